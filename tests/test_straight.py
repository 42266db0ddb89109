"""Straight-line code: the outputs of the forward that it stands for, whatever comes, and no module called in it."""

import copy
import inspect
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_deployment import FAMILIES, apart, family, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toys import convnet, mlp

import itop_prune
from itop_prune.inference import deployment
from itop_prune.inference.deployment import deploy
from itop_prune.inference.kernels import KERNELS
from itop_prune.inference.straight import StraightLine

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*")

X = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))


class Calls:
    """Counts the modules that are called."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Calls":
        self.handle = nn.modules.module.register_module_forward_pre_hook(self.add)
        return self

    def add(self, *_: object) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def called(model: nn.Module, x: Tensor) -> int:
    """How many modules a forward calls."""
    with Calls() as calls, torch.no_grad():
        model(x)
    return calls.count


def straightened(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with a forward that must be straight-line code."""
    model.eval().requires_grad_(False)
    line = StraightLine(model, x.shape, x.dtype)
    assert line.make()
    model.forward = line
    return model


def possible(forward: Callable[[nn.Module, Tensor], object], *shape: int) -> bool:
    """Whether there is straight-line code for a model with a forward and one layer, `fc`."""
    model = type("Model", (nn.Module,), {"forward": forward})()
    model.fc = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(shape or (1, 4))
    line = StraightLine(model.eval(), x.shape, x.dtype)
    expected, weight = forward(model, x.clone()), model.fc.weight.clone()
    made = line.make()
    found = line(x)
    assert torch.equal(model.fc.weight, weight)
    assert type(found) is type(expected)
    assert not isinstance(expected, Tensor) or apart(found, expected) <= 1e-6
    return made


@pytest.fixture
def deployed() -> nn.Module:
    """A deployed MLP of six modules, sparse in every layer."""
    model = mlp()
    itop_prune.apply(model, 0.5)
    return deploy(model, X, choices=("csr",), straight=True)


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_deployed_model_calls_no_layer_and_gives_the_same(kernel: str, rows: int) -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    x = torch.randn(rows, 20)
    deployed = deploy(model, x, choices=(kernel,), straight=True)
    assert deployed.report.straight
    assert "in straight-line code" in str(deployed.report)
    assert called(deployed, x) == 1
    for other in (x, torch.randn(rows, 20)):
        assert apart(deployed(other), model.eval()(other)) <= 1e-6


def test_convolutions_and_batch_norm_too() -> None:
    model = convnet()
    itop_prune.apply(model, 0.5)
    x = torch.randn(1, 3, 8, 8)
    deployed = deploy(model, x, choices=("csr",), straight=True)
    assert called(deployed, x) == 1
    assert apart(deployed(x), model.eval()(x)) <= 1e-6


WITHOUT_PARTS = {"resnet18", "convnext_atto", "mobilenetv3_small_050", "tf_efficientnet_b0", "nf_resnet26"}
"""Whose forward splits no tensor into a tuple of others."""


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_timm_compute_the_same_where_it_is_possible(name: str) -> None:
    model, x = copy.deepcopy(family(name)).eval().requires_grad_(False), images(FAMILIES[name][1])
    itop_prune.remove(model)
    expected = model(x)
    line = StraightLine(model, x.shape, x.dtype)
    assert line.make() == (name in WITHOUT_PARTS)
    assert apart(line(x), expected) <= 1e-6
    model.forward = line
    assert (called(model, x) == 1) == (name in WITHOUT_PARTS)


def test_nobody_gets_it_who_did_not_ask() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    deployed = deploy(model, X, choices=("csr",))
    assert not deployed.report.straight
    assert "straight" not in str(deployed.report)
    assert called(deployed, X) == 6


def test_a_model_that_no_sparse_kernel_makes_faster_gains_by_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "in_turns", lambda calls, **_: {name: 1.0 + (name == "dense") for name in calls})
    model = mlp()
    itop_prune.apply(model, 0.5)
    deployed = deploy(model, X, choices=("dense",), straight=True)
    assert deployed.report.straight
    assert deployed.report.speedup == 2.0
    assert called(deployed, X) == 1


@pytest.mark.parametrize("x", [torch.randn(20, 20).t()[:2], (torch.randn(1, 20), None)], ids=["strided", "two"])
def test_where_the_example_does_not_fit_the_forward_stays(x: object) -> None:
    class Model(nn.Sequential):
        def forward(self, x: Tensor, more: object = None) -> Tensor:
            return super().forward(x)

    model = Model(nn.Linear(20, 16), nn.ReLU())
    itop_prune.apply(model, 0.5)
    deployed = deploy(model, x, choices=("csr",), straight=True)
    assert not deployed.report.straight
    assert "forward" not in vars(deployed)


# --- what goes another way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [torch.randn(3, 20), torch.randn(20, 1).expand(20, 20)[:1], torch.randn(20)])
def test_other_inputs_go_through_the_layers(deployed: nn.Module, x: Tensor) -> None:
    assert called(deployed, x) == 6
    assert apart(deployed(x), type(deployed).forward(deployed, x)) == 0


