"""Convolutions in sparse storage compute with kernels, and nothing else about them changes."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from itop_prune_tools.models import registration  # noqa: F401  # names of models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import itop_prune
from itop_prune.kernels import convolution_products

F32, F64 = torch.float32, torch.float64
IMAGES = 9


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often kernels of convolutions computed."""
    counted = {"forward": 0, "backward": 0}

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(convolution_products, name)

        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return function(*arguments)

        return call

    for name in counted:
        monkeypatch.setattr(convolution_products, name, counting(name))
    return counted


def convolution(*sizes: Any, dtype: torch.dtype = F64, last: bool = False, **keywords: Any) -> Any:
    """A convolution in sparse storage, 90 % of it zeros."""
    torch.manual_seed(0)
    layer = nn.Conv2d(*sizes, dtype=dtype, **keywords)
    if last:
        layer = layer.to(memory_format=torch.channels_last)
    itop_prune.apply(nn.Sequential(layer), 0.9, storage="sparse")
    return layer


def images(*size: int, dtype: torch.dtype = F64, last: bool = False, count: int = IMAGES) -> Tensor:
    x = torch.randn(count, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def dense(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What torch computes with the layer's dense weight."""
    return nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)  # noqa: SLF001


def assert_same_gradients(layer: nn.Conv2d, x: Tensor) -> None:
    """The layer's output and all gradients are those of the dense weight."""
    sources = [p for p in (x, *layer.parameters()) if p.requires_grad]
    found, expected = layer(x), dense(layer, x)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert torch.allclose(found, expected)
    if sources:
        pairs = (torch.autograd.grad(y.square().sum(), sources) for y in (found, expected))
        for one, other in zip(*pairs, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other)


LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "3x3": ((6, 8, 3), {"padding": 1}),
    "3x3 without bias": ((6, 8, 3), {"padding": 1, "bias": False}),
    "1x1": ((6, 8, 1), {}),
    "stride 2": ((6, 8, 3, 2, 1), {}),
    "1x1, stride 2": ((6, 8, 1, 2), {}),
    "7x7, stride 2": ((3, 8, 7, 2, 3), {}),
    "dilation": ((6, 8, 3), {"padding": (2, 4), "dilation": (2, 4)}),
    "valid": ((6, 8, 3), {"padding": "valid"}),
    "same": ((6, 8, (3, 5)), {"padding": "same"}),
    "same, dilation": ((6, 8, (2, 3)), {"padding": "same", "dilation": (2, 1)}),
    "reflect": ((6, 8, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": ((6, 8, 3), {"padding": 2, "padding_mode": "replicate"}),
    "circular, same": ((6, 8, 3), {"padding": "same", "padding_mode": "circular"}),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_all_convolutions_of_one_group_compute_as_with_the_dense_weight(
    kind: str, last: bool, calls: dict[str, int]
) -> None:
    sizes, keywords = LAYERS[kind]
    layer = convolution(*sizes, **keywords, last=last)
    assert_same_gradients(layer, images(sizes[0], 11, 8, last=last).requires_grad_())
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "7x7, stride 2", "circular, same"])
def test_few_images_compute_as_with_the_dense_weight(
    kind: str, last: bool, count: int, calls: dict[str, int]
) -> None:
    sizes, keywords = LAYERS[kind]
    layer = convolution(*sizes, **keywords, last=last)
    x = images(sizes[0], 11, 8, count=count, last=last)
    assert_same_gradients(layer, x.requires_grad_())
    assert calls == {"forward": 1, "backward": 1}


INPUTS: dict[str, Callable[[], Tensor]] = {
    "channels last in a contiguous layer": functools.partial(images, 6, 7, 7, last=True),
    "one channel more, cut off": lambda: images(7, 7, 7)[:, 1:],
    "half of the channels, channels last": lambda: images(12, 7, 7, last=True)[:, :6],
    "every second pixel, channels last": lambda: images(6, 14, 14, last=True)[:, :, ::2, ::2],
    "every second column": lambda: images(6, 7, 14)[..., ::2],
    "flipped": lambda: images(6, 7, 7).flip(3),
    "rows last": lambda: images(6, 7, 7).transpose(2, 3),
    "expanded": lambda: images(6, 1, 1).expand(IMAGES, 6, 7, 7),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_images_of_any_form_in_memory_compute_the_same(kind: str, calls: dict[str, int]) -> None:
    layer, x = convolution(6, 8, 3, padding=1), INPUTS[kind]().detach().requires_grad_()
    sources = [x, layer.weight_values, layer.bias]
    found, expected = layer(x), dense(layer, x)
    assert found.stride() == expected.stride()
    assert torch.allclose(found, expected)
    for one, other in zip(
        *(torch.autograd.grad(y.square().sum(), sources) for y in (found, expected)), strict=True
    ):
        assert torch.allclose(one, other)
    assert calls == {"forward": 1, "backward": 1}


def test_images_of_several_sizes_in_turn_compute_as_with_the_dense_weight(
    calls: dict[str, int],
) -> None:
    layer = convolution(6, 8, 3, padding=1)
    for count, height, last in ((9, 11, False), (9, 8, True), (1, 8, True), (20, 11, False)) * 2:
        assert_same_gradients(layer, images(6, height, 8, count=count, last=last).requires_grad_())
    layer.padding = (0, 2)
    assert_same_gradients(layer, images(6, 11, 8, count=20).requires_grad_())
    assert calls == {"forward": 9, "backward": 9}


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: convolution(8, 8, 3, groups=2), lambda: images(8, 7, 7)),
        (lambda: convolution(6, 8, 3, stride=(1, 2)), lambda: images(6, 7, 7)),
        (lambda: convolution(6, 8, 3), lambda: images(6, 7, 7)[0]),
        (lambda: convolution(6, 8, 3), lambda: images(6, 7, 7, count=0)),
        (lambda: convolution(6, 8, 3, dtype=torch.bfloat16), lambda: images(6, 7, 7).bfloat16()),
    ],
    ids=["groups", "two strides", "no batch", "no images", "another type"],
)
def test_what_kernels_do_not_take_computes_with_the_dense_weight(
    layer: Callable[[], Any], x: Callable[[], Tensor], calls: dict[str, int]
) -> None:
    one = layer()
    assert torch.equal(one(x()), dense(one, x()))
    assert not calls["forward"]


