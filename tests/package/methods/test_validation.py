"""Numbers of a user: the last that is allowed passes, the next is refused with what is allowed."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import itop_prune
from itop_prune.methods.validation import check_scores, checked_seed, is_count, is_number

NO_NUMBERS = [True, False, "1", None, 1j, torch.tensor(1), [1]]
LEAST = math.ulp(0.0)  # the smallest float above 0


def test_whole_numbers_from_1_are_counts_and_all_else_is_not() -> None:
    assert all(is_count(value) for value in (1, 2, 10**20, np.int64(1)))
    others = [0, -1, 1.0, math.nan, math.inf, np.bool_(True), *NO_NUMBERS]
    assert [value for value in others if is_count(value)] == []


def test_ints_and_floats_are_numbers_whatever_their_range_and_all_else_is_not() -> None:
    numbers = [0, -1, 0.5, math.inf, math.nan, np.float32(0.5), np.float64(0.5), np.int64(1)]
    assert all(is_number(value) for value in numbers)
    assert [value for value in NO_NUMBERS if is_number(value)] == []


def test_whole_numbers_are_seeds_and_become_plain() -> None:
    for seed in (0, -3, 10**20, np.int64(7)):
        assert checked_seed(seed) == seed
        assert type(checked_seed(seed)) is int
    for seed in (1.5, "x", None, True):
        message = f"^seed is {re.escape(repr(seed))}; allowed is a whole number$"
        with pytest.raises(ValueError, match=message):
            checked_seed(seed)


def schedule(**given: Any) -> itop_prune.MaskScheduler:
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options = {"total_steps": 10, "every": 1, "rate": 0.5, "min_rate": 0.1, **given}
    return itop_prune.MaskScheduler(itop_prune.apply(layer, 0.5), optimizer, **options)


def refused(message: str, **given: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schedule(**given)


@pytest.mark.parametrize("name", ["total_steps", "every"])
def test_steps_are_counted_from_1(name: str) -> None:
    schedule(**{"total_steps": 1, "every": 1, name: 1})
    for value in (0, 1.0, math.nan, True, "1"):
        allowed = "allowed are whole numbers from 1 to 2^63 - 1: it counts optimizer steps"
        refused(f"{name} is {value!r}; {allowed}", **{name: value})


MOVING = {"density": "linear", "final_sparsity": 0.9}


@pytest.mark.parametrize(
    "given",
    [
        {"stop": 1},
        {"rate": LEAST, "min_rate": 0},
        {"rate": 1, "min_rate": 1},
        {"min_rate": 0.0},
        {"min_rate": 0.5},
        {"rate": 0, "min_rate": 0, **MOVING},
    ],
)
def test_rates_are_allowed_up_to_their_ends(given: dict[str, Any]) -> None:
    assert schedule(**given).rate == given.get("rate", 0.5)


@pytest.mark.parametrize("moving", [{}, MOVING], ids=["", "moving"])
@pytest.mark.parametrize(
    ("name", "allowed", "beyond"),
    [
        ("stop", "(0, 1]", [0, -LEAST, math.nextafter(1.0, 2.0)]),
        ("rate", "(0, 1], or 0 with final_sparsity", [-LEAST, math.nextafter(1.0, 2.0)]),
        ("min_rate", "[0, rate], and rate is 0.5", [-LEAST, math.nextafter(0.5, 1.0)]),
    ],
)
def test_rates_beyond_their_ends_are_refused_with_the_range(
    name: str, allowed: str, beyond: list[float], moving: dict[str, Any]
) -> None:
    for value in [*beyond, math.nan, *NO_NUMBERS]:
        message = f"{name} is {value!r}; allowed is a number in {allowed}"
        refused(message, **{name: value, **moving})


def test_a_rate_of_0_is_refused_where_nothing_else_moves() -> None:
    for rate in (0, 0.0, -0.0):
        message = f"rate is {rate!r}; allowed is a number in (0, 1], or 0 with final_sparsity"
        refused(message, rate=rate, min_rate=0)


def one_per_layer() -> None:
    """A criterion, for the name that the messages tell."""


MASK = torch.ones(4, 6, dtype=torch.bool)


def test_scores_of_the_shape_of_the_mask_may_be_of_any_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        check_scores(torch.ones(4, 6, dtype=dtype), MASK, one_per_layer, "")


@pytest.mark.parametrize(
    ("scores", "seen"),
    [
        (torch.ones(6, 4), "(6, 4) on cpu"),
        (torch.ones(24), "(24,) on cpu"),
        (torch.ones(1, 4, 6), "(1, 4, 6) on cpu"),
        (torch.ones(4, 1), "(4, 1) on cpu"),
        (torch.ones(()), "() on cpu"),
        (torch.ones(4, 6, device="meta"), "(4, 6) on meta"),
        (None, "None"),
        ([1.0, 2.0], "[1.0, 2.0]"),
    ],
)
def test_scores_that_are_not_one_per_weight_are_refused_with_whose_they_are(
    scores: object, seen: str
) -> None:
    message = (
        f"one_per_layer gave {seen} for 0.weight; it must give one score per weight, (4, 6) on cpu"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_scores(scores, MASK, one_per_layer, " for 0.weight")