def test_refusals_are_those_of_the_layers(deployed: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"given torch\.float64"):
        deployed(X.double())
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a gradient is asked for"):
        deployed(X.clone().requires_grad_())


def test_an_input_by_its_name(deployed: nn.Module) -> None:
    assert torch.equal(deployed(input=X), deployed(X))
    assert inspect.signature(deployed.forward) == inspect.signature(nn.Sequential().forward)


@pytest.mark.parametrize("register", [nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook])
def test_hooks_of_layers_are_called(deployed: nn.Module, register: Callable[..., Any]) -> None:
    seen: list[torch.Size] = []
    expected = deployed(X)
    handle = register(deployed[2], lambda _, inputs, *__: seen.append(inputs[0].shape))
    assert torch.equal(deployed(X), expected)
    assert seen == [(1, 16)]
    handle.remove()
    assert called(deployed, X) == 1


def test_more_arguments_than_one() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x)

    model = straightened(Scaled(20, 3), X)
    expected = model(X)
    assert torch.equal(model(X, 2.0), 2 * expected)
    assert torch.equal(model(X, scale=2.0), 2 * expected)


def test_compilers_and_exporters_see_the_layers() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    deployed = deploy(model, X, choices=("embedding_bag",), straight=True)
    expected = deployed(X)
    assert apart(torch.compile(deployed, fullgraph=True, backend="eager")(X), expected) <= 1e-6
    assert apart(torch.export.export(deployed, (X,)).module()(X), expected) <= 1e-6
    assert torch.equal(deployed(X), expected)
    assert called(deployed, X) == 1


def test_a_layer_in_training_mode_trains() -> None:
    model = straightened(nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5)), X)
    assert model(X).all()
    model[1].train()
    assert not model(X).all()


def test_under_autocast_layers_have_their_say() -> None:
    model = straightened(nn.Sequential(nn.Linear(20, 16), nn.ReLU()), X)
    with torch.autocast("cpu", torch.bfloat16):
        assert called(model, X) == 3
        assert model(X).dtype is torch.bfloat16
    assert called(model, X) == 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter": lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(16), requires_grad=False)),
    "no parameter": lambda m: setattr(m[0], "bias", None),
    "a number": lambda m: setattr(m[1], "negative_slope", 5.0),
    "a function": lambda m: setattr(m[4], "activation", torch.tanh),
    "a tensor": lambda m: setattr(m[4], "scale", torch.tensor(3.0)),
    "a buffer": lambda m: setattr(m[4], "shift", torch.tensor(3.0)),
    "a bias where none was": lambda m: setattr(m[2], "bias", nn.Parameter(torch.ones(12), requires_grad=False)),
    "a forward": lambda m: setattr(m[1], "forward", torch.sigmoid),
    "another layer": lambda m: m.__setitem__(3, nn.Sigmoid().eval()),
    "one more layer": lambda m: m.append(nn.Sigmoid().eval()),
}


