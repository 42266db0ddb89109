"""A deployed model: outputs of the masked one whatever is chosen, dense if that is faster."""

import copy
import dataclasses
import functools
import importlib.util
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from helpers.toys import convnet, mlp
from torch import Tensor, nn

import itop_prune
from itop_prune.inference import deployment
from itop_prune.inference.deployment import deploy
from itop_prune.inference.measurement import clone_tensors
from itop_prune.kernels import runtime
from itop_prune.layers.masked_layer import sparse_names

# timm scripts functions and uses parts of torch that torch deprecates; nothing of ours warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES: dict[str, tuple[dict[str, object], int, int]] = {
    "resnet18": ({"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}, 64, 14),
    "vit_tiny_patch16_224": ({"img_size": 32, **TINY}, 32, 10),
    "beit_base_patch16_224": ({"img_size": 32, **TINY}, 32, 8),
    "eva02_tiny_patch14_224": ({"img_size": 28, **TINY}, 28, 8),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "window_size": 4, "depths": (2, 1), "embed_dim": 24, "num_heads": (2, 4)},
        64,
        18,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}, 32, 13),
    "mobilenetv3_small_050": ({}, 32, 42),
    "tf_efficientnet_b0": ({}, 32, 65),
    "coat_tiny": (
        {"img_size": 32, "embed_dims": (64,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1},
        32,
        29,
    ),
    "xcit_nano_12_p16_224": ({"depth": 1}, 32, 22),
    "edgenext_xx_small": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}, 64, 22),
    "nf_resnet26": ({"depths": (1, 1, 1, 1), "channels": (32, 48, 64, 96), "stem_chs": 16}, 64, 1),
    "levit_128s": ({"img_size": 64}, 64, 52),
}
"""Keyword arguments, pixels, and how many layers kernels compute."""
QUICK = (
    "resnet18",
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "convnext_atto",
    "nf_resnet26",
)
"""Families that are tried always: convolutions, tokens, weights read by a parent, standardized."""


