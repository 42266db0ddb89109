"""A model on the meta device becomes the sparse model that a normal build and `apply` give."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers.toys import convnet, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import itop_prune
from itop_prune.layers import never_dense
from itop_prune.update import rules

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(8, 24, 3, groups=2), nn.BatchNorm2d(24), nn.ConvTranspose2d(24, 8, 3)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(48, 4, 96),
    "recurrent": lambda: nn.LSTM(40, 32, 2),
    "resnet": lambda: timm.create_model("resnet10t"),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_classes=9),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def made(build: Callable[[], nn.Module], sparsity: float = 0.8, **options: Any) -> nn.Module:
    model = on_meta(build)
    itop_prune.apply(model, sparsity, storage="sparse", device="cpu", **options)
    return model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    masks = itop_prune.find_masks(model)
    return {name: itop.active_values()[1].double() for name, itop in masks.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_as_a_normal_build_leaves_it(kind: str) -> None:
    """Positions are equal; values and all others are of equal distribution."""
    normal = MODELS[kind]()
    for module in normal.modules():  # timm's models draw anew after they are built
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset:
            reset()
    masks = itop_prune.apply(normal, 0.8, storage="sparse")
    model = made(MODELS[kind])

    assert type(model) is type(normal)
    ours, theirs = model.state_dict(), normal.state_dict()
    assert [(name, t.shape, t.dtype) for name, t in ours.items()] == [
        (name, t.shape, t.dtype) for name, t in theirs.items()
    ]
    assert not any(tensor.is_meta for tensor in ours.values())
    for name, itop in itop_prune.find_masks(model).items():
        assert torch.equal(itop.positions, masks[name].positions)
    drawn = {f"{name}_values": values for name, values in values_of(model).items()}
    for name, tensor in ours.items():
        expected = theirs[name]
        if name in drawn and len(drawn[name]) > 500:
            values, other = drawn[name], expected.double()
            assert abs(float(values.mean())) < 5 * float(other.std()) / math.sqrt(len(values))
            assert float(values.std()) == pytest.approx(float(other.std()), rel=0.15)
            assert float(values.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.25)
        elif not expected.is_floating_point() or float(expected.double().std()) == 0.0:
            assert torch.equal(tensor, expected), name


def test_biases_are_drawn_with_the_fan_in_of_the_dense_layer() -> None:
    bias = made(lambda: nn.Linear(400, 2000)).bias.detach()
    assert float(bias.abs().max()) == pytest.approx(1 / math.sqrt(400), rel=0.01)


def test_fan_in_is_that_of_apply_on_a_normal_build() -> None:
    normal = nn.Linear(64, 96)
    masks = itop_prune.apply(normal, 0.9, storage="sparse", init="fan_in")
    model = made(lambda: nn.Linear(64, 96), 0.9, init="fan_in")
    positions, values = itop_prune.find_masks(model)["weight"].active_values()
    _, theirs = masks["weight"].active_values()
    assert values.std() == pytest.approx(float(theirs.std()), rel=0.15)
    active = torch.bincount(positions // 64, minlength=96)
    bounds = (1 / active.sqrt()).index_select(0, positions // 64)
    assert (values.abs() <= bounds * 1.0001).all()


def test_torchs_generator_decides_the_values_and_the_seed_the_positions() -> None:
    torch.manual_seed(3)
    one = made(mlp)
    torch.manual_seed(3)
    other = made(mlp, seed=1)
    assert not torch.equal(one[0].weight_positions, other[0].weight_positions)
    assert torch.equal(one[0].bias, other[0].bias)
    assert torch.equal(one[0].weight_values, other[0].weight_values)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor with numbers that any operation gave."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "global", "floor": 1e-6},
        {"density": "cubic", "final_sparsity": 0.99998},
        {"redistribute": "nonzeros", "survival": True},
    ],
    ids=["global", "falling density", "redistributed"],
)
def test_no_operation_of_apply_and_updates_makes_a_dense_weight(options: dict[str, Any]) -> None:
    """A layer of 10 billion weights with 400,000 active ones. Its product is a kernel's."""
    size = 100_000
    with Largest() as largest:
        model = on_meta(lambda: nn.Sequential(nn.Linear(9, size), nn.Linear(size, size)))
        masks = itop_prune.apply(model, 1 - 4e-5, storage="sparse", device="cpu", include="1")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        regrow = itop_prune.MaskScheduler(
            masks, optimizer, total_steps=4, every=2, explored_bytes=size, **options
        )
        before = masks["1.weight"].active
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
            optimizer.step()
            regrow.step()
    assert largest.numel < 100 * size
    assert regrow.updates == 2
    assert before == 400_000
    assert masks["1.weight"].active == (200_000 if "density" in options else before)
    assert str(itop_prune.summarize(model, regrow.explored))


