"""The field's methods as rows of arguments: each keeps the promises, whatever it prunes, grows, shares or shrinks."""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.toys import batch, convnet, mlp, train
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import MaskScheduler
from itop_prune.methods import criteria
from itop_prune.methods.schedules import alternating

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 3
SMALL = {"total_steps": STEPS, "every": EVERY}

ROWS: dict[str, dict[str, Any]] = {
    path.stem.removeprefix("fashion_mnist_lenet300_"): recipe["regrow"]
    for path in sorted((ROOT / "recipes").glob("fashion_mnist_lenet300_*.yaml"))
    if "regrow" in (recipe := yaml.safe_load(path.read_text()))
}
MORE: dict[str, dict[str, Any]] = {
    "taylor": {"prune": "taylor"},
    "sampled": {"prune": "sampled_magnitude", "grow": "sampled_gradient"},
    "random": {"prune": "random", "grow": "unexplored"},
    "mix": {"grow": criteria.mix("gradient", "random", 0.25)},
    "mix by name": {"grow": "gradient+unexplored"},
    "several gradients": {"grow": "gradient", "gradient_steps": 3},
    "global": {"scope": "global", "floor": 0.1},
    "global, by magnitude": {"scope": "global", "redistribute": "magnitude"},
    "nonzeros": {"redistribute": "nonzeros", "rate": 1.0, "schedule": "constant"},
    "momentum everywhere": {
        "grow": "momentum",
        "redistribute": "momentum",
        "prune": "taylor",
        "gradient_steps": 2,
    },
    "survival": {"survival": True, "schedule": "exponential"},
    "to sparse by momentum": {
        "density": "linear",
        "final_sparsity": 0.9,
        "redistribute": "momentum",
    },
    "from sparse to denser": {"density": "linear", "final_sparsity": 0.2, "grow": "gradient"},
}
METHODS = {**ROWS, **MORE}
methods = pytest.mark.parametrize("method", METHODS, ids=METHODS)
pytestmark = [  # what a ranking over all layers does to models so small
    pytest.mark.filterwarnings("ignore:.*so some have none"),
    pytest.mark.filterwarnings("ignore:the dense gradient of .* is 0 everywhere"),
]


class Run:
    def __init__(
        self, method: str, model: Callable[[], nn.Module] = mlp, sparsity: float = 0.5
    ) -> None:
        self.model, self.shape = model(), (20,) if model is mlp else (3, 8, 8)
        arguments = {**METHODS[method], **SMALL, "stop": 1.0}
        self.masks = itop_prune.apply(self.model, sparsity)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
        )
        self.regrow = MaskScheduler(self.masks, self.optimizer, **arguments)

    def train(
        self, steps: range = range(STEPS), after: Callable[[int], None] = lambda step: None
    ) -> list[float]:
        return train(
            self.model, self.optimizer, self.regrow, steps=steps, shape=self.shape, after=after
        )

    def counts(self) -> dict[str, int]:
        return {name: itop.active for name, itop in self.masks.items()}

    def everything(self) -> dict[str, Tensor]:
        found = {**self.model.state_dict()}
        found |= {
            f"momentum {i}": s["momentum_buffer"]
            for i, s in enumerate(self.optimizer.state.values())
        }
        return {
            name: tensor.clone() for name, tensor in (found | dict(self.regrow.explored)).items()
        }


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_there_are_rows() -> None:
    assert {
        "erk98_rigl",
        "erk98_snfs",
        "erk98_gmp",
        "global98_granet",
        "global98_acdc",
    } <= ROWS.keys()


