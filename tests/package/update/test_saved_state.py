"""The form of a saved MaskScheduler: every other is refused, and the scheduler stays as it was."""

import copy
from typing import Any

import pytest
import torch
from helpers.sparse_run import Run, sparse

FLOATS = {
    "0.weight": torch.ones(16, 20),
    "2.weight": torch.ones(12, 16),
    "4.weight": torch.ones(4, 12),
}
MASKS = {name: tensor.bool() for name, tensor in FLOATS.items()}
SHAPES = {name: tuple(tensor.shape) for name, tensor in FLOATS.items()}
EMPTY = {"grown": {}, "counts": {}}
OTHERS: dict[str, list[object]] = {
    "step": [None, -1, 1.0, True, "3", torch.tensor(3)],
    "updates": [None, -1],
    "skipped": [[], 0.5],
    "due": [None, 1, "no"],
    "without_gradient": [None, 3, "0.weight", ["x"], [["0.weight"]], [0]],
    "first_counts": [None, [], {"0.weight": 3}, dict.fromkeys(MASKS), dict.fromkeys("xyz", 1)],
    "dense": [
        None,
        {"sums": {}},
        {"sums": None, "averages": {}},
        {"sums": {}, "averages": {"0.weight": 1.0}},
        {"sums": {"0.weight": FLOATS["2.weight"]}, "averages": {}},
        {"sums": {"x": FLOATS["0.weight"]}, "averages": {}},
        {"sums": {"0.weight": FLOATS["0.weight"].to("meta")}, "averages": {}},
        {"sums": MASKS, "averages": {}},
    ],
    "shapes": [None, []],
    "explored": [None, [], {}, dict.fromkeys(MASKS), FLOATS, MASKS],
    "entered": [None, 3, {"0.weight": -1}, {"0.weight": None}, {"x": 1}],
    "survival": [
        None,
        {},
        {**EMPTY, "grown": FLOATS},
        {**EMPTY, "grown": {"0.weight": MASKS["2.weight"]}},
        {**EMPTY, "counts": {"0.weight": 3}},
        {**EMPTY, "counts": {"0.weight": (1, 2, 3)}},
        {**EMPTY, "counts": {"0.weight": (1, -2)}},
    ],
}


def run_of(**options: Any) -> Run:
    return sparse(grow="momentum", survival=True, **options)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    run = run_of()
    run.train(range(5))
    return run.regrow.state_dict()


@pytest.mark.parametrize("key", OTHERS)
def test_an_entry_of_another_kind_is_refused_and_changes_nothing(
    key: str, state: dict[str, Any]
) -> None:
    regrow = run_of(seed=1).regrow
    before = copy.deepcopy(regrow.state_dict())
    for value in OTHERS[key]:
        with pytest.raises(
            ValueError, match=f"the state has another kind of {key}; give what a Ma"
        ):
            regrow.load_state_dict({**state, key: value})
        assert repr(regrow.state_dict()) == repr(before)
    regrow.load_state_dict(state)
    assert repr(regrow.state_dict()) == repr(state)


@pytest.mark.parametrize("state", [None, [], "state", {}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"the state lacks step, updates, .*explored; give what"):
        run_of().regrow.load_state_dict(state)


@pytest.mark.parametrize(
    ("shapes", "differing"),
    [
        ({}, "0.weight, 2.weight, 4.weight"),
        ({**SHAPES, "x": (16, 20)}, "x"),
        ({**SHAPES, "2.weight": (16, 12)}, "2.weight"),  # as many weights
    ],
)
def test_a_state_of_other_masks_is_refused_by_name(
    shapes: dict[str, Any], differing: str, state: dict[str, Any]
) -> None:
    regrow = run_of(seed=1).regrow
    before = copy.deepcopy(regrow.state_dict())
    message = f"the state was saved for other masks; different are: {differing}$"
    with pytest.raises(ValueError, match=message):
        regrow.load_state_dict({**state, "shapes": shapes})
    assert repr(regrow.state_dict()) == repr(before)
