"""Sparse storage trains as masks do: equal masks, and weights equal up to rounding, in float64."""

import collections
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm.optim
import torch
from itop_prune_tools.benchmarks.measure import peak_bytes
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import itop_prune
from itop_prune.kernels import linear_products, runtime
from itop_prune.update import layer_update

STEPS, EVERY = 300, 28  # ten updates

RULES: dict[str, dict[str, Any]] = {
    "random growth": {},
    "gradient growth": {"grow": "gradient"},
    "gradients of three steps": {"grow": "gradient", "gradient_steps": 3},
    "momentum growth": {"grow": "momentum", "prune": "set", "survival": True},
    "global with redistribution": {
        "scope": "global",
        "redistribute": "magnitude",
        "grow": "gradient",
    },
    "GMP": {"rate": 0.0, "min_rate": 0.0, "density": "cubic", "final_sparsity": 0.95},
    "GraNet": {
        "scope": "global",
        "density": "cubic",
        "final_sparsity": 0.95,
        "grow": "gradient",
    },
    "one backward": {"grow": "gradient", "one_backward": True},
    "one backward, global": {"grow": "gradient", "scope": "global", "one_backward": True},
    "AC/DC": {"rate": 0.0, "min_rate": 0.0, "density": "alternating", "final_sparsity": 0.95},
    "density that rises": {"density": "cubic", "final_sparsity": 0.4},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "SGD, Nesterov": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam, amsgrad": functools.partial(torch.optim.Adam, lr=1e-3, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-4, momentum=0.9, centered=True),
    "Lion": functools.partial(timm.optim.Lion, lr=1e-4),
    "LAMB": functools.partial(timm.optim.Lamb, lr=1e-3),
    "Adan": functools.partial(timm.optim.Adan, lr=1e-3),
}


class Net(nn.Module):
    """Convolutions of every kind that sparse storage treats apart, and a layer called twice."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.twice = nn.Linear(8 * 16, 8 * 16)
        self.head = nn.Linear(8 * 16, 8)
        self.checkpointing = checkpointing

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(F.relu(self.norm(self.stem(x)))))
        return self.twice(F.relu(self.twice(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def batches(steps: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [
        (
            torch.stack([draw() for _ in range(size)]),
            torch.randint(8, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def trained(
    storage: str,
    optimizer: str = "SGD, momentum",
    *,
    steps: int = STEPS,
    micro_batches: int = 1,
    checkpointing: bool = False,
    placed: dict[str, Any] | None = None,
    **rules: Any,
) -> tuple[nn.Module, itop_prune.MaskScheduler, nn.Module]:
    """Train with clipping and an average; return the model, its scheduler and the average."""
    model = Net(checkpointing).double()
    placed = {"sparsity": 0.8, **(placed or {})}
    masks = itop_prune.apply(model, storage=storage, **placed)
    average = ModelEmaV3(model, decay=0.9)
    averaged = itop_prune.find_masks(average.module)
    built = OPTIMIZERS[optimizer](model.parameters())
    rules = {"total_steps": steps, "every": EVERY, "stop": 0.95, **rules}
    regrow = itop_prune.MaskScheduler(masks, built, **rules)

    for step, (x, y) in enumerate(batches(steps)):
        for part in range(micro_batches):
            loss = F.cross_entropy(model(x[part::micro_batches]), y[part::micro_batches])
            (loss / micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        built.step()
        if regrow.step():
            regrow.clean_average(averaged)  # first: sparse parameters may be longer now
        average.update(model, step=step)
        regrow.clean_average(averaged)
        built.zero_grad()
    return model, regrow, average.module


def assert_same_training(**arguments: Any) -> None:
    (model, regrow, average), (sparse, other, sparse_average) = (
        trained(storage, **arguments) for storage in ("mask", "sparse")
    )
    assert regrow.updates == other.updates > 0
    assert regrow.exploration_rate() == other.exploration_rate()
    assert regrow.survival_rates() == other.survival_rates()
    for pair in ((model, sparse), (average, sparse_average)):
        found, expected = (itop_prune.find_masks(one) for one in pair)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name].mask, expected[name].mask)
            assert torch.allclose(found[name].weight, expected[name].weight, rtol=0, atol=1e-9)
    for name, itop in itop_prune.find_masks(sparse).items():
        assert itop.storage == "sparse", name
        free = itop.positions < 0
        assert not itop.parameter[:, free].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_linear_layers_of_these_runs_compute_with_kernels(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: collections.Counter[str] = collections.Counter()

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(linear_products, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(linear_products, name, counting(name))
    trained("sparse", steps=30, grow="gradient", checkpointing=checkpointing)
    assert calls == {"forward": 30 * (5 if checkpointing else 3), "backward": 30 * 3}


def slow_but(fast: set[str], names: Iterable[str]) -> list[Any]:
    """Parameters of which only some belong to the fast tier."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("rules", slow_but({"gradient growth", "one backward", "AC/DC"}, RULES))