@methods
@pytest.mark.parametrize("model", [mlp, convnet])
def test_the_total_is_exact_at_every_step(method: str, model: Callable) -> None:
    run = Run(method, model)
    weights, started = (
        sum(itop.mask.numel() for itop in run.masks.values()),
        sum(run.counts().values()),
    )
    last = METHODS[method].get("final_sparsity")
    path = METHODS[method].get("density")
    seen = []
    run.train(after=lambda step: seen.append(sum(run.counts().values())))
    for step, active in enumerate(seen, start=1):
        done = (step // EVERY) * EVERY / STEPS
        ended = started if last is None else round((1 - last) * weights)
        factor = (
            1.0 if last is None else itop_prune.schedules.SCHEDULES[path](done) if done else 1.0
        )
        assert active == round(ended + (started - ended) * factor)


@methods
def test_layer_counts_move_only_where_the_method_says_so(method: str) -> None:
    run = Run(method)
    before = run.counts()
    run.train()
    free = {"redistribute", "density"} & METHODS[method].keys()
    assert free or run.counts() == before


@methods
def test_masks_move(method: str) -> None:
    run = Run(method)
    before = {name: itop.mask.clone() for name, itop in run.masks.items()}
    run.train(range(EVERY * 2))
    assert any(not torch.equal(itop.mask, before[name]) for name, itop in run.masks.items())


@methods
@pytest.mark.parametrize("stop_after", [2, 3, 10])
def test_resume_is_bit_exact(method: str, stop_after: int) -> None:
    straight, run, other = Run(method), Run(method), Run(method)
    expected = straight.train()
    losses = run.train(range(stop_after))
    saved = copy.deepcopy(
        (run.model.state_dict(), run.optimizer.state_dict(), run.regrow.state_dict())
    )
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    other.regrow.load_state_dict(saved[2])
    assert losses + other.train(range(stop_after, STEPS)) == expected
    assert differing(other.everything(), straight.everything()) == []
    assert math.isnan(straight.regrow.survival_rate()) or (
        other.regrow.survival_rates() == straight.regrow.survival_rates()
    )


@methods
def test_what_grows_starts_at_zero_and_what_leaves_ends_there(method: str) -> None:
    run = Run(method)
    for step in range(STEPS):
        before = {name: itop.mask.clone() for name, itop in run.masks.items()}
        x, y = batch(step, 20)
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        if run.regrow.step():
            for name, itop in run.masks.items():
                touched = ~(before[name] & itop.mask)
                assert not itop.parameter[touched].any()
                assert not run.optimizer.state[itop.parameter]["momentum_buffer"][touched].any()
        run.optimizer.zero_grad()


@methods
def test_the_same_step_is_taken_whatever_listens(method: str) -> None:
    """Up to the first update, a run that asks for gradients trains as one that does not."""
    run, plain = Run(method), Run("survival")
    assert run.train(range(EVERY)) == plain.train(range(EVERY))


# Older compilers of torch make an instance of a torch.autograd.Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", ["erk98_snfs", "global98_granet", "momentum everywhere"])
def test_torch_compile_gives_the_masks_of_an_eager_run(method: str) -> None:
    eager, compiled = Run(method), Run(method)
    compiled.model.compile(backend="aot_eager")
    for run in (eager, compiled):
        run.train(range(EVERY * 2))
    torch.compiler.reset()
    for name, itop in eager.masks.items():
        assert torch.equal(itop.mask, compiled.masks[name].mask)


# --- global --------------------------------------------------------------------------------------


def test_global_pruning_takes_the_smallest_of_all_layers() -> None:
    run = Run("global")
    with torch.no_grad():
        for name, scale in (("0.weight", 1.0), ("2.weight", 100.0), ("4.weight", 100.0)):
            run.masks[name].parameter.copy_(scale * run.masks[name].mask)
    noted: dict[str, Tensor] = {name: itop.mask.clone() for name, itop in run.masks.items()}
    x, y = batch(0, 20)
    run.regrow = MaskScheduler(
        run.masks, run.optimizer, total_steps=9, every=1, rate=0.1, scope="global"
    )
    F.cross_entropy(run.model(x), y).backward()
    assert run.regrow.step()
    stayed = {name: torch.equal(itop.mask, noted[name]) for name, itop in run.masks.items()}
    assert stayed == {"0.weight": False, "2.weight": True, "4.weight": True}


def test_a_floor_keeps_every_layer_above_it() -> None:
    run = Run("global")
    floors = {name: round(0.4 * itop.mask.numel()) for name, itop in run.masks.items()}
    with torch.no_grad():
        run.masks["0.weight"].parameter.mul_(1e-6)
    options = {
        "scope": "global",
        "floor": 0.4,
        "redistribute": lambda weights: {"0.weight": 0.0, "2.weight": 1.0, "4.weight": 1.0},
    }
    run.regrow = MaskScheduler(
        run.masks, run.optimizer, total_steps=9, every=1, rate=0.3, **options
    )
    x, y = batch(0, 20)
    F.cross_entropy(run.model(x), y).backward()
    assert run.regrow.step()
    counts = run.counts()
    assert counts["0.weight"] == floors["0.weight"]
    assert sum(counts.values()) == 280


# --- redistribution ------------------------------------------------------------------------------


def test_what_grows_goes_where_the_function_says_in_proportion() -> None:
    """560 weights, half active by ERK; at a rate of 0.2 some are pruned, and three quarters of them go to the first."""
    run = Run("nonzeros")
    seen: dict[str, Mapping[str, float]] = {}

    def mine(
        weights: Mapping[str, float], active: Mapping[str, float], pruned: Mapping[str, float]
    ) -> Mapping:
        seen.update(weights=weights, active=active, pruned=pruned)
        return {"0.weight": 3.0, "2.weight": 1.0, "4.weight": 0.0}

    before = run.counts()
    run.regrow = MaskScheduler(
        run.masks,
        run.optimizer,
        total_steps=9,
        every=9,
        rate=0.2,
        schedule="constant",
        redistribute=mine,
    )
    run.train(range(9))
    pruned = {name: math.ceil(0.2 * active) for name, active in before.items()}
    assert seen == {
        "weights": {"0.weight": 320, "2.weight": 192, "4.weight": 48},
        "active": before,
        "pruned": pruned,
    }
    total = sum(pruned.values())
    gained = {name: active - (before[name] - pruned[name]) for name, active in run.counts().items()}
    assert gained["4.weight"] == 0
    assert gained["0.weight"] in (math.floor(0.75 * total), math.ceil(0.75 * total))
    assert sum(gained.values()) == total


def test_statistics_are_means_over_active_weights() -> None:
    run = Run("momentum everywhere")
    seen: dict[str, dict[str, float]] = {}

    def spy(magnitude: dict[str, float], momentum: dict[str, float]) -> dict[str, float]:
        seen.update(magnitude=magnitude, momentum=momentum)
        expected.update(
            {
                name: itop.parameter.abs().sum().item() / itop.active
                for name, itop in run.masks.items()
            }
        )
        return magnitude

    expected: dict[str, float] = {}
    run.regrow = MaskScheduler(run.masks, run.optimizer, total_steps=4, every=2, redistribute=spy)
    run.train(range(2))
    assert seen["magnitude"] == pytest.approx(expected)
    assert all(value > 0 for value in seen["momentum"].values())


@pytest.mark.parametrize(
    "answer",
    [None, {"0.weight": 1.0}, {"0.weight": -1.0, "2.weight": 1.0, "4.weight": 1.0}, math.nan],
)
def test_a_redistribution_that_gives_something_else_is_refused_by_name(answer: Any) -> None:
    def mine(active: Mapping[str, float]) -> Any:
        return answer

    run = Run("nonzeros")
    run.regrow = MaskScheduler(run.masks, run.optimizer, total_steps=4, every=1, redistribute=mine)
    with pytest.raises(
        ValueError, match=r"mine gave .*; it must give a number from 0 for every layer"
    ):
        run.train(range(1))


def test_an_unknown_redistribution_or_statistic_is_answered_with_the_menu() -> None:
    run = Run("nonzeros")
    with pytest.raises(
        ValueError, match=r"unknown redistribute 'moment'.*momentum.*nearest: 'momentum'"
    ):
        MaskScheduler(run.masks, run.optimizer, **SMALL, redistribute="moment")
    with pytest.raises(
        ValueError, match=r"parameter of the redistribution <lambda> 'weight'; known are weights"
    ):
        MaskScheduler(run.masks, run.optimizer, **SMALL, redistribute=lambda weight: weight)


# --- what criteria are given ---------------------------------------------------------------------


def dense_gradients(steps: int) -> list[dict[str, Tensor]]:
    """Of a run without updates, by a twin whose masks are gone: the true gradient of every weight at every step."""
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    found = []
    for step in range(steps):
        twin = mlp()
        twin.load_state_dict(itop_prune.dense_state_dict(model))
        x, y = batch(step, 20)
        F.cross_entropy(twin(x), y).backward()
        found.append(
            {name: parameter.grad for name, parameter in twin.named_parameters() if name in masks}
        )
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for itop in masks.values():
            itop.zero_off_mask()
    return found


def given(steps: int, **options: Any) -> list[Tensor]:
    """What a criterion is given at the only update, by layer."""
    seen: list[Tensor] = []

    def by_grad(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad

    def by_momentum(momentum: Tensor) -> Tensor:
        seen.append(momentum.clone())
        return momentum

    run = Run("survival")
    criterion = {"grad": by_grad, "momentum": by_momentum}[options.pop("of")]
    run.regrow = MaskScheduler(
        run.masks, run.optimizer, total_steps=steps, every=steps, grow=criterion, **options
    )
    run.train(range(steps))
    return seen


@pytest.mark.parametrize("last", [1, 2, 4])
def test_gradients_are_summed_over_the_last_steps(last: int) -> None:
    found = dense_gradients(4)
    for place, name in enumerate(
        ("0.weight", "2.weight")
    ):  # the third is dense, and asks for nothing
        expected = sum(step[name] for step in found[-last:])
        torch.testing.assert_close(given(4, of="grad", gradient_steps=last)[place], expected)


def test_momentum_is_the_moving_average_of_the_dense_gradient() -> None:
    found = dense_gradients(3)
    for place, name in enumerate(("0.weight", "2.weight")):
        expected = 0.1 * (0.81 * found[0][name] + 0.9 * found[1][name] + found[2][name])
        torch.testing.assert_close(given(3, of="momentum")[place], expected)


@pytest.mark.parametrize(
    "options", [{"grow": "momentum"}, {"grow": "gradient", "gradient_steps": 3}]
)
def test_a_gradient_that_is_not_finite_is_not_remembered(options: dict[str, Any]) -> None:
    run = Run("survival")
    run.regrow = MaskScheduler(run.masks, run.optimizer, total_steps=9, every=3, **options)
    x, y = batch(0, 20)
    poison = run.model[0].weight_orig.register_hook(lambda gradient: gradient * math.inf)
    F.cross_entropy(run.model(x), y).backward()
    poison.remove()
    run.regrow.step()
    run.optimizer.zero_grad()
    run.train(range(1, 3))
    assert run.regrow.updates == 1
    assert run.regrow.skipped == 0
    state = run.regrow.state_dict()["dense"]
    assert all(tensor.isfinite().all() for kept in state.values() for tensor in kept.values())


def test_growth_sees_the_mask_after_pruning() -> None:
    seen: list[Tensor] = []

    def spy(mask: Tensor) -> Tensor:
        seen.append(mask.clone())
        return mask.float()

    run = Run("survival")
    run.regrow = MaskScheduler(run.masks, run.optimizer, total_steps=9, every=3, grow=spy)
    run.train(range(2))
    before = run.counts()
    run.train(range(2, 3))
    rate = run.regrow.rate
    open_ones = [
        before[name] for name, itop in run.masks.items() if before[name] < itop.mask.numel()
    ]
    expected = [active - math.ceil(rate * active) for active in open_ones]
    assert [int(mask.sum()) for mask in seen] == expected


@pytest.mark.parametrize("role", ["prune", "grow"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_criterion_that_gives_nan_is_named_with_the_layer(role: str, scope: str) -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight * math.nan

    run = Run("survival")
    run.regrow = MaskScheduler(
        run.masks, run.optimizer, total_steps=9, every=1, scope=scope, **{role: broken}
    )
    with pytest.raises(ValueError, match=r"broken.*0\.weight.*numbers"):
        run.train(range(1))


def test_a_mix_that_gives_nan_is_named_with_the_layer() -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight * math.nan

    run = Run("survival")
    grow = criteria.mix(broken, "random")
    run.regrow = MaskScheduler(run.masks, run.optimizer, total_steps=9, every=1, grow=grow)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"broken.*0\.weight.*numbers|broken.*0\.weight.*NaN"
    ):
        run.train(range(1))


# --- density -------------------------------------------------------------------------------------


def test_each_layer_ends_at_what_the_final_method_gives_it() -> None:
    run = Run("erk98_gmp")
    options = {"rate": 0.0, "min_rate": 0.0, "density": "cubic", "final_sparsity": 0.9}
    run.regrow = MaskScheduler(run.masks, run.optimizer, **SMALL, **options, final_method="uniform")
    run.train()
    assert run.counts() == {"0.weight": 32, "2.weight": 19, "4.weight": 5}


def test_weights_that_left_on_the_way_to_sparse_stay_out_at_rate_0() -> None:
    run = Run("erk98_gmp", sparsity=0.0)
    before = {name: itop.mask.clone() for name, itop in run.masks.items()}
    for step in range(STEPS):
        run.train(range(step, step + 1))
        for name, itop in run.masks.items():
            assert not (itop.mask & ~before[name]).any()
            before[name] = itop.mask.clone()


def test_alternating_goes_dense_and_back() -> None:
    run = Run("global98_acdc", sparsity=0.0)
    path = functools.partial(alternating, cycles=2)
    options = {"rate": 0.0, "min_rate": 0.0, "final_sparsity": 0.9}
    run.regrow = MaskScheduler(
        run.masks, run.optimizer, total_steps=8, every=2, density=path, **options
    )
    seen = []
    run.train(range(8), after=lambda step: seen.append(sum(run.counts().values())))
    assert seen == [560, 56, 56, 560, 560, 56, 56, 56]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 0.9}, "density is constant, final_sparsity 0.9; they go together"),
        ({"density": "cubic"}, "density is cubic, final_sparsity None; they go together"),
        ({"density": "cubic", "final_sparsity": 1.0}, "final_sparsity is 1.0; allowed"),
        (
            {"density": "cubic", "final_sparsity": 0.9, "every": 30},
            "none is made, and final_sparsity never reached",
        ),
        ({"density": "cubic", "final_sparsity": 0.999}, "each of 3 layers needs at least 1"),
        ({"density": "cubik", "final_sparsity": 0.9}, "unknown density 'cubik'.*nearest: 'cubic'"),
        (
            {"rate": 0.0, "min_rate": 0.0},
            "rate is 0.0; allowed is a number in .0, 1., or 0 with final_sparsity",
        ),
        ({"scope": "all"}, "scope is 'all'; allowed are 'layer' and 'global'"),
        ({"floor": 0.1}, "floor is 0.1; allowed is a number in .0, 1., with scope='global'"),
        (
            {"gradient_steps": 4},
            "gradient_steps is 4; allowed are whole numbers from 1 to every, 3",
        ),
        ({"gradient_steps": 0}, "gradient_steps is 0; allowed are whole numbers from 1"),
    ],
)
def test_bad_values_are_answered_with_what_is_allowed(
    options: dict[str, Any], message: str
) -> None:
    run = Run("survival")
    with pytest.raises(ValueError, match=message):
        MaskScheduler(run.masks, run.optimizer, **{**SMALL, **options})


