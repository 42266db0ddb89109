"""The plan: which steps are followed by an update, and what it exchanges, worked out by hand."""

from typing import Any

import pytest

from itop_prune.methods.schedules import constant, linear
from itop_prune.update.timetable import Plan


def plan(**given: Any) -> Plan:
    settings = {
        "total_steps": 100,
        "every": 10,
        "stop": 1.0,
        "rate": 0.5,
        "min_rate": 0.1,
        "schedule": linear,
    }
    return Plan(**settings | given)


@pytest.mark.parametrize(
    ("total_steps", "every", "stop", "expected"),
    [
        (100, 25, 1.0, [25, 50, 75, 100]),
        (99, 25, 1.0, [25, 50, 75]),
        (100, 25, 0.75, [25, 50, 75]),
        (100, 1, 0.29, list(range(1, 30))),  # 0.29 * 100 is 28.999999999999996
        (10, 11, 1.0, []),
    ],
)
def test_updates_are_every_so_many_steps_up_to_the_stop_that_one_included(
    total_steps, every, stop, expected
):
    assert list(plan(total_steps=total_steps, every=every, stop=stop).updates()) == expected


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 10), (9, 10), (10, 20), (79, 80), (80, None), (500, None)]
)
def test_the_next_update_is_the_first_after_a_step(step, expected):
    assert plan(stop=0.8).next_update(step) == expected


def test_the_rate_falls_from_the_first_to_the_last_which_is_reached_at_the_stop():
    falling = plan(stop=0.5)
    assert [round(falling.rate_at(step), 12) for step in (0, 25, 50, 100)] == [0.5, 0.3, 0.1, 0.1]
    assert plan(schedule=constant).rate_at(100) == 0.5


def test_progress_is_whole_at_the_last_update_and_after_it():
    assert [plan(total_steps=99).progress(step) for step in (45, 90, 95)] == [0.5, 1.0, 1.0]
    assert plan(every=1000).progress(7) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every is 0; allowed are whole numbers from 1"),
        ({"total_steps": 1.5}, "total_steps is 1.5; allowed"),
        ({"every": True}, "every is True; allowed"),
        ({"stop": 0.0}, "stop is 0.0; allowed is a number in .0, 1."),
        ({"rate": float("nan")}, "rate is nan; allowed"),
        (
            {"rate": 0.0, "min_rate": 0.0},
            "rate is 0.0; allowed is a number in .0, 1., or 0 with final_sparsity",
        ),
        ({"min_rate": 0.6}, "min_rate is 0.6; allowed is a number in .0, rate., and rate is 0.5"),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**given)


def test_a_rate_of_zero_is_allowed_where_the_density_moves():
    assert plan(rate=0.0, min_rate=0.0, may_rest=True).rate_at(10) == 0.0
