"""The form of a saved MaskScheduler, checked before anything of it is loaded."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from itop_prune.methods.validation import is_plain

SAVED = (
    "step",
    "updates",
    "skipped",
    "due",
    "without_gradient",
    "first_counts",
    "dense",
    "explored",
)
"""The keys that a state dict must have to be loaded."""

ADVICE = "give what a MaskScheduler's state_dict() returned"


def check_state(state: Mapping[str, Any], explored: Mapping[str, Tensor]) -> None:
    """Refuse a state that no MaskScheduler of these masks can have saved.

    Args:
        state: What is to be loaded.
        explored: By name, what the scheduler has explored.

    Raises:
        ValueError: It lacks an entry, is of other masks, or an entry is of another kind.
    """
    missing = [key for key in SAVED if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing)}; {ADVICE}")

    saved = state["explored"]
    if isinstance(saved, Mapping) and all(map(is_plain, saved.values())):
        differing = sorted(
            str(name)
            for name in saved.keys() | explored.keys()
            if name not in saved
            or name not in explored
            or saved[name].shape != explored[name].shape
        )
        if differing:
            raise ValueError(
                f"the state was saved for other masks; different are: {', '.join(differing)}"
            )

    wrong = [key for key, fits in _fitting(state, explored).items() if not fits]
    if wrong:
        raise ValueError(f"the state has another kind of {', '.join(wrong)}; {ADVICE}")


def _fitting(state: Mapping[str, Any], explored: Mapping[str, Tensor]) -> dict[str, bool]:
    """Tell of each entry whether a MaskScheduler of these masks can have saved it."""

    def by_layer(values: object, fits: Callable[[Any, Tensor], bool]) -> bool:
        return isinstance(values, Mapping) and all(
            name in explored and fits(value, explored[name]) for name, value in values.items()
        )

    names, first, dense = state["without_gradient"], state["first_counts"], state["dense"]
    survival = state.get("survival", {"grown": {}, "counts": {}})
    return {
        **{key: _is_whole(state[key]) for key in ("step", "updates", "skipped")},
        "due": isinstance(state["due"], bool),
        "without_gradient": isinstance(names, list)
        and all(isinstance(name, str) and name in explored for name in names),
        "first_counts": by_layer(first, _is_whole) and len(first) in (0, len(explored)),
        "dense": isinstance(dense, Mapping)
        and by_layer(dense.get("sums"), _is_gradient)
        and by_layer(dense.get("averages"), _is_gradient),
        "explored": by_layer(state["explored"], _is_mask),
        "entered": by_layer(state.get("entered", {}), _is_whole),
        "survival": isinstance(survival, Mapping)
        and by_layer(survival.get("grown"), _is_mask)
        and by_layer(survival.get("counts"), _is_pair),
    }


def _is_whole(value: object, explored: Tensor | None = None) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_pair(value: object, explored: Tensor) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_whole, value))


def _is_mask(value: object, explored: Tensor) -> bool:
    return is_plain(value) and value.shape == explored.shape and value.dtype == torch.bool


def _is_gradient(value: object, explored: Tensor) -> bool:
    return is_plain(value) and value.is_floating_point() and value.shape == explored.shape