@pytest.mark.parametrize("x", [images(5, 7, 7), images(6, 2, 2), images(6, 7)])
def test_wrong_images_raise_what_a_dense_layer_raises(x: Tensor, calls: dict[str, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, dtype=F64)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    layer = convolution(6, 8, 3)
    for fitting in range(2):  # whether or not the layer has computed before
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(expected.value)
        assert calls["forward"] == fitting
        layer(images(6, 7, 7))


def test_images_of_another_type_than_the_values_are_refused(calls: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match=r"Input type .* should be the same"):
        convolution(6, 8, 3)(images(6, 7, 7, dtype=F32))
    assert not calls["forward"]


def test_gradients_are_those_of_finite_differences_and_can_be_differentiated_again(
    calls: dict[str, int],
) -> None:
    layer = convolution(3, 4, 3, stride=2, padding=1)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        parts = {"weight_values": values, "bias": bias}
        return torch.func.functional_call(layer, parts, (x,))

    inputs = [images(3, 4, 3, count=4), layer.weight_values, layer.bias]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert calls["forward"]
    assert calls["backward"]
    assert torch.autograd.gradgradcheck(run, inputs)


def test_checkpointing_and_frozen_parts_compute_the_same(calls: dict[str, int]) -> None:
    layer, x = convolution(6, 8, 3, padding=1), images(6, 7, 7)
    assert_same_gradients(layer, x)
    layer.weight_values.requires_grad_(False)
    assert_same_gradients(layer, x.clone().requires_grad_())
    layer.weight_values.requires_grad_(True)
    layer(x).square().sum().backward()
    expected, layer.weight_values.grad = layer.weight_values.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.weight_values.grad, expected)
    assert calls == {"forward": 5, "backward": 4}


def test_autocast_computes_in_the_type_of_the_values_and_gives_its_own(
    calls: dict[str, int],
) -> None:
    layer, x = convolution(6, 8, 3, dtype=F32), images(6, 7, 7, dtype=F32, count=19)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), dense(layer, x), rtol=2**-8, atol=1e-6)
    assert calls["forward"] == 1


def test_masks_that_moved_are_those_that_compute(calls: dict[str, int]) -> None:
    model = nn.Sequential(convolution(6, 8, 3, stride=2, padding=1), nn.ReLU())
    other, x = copy.deepcopy(model), images(6, 7, 7)
    before = model(x)
    (itop,) = itop_prune.find_masks(model).values()
    itop.write_mask(itop.mask, itop.mask.flip(0))
    nn.init.normal_(itop.parameter)
    assert not torch.allclose(model(x), before)
    assert torch.equal(other(x), before)
    assert_same_gradients(model[0], x.requires_grad_())
    assert calls["forward"] == 4


def test_images_on_the_cpu_compute_there_whatever_the_default_device_is(
    calls: dict[str, int],
) -> None:
    layer, x = convolution(6, 8, 3), images(6, 7, 7).requires_grad_()
    expected = layer(x)
    with torch.device("meta"):
        found = layer(x)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert x.grad is not None
    assert calls == {"forward": 2, "backward": 1}


