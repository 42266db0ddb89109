"""What is odd at an update, in words, each said once: layers that are unused, deaf or starved."""

import warnings
from collections.abc import Collection, Iterator, Mapping

from itop_prune.distributed import State, is_first
from itop_prune.layers.handle import ITOP
from itop_prune.methods.lookup import listed

MISSES = 3
"""So many updates in a row without a gradient are no accident."""


class Notices:
    """Warnings that wait until a step is over, lest one stops it halfway; each once, and on the first rank alone."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._waiting: list[str] = []
        self._rows: dict[str, int] = {}

    def in_a_row(self, key: str, now: bool) -> int:
        """Return how many times in a row, this one included, something was so."""
        self._rows[key] = self._rows.get(key, 0) + 1 if now else 0
        return self._rows[key]

    def missed(self, has_gradient: Mapping[str, bool]) -> list[str]:
        """Count an update, and return the names of those that several in a row have found without a gradient."""
        return [
            name
            for name, has in has_gradient.items()
            if self.in_a_row(f"missed {name}", not has) >= MISSES
        ]

    def add(self, key: str, message: str) -> None:
        """Keep a message to be given, if none of its key was before."""
        if key not in self._known and is_first():
            self._waiting.append(message)
        self._known.add(key)

    def give(self) -> None:
        """Warn of what was kept; the warning points at the line that called the caller."""
        while self._waiting:
            warnings.warn(self._waiting.pop(0), stacklevel=3)


def deaf(step: int) -> str:
    """Return what to say where gradients are there and nothing was heard."""
    return (
        f"an update is due at step {step}, and waits: weights have gradients, and no dense gradient was seen. It is "
        "collected where loss.backward() goes through the model; what is set by hand or made by torch.func is not"
    )


def odd_layers(
    state: State,
    masks: Mapping[str, ITOP],
    without_gradient: Collection[str],
    missed: Collection[str],
    listened: bool,
    step: int,
    ends: bool = False,
) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for every layer that is not used, hears nothing or has too few active weights.

    Args:
        state: Of all ranks.
        masks: Those that can move.
        without_gradient: Names of those that got none since the last update.
        missed: Names of those that got none at each of the last updates, this one included.
        listened: Whether the dense gradient was asked for.
        step: For the message.
        ends: Whether the density must be the final one after this update.
    """
    for name in sorted(without_gradient):
        yield (
            name,
            f"{name} got no gradient since the last update: is its layer still used by the model? Where another "
            "took its place (reset_classifier, set_input_size), mask that one by apply(model, ..., include=[...]), "
            "then build optimizer and MaskScheduler anew with find_masks(model)",
        )
    if used := [name for name in missed if name not in without_gradient]:
        yield (
            "missed",
            f"{listed(used)} got no gradient at step {step} and the updates before it, though between them: the masks "
            "stay as they are. Where layers are used in turn (experts, heads), choose `every` so that it meets all",
        )
    absent = [name for name, has in state.has_gradient.items() if not has]
    if absent and ends:
        yield (
            "final",
            f"the final sparsity is missed: these got no gradient at the last update, step {step}, and stay as they "
            f"are: {listed(absent)}. Choose `every`, `stop` and total_steps so that all layers are used in that step",
        )
    for name in state.silent if listened and state.any_gradient else ():
        yield (
            f"silent {name}",
            f"the dense gradient of {name} is 0 everywhere at step {step}, so growth there is by chance: is "
            "a layer near it so sparse that nothing passes, or a scale behind it still 0?",
        )
    for name, itop in masks.items():
        if state.active[name] < itop.outputs:
            yield (
                f"few {name}",
                f"{name} has fewer active weights than outputs, {state.active[name]} and {itop.outputs}, so some have "
                "none: lower the sparsity, or take a method that gives small layers more (ERK)",
            )