class Head(nn.Linear):
    """A layer that reads attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__(12, 4)
        self.activation, self.scale = torch.relu, torch.tensor(2.0)
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x)) * self.scale + self.shift


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_what_it_was_goes_through_its_layers_until_it_is_made_anew(change: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 16), nn.LeakyReLU(), nn.Linear(16, 12, bias=False), nn.Tanh(), Head()]
    model = straightened(nn.Sequential(*layers), X)
    before = model(X)
    CHANGES[change](model)
    expected = type(model).forward(model, X)
    assert apart(before, expected) > 1e-3
    assert torch.equal(model(X), expected)
    assert called(model, X) > 1
    if change != "a forward":
        assert model.forward.make()
        assert called(model, X) == 1
        assert apart(model(X), expected) <= 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_that_are_loaded_are_seen(kernel: str) -> None:
    models = []
    for seed in (0, 1):
        models.append(mlp(seed))
        itop_prune.apply(models[-1], 0.5)  # the same masks
    deployed, other = (deploy(model, X, choices=(kernel,), straight=True) for model in models)
    deployed[0].bias.fill_(1.0)
    assert called(deployed, X) == 1
    assert apart(deployed(X), type(deployed).forward(deployed, X)) <= 1e-6
    deployed.load_state_dict(other.state_dict())
    assert apart(deployed(X), other(X)) <= 1e-6
    assert deployed.forward.make()
    assert called(deployed, X) == 1
    assert torch.equal(deployed(X), other(X))


def test_of_another_type_it_goes_through_the_layers(deployed: nn.Module) -> None:
    expected = deployed(X)
    assert apart(deployed.double()(X.double()), expected) <= 1e-6
    assert apart(deployed.float()(X), expected) <= 1e-6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_on_their_own_and_make_their_code_when_they_are_asked_to(
    deployed: nn.Module, copied: Callable[[nn.Module], nn.Module]
) -> None:
    expected = deployed(X)
    other = copied(deployed)
    assert called(other, X) == 6
    assert other.forward.make()
    assert called(other, X) == 1
    assert torch.equal(other(X), expected)
    other[4].bias.add_(1.0)
    assert apart(other(X), expected + 1) <= 1e-6
    assert torch.equal(deployed(X), expected)


@pytest.mark.parametrize("why", ["training", "hook", "autocast"])
def test_while_the_code_would_not_run_none_is_made(why: str) -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16)).requires_grad_(False).eval()
    line = StraightLine(model, X.shape, X.dtype)
    if why == "training":
        model[1].train()
    elif why == "hook":
        model[0].register_forward_hook(lambda *_: 2 * _[2])
    with torch.autocast("cpu", enabled=why == "autocast"):
        assert not line.make()
        assert line.code is None


def test_making_it_leaves_random_numbers_and_what_a_forward_keeps_alone() -> None:
    model = nn.Sequential(nn.Linear(20, 16)).eval()
    state = torch.get_rng_state()
    assert StraightLine(model, X.shape, X.dtype).make()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_input_is_left_alone() -> None:
    model = straightened(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(20, 3)), X)
    x = X.clone()
    model(x)
    assert torch.equal(x, X)


# --- what is written down -------------------------------------------------------------------------------------------


def test_what_is_read_again_is_not_overwritten() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.fc(x)
        view = y.view(4)
        return torch.relu(y) - view

    assert possible(forward)
    assert possible(lambda self, x: torch.relu(self.fc.weight) @ x[0])
    assert possible(lambda self, x: (F.relu(y := self.fc(x), inplace=True), y + 1)[1])
    assert possible(lambda self, x: (y := self.fc(x), y.view(4), F.relu(y, inplace=True))[1] + 1)


def test_pieces_shapes_and_constants() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x.reshape(2, -1)[:, 1:3].t().relu()
        y = torch.cat([y, y.new_ones(2, x.shape[-1])], dim=1)
        return self.fc(y.flatten()[: x.numel() // 2]).unsqueeze(0) if len(y) == 2 else y

    assert possible(forward, 1, 8)


def test_rows_biases_and_types() -> None:
    assert possible(lambda self, x: self.fc(x), 3, 4)
    assert possible(lambda self, x: self.fc(x), 4)
    assert possible(lambda self, x: F.linear(x, self.fc.weight, None))
    assert possible(lambda self, x: self.fc(x) + (self.fc.weight.view(torch.int32) >> 23))


def test_what_python_must_see_is_refused() -> None:
    assert not possible(lambda self, x: self.fc(x) if x.sum() > 0 else -self.fc(x))
    assert not possible(lambda self, x: self.fc(x) * x.sum().item())
    assert not possible(lambda self, x: self.fc(x) * torch.from_numpy(x.numpy()))


def test_shapes_that_depend_on_values_are_refused() -> None:
    assert not possible(lambda self, x: self.fc(x).sum() * len(x[x > 0.5]))
    assert not possible(lambda self, x: self.fc(x) * (x != 0).nonzero().shape[0])


def test_switches_of_torch_are_refused() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc(x)

    before = torch.is_grad_enabled()
    assert not possible(forward)
    assert torch.is_grad_enabled() == before


def test_what_a_forward_keeps_is_refused() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.last = self.fc(x)
        return self.last

    assert not possible(forward)


def test_containers_that_may_hold_what_changes_are_refused() -> None:
    class Pair(NamedTuple):
        one: Tensor
        other: Tensor

    assert not possible(lambda self, x: torch.cat(Pair(self.fc.weight, self.fc.weight)))
    assert possible(lambda self, x: torch.cat((self.fc.weight, x)))


def test_what_is_no_longer_needed_is_let_go() -> None:
    class Alive(TorchDispatchMode):
        most, seen = 0, ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.seen = (*self.seen, weakref.ref(result))
            self.most = max(self.most, sum(tensor() is not None for tensor in self.seen))
            return result

    model = straightened(nn.Sequential(*(nn.Tanh() for _ in range(20))), X)
    with Alive() as alive:
        model(X)
    assert len(alive.seen) == 20
    assert alive.most <= 2


def test_several_outputs_and_inner_ones_are_refused() -> None:
    assert not possible(lambda self, x: (self.fc(x), x))
    assert not possible(lambda self, x: self.fc(x).chunk(2, 1)[0])
    assert possible(lambda self, x: self.fc(x)[:, :2])


def test_tensors_of_nobody_are_refused() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: Tensor) -> Tensor:
            return torch.from_dlpack(x) * 2

    secret = torch.ones(4)
    assert not possible(lambda self, x: self.fc(x) + secret)
    possible(lambda self, x: self.fc(Double.apply(x)))


def test_what_differs_from_call_to_call_is_refused() -> None:
    numbers = itertools.count(1)
    line = StraightLine(nn.Sequential(nn.Linear(20, 4)).eval(), X.shape, X.dtype)
    assert line.make()
    line.model.register_module("0", Numbered(numbers).eval())
    assert not line.make()


class Numbered(nn.Linear):
    """Another function at each call."""

    def __init__(self, numbers: Iterator[int]) -> None:
        super().__init__(20, 4)
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.numbers)


def test_chance_is_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(4)

    line = StraightLine(Noisy(4, 4).eval(), torch.Size([1, 4]), torch.float32)
    assert not line.make()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with torch.no_grad():
        yield
