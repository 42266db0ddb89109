"""Products with active weights: those of the dense weight, for any shape, slots and threads."""

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from itop_prune.kernels import known_orders, linear_products, runtime
from itop_prune.kernels.orders import Order, make_order
from itop_prune.layers.sparse_storage import Layout, dense, gather

NEEDS = list(itertools.product([False, True], repeat=3))
ALL = (True, True, True)
KNOWN = vars(known_orders)["_orders"]


@dataclass
class Layer:
    """A layer, its input, and the gradient of its output."""

    x: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor
    gradient: Tensor

    @property
    def order(self) -> Order:
        return make_order(self.positions.numpy(), len(self.bias), self.x.shape[1])

    @property
    def weight(self) -> Tensor:
        return dense(self.values, self.positions, Layout((len(self.bias), self.x.shape[1])))

    def computed(self) -> list[Tensor]:
        """The output and all gradients, by the kernels."""
        output = linear_products.forward(self.x, self.values, self.order, self.bias)
        return [
            output,
            *linear_products.backward(self.gradient, self.x, self.values, self.order, ALL),
        ]

    def expected(self) -> list[Tensor]:
        """The same by the dense weight."""
        return [
            F.linear(self.x, self.weight, self.bias),
            self.gradient @ self.weight,
            gather(self.gradient.t() @ self.x, self.positions),
            self.gradient.sum(0),
        ]