class Halves(nn.Module):
    """Convolutions of half of the channels, which are a view of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        half, _ = x.chunk(2, 1)
        return self.second(torch.relu(self.first(half)) + 1) * 2


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_compiled_networks_compute_the_same_for_images_of_several_sizes(last: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Halves()
    if last:
        model = model.to(memory_format=torch.channels_last)
    itop_prune.apply(model, 0.9, storage="sparse")
    compiled = torch.compile(model)
    for size, arrives_last in ((6, last), (8, last), (9, not last)):
        x = images(8, size, size, dtype=F32, count=16, last=arrives_last)
        gradients = []
        for run in (model, compiled):
            source = x.clone(memory_format=torch.preserve_format).requires_grad_()
            output = run(source)
            gradients.append(
                [output, *torch.autograd.grad(output.square().sum(), [source, *model.parameters()])]
            )
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_export_has_dynamic_sizes() -> None:
    model = nn.Sequential(convolution(6, 8, 3, dtype=F32)).eval()
    batch, height = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=4)
    x = images(6, 7, 7, dtype=F32, count=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 2: height},))
    for count, size in ((16, 7), (3, 9)):
        x = images(6, size, 7, dtype=F32, count=count)
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_positions_outside_of_the_weight_are_refused(calls: dict[str, int]) -> None:
    layer = convolution(6, 8, 3)
    layer.weight_positions[:1].fill_(8 * 54)
    with pytest.raises(ValueError, match="position 432 is outside of a weight of 432"):
        layer(images(6, 7, 7))
    assert not calls["forward"]


def test_a_summary_tells_which_convolutions_take_kernels() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3, (1, 2))
    )
    itop_prune.apply(model, 0.9, storage="sparse", densities={"0": 0.1})
    assert [row.computes for row in itop_prune.summarize(model).rows] == [
        "kernel",
        "dense",
        "dense",
    ]
    itop_prune.remove(model)
    itop_prune.apply(model, 0.5, storage="sparse", method="uniform")
    assert {row.computes for row in itop_prune.summarize(model).rows} == {"dense"}


NETS: dict[str, Callable[[], nn.Module]] = {
    "VGG-C": lambda: timm.create_model("cifar_vgg_c", num_classes=4, img_size=32),
    "ResNet-34": lambda: timm.create_model(
        "cifar_resnet34", num_classes=4, channels=(8, 8, 16, 16)
    ),
}


LINEAR = {"VGG-C": ("pre_logits.*", "head"), "ResNet-34": ("fc",)}


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("net", NETS)
def test_networks_train_as_with_masks(net: str, grow: str, calls: dict[str, int]) -> None:
    """Equal masks after two updates, and weights equal up to rounding, in float64.

    A step multiplies a difference by about 50, since batches are small. So steps are few. Linear
    layers behind the convolutions have gradients that are 0 up to rounding, so they stay dense.
    """
    models = []
    for storage in ("mask", "sparse"):
        torch.manual_seed(0)
        model = NETS[net]().double()
        masks = itop_prune.apply(model, 0.95, storage=storage, exclude=LINEAR[net])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=6, every=2, grow=grow)
        for step in range(5):
            x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step), dtype=F64)
            F.cross_entropy(model(x), torch.arange(8) % 4).backward()
            optimizer.step()
            regrow.step()
            optimizer.zero_grad()
        models.append(model)
        assert regrow.updates == 2

    masked, sparse = models
    assert calls["forward"] >= 5 * 8
    for name, itop in itop_prune.find_masks(masked).items():
        other = itop_prune.find_masks(sparse)[name]
        assert torch.equal(itop.mask, other.mask), name
        layers = (one.get_submodule(name.rpartition(".")[0]) for one in models)
        one, two = (layer.weight for layer in layers)
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-8), name


FAMILIES = ["byobnet", "convnext", "efficientnet", "mambaout", "resnet"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_timm_have_the_outputs_and_gradients_of_masks(
    family: str, count: int, calls: dict[str, int]
) -> None:
    """In float64; gradients together, since single ones may be 0 up to rounding."""
    x = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=F64)
    outputs, gradients = [], []
    for storage in ("mask", "sparse"):
        torch.manual_seed(0)
        model = timm.create_model(f"test_{family}", num_classes=4).double()
        for parameter in model.parameters():
            if not parameter.any():  # it would hide the layers before it
                nn.init.normal_(parameter, 0.1, 0.1)
        masks = itop_prune.apply(model, 0.9, method="uniform", storage=storage)
        output = model(x)
        F.cross_entropy(output, torch.arange(count) % 4).backward()
        outputs.append(output)
        found = []
        for name, itop in masks.items():
            gradient = itop.parameter.grad
            if storage == "sparse":
                positions = itop.positions.long()
                dense = torch.zeros(itop.size, dtype=F64)
                gradient = dense.index_copy(0, positions, gradient[0])
            found.append(gradient.flatten())
            assert gradient.any(), name
        gradients.append(torch.cat(found))
    assert calls["forward"] >= 1
    assert calls["backward"] >= 1
    assert torch.allclose(*outputs, rtol=1e-8, atol=1e-10)
    one, two = gradients
    assert (one - two).norm() <= 1e-8 * one.norm()