def images(size: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@functools.cache
def family(name: str) -> nn.Module:
    """A small masked model without a scale or head of 0, which would hide the layers before it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **FAMILIES[name][0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.3)
    itop_prune.apply(model, 0.9, "uniform")
    return model


def output(model: nn.Module, *arguments: Tensor) -> Tensor:
    was_training = model.training
    with torch.no_grad():
        found = model.eval()(*arguments)
    model.train(was_training)
    return found


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


Table = dict[str, float]


def timed(monkeypatch: pytest.MonkeyPatch, layers: Table, whole: Table) -> None:
    """Let each call of a layer, and the whole model, take what a table says."""

    def told(models: Any, names: list[str], arguments: tuple[Any, ...]) -> dict[str, Table]:
        table, model = whole if "deployed" in models else layers, models["dense"]
        calls: Counter[str] = Counter()
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: calls.update([name])
            )
            for name in names
        ]
        model(*clone_tensors(arguments))
        for hook in hooks:
            hook.remove()
        return {name: {key: n * table[key] for key in models} for name, n in calls.items()}

    monkeypatch.setattr(deployment, "layer_seconds", told)


FASTER = {"dense": 2.0, "deployed": 1.0}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing: which is faster does not matter where a choice is forced."""
    timed(monkeypatch, {"dense": 1.0, "sparse": 1.0}, FASTER)


# --- equality -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def test_a_sparse_copy_gives_the_outputs_of_the_masked_model(name: str) -> None:
    model, (_, size, count) = family(name), FAMILIES[name]
    deployed = deploy(model, images(size), choices=("sparse",))
    report = deployed.report
    assert report.fallback == ""
    assert [row.name for row in report.choices] == list(itop_prune.find_masks(model))
    assert {row.storage for row in report.choices} == {"sparse"}
    assert sum(not row.why for row in report.choices) == count
    assert all(row.dense_seconds for row in report.choices if not row.why)
    assert report.difference <= 1e-5
    for number in (1, 3, 9):  # measured with one image, right with any number
        x = images(size, number)
        assert apart(output(deployed, x), output(model, x)) <= 1e-5


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_what_is_chosen_by_time_gives_the_outputs_of_the_masked_model(name: str) -> None:
    model, x = family(name), images(FAMILIES[name][1], 2)
    deployed = deploy(model, x)
    assert apart(output(deployed, x), output(model, x)) <= 1e-5


@pytest.mark.usefixtures("hurried")
def test_convolutions_keep_channels_last() -> None:
    model = copy.deepcopy(family("resnet18")).to(memory_format=torch.channels_last)
    x = images(64, 2).to(memory_format=torch.channels_last)
    deployed = deploy(model, x, choices=("sparse",))
    with torch.no_grad():
        features, expected = deployed.forward_features(x), model.eval().forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert apart(features, expected) <= 1e-5


class Reader(nn.Module):
    """Reads one layer's weight, calls one twice, passes one by keyword, has two names for one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.twice, self.named, self.both = (nn.Linear(6, 6) for _ in range(4))
        self.again = self.both

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        x = self.twice(torch.relu(self.twice(x))) + nn.functional.linear(x, self.twice.weight)
        return self.again(self.named(input=x)) + self.both(x) + shift


def reader() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Reader()
    itop_prune.apply(model, 0.5)
    return model, (torch.randn(2, 5, 6), torch.randn(6))


@pytest.mark.usefixtures("hurried")
def test_layers_are_used_as_a_model_likes() -> None:
    model, arguments = reader()
    deployed = deploy(model, arguments, choices=("sparse",))
    chosen = {row.name: row.why for row in deployed.report.choices}
    assert chosen.pop("read.weight") == "not called: what holds it reads its weight"
    assert chosen == dict.fromkeys(["twice.weight", "named.weight", "both.weight"], "")
    assert {row.storage for row in deployed.report.choices} == {"sparse"}
    assert deployed.again is deployed.both
    assert apart(output(deployed, *arguments), output(model, *arguments)) <= 1e-5


def test_a_model_whose_weights_are_all_read_by_their_holder_says_so() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.held.weight)

    model = Holder()
    itop_prune.apply(model, 0.5)
    row = deploy(model, torch.randn(1, 8)).report.choices[0]
    assert (row.storage, row.why) == ("dense", "not called: what holds it reads its weight")


@dataclasses.dataclass
class Scores:
    scores: Tensor
    hidden: list[Tensor]


class Telling(nn.Module):
    """Writes into its input, rules a class out, and returns an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Scores:
        hidden = self.first(x.mul_(2.0))
        scores = self.second(torch.relu(hidden))
        scores[:, 1] = -torch.inf
        return Scores(scores, [hidden])


@pytest.mark.usefixtures("hurried")
def test_a_model_that_writes_into_its_input_and_rules_classes_out_is_deployed() -> None:
    torch.manual_seed(0)
    model = Telling()
    itop_prune.apply(model, 0.5)
    example = torch.randn(3, 8)
    before = example.clone()
    deployed = deploy(model, example, choices=("sparse",))
    assert torch.equal(example, before)
    assert [row.storage for row in deployed.report.choices] == ["sparse"] * 2
    assert deployed.report.fallback == ""
    assert deployed.report.difference <= 1e-5
    found, expected = deployed(example.clone()), model(example.clone())
    torch.testing.assert_close(found.scores, expected.scores.detach())


@pytest.mark.usefixtures("hurried")
def test_outputs_that_can_not_be_compared_leave_the_model_dense_and_it_says_so() -> None:
    class Words(nn.Sequential):
        def forward(self, x: Tensor) -> str:
            return str(super().forward(x).argmax())

    model = Words(nn.Linear(8, 4))
    itop_prune.apply(model, 0.5)
    report = deploy(model, torch.randn(1, 8), choices=("sparse",)).report
    assert report.fallback == "all of it dense: no numbers in the outputs, or NaN, to compare"


def test_a_model_with_a_report_of_its_own_is_refused() -> None:
    model = nn.ModuleDict({"report": nn.Linear(8, 4)})
    itop_prune.apply(model, 0.5)
    with pytest.raises(
        ValueError, match=r"ModuleDict has a `report` of its own, .* give it another name"
    ):
        deploy(model, torch.randn(1, 8))


@pytest.mark.usefixtures("hurried")
def test_weight_standardised_convolutions_and_conv2d_of_others_stay_dense() -> None:
    for name, kind in {
        "nf_resnet26": "ScaledStdConv2d",
        "tf_efficientnet_b0": "Conv2dSame",
    }.items():
        deployed = deploy(family(name), images(FAMILIES[name][1]))
        assert f"timm's {kind} computes in a way of its own" in {
            row.why for row in deployed.report.choices
        }


# --- what is left and what comes back -------------------------------------------------------------


@pytest.mark.usefixtures("hurried")
def test_the_original_is_as_it_was() -> None:
    model = mlp().train()
    masks = itop_prune.apply(model, 0.5)
    model(torch.randn(3, 20)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deployed = deploy(model, torch.randn(1, 20), choices=("sparse",))
    assert model.training
    assert all(
        parameter.requires_grad and parameter.grad is not None for parameter in model.parameters()
    )
    assert itop_prune.find_masks(model) == masks
    with torch.no_grad():
        for tensor in deployed.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("hurried")
def test_the_copy_is_for_inference() -> None:
    model = convnet().train()
    itop_prune.apply(model, 0.5)
    model(torch.randn(3, 3, 8, 8)).sum().backward()
    deployed = deploy(model, torch.randn(1, 3, 8, 8), choices=("sparse",))
    assert not deployed.training
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in deployed.parameters()
    )
    assert [sparse_names(deployed[place]) for place in (0, 3, 7)] == [("weight",)] * 3
    assert itop_prune.find_masks(deployed) == {}
    assert not deployed(torch.randn(2, 3, 8, 8)).requires_grad
    with torch.inference_mode():
        deployed(torch.randn(2, 3, 8, 8))


@pytest.mark.usefixtures("hurried")
def test_gradients_of_the_input_pass_through_the_copy() -> None:
    model, found = mlp(), []
    itop_prune.apply(model, 0.9)
    x = torch.randn(3, 20)
    for each in (model, deploy(model, x, choices=("sparse",))):
        given = x.clone().requires_grad_()
        each(given).square().sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("hurried")
def test_copies_and_pickles_compute_and_report_the_same() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    x = torch.randn(3, 20)
    deployed = deploy(model, x, choices=("sparse",))
    expected = deployed(x)
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(other(x), expected)
        assert str(other.report) == str(deployed.report)
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.usefixtures("hurried")
def test_a_model_in_a_wrapper_comes_back_without_it() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    x = torch.randn(1, 20)
    for wrapped in (
        torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel(model),
    ):
        deployed = deploy(wrapped, x, choices=("sparse",))
        assert type(deployed) is nn.Sequential
        assert apart(output(deployed, x), output(model, x)) <= 1e-5


@pytest.mark.usefixtures("hurried")
def test_outputs_are_those_of_any_number_of_threads() -> None:
    model = family("vit_tiny_patch16_224")
    deployed = deploy(model, images(32), choices=("sparse",))
    expected, threads = output(model, images(32)), torch.get_num_threads()
    torch.set_num_threads(2)
    found = output(deployed, images(32))
    torch.set_num_threads(threads)
    assert apart(found, expected) <= 1e-5


@pytest.mark.usefixtures("hurried")
def test_a_deployed_model_is_compiled_to_one_graph() -> None:
    model, graphs = convnet(), []
    itop_prune.apply(model, 0.5)
    x = torch.randn(1, 3, 8, 8)
    deployed = deploy(model, x, choices=("sparse",))

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(deployed, backend=backend)
    assert apart(output(compiled, x), output(model, x)) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.usefixtures("hurried")
def test_calls_from_several_threads_give_each_its_own_output() -> None:
    model = family("vit_tiny_patch16_224")
    deployed = deploy(model, images(32), choices=("sparse",))
    inputs = [images(32, count) for count in (1, 2, 3, 4)] * 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(functools.partial(output, deployed), inputs))
    for x, y in zip(inputs, found, strict=True):
        assert apart(y, output(model, x)) <= 1e-5