def layer_of(
    rows: int,
    outputs: int,
    inputs: int,
    density: float = 0.2,
    *,
    free: int = 2,
    empty: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Layer:
    """Draw a layer. Free slots hold NaN, which whoever reads them spreads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = torch.rand(outputs, inputs, generator=generator) < density
    if empty:
        mask[torch.rand(outputs, generator=generator) < 0.2] = False
        mask[:, torch.rand(inputs, generator=generator) < 0.2] = False
    positions = F.pad(mask.flatten().nonzero().flatten(), (0, free), value=-1)
    positions = positions[torch.randperm(len(positions), generator=generator)].int()
    values = draw(1, len(positions))
    values[0, positions < 0] = torch.nan
    return Layer(draw(rows, inputs), values, positions, draw(outputs), draw(rows, outputs))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


SIZES = st.integers(1, 150) | st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65])


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Layer:
    return layer_of(
        draw(st.just(0) | SIZES),
        draw(SIZES),
        draw(SIZES),
        draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])),
        free=draw(st.integers(0, 3)),
        empty=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        dtype=dtype,
    )


@pytest.mark.slow
@settings(deadline=None)
@given(layers())
@example(layer_of(5, 6, 7, 0.0, free=4))  # all slots are free
@example(layer_of(5, 6, 7, 0.0, free=0))  # there are no slots
@example(layer_of(0, 6, 7))
@example(layer_of(300, 40, 60))  # more tiles than sums over chunks of rows
@example(layer_of(1, 1, 1, 1.0, empty=False))
def test_outputs_and_gradients_are_those_of_the_dense_weight(layer: Layer) -> None:
    assert_close(layer.computed(), layer.expected(), 1e-9)
    output = linear_products.forward(layer.x, layer.values, layer.order, None)
    assert_close([output], [F.linear(layer.x, layer.weight)], 1e-9)


@pytest.mark.slow
@settings(deadline=None)
@given(layers(torch.float32))
def test_float32_too(layer: Layer) -> None:
    assert_close(layer.computed(), layer.expected(), 1e-3)


@settings(deadline=None, max_examples=20)
@given(layers(), st.sampled_from(NEEDS))
def test_gradients_that_are_not_needed_are_empty_and_change_no_other(
    layer: Layer, needs: tuple[bool, bool, bool]
) -> None:
    some = linear_products.backward(layer.gradient, layer.x, layer.values, layer.order, needs)
    for need, found, whole in zip(needs, some, layer.computed()[1:], strict=True):
        assert torch.equal(found, whole) if need else not found.numel()


@settings(deadline=None, max_examples=20)
@given(layers(), st.none() | st.integers(0, 1000))
def test_results_do_not_depend_on_which_weight_has_which_slot(
    layer: Layer, seed: int | None
) -> None:
    """Without a seed slots follow their weights, and free ones come last."""
    if seed is None:
        moved = layer.positions.where(layer.positions >= 0, 2**31 - 1).argsort()
    else:
        generator = torch.Generator().manual_seed(seed)
        moved = torch.randperm(len(layer.positions), generator=generator)
    other = Layer(
        layer.x, layer.values[:, moved], layer.positions[moved], layer.bias, layer.gradient
    )
    expected = layer.computed()
    expected[2] = expected[2][:, moved]
    for found, one in zip(other.computed(), expected, strict=True):
        assert torch.equal(found, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_of_any_number_of_weights_an_output(dtype: torch.dtype) -> None:
    for inputs in range(1, 40):  # vectors of weights, and what is left
        layer = layer_of(1, 3, inputs, density=1.0, free=0, empty=False, dtype=dtype)
        output = linear_products.forward(layer.x, layer.values, layer.order, layer.bias)
        torch.testing.assert_close(output, F.linear(layer.x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_tensors_of_any_strides_are_read_as_they_are(rows: int) -> None:
    layer = layer_of(rows, 30, 20)
    expected = layer.computed()
    layer.x, layer.gradient = layer.x.t().contiguous().t(), layer.gradient.t().contiguous().t()
    layer.values, layer.bias = (
        tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (layer.values, layer.bias)
    )
    assert all(map(torch.equal, layer.computed(), expected))

    layer.x, layer.gradient, layer.values, layer.bias = (
        torch._neg_view(-tensor)  # noqa: SLF001
        for tensor in (layer.x, layer.gradient, layer.values, layer.bias)
    )
    assert all(map(torch.equal, layer.computed(), expected))

    layer.gradient, layer.bias = torch.ones(()).double().expand(rows, 30), layer.bias[:1].expand(30)
    assert_close(layer.computed(), layer.expected(), 1e-9)


# --- threads -------------------------------------------------------------------------------------

LARGE = {
    "many rows": (600, 128, 150, 0.3),
    "few rows": (16, 509, 643, 0.4),  # threads share outputs
    "one row": (1, 2048, 2100, 0.5),
}


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_torch")
@pytest.mark.parametrize("size", LARGE)
def test_results_are_the_same_to_the_last_bit_for_any_number_of_threads(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(*LARGE[size])
    asked, run = [], runtime.run

    def note(kernel: Any, threads: int, *arguments: Any) -> None:
        asked.append(threads)
        run(kernel, threads, *arguments)

    monkeypatch.setattr(runtime, "run", note)
    expected = None
    most = numba.config.NUMBA_NUM_THREADS
    for threads in {1, 2, 3, most + 1}:
        torch.set_num_threads(threads)
        asked.clear()
        found = layer.computed()
        assert asked == [min(threads, most)] * 2
        expected = expected or found
        assert all(map(torch.equal, found, expected))
    assert_close(expected, layer.expected(), 1e-9)


def in_fresh_interpreter(program: str, **environment: str) -> None:
    """Numba reads its settings once in a process."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), **environment}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@pytest.mark.slow
def test_more_threads_than_tiles_and_cores_give_the_same_bits() -> None:
    program = """
import torch
from test_linear_products import LARGE, layer_of
for size in LARGE.values():
    layer = layer_of(*size)
    results = []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        results.append(layer.computed())
    for found in results:
        assert all(map(torch.equal, found, results[0]))
"""
    in_fresh_interpreter(program, NUMBA_NUM_THREADS="8")


@pytest.mark.slow
def test_threads_of_python_may_call_at_once_where_numba_has_only_its_simplest_threads() -> None:
    """Those end the process if two of its threads call them at once."""
    program = """
from test_linear_products import *
torch.set_num_threads(2)
several = [layer_of(*LARGE["many rows"], seed=seed) for seed in range(8)]
expected = [layer.computed() for layer in several]
assert numba.threading_layer() == "workqueue"
with ThreadPoolExecutor(8) as pool:
    for found, one in zip(pool.map(Layer.computed, several * 8), expected * 8, strict=True):
        assert all(map(torch.equal, found, one))
"""
    in_fresh_interpreter(program, NUMBA_THREADING_LAYER="workqueue")


@pytest.mark.slow
def test_the_first_call_leaves_the_threads_of_torch_as_they_are() -> None:
    in_fresh_interpreter("""
import torch
from test_linear_products import layer_of
for threads in (1, 3):
    torch.set_num_threads(threads)
    layer_of(3, 4, 5).computed()
    assert torch.get_num_threads() == threads
""")


@pytest.mark.usefixtures("threads_of_torch")
def test_the_threads_of_numba_are_as_many_after_a_call_as_before() -> None:
    large, small = layer_of(*LARGE["few rows"]), layer_of(3, 4, 5)
    before, most = numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    try:
        for own, others in itertools.product({1, most}, repeat=2):
            numba.set_num_threads(own)
            torch.set_num_threads(others)
            for layer in (large, small):
                layer.computed()
                assert numba.get_num_threads() == own
    finally:
        numba.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_torch")
def test_threads_of_python_may_call_at_once() -> None:
    torch.set_num_threads(2)
    several = [layer_of(*LARGE["many rows"], seed=seed) for seed in range(4)]
    several += [layer_of(7, 20, 30, seed=seed) for seed in range(4)]
    expected = [layer.computed() for layer in several]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, one in zip(pool.map(Layer.computed, several), expected, strict=True):
                assert all(map(torch.equal, found, one))


# --- which layers, and their orders --------------------------------------------------------------


def order_of(layer: Layer) -> Order | None:
    shape = (len(layer.bias), layer.x.shape[1])
    return linear_products.order_of(layer.x, layer.values, layer.positions, shape, layer.bias)


def test_an_order_is_made_again_when_positions_have_changed_and_forgotten_with_them() -> None:
    layer = layer_of(5, 30, 20)
    order, known = order_of(layer), len(KNOWN)
    assert order is order_of(layer)

    layer.positions.copy_(layer.positions.flip(0))
    layer.values = layer.values.flip(1)
    moved = order_of(layer)
    assert moved is not order
    assert moved.by_output.slots.tolist() == layer.order.by_output.slots.tolist()

    layer.positions = layer.positions.clone()
    assert order_of(layer) not in (order, moved)
    assert len(KNOWN) == known

    alive = [weakref.ref(one) for one in (order, moved, order_of(layer))]
    del order, moved, layer
    assert [reference() for reference in alive] == [None] * 3
    assert len(KNOWN) == known - 1


def test_positions_whose_changes_can_not_be_seen_are_read_at_each_call() -> None:
    with torch.inference_mode():
        layer = layer_of(5, 30, 20)
        layer.values.nan_to_num_()
        assert torch.allclose(_output(layer), F.linear(layer.x, layer.weight, layer.bias))
        layer.positions.copy_(layer.positions.flip(0))
        assert torch.allclose(_output(layer), F.linear(layer.x, layer.weight, layer.bias))


def _output(layer: Layer) -> Tensor:
    order = order_of(layer)
    assert order
    return linear_products.forward(layer.x, layer.values, order, layer.bias)


MISFITS: dict[str, dict[str, Any]] = {
    "another type of input": {"x": torch.zeros(5, 20)},
    "integers": {"x": torch.zeros(5, 20, dtype=torch.int64)},
    "another type of values": {"values": torch.zeros(1, 7)},
    "half precision": {"x": torch.zeros(5, 20).bfloat16(), "values": torch.zeros(1, 7).bfloat16()},
    "more features": {"x": torch.zeros(5, 21).double()},
    "an input without dimensions": {"x": torch.zeros(()).double()},
    "a sparse input": {"x": torch.ones(5, 20).double().to_sparse()},
    "an input on another device": {"x": torch.zeros(5, 20, device="meta").double()},
    "values on another device": {"values": torch.zeros(1, 7, device="meta").double()},
    "fewer values": {"values": torch.zeros(1, 6).double()},
    "more values": {"values": torch.zeros(1, 8).double()},
    "positions in two dimensions": {"positions": torch.arange(7).int().view(1, 7)},
    "a shorter bias": {"bias": torch.zeros(29).double()},
    "a bias of one number": {"bias": torch.zeros(1).double()},
    "another type of bias": {"bias": torch.zeros(30)},
    "a bias on another device": {"bias": torch.zeros(30, device="meta").double()},
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_left_to_the_dense_weight(what: str) -> None:
    fitting: dict[str, Any] = {
        "x": torch.zeros(5, 20).double(),
        "values": torch.zeros(1, 7).double(),
        "positions": torch.arange(7).int(),
        "shape": (30, 20),
        "bias": torch.zeros(30).double(),
    }
    assert linear_products.order_of(**fitting) is not None
    assert linear_products.order_of(**{**fitting, **MISFITS[what]}) is None


@pytest.mark.parametrize(
    ("shape", "active", "sparse"),
    [
        ((400, 400), 40_000, True),
        ((400, 400), 40_001, False),
        ((10, 20), 200, True),
        ((10, 4000), 16_384, True),
        ((10, 4000), 16_385, False),
        ((0, 5), 0, False),
        ((2**30, 2**30), 10, True),
        ((2**31, 1), 10, False),
        ((1, 2**31), 10, False),
        ((2**30, 2**30), 2**31, False),
    ],
)
def test_a_layer_takes_kernels_by_its_shape_and_density(
    shape: tuple[int, int], active: int, sparse: bool
) -> None:
    assert runtime.uses_kernels(shape, active) == sparse
