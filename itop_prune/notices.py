"""What is odd at an update, in words, each said once: layers that are unused, deaf or starved."""

import warnings
from collections.abc import Collection, Iterator, Mapping

from itop_prune.mask import ITOP
from itop_prune.ranks import State, is_first


class Notices:
    """Warnings that wait until a step is over, lest one stops it halfway; each once, and on the first rank alone."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._waiting: list[str] = []

    def add(self, key: str, message: str) -> None:
        """Keep a message to be given, if none of its key was before."""
        if key not in self._known and is_first():
            self._waiting.append(message)
        self._known.add(key)

    def give(self) -> None:
        """Warn of what was kept; the warning points at the line that called the caller."""
        while self._waiting:
            warnings.warn(self._waiting.pop(0), stacklevel=3)


def odd_layers(
    state: State, masks: Mapping[str, ITOP], without_gradient: Collection[str], listened: bool, step: int
) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for every layer that is not used, hears nothing or has too few active weights.

    Args:
        state: Of all ranks.
        masks: Those that can move.
        without_gradient: Names of those that got none since the last update.
        listened: Whether the dense gradient was asked for.
        step: For the message.
    """
    for name in sorted(without_gradient):
        yield (
            name,
            f"{name} got no gradient since the last update: is its layer still used by the model? Where another "
            "took its place (reset_classifier, set_input_size), mask that one by apply(model, ..., include=[...]), "
            "then build optimizer and MaskScheduler anew with find_masks(model)",
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
                f"{name} has {state.active[name]} active weights for {itop.outputs} outputs, so some have none: "
                "lower the sparsity, or take a method that gives small layers more (ERK)",
            )
