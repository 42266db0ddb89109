"""The methods of the literature as rows of arguments: each keeps the promises."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.sparse_run import Run, assert_same, momentum, sparse
from helpers.toys import batch, convnet, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune.methods import criteria, schedules
from itop_prune.methods.schedules import alternating

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 3

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
methods = pytest.mark.parametrize("method", METHODS)
pytestmark = [  # what a ranking over all layers does to models so small
    pytest.mark.filterwarnings("ignore:.*so some have none"),
    pytest.mark.filterwarnings("ignore:the dense gradient of .* is 0 everywhere"),
]


def run_of(
    method: str, build: Callable[[], nn.Module] = mlp, sparsity: float = 0.5, **other: Any
) -> Run:
    """A run by a method of the table, or by it with other arguments."""
    rules = {**METHODS[method], "total_steps": STEPS, "every": EVERY, "stop": 1.0, **other}
    rules["gradient_steps"] = min(EVERY, rules.get("gradient_steps", 1))
    return sparse(build, momentum, sparsity=sparsity, **rules)


def ruled(steps: int = 9, every: int = 1, sparsity: float = 0.5, **rules: Any) -> Run:
    return sparse(mlp, momentum, sparsity=sparsity, total_steps=steps, every=every, **rules)


def test_there_are_rows() -> None:
    expected = {"erk98_rigl", "erk98_snfs", "erk98_gmp", "global98_granet", "global98_acdc"}
    expected |= {"tuned_global98_sparse-to-sparser"}
    assert expected <= ROWS.keys()


@methods
@pytest.mark.parametrize("build", [mlp, convnet])
def test_counts_are_exact_and_what_enters_or_leaves_is_zero_at_every_step(
    method: str, build: Callable
) -> None:
    run, rules = run_of(method, build), METHODS[method]
    weights = sum(itop.mask.numel() for itop in run.masks.values())
    first, counts = run.positions(), run.counts()
    started, last = sum(counts.values()), rules.get("final_sparsity")
    for step in range(1, STEPS + 1):
        before = run.positions()
        run.backward(step)
        run.optimizer.step()
        moved = run.regrow.step()
        run.optimizer.zero_grad()
        assert moved == (step % EVERY == 0)
        if moved:
            for name, itop in run.masks.items():
                touched = ~(before[name] & itop.mask)
                for value in (itop.parameter, *run.statistics(name)):
                    assert not value[touched].any()

        expected = started
        if last is not None and step >= EVERY:
            ended = round((1 - last) * weights)
            factor = schedules.find(rules["density"], "density")((step // EVERY) * EVERY / STEPS)
            expected = round(ended + (started - ended) * factor)
        assert sum(run.counts().values()) == expected
        if not {"redistribute", "density"} & rules.keys():
            assert run.counts() == counts
        if step == 2 * EVERY:
            assert any(not torch.equal(itop.mask, first[n]) for n, itop in run.masks.items())


@methods
@pytest.mark.parametrize(
    "stop_after", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 10))]
)
def test_resume_is_bit_exact(method: str, stop_after: int) -> None:
    whole, other = run_of(method), run_of(method)
    whole.train(range(stop_after))
    other.restore(whole.saved())
    rest = range(stop_after, STEPS)
    assert other.train(rest) == whole.train(rest)
    assert_same(other.numbers(), whole.numbers())
    if not math.isnan(whole.regrow.survival_rate()):
        assert other.regrow.survival_rates() == whole.regrow.survival_rates()


@methods
def test_the_same_steps_are_taken_before_the_first_update_whatever_is_collected(
    method: str,
) -> None:
    assert run_of(method).train(range(EVERY)) == run_of("survival").train(range(EVERY))


# Older compilers of torch make an instance of a torch.autograd.Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    [
        "momentum everywhere",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("erk98_snfs", "global98_granet")),
    ],
)
def test_torch_compile_gives_the_masks_of_an_eager_run(method: str) -> None:
    eager, compiled = run_of(method), run_of(method)
    compiled.model.compile(backend="aot_eager")
    for run in (eager, compiled):
        run.train(range(EVERY * 2))
    torch.compiler.reset()
    assert_same(compiled.positions(), eager.positions())


# --- global --------------------------------------------------------------------------------------


def test_global_pruning_takes_the_smallest_of_all_layers() -> None:
    run = ruled(rate=0.1, scope="global")
    with torch.no_grad():
        for name, scale in (("0.weight", 1.0), ("2.weight", 100.0), ("4.weight", 100.0)):
            run.masks[name].parameter.copy_(scale * run.masks[name].mask)
    before = run.positions()
    run.backward(0)
    assert run.regrow.step()
    stayed = {name: torch.equal(itop.mask, before[name]) for name, itop in run.masks.items()}
    assert stayed == {"0.weight": False, "2.weight": True, "4.weight": True}


def test_a_floor_keeps_every_layer_above_it() -> None:
    shares = {"0.weight": 0.0, "2.weight": 1.0, "4.weight": 1.0}
    run = ruled(rate=0.3, scope="global", floor=0.4, redistribute=lambda weights: shares)
    with torch.no_grad():
        run.masks["0.weight"].parameter.mul_(1e-6)
    run.backward(0)
    assert run.regrow.step()
    counts = run.counts()
    assert counts["0.weight"] == round(0.4 * 320)
    assert sum(counts.values()) == 280


# --- redistribution ------------------------------------------------------------------------------


def test_what_grows_goes_where_the_function_says_in_proportion() -> None:
    """Three quarters of what was pruned go to the first layer, nothing to the last."""
    seen: dict[str, Mapping[str, float]] = {}

    def mine(weights: Mapping, active: Mapping, pruned: Mapping) -> Mapping[str, float]:
        seen.update(weights=weights, active=active, pruned=pruned)
        return {"0.weight": 3.0, "2.weight": 1.0, "4.weight": 0.0}

    run = ruled(every=9, rate=0.2, schedule="constant", redistribute=mine)
    before = run.counts()
    run.train(range(9))
    pruned = {name: math.ceil(0.2 * active) for name, active in before.items()}
    sizes = {"0.weight": 320, "2.weight": 192, "4.weight": 48}
    assert seen == {"weights": sizes, "active": before, "pruned": pruned}
    total, counts = sum(pruned.values()), run.counts()
    gained = {name: counts[name] - (before[name] - pruned[name]) for name in before}
    assert gained["4.weight"] == 0
    assert gained["0.weight"] in (math.floor(0.75 * total), math.ceil(0.75 * total))
    assert sum(gained.values()) == total


def test_statistics_are_means_over_active_weights() -> None:
    seen: dict[str, dict[str, float]] = {}
    expected: dict[str, float] = {}

    def spy(magnitude: dict[str, float], momentum: dict[str, float]) -> dict[str, float]:
        seen.update(magnitude=magnitude, momentum=momentum)
        for name, itop in run.masks.items():
            expected[name] = itop.parameter.abs().sum().item() / itop.active
        return magnitude

    run = ruled(4, every=2, redistribute=spy)
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

    message = r"mine gave .*; it must give a number from 0 for every layer"
    with pytest.raises(ValueError, match=message):
        ruled(4, redistribute=mine).train(range(1))


# --- what criteria are given ---------------------------------------------------------------------


def dense_gradients(steps: int) -> list[dict[str, Tensor]]:
    """The true gradient of every weight at every step of a run without updates, by dense twins."""
    run, found = ruled(99, every=99), []
    for step in range(steps):
        twin = mlp()
        twin.load_state_dict(itop_prune.dense_state_dict(run.model))
        x, y = batch(step, 20)
        F.cross_entropy(twin(x), y).backward()
        found.append({name: twin.get_parameter(name).grad for name in run.masks})
        run.train(range(step, step + 1))
    return found


def given(steps: int, grow: Callable[[list[Tensor]], Callable], **options: Any) -> list[Tensor]:
    """What a criterion is given at the only update: of two layers, for the third is dense."""
    seen: list[Tensor] = []
    ruled(steps, every=steps, grow=grow(seen), **options).train(range(steps))
    return seen


def by_grad(seen: list[Tensor]) -> Callable:
    return lambda grad: seen.append(grad.clone()) or grad


def by_momentum(seen: list[Tensor]) -> Callable:
    return lambda momentum: seen.append(momentum.clone()) or momentum


@pytest.mark.parametrize("last", [1, 2, 4])
def test_gradients_are_summed_over_the_last_steps(last: int) -> None:
    found = dense_gradients(4)
    seen = given(4, by_grad, gradient_steps=last)
    for grad, name in zip(seen, ("0.weight", "2.weight"), strict=True):
        torch.testing.assert_close(grad, sum(step[name] for step in found[-last:]))


def test_momentum_is_the_moving_average_of_the_dense_gradient() -> None:
    found = dense_gradients(3)
    for average, name in zip(given(3, by_momentum), ("0.weight", "2.weight"), strict=True):
        expected = 0.1 * (0.81 * found[0][name] + 0.9 * found[1][name] + found[2][name])
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize(
    "options", [{"grow": "momentum"}, {"grow": "gradient", "gradient_steps": 3}]
)
def test_a_gradient_that_is_not_finite_is_not_remembered(options: dict[str, Any]) -> None:
    run = ruled(every=3, **options)
    spoil = run.model[0].weight_orig.register_hook(lambda gradient: gradient * math.inf)
    run.backward(0)
    spoil.remove()
    run.regrow.step()
    run.optimizer.zero_grad()
    run.train(range(1, 3))
    assert (run.regrow.updates, run.regrow.skipped) == (1, 0)
    state = run.regrow.state_dict()["dense"]
    assert all(tensor.isfinite().all() for kept in state.values() for tensor in kept.values())


def test_growth_sees_the_mask_after_pruning() -> None:
    seen: list[int] = []

    def spy(mask: Tensor) -> Tensor:
        seen.append(int(mask.sum()))
        return mask.float()

    run = ruled(every=3, grow=spy)
    sparse_ones = [itop.active for itop in run.masks.values() if not itop.mask.all()]
    run.train(range(3))
    assert seen == [active - math.ceil(run.regrow.rate * active) for active in sparse_ones]


def broken(weight: Tensor) -> Tensor:
    return weight * math.nan


@pytest.mark.parametrize("role", ["prune", "grow"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_criterion_that_gives_nan_is_named_with_the_layer(role: str, scope: str) -> None:
    with pytest.raises(ValueError, match=r"broken.*0\.weight.*numbers"):
        ruled(scope=scope, **{role: broken}).train(range(1))


def test_a_mix_that_gives_nan_is_named_with_the_layer() -> None:
    message = r"broken.*0\.weight.*numbers|broken.*0\.weight.*NaN"
    with pytest.raises((ValueError, RuntimeError), match=message):
        ruled(grow=criteria.mix(broken, "random")).train(range(1))


# --- density -------------------------------------------------------------------------------------

AT_REST = {"rate": 0.0, "min_rate": 0.0}


def test_each_layer_ends_at_what_the_final_method_gives_it() -> None:
    rules = {"density": "cubic", "final_sparsity": 0.9, "final_method": "uniform"}
    run = ruled(STEPS, every=EVERY, **AT_REST, **rules)
    run.train(range(STEPS))
    assert run.counts() == {"0.weight": 32, "2.weight": 19, "4.weight": 5}


def test_weights_that_left_on_the_way_to_sparse_stay_out_at_rate_0() -> None:
    run = run_of("erk98_gmp", sparsity=0.0)
    before = run.positions()
    for step in range(STEPS):
        run.train(range(step, step + 1))
        assert not any((itop.mask & ~before[name]).any() for name, itop in run.masks.items())
        before = run.positions()


def test_alternating_goes_dense_and_back() -> None:
    path, seen = functools.partial(alternating, cycles=2), []
    run = ruled(8, every=2, sparsity=0.0, density=path, final_sparsity=0.9, **AT_REST)
    run.train(range(8), after=lambda step: seen.append(sum(run.counts().values())))
    assert seen == [560, 56, 56, 560, 560, 56, 56, 56]


# --- refusals ------------------------------------------------------------------------------------

CUBIC = {"density": "cubic", "final_sparsity": 0.9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 0.9}, "density is constant, final_sparsity 0.9; they go together"),
        ({"density": "cubic"}, "density is cubic, final_sparsity None; they go together"),
        ({**CUBIC, "final_sparsity": 1.0}, "final_sparsity is 1.0; allowed"),
        ({**CUBIC, "every": 30}, "none is made, and final_sparsity never reached"),
        ({**CUBIC, "final_sparsity": 0.999}, "each of 3 layers needs at least 1"),
        ({**CUBIC, "density": "cubik"}, "unknown density 'cubik'.*nearest: 'cubic'"),
        (AT_REST, "rate is 0.0; allowed is a number in .0, 1., or 0 with final_sparsity"),
        ({"scope": "all"}, "scope is 'all'; allowed are 'layer' and 'global'"),
        ({"floor": 0.1}, "floor is 0.1; allowed is a number in .0, 1., with scope='global'"),
        (
            {"gradient_steps": 4},
            "gradient_steps is 4; allowed are whole numbers from 1 to every, 3",
        ),
        ({"gradient_steps": 0}, "gradient_steps is 0; allowed are whole numbers from 1"),
        ({"redistribute": "moment"}, "unknown redistribute 'moment'.*nearest: 'momentum'"),
        (
            {"redistribute": lambda weight: weight},
            "parameter of the redistribution <lambda> 'weight'; known are weights",
        ),
    ],
)
def test_bad_values_are_answered_with_what_is_allowed(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ruled(**{"steps": STEPS, "every": EVERY, **options})


# --- survival ------------------------------------------------------------------------------------


def test_survival_is_the_share_of_the_last_grown_that_is_still_there() -> None:
    run = run_of("survival")
    positions = [run.positions()]
    for update in range(3):
        run.train(range(update * EVERY, (update + 1) * EVERY))
        positions.append(run.positions())
        assert math.isnan(run.regrow.survival_rate()) == (update == 0)
    before, grown_in, last = positions[1:]
    grown = {name: grown_in[name] & ~before[name] for name in before}
    kept = {name: int((grown[name] & last[name]).sum()) for name in before}
    sizes = {name: int(grown[name].sum()) for name in before}
    expected = {name: kept[name] / size for name, size in sizes.items() if size}
    assert run.regrow.survival_rates() == expected
    assert run.regrow.survival_rate() == sum(kept.values()) / sum(sizes.values())


def test_survival_is_not_counted_unless_asked_for() -> None:
    run = run_of("erk98_rigl")
    run.train(range(STEPS))
    assert math.isnan(run.regrow.survival_rate())
    assert run.regrow.survival_rates() == {}
    assert "survival" not in run.regrow.state_dict()


def test_warnings_name_the_line_that_called_step() -> None:
    run = run_of("erk98_rigl")
    run.masks["4.weight"].mask[:] = False
    run.masks["4.weight"].mask[0, 0] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(EVERY):
            run.backward(step)
            run.optimizer.step()
            run.regrow.step()
            run.optimizer.zero_grad()
    assert {Path(one.filename).name for one in caught} == {"test_methods.py"}