def test_a_layer_of_ten_billion_weights_trains_with_its_kernel() -> None:
    pytest.importorskip("numba")
    model = on_meta(lambda: nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 3)))
    torch.manual_seed(0)
    masks = itop_prune.apply(model, 1 - 2e-5, storage="sparse", device="cpu", include="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2)
    x = torch.randn(4, 100_000)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        regrow.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    positions, values = masks["0.weight"].active_values()
    row = int(positions[positions >= 0][0]) // 100_000
    own = positions // 100_000 == row
    output = model[0](x).detach()
    expected = (values[own] * x[1, positions[own].long() % 100_000]).sum() + model[0].bias.detach()[
        row
    ]
    assert float(output[1, row]) == pytest.approx(float(expected), rel=1e-4)


# --- what can't be made --------------------------------------------------------------------------


def assert_untouched(model: nn.Module) -> None:
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not itop_prune.find_masks(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "mask"}, "storage is 'mask', whose weights are dense"),
        ({"scores": "magnitude"}, "scores and patterns look at every weight"),
        ({"method": "magnitude"}, "scores and patterns look at every weight"),
        ({"sparsity": 0.5, "pattern": "2:4", "method": "ERK"}, "scores and patterns look at"),
        ({"sparsity": None, "scores": "nonzero"}, "scores and patterns look at every weight"),
        ({"device": "abacus"}, "device is 'abacus'.*such as 'cpu'"),
    ],
    ids=str,
)
def test_arguments_that_need_values_are_refused(options: dict[str, Any], message: str) -> None:
    model = on_meta(mlp)
    given = {"sparsity": 0.8, "storage": "sparse", "device": "cpu", **options}
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, **given)
    assert_untouched(model)


def test_a_model_with_values_is_refused() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight, 2.weight, 4.weight has values: build the"):
        itop_prune.apply(model, 0.8, storage="sparse", device="cpu")
    with pytest.raises(ValueError, match="has values: build the"):
        itop_prune.apply(model, scores="nonzero", storage="sparse", device="cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Rotary(nn.Module):
    """A buffer that is computed when the module is built."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("angles", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.angles


class Orthogonal(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)


class Normalized(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = 0.0

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):  # after it was built
            self.scale = self.weight.detach().norm().item()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Rotary, "angles of Rotary can't be made from the meta device: reset_parameters does not"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "cls_token, pos_embed of VisionTransf"),
        (lambda: Orthogonal(8, 8), "Orthogonal can't be made from the meta device: .*"),
        (Normalized, "Normalized can't be made from the meta device: .*"),
    ],
    ids=["buffer", "token", "not elementwise", "reads the weight"],
)
def test_modules_that_do_not_fill_their_tensors_are_named(
    build: Callable[[], nn.Module], message: str
) -> None:
    model = on_meta(build)
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, storage="sparse", device="cpu")
    assert_untouched(model)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(never_dense, "total_memory", lambda device: 1 << 30)
    model = on_meta(lambda: nn.Linear(1_000_000, 1_000_000))
    with pytest.raises(
        ValueError, match=r"1,000,000,000 active weights take .* has 1.07 GB: raise"
    ):
        itop_prune.apply(model, 0.999, storage="sparse", device="cpu")
    wide = on_meta(lambda: nn.Sequential(nn.Conv1d(200_000, 10_000, 1)))
    with pytest.raises(ValueError, match=r"0\.weight computes with its dense weight of 8 GB"):
        itop_prune.apply(wide, 0.9999, storage="sparse", device="cpu")
    grouped = on_meta(lambda: nn.Sequential(nn.Conv2d(200_000, 20_000, 1, groups=2)))
    with pytest.raises(ValueError, match=r"0\.weight computes with its dense weight of 8 GB"):
        itop_prune.apply(grouped, 0.9999, storage="sparse", device="cpu")
    assert_untouched(model)
    assert_untouched(wide)


@pytest.mark.parametrize(
    "options", [{"grow": "gradient"}, {"prune": "set"}, {"redistribute": "magnitude"}], ids=str
)
def test_rules_that_look_at_all_weights_of_a_large_layer_are_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "total_memory", lambda device: 1 << 30)
    model = made(lambda: nn.Linear(100_000, 100_000), 1 - 1e-6)
    masks = itop_prune.find_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weight is too large .* 10,000,000,000 .* 40 GB"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2, **options)


def test_the_head_of_a_normal_model_can_be_reset_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made is a plain model: copies, state dicts, and `remove` work."""
    model = made(convnet, 0.5)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), twin(x))
    other = convnet()
    itop_prune.load(other, model.state_dict())
    itop_prune.remove(twin)
    assert torch.allclose(twin.eval()(x), model.eval()(x), atol=1e-6)