@pytest.mark.usefixtures("hurried")
def test_a_model_in_sparse_storage_is_deployed_as_one_with_masks() -> None:
    x, found = torch.randn(3, 20), {}
    for storage in ("mask", "sparse"):
        torch.manual_seed(0)
        model = mlp()
        itop_prune.apply(model, 0.5, storage=storage)
        deployed = deploy(model, x, choices=("sparse",))
        assert {row.storage for row in deployed.report.choices} == {"sparse"}
        assert apart(output(deployed, x), output(model, x)) <= 1e-5
        found[storage] = deployed.state_dict()
    assert found["mask"].keys() == found["sparse"].keys()
    for name, tensor in found["mask"].items():
        assert torch.equal(tensor, found["sparse"][name])


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "choices", "chosen"),
    [
        ({"dense": 3.0, "sparse": 1.0}, None, "sparse"),
        ({"dense": 3.0, "sparse": 1.0}, ["dense", "sparse"], "sparse"),
        ({"dense": 1.0, "sparse": 2.0}, None, "dense"),
        # faster, but not clearly; and clearly
        ({"dense": 1.04, "sparse": 1.0}, None, "dense"),
        ({"dense": 1.06, "sparse": 1.0}, None, "sparse"),
        # forced
        ({"dense": 1.0, "sparse": 2.0}, ("sparse",), "sparse"),
    ],
)
def test_a_layer_is_sparse_where_that_is_clearly_faster(
    seconds: dict[str, float],
    choices: tuple[str, ...] | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    itop_prune.apply(model, 0.9)
    timed(monkeypatch, seconds, FASTER)
    report = deploy(model, torch.randn(1, 20), choices=choices).report
    assert [(row.storage, row.dense_seconds, row.seconds) for row in report.choices] == 3 * [
        (chosen, seconds["dense"], seconds[chosen])
    ]
    assert [row.shape for row in report.choices] == [(16, 20), (12, 16), (4, 12)]
    # The dense model beside itself is as fast, whatever was timed.
    whole = (2.0, 2.0, 1.0) if chosen == "dense" else (2.0, 1.0, 2.0)
    assert (report.dense_seconds, report.seconds, report.speedup) == whole
    assert report.fallback == ""
    assert (report.shapes, report.threads) == (((1, 20),), torch.get_num_threads())


def test_dense_alone_measures_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    itop_prune.apply(model, 0.9)
    timed(monkeypatch, {}, FASTER)
    report = deploy(model, torch.randn(1, 20), choices=("dense",)).report
    assert {(row.storage, row.dense_seconds) for row in report.choices} == {("dense", 0.0)}


def test_a_layer_that_is_called_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = reader()
    timed(monkeypatch, {"dense": 3.0, "sparse": 1.0}, FASTER)
    rows = {
        row.name: (row.dense_seconds, row.seconds)
        for row in deploy(model, arguments).report.choices
    }
    twice, once = (6.0, 2.0), (3.0, 1.0)
    assert rows == {
        "read.weight": (0, 0),
        "twice.weight": twice,
        "named.weight": once,
        "both.weight": twice,
    }


@pytest.mark.parametrize(("choices", "falls_back"), [(None, True), (("sparse",), False)])
def test_a_model_that_is_slower_in_the_end_stays_dense_unless_its_choices_are_forced(
    choices: tuple[str, ...] | None, falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = mlp(), torch.randn(1, 20)
    itop_prune.apply(model, 0.9)
    timed(monkeypatch, {"dense": 3.0, "sparse": 1.0}, {"dense": 2.0, "deployed": 2.1})
    deployed = deploy(model, x, choices=choices)
    held = {sparse_names(layer) for layer in (deployed[0], deployed[2], deployed[4])}
    assert held == ({()} if falls_back else {("weight",)})
    stored = {row.storage for row in deployed.report.choices}
    assert stored == ({"dense"} if falls_back else {"sparse"})
    assert deployed.report.fallback == (
        "all of it dense: it would take 2100.000 ms" if falls_back else ""
    )
    assert deployed.report.speedup == (1.0 if falls_back else 2.0 / 2.1)
    assert apart(output(deployed, x), output(model, x)) <= 1e-5
    assert deployed.report.fallback in str(deployed.report)


def test_layers_that_no_kernel_computes_stay_dense_and_say_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.grouped = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
            self.line, self.recurrent = nn.Conv1d(36, 8, 1), nn.LSTM(8, 8)
            self.patched, self.full = nn.Linear(8, 8), nn.Linear(8, 8192)
            self.wide = nn.Linear(8192, 8)
            self.patched.forward = lambda x: x  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(self.plain(x)).flatten(1)[:, :36, None]
            x, _ = self.recurrent(self.line(x).mT)
            return self.wide(self.full(self.patched(x)))

    torch.manual_seed(0)
    model = Layers()
    itop_prune.apply(model, 0.5, "uniform")
    itop_prune.find_masks(model)["plain.weight"].mask[1:] = False
    itop_prune.find_masks(model)["wide.weight"].mask[1:] = False
    timed(monkeypatch, {"dense": 3.0, "sparse": 1.0}, FASTER)
    report = deploy(model, torch.randn(2, 8, 10, 10)).report
    alone = "torch's LSTM computes in a way of its own"
    assert {row.name: (row.storage, row.why) for row in report.choices} == {
        "plain.weight": ("sparse", ""),
        "grouped.weight": ("dense", "no kernel computes such a Conv2d"),
        "line.weight": ("dense", "no kernel computes such a Conv1d"),
        "recurrent.weight_ih_l0": ("dense", alone),
        "recurrent.weight_hh_l0": ("dense", alone),
        "patched.weight": ("dense", "torch's Linear computes in a way of its own"),
        "full.weight": ("dense", "too many active weights for a kernel"),
        "wide.weight": ("sparse", ""),
    }


class Restless(nn.Sequential):
    """A model whose outputs change from one call to the next."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input) + self.calls


def test_a_model_whose_outputs_would_differ_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Restless(*mlp())
    itop_prune.apply(model, 0.5)
    timed(monkeypatch, {"dense": 3.0, "sparse": 1.0}, FASTER)
    report = deploy(model, torch.randn(1, 20)).report
    assert {row.storage for row in report.choices} == {"dense"}
    assert report.fallback.startswith("all of it dense: the outputs would differ by")
    assert report.difference == 0.0


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "has_numba", runtime.has_numba.__wrapped__)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "numba" else find(name, *more),
    )


@pytest.mark.usefixtures("without_numba")
def test_without_numba_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    itop_prune.apply(model, 0.9)
    timed(monkeypatch, {"dense": 3.0, "sparse": 1.0}, FASTER)
    with pytest.warns(UserWarning, match=r"Numba is not installed; .* pip install"):
        report = deploy(model, torch.randn(1, 20)).report
    assert {(row.storage, row.why) for row in report.choices} == {
        ("dense", "Numba is not installed")
    }


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(1, 21),
            r"Sequential can't be run with inputs of shape \[\(1, 21\)\].*what its forward takes",
        ),
        ((torch.zeros(1, 20), torch.zeros(3)), r"shape \[\(1, 20\), \(3,\)\].*a tensor or a tuple"),
        ("text", r"shape \[\]"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(x: object, message: str) -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    with pytest.raises(ValueError, match=message):
        deploy(model, x)


def test_a_model_without_masks_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"Sequential has no masks.*before itop_prune\.remove"):
        deploy(model, torch.zeros(1, 20))
    itop_prune.apply(model, 0.5)
    itop_prune.remove(model)
    with pytest.raises(ValueError, match="has no masks"):
        deploy(model, torch.zeros(1, 20))


def test_a_model_elsewhere_than_on_the_cpu_is_refused() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    with pytest.raises(ValueError, match=r"is on meta; allowed is the CPU"):
        deploy(model.to("meta"), torch.zeros(1, 20))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("spars",), r"unknown choice 'spars'; known are dense, sparse \(nearest: 'sparse'\)"),
        ("sparse", "choices is 'sparse'; allowed are some of dense, sparse, as a tuple"),
        ((), r"choices is \(\); allowed"),
    ],
)
def test_choices_that_are_none_are_refused(choices: tuple[str, ...], message: str) -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    with pytest.raises(ValueError, match=message):
        deploy(model, torch.zeros(1, 20), choices=choices)


@pytest.mark.usefixtures("hurried")
def test_a_deployed_model_has_no_masks_to_count_or_export() -> None:
    model, x = mlp(), torch.zeros(1, 20)
    itop_prune.apply(model, 0.5)
    calls = (
        itop_prune.summarize,
        itop_prune.dense_state_dict,
        lambda model: itop_prune.flops(model, x),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=r"this Sequential is for inference alone: .* ask the one that was"
        ):
            call(deploy(model, x, choices=("sparse",)))
        call(model)
        call(deploy(model, x, choices=("dense",)))  # a plain model
