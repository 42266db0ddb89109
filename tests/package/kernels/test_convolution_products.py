"""Convolutions with active weights: those of the dense weight, for any geometry and threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from itop_prune.kernels import convolution_products, runtime
from itop_prune.kernels.convolution_plan import LARGEST_TILE, Plan, make_plan, plan_of, tile_bytes
from itop_prune.kernels.convolution_rows import clear_ends
from itop_prune.kernels.orders import Order, make_order
from itop_prune.layers.sparse_storage import Layout, dense, gather

ALL = (True, True, True)
TILE, IMAGE = (True, 1 << 16), (False, 1 << 16)
BANDS = [(tiled, pixels) for tiled in (True, False) for pixels in (1, 300, 1 << 16)]
"""In tiles or one by one: bands of one row, of a few and of all."""


@dataclass
class Convolution:
    """A convolution and its images. Free slots hold NaN; a kernel that reads one spreads it."""

    x: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor
    shape: tuple[int, int, int, int]
    stride: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    channels_last: bool = False
    band: tuple[bool, int] = TILE
    """Whether images are packed in tiles, and the pixels of a band."""

    @property
    def plan(self) -> Plan | None:
        size = (self.x.shape[2], self.x.shape[3])
        return make_plan(self.shape, size, self.stride, self.padding, self.dilation, *self.band)

    @property
    def order(self) -> Order:
        assert self.plan is not None
        inputs = self.shape[1] * self.shape[2] * self.shape[3]
        return make_order(self.positions.numpy(), self.shape[0], inputs, self.plan.ranks)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.plan, self.order

    def output(self) -> Tensor:
        return convolution_products.forward(self.x, *self.arguments, self.bias, self.channels_last)

    def gradients(self, gradient: Tensor, needs: tuple[bool, bool, bool] = ALL) -> list[Tensor]:
        return list(convolution_products.backward(gradient, self.x, *self.arguments, needs))

    def expected(self, gradient: Tensor | None = None) -> list[Tensor]:
        """The output and all gradients, by the dense weight, in float64.

        In float32 oneDNN writes past its memory for some 1 by 1 convolutions of stride 2.
        """
        x, values, bias = (part.detach().double() for part in (self.x, self.values, self.bias))
        weight = dense(values, self.positions, Layout(self.shape))
        for leaf in (x, weight, bias):
            leaf.requires_grad_()
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        if gradient is None:
            return [y]
        for_x, for_weight, for_bias = torch.autograd.grad(y, [x, weight, bias], gradient.double())
        return [y, for_x, gather(for_weight, self.positions), for_bias]


def convolution_of(
    images: int,
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    *,
    density: float = 0.3,
    last: bool = False,
    band: tuple[bool, int] = TILE,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Convolution:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=dtype)

    mask = torch.rand(shape, generator=generator) < density
    mask[0] = False
    positions = F.pad(mask.flatten().nonzero().flatten(), (0, 2), value=-1)
    positions = positions[torch.randperm(len(positions), generator=generator)].int()
    values = draw(1, len(positions))
    values[0, positions < 0] = torch.nan

    # Around the images lies NaN; a kernel that reads it spreads it.
    around = torch.full((images + 2, shape[1], *size), torch.nan, dtype=dtype)
    if last:
        around = around.contiguous(memory_format=torch.channels_last)
    around[1:-1] = draw(images, shape[1], *size)
    x, bias = around[1:-1], draw(shape[0])
    return Convolution(x, values, positions, bias, shape, stride, padding, dilation, last, band)


def assert_as_dense(one: Convolution, tolerance: float = 1e-9) -> None:
    output = one.output()
    gradient = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator())
    if one.channels_last:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    pairs = zip([output, *one.gradients(gradient)], one.expected(gradient), strict=True)
    for found, expected in pairs:
        assert (found.dtype, found.shape) == (one.x.dtype, expected.shape)
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"shape": (6, 5, 3, 3), "size": (9, 7), "padding": (1, 1)},
    "3x3 without padding": {"shape": (6, 5, 3, 3), "size": (9, 7)},
    "1x1": {"shape": (12, 9, 1, 1), "size": (5, 5)},
    "1x1 of stride 2": {"shape": (6, 5, 1, 1), "size": (8, 6), "stride": 2},
    "3x3 of stride 2": {"shape": (6, 5, 3, 3), "size": (8, 8), "stride": 2, "padding": (1, 1)},
    "7x7 of stride 2": {"shape": (7, 3, 7, 7), "size": (15, 14), "stride": 2, "padding": (3, 3)},
    "2x3 of stride 3": {"shape": (5, 4, 2, 3), "size": (9, 11), "stride": 3, "padding": (1, 0)},
    "dilated": {"shape": (6, 5, 3, 3), "size": (9, 9), "padding": (2, 4), "dilation": (2, 3)},
    "dilated of stride 2": {
        "shape": (6, 5, 3, 2),
        "size": (12, 11),
        "stride": 2,
        "padding": (1, 2),
        "dilation": (2, 1),
    },
    "one pixel": {"shape": (6, 5, 3, 3), "size": (1, 1), "padding": (1, 1)},
    "much padding": {"shape": (4, 3, 3, 3), "size": (3, 2), "padding": (4, 5)},
    "stride larger than the kernel": {"shape": (4, 3, 1, 1), "size": (10, 9), "stride": 4},
    "more channels than a line": {"shape": (20, 18, 3, 3), "size": (4, 4), "padding": (1, 1)},
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_output_and_gradients_are_those_of_the_dense_weight(geometry: str, last: bool) -> None:
    for images in (1, 8, 19):
        assert_as_dense(convolution_of(images, **GEOMETRIES[geometry], last=last))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_images_in_bands_compute_the_same(geometry: str, last: bool) -> None:
    for band in BANDS:
        assert_as_dense(convolution_of(11, **GEOMETRIES[geometry], last=last, band=band))


@pytest.mark.parametrize("band", [(False, 1), IMAGE], ids=["one row", "all rows"])
def test_bands_wider_than_a_vector_compute_the_same(band: tuple[bool, int]) -> None:
    geometry = {"shape": (6, 5, 3, 3), "size": (4, 75), "padding": (1, 1)}
    for stride in (1, 2):
        assert_as_dense(convolution_of(2, **geometry, stride=stride, band=band))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("geometry", ["3x3", "3x3 of stride 2"])
def test_a_last_tile_that_is_not_full_computes_the_same(geometry: str, last: bool) -> None:
    """Of ten tiles the last one comes after a full one, in the memory of that."""
    for pixels in (1, 1 << 16):
        one = convolution_of(75, **GEOMETRIES[geometry], last=last, band=(True, pixels))
        assert_as_dense(one)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32_computes_the_same(geometry: str) -> None:
    for last in (False, True):
        one = convolution_of(19, **GEOMETRIES[geometry], last=last, dtype=torch.float32)
        for band in BANDS:
            one.band = band
            assert_as_dense(one, 1e-4)


AXIS = st.tuples(st.integers(1, 14), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3))


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 20),
    st.integers(1, 18),
    st.integers(1, 18),
    AXIS,
    AXIS,
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.booleans(),
    st.sampled_from(BANDS),
)
@example(1, 1, 1, (1, 4, 1, 1), (1, 1, 0, 1), 1, 1.0, False, TILE)  # a kernel larger than the image
def test_any_geometry_computes_as_with_the_dense_weight(
    images: int,
    outputs: int,
    channels: int,
    rows: tuple[int, int, int, int],
    columns: tuple[int, int, int, int],
    stride: int,
    density: float,
    last: bool,
    band: tuple[bool, int],
) -> None:
    size, kernel, padding, dilation = zip(rows, columns, strict=True)
    shape = (outputs, channels, *kernel)
    one = convolution_of(images, shape, size, stride, padding, dilation, density=density, last=last)
    one.band = band
    if one.plan is None:
        with pytest.raises(RuntimeError, match="size"):
            one.expected()
    else:
        assert_as_dense(one)


@pytest.mark.parametrize(
    "band", [TILE, (True, 1), (False, 300)], ids=["tiles", "bands of tiles", "images"]
)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradients_that_are_needed_are_computed(
    needs: tuple[bool, bool, bool], band: tuple[bool, int]
) -> None:
    one = convolution_of(9, (6, 5, 3, 3), (8, 8), 2, (1, 1), band=band)
    gradient = torch.randn_like(one.output())
    for needed, found, expected in zip(
        needs, one.gradients(gradient, needs), one.expected(gradient)[1:], strict=True
    ):
        assert torch.allclose(found, expected) if needed else not found.numel()


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_torch")
@pytest.mark.parametrize(
    ("images", "band"),
    [(8, TILE), (40, TILE), (40, (True, 1)), (5, IMAGE), (5, (False, 1))],
    ids=["one tile", "many tiles", "bands of tiles", "few bands", "many bands"],
)
def test_results_are_the_same_to_the_last_bit_for_any_number_of_threads(
    images: int, band: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = convolution_of(images, (40, 40, 3, 3), (20, 20), 1, (1, 1), band=band)
    gradient = torch.randn_like(one.output())
    asked, run = [], runtime.run

    def note(kernel: Any, threads: int, *arguments: Any) -> None:
        asked.append(threads)
        run(kernel, threads, *arguments)

    monkeypatch.setattr(runtime, "run", note)
    most, expected = numba.config.NUMBA_NUM_THREADS, None
    for threads in {1, most}:
        torch.set_num_threads(threads)
        found = [one.output(), *one.gradients(gradient)]
        expected = expected or found
        assert all(map(torch.equal, found, expected))
    assert set(asked) == {1, most}


@pytest.mark.usefixtures("threads_of_torch")
def test_the_gradient_of_a_single_bias_is_the_same_for_any_number_of_threads() -> None:
    one = convolution_of(64, (1, 3, 1, 1), (64, 64), dtype=torch.float32)
    gradient, found = torch.randn(64, 1, 64, 64), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(one.gradients(gradient, (False, False, True))[2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_images_that_lie_elsewhere_in_memory_compute_the_same() -> None:
    one = convolution_of(9, (6, 5, 3, 3), (8, 8), 1, (1, 1))
    expected = one.output()
    one.x = one.x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(one.output(), expected)
    wide = torch.randn(9, 5, 8, 16, dtype=torch.float64)
    wide[..., ::2] = one.x
    one.x = wide[..., ::2]
    assert torch.equal(one.output(), expected)


@pytest.mark.parametrize("band", [TILE, (True, 60), (False, 60)])
def test_one_order_computes_images_of_any_size_and_type_in_turn(band: tuple[bool, int]) -> None:
    sizes: list[tuple[int, int]] = [(9, 7), (6, 8)]
    shape = GEOMETRIES["3x3"]["shape"]
    one, other = (convolution_of(9, shape, size, 1, (1, 1), band=band) for size in sizes)
    narrow = convolution_of(9, shape, sizes[0], 1, (1, 1), band=band, dtype=torch.float32)
    order = one.order
    for each, tolerance in [(one, 1e-9), (other, 1e-9), (one, 1e-9), (narrow, 1e-4), (one, 1e-9)]:
        assert torch.equal(each.positions, one.positions)
        with mock.patch.object(Convolution, "order", order):
            assert_as_dense(each, tolerance)


def test_a_plan_says_what_each_place_of_the_kernel_reads() -> None:
    """A row of 5 pixels with one pixel of padding, stride 2: phases of 4 and 3 pixels."""
    plan = make_plan((1, 1, 1, 3), (1, 5), 2, (0, 1), (1, 1))
    assert plan is not None
    assert (plan.rows, plan.columns) == (1, 3)
    assert plan.packed == (1, 4)  # of 7 columns the even ones, and the odd ones
    assert plan.ranks == (0, 2, 1)  # places 0 and 2 read the first phase
    assert plan.shifts == (0, 1, 4)
    assert plan.phases.tolist() == [0, 2, 3, 3, 3]
    assert plan.reach == (0, 1)
    assert plan.packed_gradient == (1, 4)
    assert plan.mirrored == (1, 0, 1)
    assert plan.narrowest == 2


def test_a_plan_of_bands_says_how_many_rows_one_has() -> None:
    """A packed row has 2 channels of 7 numbers, its gradient 3 outputs of 8; two rows go around."""
    plan = make_plan((3, 2, 3, 3), (9, 5), 1, (1, 1), (1, 1), pixels=6 * 24)
    assert plan is not None
    assert (plan.band, plan.packed, plan.packed_gradient) == (4, (6, 7), (6, 8))
    one = make_plan((3, 2, 3, 3), (9, 5), 1, (1, 1), (1, 1), pixels=1)
    assert one is not None
    assert one.band == 1


def test_numbers_behind_the_planes_of_a_band_are_cleared() -> None:
    """Vectors go over the ends, and denormal numbers there would slow them."""
    tile = np.ones(12, np.float32)
    clear_ends(runtime.kind_of(torch.float32, 64), tile, 2, 5, 3)
    assert tile.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]


def planned(
    x: tuple[int, ...] = (16, 4, 8, 8), stride: tuple[int, int] = (1, 1), groups: int = 1
) -> Plan | None:
    images = torch.empty(x, device="meta")
    return plan_of(images, (6, 4, 3, 3), stride, (0, 0), (1, 1), groups)


def test_few_images_and_wide_ones_are_packed_one_by_one() -> None:
    for x, tiled in {
        (8, 4, 8, 8): True,  # half of a tile
        (7, 4, 8, 8): False,
        (16, 4, 4096, 1024): True,
        (16, 4, 8, 1 << 20): False,
    }.items():
        plan = planned(x)
        assert plan is not None
        assert plan.tiled == tiled


@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [
        ((64, 64, 3, 3), 32, 1),
        ((128, 64, 3, 3), 32, 2),
        ((512, 512, 3, 3), 4, 1),
        ((64, 256, 1, 1), 56, 1),
    ],
)
def test_a_packed_band_takes_about_a_megabyte_at_most(
    shape: tuple[int, int, int, int], size: int, stride: int
) -> None:
    """Then two of them fit into a second cache level of 2 MB, and a thread needs little memory."""
    around = shape[2] // 2
    x = torch.empty(16, shape[1], size, size, device="meta")
    plan = plan_of(x, shape, (stride, stride), (around, around), (1, 1), 1)
    assert plan is not None
    assert plan.tiled
    assert tile_bytes(plan, 4) <= 1.1e6


REFUSED = {
    "no images": {"x": (0, 4, 8, 8)},
    "groups": {"x": (16, 8, 8, 8), "groups": 2},
    "strides that differ": {"stride": (1, 2)},
    "channels that do not match": {"x": (16, 5, 8, 8)},
    "images without a batch": {"x": (4, 8, 8)},
    "images smaller than the kernel": {"x": (16, 4, 2, 2)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_kernels_do_not_compute_is_left_to_the_dense_weight(case: str) -> None:
    assert planned()
    assert planned(**REFUSED[case]) is None  # type: ignore[arg-type]


def test_the_largest_tile_holds_half_a_gibibyte_at_most() -> None:
    assert LARGEST_TILE <= 1 << 29
