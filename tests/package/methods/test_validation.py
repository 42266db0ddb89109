"""Numbers of a user: the last that is allowed passes, the next is refused with what was seen and what is allowed."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from itop_prune.methods.validation import (
    check_rates,
    check_scores,
    check_steps,
    checked_seed,
    is_count,
    is_number,
)

NO_NUMBERS = [True, False, "1", None, 1j, torch.tensor(1), [1]]
LEAST = math.ulp(0.0)  # the smallest float above 0


@pytest.mark.parametrize("value", [1, 2, 10**20, np.int64(1)])
def test_whole_numbers_from_1_are_counts(value: object) -> None:
    assert is_count(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, math.nan, math.inf, np.bool_(True), *NO_NUMBERS])
def test_all_else_is_no_count(value: object) -> None:
    assert not is_count(value)


@pytest.mark.parametrize(
    "value", [0, 1, -1, 0.5, math.inf, math.nan, np.float32(0.5), np.float64(0.5), np.int64(1)]
)
def test_ints_and_floats_are_numbers_whatever_their_range(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_all_else_is_no_number(value: object) -> None:
    assert not is_number(value)


@pytest.mark.parametrize("seed", [0, -3, 10**20, np.int64(7)])
def test_whole_numbers_are_seeds_and_become_plain(seed: Any) -> None:
    assert checked_seed(seed) == seed
    assert type(checked_seed(seed)) is int


@pytest.mark.parametrize("seed", [1.5, "x", None, True])
def test_all_else_is_no_seed(seed: object) -> None:
    with pytest.raises(
        ValueError, match=f"^seed is {re.escape(repr(seed))}; allowed is a whole number$"
    ):
        checked_seed(seed)


@pytest.mark.parametrize(("total_steps", "every"), [(1, 1), (1, 2), (2, 1)])
def test_steps_are_counted_from_1(total_steps: int, every: int) -> None:
    check_steps(total_steps, every)


@pytest.mark.parametrize("name", ["total_steps", "every"])
@pytest.mark.parametrize("value", [0, 1.0, math.nan, True, "1"])
def test_steps_that_are_no_count_are_refused_by_name(name: str, value: Any) -> None:
    message = f"{name} is {value!r}; allowed are whole numbers from 1: it counts optimizer steps"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_steps(**{"total_steps": 1, "every": 1, name: value})


RATES = {"stop": 1.0, "rate": 0.5, "min_rate": 0.1, "may_rest": False}


@pytest.mark.parametrize(
    "given",
    [
        {"stop": LEAST},
        {"stop": 1},
        {"rate": LEAST, "min_rate": 0},
        {"rate": 1},
        {"rate": 1, "min_rate": 1},
        {"min_rate": 0.0},
        {"min_rate": 0.5},
        {"rate": 0, "min_rate": 0, "may_rest": True},
    ],
)
def test_rates_are_allowed_up_to_their_ends(given: dict[str, Any]) -> None:
    check_rates(**RATES | given)


@pytest.mark.parametrize("may_rest", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (name, value, allowed)
        for name, allowed, beyond in [
            ("stop", "(0, 1]", [0, -LEAST, math.nextafter(1.0, 2.0)]),
            ("rate", "(0, 1], or 0 with final_sparsity", [-LEAST, math.nextafter(1.0, 2.0)]),
            ("min_rate", "[0, rate], and rate is 0.5", [-LEAST, math.nextafter(0.5, 1.0)]),
        ]
        for value in [*beyond, math.nan, *NO_NUMBERS]
    ],
)
def test_rates_beyond_their_ends_are_refused_with_the_range(
    name: str, value: Any, allowed: str, may_rest: bool
) -> None:
    message = f"{name} is {value!r}; allowed is a number in {allowed}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_rates(**RATES | {name: value, "may_rest": may_rest})


@pytest.mark.parametrize("rate", [0, 0.0, -0.0])
def test_a_rate_of_0_is_refused_where_nothing_else_moves(rate: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^rate is {rate!r}; allowed is a number in \(0, 1\], or 0 with final_spars",
    ):
        check_rates(**RATES | {"rate": rate, "min_rate": 0})


def one_per_layer() -> None:
    """A criterion, for the name that the messages tell."""


MASK = torch.ones(4, 6, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_scores_of_the_shape_of_the_mask_may_be_of_any_type(dtype: torch.dtype) -> None:
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
        (0.5, "0.5"),
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
