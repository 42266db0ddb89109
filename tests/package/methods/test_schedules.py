"""Schedules and what follows from them: the rate, the plan of updates, and R_s over a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import itop_prune
from itop_prune.methods import schedules

NUMBERS = json.loads((Path(__file__).parents[2] / "reference" / "numbers.json").read_text())
EXPECTED = NUMBERS["R_s"]["expected_under_random_growth"]["rows"]


def scheduler(model: nn.Module, density: float = 0.5, **options) -> itop_prune.MaskScheduler:
    """A scheduler over a model whose weights have gradients of 0."""
    masks = itop_prune.apply(model, 1.0 - density, method="uniform")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return itop_prune.MaskScheduler(masks, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_constant_is_one(progress: float) -> None:
    assert schedules.constant(progress) == 1.0


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_linear_falls_evenly(progress: float, factor: float) -> None:
    assert schedules.linear(progress) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0)]
)
def test_cosine_is_half_a_wave(progress: float, factor: float) -> None:
    assert schedules.cosine(progress) == pytest.approx(factor)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (0.5, 0.1), (1.0, 0.01)])
def test_exponential_loses_the_same_share_in_equal_times(progress: float, factor: float) -> None:
    assert schedules.exponential(progress) == pytest.approx(factor)
    assert schedules.exponential(progress, last=0.04) == pytest.approx(0.04**progress)


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1.0), (0.5, 0.125), (0.9, 0.001), (1.0, 0.0)]
)
def test_cubic_is_the_cube_of_what_is_left(progress: float, factor: float) -> None:
    """GMP's sparsity s_f + (s_i - s_f) (1 - t)^3 is the same said of the density."""
    assert schedules.cubic(progress) == pytest.approx(factor)


@pytest.mark.parametrize("cycles", [1, 3, 4])
def test_alternating_is_dense_and_sparse_for_equal_times_and_ends_sparse(cycles: int) -> None:
    phases = [schedules.alternating(i / (2 * cycles), cycles) for i in range(2 * cycles)]
    assert phases == [1.0, 0.0] * cycles
    assert schedules.alternating(1.0, cycles) == 0.0


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "cubic"])
def test_a_schedule_never_rises(name: str) -> None:
    factors = [schedules.SCHEDULES[name](i / 100) for i in range(101)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("row", NUMBERS["rate_cosine"], ids=lambda row: f"t={row['t']}")
def test_the_reference_rate(row: dict) -> None:
    regrow = scheduler(
        nn.Linear(4, 4),
        total_steps=row["T_max"],
        every=row["T_max"] + 1,
        rate=row["d"],
        min_rate=row["eta_min"],
    )
    for _ in range(row["t"]):
        regrow.step()
    assert regrow.rate == pytest.approx(row["f"], abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.325, 0.25, 0.175, 0.1]),
        (lambda p: p**2, [0.11875]),
    ],
    ids=["constant", "linear", "a function"],
)
def test_the_rate_after_every_step_follows_the_schedule(
    schedule: object, expected: list[float]
) -> None:
    regrow = scheduler(
        nn.Linear(4, 4), total_steps=4, every=5, rate=0.4, min_rate=0.1, schedule=schedule
    )
    rates = []
    for _ in expected:
        regrow.step()
        rates.append(regrow.rate)
    assert rates == pytest.approx(expected)


def test_a_schedule_may_give_a_number_of_numpys() -> None:
    regrow = scheduler(
        nn.Linear(4, 4), total_steps=4, every=5, rate=0.4, min_rate=0.0, schedule=np.float32
    )
    regrow.step()
    assert regrow.rate == 0.1


def test_the_rate_reaches_its_minimum_at_stop_and_stays_there() -> None:
    regrow = scheduler(nn.Linear(4, 4), total_steps=8, every=9, stop=0.5, rate=0.4, min_rate=0.1)
    rates = []
    for _ in range(10):
        regrow.step()
        rates.append(regrow.rate)
    assert rates[2] > 0.1
    assert rates[3:] == pytest.approx([0.1] * 7)


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
    rates = [regrow.exploration_rate()]
    for mask in others:
        regrow.step()
        assert torch.equal(layer.weight_mask, mask)
        rates.append(regrow.exploration_rate())
    assert rates == case["Rs"]


def test_the_reference_r_s_over_layers_counts_weights_and_not_layers() -> None:
    case = NUMBERS["R_s"]["exact"][1]
    model = nn.ModuleDict(
        {name: nn.Linear(layer["numel"], 1, bias=False) for name, layer in case["layers"].items()}
    )
    model["dense"] = nn.Linear(10, 1, bias=False)
    masks = {}
    for name, layer in case["layers"].items():
        union = torch.arange(layer["numel"])[None] < layer["union"]
        masks[f"{name}.weight"] = itop_prune.ITOP.apply(model[name], "weight", union)
    regrow = itop_prune.MaskScheduler(
        masks, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1, every=1
    )
    assert regrow.exploration_rate() == case["Rs_global"]


@pytest.mark.parametrize(
    "row", EXPECTED, ids=lambda row: f"density {row['density']}, {row['updates']} updates"
)
def test_r_s_under_random_growth_is_what_is_expected(row: dict) -> None:
    """Of n weights, R_s has a standard deviation of at most sqrt(R_s (1 - R_s) / n): positions are drawn once each.

    Rounding an exchange up to a whole weight adds at most one weight per update and layer. Allowed
    are both, with 4 deviations: at most 0.007. Eight layers instead of a large one, since torch
    splits larger tensors over threads.
    """
    model = nn.Sequential(*(nn.Linear(150, 150, bias=False) for _ in range(8)))
    n = 8 * 150 * 150
    schedule = "constant" if row["schedule"] == "constant" else "cosine"
    regrow = scheduler(
        model,
        row["density"],
        total_steps=row["updates"],
        every=1,
        rate=row["d"],
        min_rate=0.005,
        schedule=schedule,
    )
    for _ in range(row["updates"]):
        assert regrow.step()
    allowed = 4 * math.sqrt(row["Rs"] * (1 - row["Rs"]) / n) + 8 * row["updates"] / n
    assert abs(regrow.exploration_rate() - row["Rs"]) < allowed
