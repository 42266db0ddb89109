"""Schedules and what follows from them: the rate, the plan of updates, and R_s over a run."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import itop_prune
from itop_prune.messages import describe
from itop_prune.methods import schedules

NUMBERS = json.loads((Path(__file__).parents[2] / "reference" / "numbers.json").read_text())
EXPECTED = NUMBERS["R_s"]["expected_under_random_growth"]["rows"]


def scheduler(model: nn.Module, density: float = 0.5, **options) -> itop_prune.MaskScheduler:
    """A scheduler over a model whose weights have gradients."""
    masks = itop_prune.apply(model, 1.0 - density, method="uniform")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return itop_prune.MaskScheduler(masks, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def rates(regrow: itop_prune.MaskScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        regrow.step()
        found.append(regrow.rate)
    return found


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", {0.0: 1.0, 0.3: 1.0, 1.0: 1.0}),
        ("linear", {0.0: 1.0, 0.3: 0.7, 1.0: 0.0}),
        ("cosine", {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0}),
        ("exponential", {0.0: 1.0, 0.5: 0.1, 1.0: 0.01}),
        # GMP's sparsity s_f + (s_i - s_f) (1 - t)^3 is the same said of the density.
        ("cubic", {0.0: 1.0, 0.5: 0.125, 0.9: 0.001, 1.0: 0.0}),
    ],
)
def test_a_schedule_by_hand_and_it_never_rises(name: str, factors: dict[float, float]) -> None:
    schedule = schedules.SCHEDULES[name]
    assert {progress: schedule(progress) for progress in factors} == pytest.approx(factors)
    found = [schedule(i / 100) for i in range(101)]
    assert found == sorted(found, reverse=True)


def test_exponential_falls_to_what_it_is_told() -> None:
    assert schedules.exponential(0.5, last=0.04) == pytest.approx(0.2)


def test_a_power_by_hand() -> None:
    schedule = schedules.power(1.5)
    assert [schedule(progress) for progress in (0.0, 0.75, 0.84, 1.0)] == pytest.approx(
        [1.0, 0.125, 0.064, 0.0]
    )
    for progress in (0.0, 0.2, 0.7, 1.0):
        assert schedules.power(3)(progress) == schedules.cubic(progress)
        assert schedules.power(1)(progress) == schedules.linear(progress)


@pytest.mark.parametrize("given", [{"power": 1.5}, schedules.power(1.5)], ids=["named", "made"])
def test_a_power_is_a_schedule_of_the_density_and_of_the_rate(given: object) -> None:
    regrow = scheduler(nn.Linear(40, 25), schedule=given, total_steps=4, every=1, min_rate=0.0)
    assert rates(regrow, 4) == pytest.approx([0.5 * (1 - step / 4) ** 1.5 for step in range(1, 5)])

    masks = itop_prune.apply(model := nn.Linear(40, 25), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = {"density": given, "final_sparsity": 0.9, "rate": 0.0, "min_rate": 0.0}
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1, **rules)
    counts = []
    model.weight_orig.grad = torch.ones(25, 40)
    for _ in range(4):
        regrow.step()
        counts.append(masks["weight"].active)
    assert counts == [round(100 + 400 * (1 - step / 4) ** 1.5) for step in range(1, 5)]


def test_a_power_is_named_in_messages_and_can_be_pickled() -> None:
    schedule = pickle.loads(pickle.dumps(schedules.power(1.5)))
    assert describe(schedule) == "power(1.5)"
    assert schedule(0.75) == 0.125


@pytest.mark.parametrize("power", [0, -1.5, "1.5", None, True, math.nan, math.inf])
def test_a_power_that_is_no_number_above_0_is_refused(power: object) -> None:
    message = re.escape(f"the power of a schedule is {power!r}; allowed is a number above 0")
    with pytest.raises(ValueError, match=message):
        schedules.power(power)
    for argument in ("schedule", "density"):
        with pytest.raises(ValueError, match=message):
            schedules.find({"power": power}, argument)


@pytest.mark.parametrize("given", [{}, {"powr": 1.5}, {"power": 1.5, "cycles": 2}])
def test_another_mapping_is_no_schedule(given: dict) -> None:
    message = re.escape(f"unknown density {given!r}; known are constant") + r'.*\{"power": 1.5\}'
    with pytest.raises(ValueError, match=message):
        schedules.find(given, "density")


@pytest.mark.parametrize("cycles", [1, 3, 4])
def test_alternating_is_dense_and_sparse_for_equal_times_and_ends_sparse(cycles: int) -> None:
    phases = [schedules.alternating(i / (2 * cycles), cycles) for i in range(2 * cycles)]
    assert phases == [1.0, 0.0] * cycles
    assert schedules.alternating(1.0, cycles) == 0.0


rate_alone = pytest.mark.filterwarnings("ignore:.*the masks never move")


@rate_alone
@pytest.mark.parametrize("row", NUMBERS["rate_cosine"], ids=lambda row: f"t={row['t']}")
def test_the_reference_rate(row: dict) -> None:
    options = {"total_steps": row["T_max"], "every": row["T_max"] + 1}
    regrow = scheduler(nn.Linear(4, 4), rate=row["d"], min_rate=row["eta_min"], **options)
    rates(regrow, row["t"])
    assert regrow.rate == pytest.approx(row["f"], abs=1e-9)


@rate_alone
@pytest.mark.parametrize(
    ("schedule", "stop", "expected"),
    [
        ("constant", 1.0, [0.4, 0.4, 0.4, 0.4]),
        ("linear", 1.0, [0.325, 0.25, 0.175, 0.1]),
        ("linear", 0.5, [0.25, 0.1, 0.1, 0.1, 0.1]),
        (lambda progress: progress**2, 1.0, [0.11875]),
        (np.float32, 1.0, [0.175]),  # numbers of NumPy's are numbers
    ],
    ids=["constant", "linear", "stop", "a function", "numpy"],
)
def test_the_rate_follows_the_schedule_until_stop_and_stays(
    schedule: object, stop: float, expected: list[float]
) -> None:
    options = {"total_steps": 4, "every": 5, "rate": 0.4, "min_rate": 0.1}
    regrow = scheduler(nn.Linear(4, 4), schedule=schedule, stop=stop, **options)
    assert rates(regrow, len(expected)) == pytest.approx(expected)


def test_the_reference_plan_of_updates() -> None:
    plan = NUMBERS["updates_at"]
    regrow = scheduler(nn.Linear(4, 4), total_steps=plan["total_steps"], every=plan["every"])
    assert [step for step in range(1, 20) if regrow.step()] == plan["updates_after_step"]


def test_the_reference_r_s_of_one_layer() -> None:
    case = NUMBERS["R_s"]["exact"][0]
    layer = nn.Linear(8, 1, bias=False)
    first, *others = (torch.tensor([mask], dtype=torch.bool) for mask in case["masks"])
    masks = {"weight": itop_prune.ITOP.apply(layer, "weight", first)}
    layer.weight_orig.grad = torch.ones(1, 8)
    coming = iter(others)
    regrow = itop_prune.MaskScheduler(
        masks,
        torch.optim.SGD(layer.parameters(), lr=0.1),
        total_steps=len(others),
        every=1,
        rate=1.0,
        schedule="constant",
        grow=lambda mask: next(coming).float(),
    )
    found = [regrow.exploration_rate()]
    for mask in others:
        regrow.step()
        assert torch.equal(layer.weight_mask, mask)
        found.append(regrow.exploration_rate())
    assert found == case["Rs"]


def test_the_reference_r_s_over_layers_counts_weights_and_not_layers() -> None:
    case = NUMBERS["R_s"]["exact"][1]
    sizes = {name: layer["numel"] for name, layer in case["layers"].items()}
    layers = {name: nn.Linear(size, 1, bias=False) for name, size in sizes.items()}
    model = nn.ModuleDict({**layers, "dense": nn.Linear(10, 1, bias=False)})
    masks = {}
    for name, layer in case["layers"].items():
        union = torch.arange(layer["numel"])[None] < layer["union"]
        masks[f"{name}.weight"] = itop_prune.ITOP.apply(model[name], "weight", union)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=1, every=1)
    assert regrow.exploration_rate() == case["Rs_global"]


@pytest.mark.parametrize(
    "row", EXPECTED, ids=lambda row: f"density {row['density']}, {row['updates']} updates"
)
def test_r_s_under_random_growth_is_what_is_expected(row: dict) -> None:
    """R_s of n weights deviates by at most sqrt(R_s (1 - R_s) / n): positions are drawn once each.

    Rounding an exchange up to a whole weight adds at most one weight per update and layer. Allowed
    are both, with 4 deviations: at most 0.007. Eight layers instead of a large one, since torch
    splits larger tensors over threads.
    """
    model = nn.Sequential(*(nn.Linear(150, 150, bias=False) for _ in range(8)))
    n, updates = 8 * 150 * 150, row["updates"]
    schedule = "constant" if row["schedule"] == "constant" else "cosine"
    options = {"rate": row["d"], "min_rate": 0.005, "schedule": schedule}
    regrow = scheduler(model, row["density"], total_steps=updates, every=1, **options)
    for _ in range(updates):
        assert regrow.step()
    allowed = 4 * math.sqrt(row["Rs"] * (1 - row["Rs"]) / n) + 8 * updates / n
    assert abs(regrow.exploration_rate() - row["Rs"]) < allowed
