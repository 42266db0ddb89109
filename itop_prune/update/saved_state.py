"""The form of a saved MaskScheduler, checked before anything of it is loaded."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch

from itop_prune.methods.validation import is_plain
from itop_prune.update.exploration import Explored

SAVED = (
    "step",
    "updates",
    "skipped",
    "due",
    "without_gradient",
    "first_counts",
    "dense",
    "shapes",
    "explored",
)
"""The keys that a state dict must have to be loaded."""

ADVICE = "give what a MaskScheduler's state_dict() returned"


def check_state(state: Mapping[str, Any], explored: Explored) -> None:
    """Refuse a state that no MaskScheduler of these masks can have saved.

    Args:
        state: What is to be loaded.
        explored: That of the masks.

    Raises:
        ValueError: It lacks an entry, is of other masks, or an entry is of another kind.
    """
    shapes = explored.shapes
    missing = [key for key in SAVED if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing)}; {ADVICE}")

    saved = state["shapes"]
    if isinstance(saved, Mapping):
        names = saved.keys() | shapes.keys()
        differing = sorted(str(name) for name in names if saved.get(name) != shapes.get(name))
        if differing:
            raise ValueError(
                f"the state was saved for other masks; different are: {', '.join(differing)}"
            )

    wrong = [key for key, fits in _fitting(state, explored).items() if not fits]
    if wrong:
        raise ValueError(f"the state has another kind of {', '.join(wrong)}; {ADVICE}")


def _fitting(state: Mapping[str, Any], explored: Explored) -> dict[str, bool]:
    """Tell of each entry whether a MaskScheduler of these masks can have saved it."""
    shapes = explored.shapes
    lengths = {name: tensor.shape for name, tensor in explored.bits.items()}

    def by_layer(values: object, fits: Callable[[Any, tuple[int, ...]], bool]) -> bool:
        return isinstance(values, Mapping) and all(
            name in shapes and fits(value, shapes[name]) for name, value in values.items()
        )

    names, first, dense = state["without_gradient"], state["first_counts"], state["dense"]
    survival = state.get("survival", {"grown": {}, "counts": {}})
    return {
        **{key: _is_whole(state[key]) for key in ("step", "updates", "skipped")},
        "due": isinstance(state["due"], bool),
        "without_gradient": isinstance(names, list)
        and all(isinstance(name, str) and name in shapes for name in names),
        "first_counts": by_layer(first, _is_whole) and len(first) in (0, len(shapes)),
        "dense": isinstance(dense, Mapping)
        and by_layer(dense.get("sums"), _is_gradient)
        and by_layer(dense.get("averages"), _is_gradient),
        "shapes": isinstance(state["shapes"], Mapping),
        "explored": by_layer(state["explored"], lambda value, _: _is_packed(value))
        and {name: tensor.shape for name, tensor in state["explored"].items()} == lengths,
        "entered": by_layer(state.get("entered", {}), _is_whole),
        "survival": isinstance(survival, Mapping)
        and by_layer(survival.get("grown"), _is_grown)
        and by_layer(survival.get("counts"), _is_pair),
    }


def _is_whole(value: object, shape: tuple[int, ...] = ()) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_pair(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_whole, value))


def _is_grown(value: object, shape: tuple[int, ...]) -> bool:
    if not is_plain(value) or value.dtype != torch.int64 or value.ndim != 1:
        return False
    inside = (value >= 0) & (value < math.prod(shape))
    return bool(inside.all() and (value[1:] > value[:-1]).all())


def _is_packed(value: object) -> bool:
    return is_plain(value) and value.dtype == torch.uint8


def _is_gradient(value: object, shape: tuple[int, ...]) -> bool:
    return is_plain(value) and value.is_floating_point() and value.shape == shape