def test_every_method_trains_the_same(rules: str) -> None:
    assert_same_training(**RULES[rules])


@pytest.mark.parametrize(
    "rules",
    [
        {"survival": True},
        {"scope": "global", "floor": 0.05, "density": "cubic", "final_sparsity": 0.9},
        {"density": "cubic", "final_sparsity": 0.6, "redistribute": "nonzeros"},
    ],
    ids=["random growth", "sparser, global", "denser"],
)
def test_updates_without_a_mask_train_the_same(
    rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the updates of much sparser layers are."""
    calls = []
    move = layer_update.LayerUpdate.exchange
    monkeypatch.setattr(layer_update, "SPARSEST", 1.0)
    monkeypatch.setattr(
        layer_update.LayerUpdate, "exchange", lambda *given: calls.append(given) or move(*given)
    )
    assert_same_training(steps=90, **rules)
    assert len(calls) >= 12


@pytest.mark.parametrize("optimizer", slow_but({"AdamW"}, OPTIMIZERS))
def test_every_optimizer_trains_the_same(optimizer: str) -> None:
    assert_same_training(optimizer=optimizer)


@pytest.mark.slow
def test_patterns_accumulation_and_checkpointing_train_the_same() -> None:
    assert_same_training(grow="gradient", micro_batches=2)
    assert_same_training(grow="gradient", checkpointing=True)
    pattern = {"sparsity": 0.5, "pattern": "2:4", "exclude": "stem"}
    assert_same_training(grow="gradient", placed=pattern)


def test_slots_stay_while_the_density_falls_and_a_weight_that_stays_keeps_its_slot() -> None:
    model = Net()
    masks = itop_prune.apply(model, 0.5, storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=8, every=2, density="cubic", final_sparsity=0.9
    )
    parameters = [itop.parameter for itop in masks.values()]
    lengths = [parameter.numel() for parameter in parameters]
    for x, y in batches(8):
        before = {name: itop.positions.clone() for name, itop in masks.items()}
        active = {name: itop.mask.clone() for name, itop in masks.items()}
        F.cross_entropy(model(x.float()), y).backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
        for name, itop in masks.items():
            stayed = (before[name] >= 0) & torch.take(itop.mask, before[name].long())
            assert torch.equal(itop.positions[stayed], before[name][stayed])
            assert stayed.sum() == (active[name] & itop.mask).sum()
    assert [itop.parameter for itop in masks.values()] == parameters
    assert [itop.parameter.numel() for itop in masks.values()] == lengths
    assert sum(itop.active for itop in masks.values()) < 0.2 * sum(lengths)


def test_the_dense_weight_is_there_for_whoever_reads_it_and_gone_after_a_product() -> None:
    """What autograd keeps from the forward to the backward is as large as inputs and values."""
    layer = nn.Linear(512, 512, bias=False)
    model = nn.Sequential(layer)
    itop = itop_prune.apply(model, 0.99, storage="sparse")["0.weight"]
    assert torch.equal(layer.weight, itop.weight)
    assert layer.weight.requires_grad

    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(torch.randn(2, 512)).sum()
    assert 0 < sum(kept) < layer.weight.numel()

    x = torch.randn(4, 512, requires_grad=True)
    functional = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), [x, itop.parameter])
    called = torch.autograd.grad(model(x).square().sum(), [x, itop.parameter])
    for one, other in zip(functional, called, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_holds_the_dense_weight_of_one_layer_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve layers of 300 by 300 hold no more than two do, but for gradients of their values."""
    monkeypatch.setattr(runtime, "uses_kernels", lambda shape, active: False)
    size, peaks = 300, {}
    for count in (2, 12):
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
        itop_prune.apply(model, 0.99, method="uniform", storage="sparse")
        x = torch.randn(1, size)
        model(x).sum().backward()  # what is made once
        model.zero_grad()
        peaks[count] = peak_bytes(lambda model=model, x=x: model(x).sum().backward())
    dense = 4 * size * size
    assert peaks[2] < 3 * dense
    assert peaks[12] - peaks[2] < 10 * 0.01 * dense + 0.2 * dense


def test_gradients_are_those_of_finite_differences_and_can_be_differentiated_again() -> None:
    for layer, shape in (
        (nn.Linear(5, 4), (2, 3, 5)),
        (nn.Linear(5, 4, bias=False), (5,)),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 5)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 5, 5)),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 2, 4, 4)),
        (nn.ConvTranspose2d(2, 3, 2), (2, 2, 3, 3)),
    ):
        model = nn.Sequential(layer).double()
        (itop,) = itop_prune.apply(model, 0.5, storage="sparse").values()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, values: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, {"0.weight_values": values}, (x,))

        values = itop.parameter.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(run, (x, values))
        assert torch.autograd.gradgradcheck(run, (x, values))


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_a_batch_of_gradients_goes_through_the_dense_weight(storage: str) -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    itop_prune.apply(layer, 0.5, storage=storage)
    gradients = torch.randn(5, 3, 4)
    (found,) = torch.autograd.grad(layer(x), x, gradients, is_grads_batched=True)
    torch.testing.assert_close(found, gradients @ layer.weight)


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_a_removed_weight_has_memory_of_its_own(storage: str) -> None:
    layer = nn.Linear(6, 4)
    itop_prune.apply(layer, 0.5, storage=storage)
    itop_prune.remove(layer)
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_vmap_over_stacked_weights_computes_each_of_them(storage: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    itop_prune.apply(model, 0.5, storage=storage)
    key = "0.weight_orig" if storage == "mask" else "0.weight_values"
    stacked = torch.stack([model.get_parameter(key).detach() * scale for scale in (1.0, 2.0)])
    x = torch.randn(3, 6, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {key: weight}, (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked)
    for gradient, weight in zip(gradients, stacked, strict=True):
        assert torch.allclose(gradient, torch.func.grad(loss)(weight))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["convolutions", "rows", "permuted", "images last"])
def test_outputs_and_gradients_round_as_with_masks(kind: str, autocast: bool) -> None:
    found = []
    for storage in ("mask", "sparse"):
        model: nn.Module = Net()  # it seeds
        if kind != "convolutions":
            model = nn.Sequential(nn.Linear(8, 6))
        masks = itop_prune.apply(model, 0.8, storage=storage)
        x = batches(1)[0][0].float()
        x = (
            {
                "convolutions": x,
                "rows": x[:, 0, 0],
                "permuted": x.permute(0, 2, 3, 1)[..., :1].expand(-1, -1, -1, 8),
                "images last": x,
            }[kind]
            .detach()
            .requires_grad_()
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        output.float().square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if "weight_" not in name}
        for name, itop in masks.items():
            gradients[name] = _dense(itop, itop.parameter.grad)
        found.append({"output": output, "input": x.grad, **gradients})

    expected, ours = found
    assert expected["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
    for name in expected:
        assert ours[name].dtype == expected[name].dtype
        if autocast:  # it casts a parameter once a step, here once a call
            assert torch.allclose(ours[name], expected[name], rtol=0.02, atol=0.02), name
        else:
            assert torch.equal(ours[name], expected[name]), name


def _dense(itop: Any, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape in the shape of the weight."""
    if itop.storage == "mask":
        return tensor
    dense = torch.zeros(itop.size)
    used = itop.positions >= 0
    dense[itop.positions[used].long()] = tensor[0, used]
    return dense.view(itop.shape)


def test_channels_last_follows_the_model() -> None:
    model = Net()
    itop_prune.apply(model, 0.8, storage="sparse")
    assert model.stem.weight.is_contiguous()
    model.to(memory_format=torch.channels_last)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    model.to(torch.float64)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert copy.deepcopy(model).stem.weight.is_contiguous(memory_format=torch.channels_last)

    other = Net().to(memory_format=torch.channels_last)
    itop_prune.apply(other, 0.8, storage="sparse")
    assert other.stem.weight.is_contiguous(memory_format=torch.channels_last)


# --- weight decay and rates by layer -------------------------------------------------------------


def test_values_get_weight_decay_as_the_weight_did() -> None:
    """By dimensions, as timm and nanoGPT do, and layer decay by names."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    dense = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    places = {id(p): (g["weight_decay"], g["lr_scale"]) for g in dense for p in g["params"]}
    before = {name: places[id(p)] for name, p in model.named_parameters()}
    itop_prune.apply(model, 0.8, storage="sparse")
    sparse = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    places = {id(p): (g["weight_decay"], g["lr_scale"]) for g in sparse for p in g["params"]}
    after = {
        name.replace("weight_values", "weight"): places[id(p)]
        for name, p in model.named_parameters()
    }
    assert after == before
    assert all(
        parameter.ndim == 2 for name, parameter in model.named_parameters() if "_values" in name
    )


# --- what can't be -------------------------------------------------------------------------------


def test_an_optimizer_of_before_apply_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = itop_prune.apply(model, 0.8, storage="sparse")
    with pytest.raises(ValueError, match=r"does not hold stem.weight.*build it from model.param"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=2)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", ["muon", "kron", "adafactor", "adamp", "sgdp", "adahessian"])
def test_an_optimizer_that_looks_at_the_matrix_is_refused(name: str) -> None:
    model = Net()
    masks = itop_prune.apply(model, 0.8, storage="sparse")
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=0.1)
    with pytest.raises(ValueError, match=r"looks at the rows and columns.*AdamW"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=2)


def test_an_unknown_storage_is_refused_and_the_model_is_as_it_was() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"unknown storage 'sparce'.*nearest: 'sparse'"):
        itop_prune.apply(model, 0.8, storage="sparce")
    assert not itop_prune.find_masks(model)


def test_the_weight_can_not_be_assigned() -> None:
    model = Net()
    itop_prune.apply(model, 0.8, storage="sparse")
    for value in (torch.zeros(8, 128), nn.Parameter(torch.zeros(8, 128))):
        with pytest.raises(RuntimeError, match="write into weight_values, or call"):
            model.head.weight = value
    assert itop_prune.find_masks(model)["head.weight"].active


def _states() -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(6, 4))
    itop_prune.apply(model, 0.5, storage="sparse")
    return model, dict(model.state_dict())


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "more values": (
        lambda state: state.update({"0.weight_values": torch.zeros(1, 13)}),
        r"values have the shape \(1, 13\) and there are 12 positions",
    ),
    "out of range": (
        lambda state: state["0.weight_positions"].__setitem__(3, 24),
        r"position 24 is outside of a weight of 24; allowed are -1 to 23",
    ),
    "below": (
        lambda state: state["0.weight_positions"].__setitem__(3, -2),
        "position -2 is outside",
    ),
    "twice": (
        lambda state: state["0.weight_positions"].__setitem__(3, state["0.weight_positions"][4]),
        "has two slots",
    ),
    "of another layer": (
        lambda state: state.update({"0.weight_shape": torch.tensor([6, 4])}),
        r"the source has the shape \(6, 4\), the model \(4, 6\)",
    ),
    "floating point": (
        lambda state: state.update({"0.weight_positions": torch.zeros(12)}),
        "positions are torch.float32",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("loader", ["load_state_dict", "load", "load into dense"])
def test_a_state_that_is_no_sparse_weight_is_refused_and_the_model_is_as_it_was(
    loader: str, how: str
) -> None:
    spoil, message = BROKEN[how]
    model, _ = _states()
    _, state = _states()
    state = {name: tensor.clone() + 0 for name, tensor in state.items()}
    spoil(state)
    if loader == "load into dense":
        model = nn.Sequential(nn.Linear(6, 4))
        message = message if "the model" not in message else "differ"
    elif loader == "load" and "the model" in message:
        message = "differ"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    call = model.load_state_dict
    if loader != "load_state_dict":
        call = functools.partial(itop_prune.load, model)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.usefixtures("without_kernels")
def test_a_state_of_the_other_storage_is_refused_by_a_strict_load() -> None:
    for own, other in (("mask", "sparse"), ("sparse", "mask")):
        model, source = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
        itop_prune.apply(model, 0.5, storage=own)
        itop_prune.apply(source, 0.5, storage=other)
        with pytest.raises(RuntimeError, match=r"of the other storage.*itop_prune.load"):
            model.load_state_dict(source.state_dict())
        itop_prune.load(model, source.state_dict())
        x = torch.randn(2, 6)
        assert torch.equal(model(x), source(x))


def test_other_numbers_of_active_weights_load_strictly_and_the_parameter_stays_the_same() -> None:
    for assign in (False, True):
        model, source = Net(), Net()
        itop_prune.apply(model, 0.5, storage="sparse")
        itop_prune.apply(source, 0.9, storage="sparse", seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, y = batches(1)[0]
        loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        parameter = model.head.weight_values
        model.load_state_dict(source.state_dict(), assign=assign)
        assert (model.head.weight_values is parameter) == (not assign)
        if not assign:  # the old graph is still alive
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
        else:
            assert torch.equal(model.head.weight, source.head.weight)


def test_averages_of_buffers_corrupt_positions_as_is_documented() -> None:
    model, moved = Net(), Net()
    itop_prune.apply(model, 0.8, storage="sparse")
    itop_prune.apply(moved, 0.8, storage="sparse", seed=1)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for one in (model, moved):
        average.update_parameters(one)
    found, expected = (itop_prune.find_masks(one)["twice.weight"] for one in (average, moved))
    assert not torch.equal(found.mask, expected.mask)
    assert "can't be right" in itop_prune.MaskScheduler.clean_average.__doc__