# --- survival ------------------------------------------------------------------------------------


def test_survival_is_the_share_of_the_last_grown_that_is_still_there() -> None:
    run = Run("survival")
    positions: list[dict[str, Tensor]] = [
        {name: itop.mask.clone() for name, itop in run.masks.items()}
    ]

    def note(step: int) -> None:
        if (step + 1) % EVERY == 0:
            positions.append({name: itop.mask.clone() for name, itop in run.masks.items()})

    run.train(range(EVERY), after=note)
    assert math.isnan(run.regrow.survival_rate())
    run.train(range(EVERY, 3 * EVERY), after=note)
    before, grown_in, last = positions[-3:]
    grown = {name: grown_in[name] & ~before[name] for name in before}
    expected = {
        n: (grown[n] & last[n]).sum().item() / grown[n].sum().item()
        for n in grown
        if grown[n].any()
    }
    assert run.regrow.survival_rates() == expected
    total = sum((grown[n] & last[n]).sum().item() for n in grown) / sum(
        g.sum().item() for g in grown.values()
    )
    assert run.regrow.survival_rate() == total


def test_survival_is_not_counted_unless_asked_for() -> None:
    run = Run("erk98_rigl")
    run.train()
    assert math.isnan(run.regrow.survival_rate())
    assert run.regrow.survival_rates() == {}
    assert "survival" not in run.regrow.state_dict()


def test_warnings_name_the_line_that_called_step() -> None:
    run = Run("erk98_rigl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            run.masks["4.weight"].mask[:] = False
            run.masks["4.weight"].mask[0, 0] = True
        for step in range(EVERY):
            x, y = batch(step, 20)
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            run.regrow.step()
            run.optimizer.zero_grad()
    assert {Path(one.filename).name for one in caught} == {"test_methods.py"}
