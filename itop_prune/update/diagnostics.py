"""Warnings about layers that get no gradient, no dense gradient, or too few weights."""

import warnings
from collections.abc import Collection, Iterator, Mapping

from itop_prune.distributed import UpdateInputs, is_first
from itop_prune.layers.handle import ITOP
from itop_prune.messages import listed

MISSES = 3
"""After so many updates in a row without a gradient, a layer is reported."""


class PendingWarnings:
    """Collects warnings during a step and issues them afterwards.

    So a warning turned into an error can't interrupt an update. Each warning is issued once, on the
    first rank only.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._waiting: list[str] = []
        self._streaks: dict[str, int] = {}

    def streak(self, key: str, happened: bool) -> int:
        """Count how many times in a row something happened, this time included."""
        self._streaks[key] = self._streaks.get(key, 0) + 1 if happened else 0
        return self._streaks[key]

    def often_without_gradient(self, has_gradient: Mapping[str, bool]) -> list[str]:
        """Count an update, and list the layers without a gradient at several updates in a row."""
        return [
            name
            for name, has in has_gradient.items()
            if self.streak(f"missed {name}", not has) >= MISSES
        ]

    def add(self, key: str, message: str) -> None:
        """Keep a message, if its key is new."""
        if key not in self._known and is_first():
            self._waiting.append(message)
        self._known.add(key)

    def issue(self) -> None:
        """Issue what was kept; the warning points at the line that called the caller."""
        while self._waiting:
            warnings.warn(self._waiting.pop(0), stacklevel=3)


def no_dense_gradient(step: int) -> str:
    """Explain that gradients are there, and no dense gradient was collected."""
    return (
        f"an update is due at step {step}, and waits: weights have gradients, and no dense "
        "gradient was seen. It is collected where loss.backward() goes through the model; a "
        "gradient that is set by hand or made by torch.func is not"
    )


def layer_warnings(
    inputs: UpdateInputs,
    masks: Mapping[str, ITOP],
    without_gradient: Collection[str],
    often_missed: Collection[str],
    needs_dense: bool,
    step: int,
    last_update: bool = False,
    across_layers: bool = False,
) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for every layer with a problem at an update.

    Args:
        inputs: Of all ranks.
        masks: The masks that can move.
        without_gradient: Layers that got no gradient since the last update.
        often_missed: Layers without a gradient at each of the last updates, this one included.
        needs_dense: Whether growth needs the dense gradient.
        step: For the message.
        last_update: Whether the final density must be reached now.
        across_layers: Whether the lowest scores of all layers together are pruned.
    """
    for name in sorted(without_gradient):
        yield (
            name,
            f"{name} got no gradient since the last update: is its layer still used by the model? "
            "Where another took its place (reset_classifier, set_input_size, "
            "resize_token_embeddings), mask that one by apply(model, ..., include=[...]), then "
            "build optimizer and MaskScheduler anew with find_masks(model)",
        )

    used = [name for name in often_missed if name not in without_gradient]
    if used:
        yield (
            "missed",
            f"{listed(used)} got no gradient at step {step} and the updates before it, though "
            "between them: the masks stay as they are. Where layers take turns (experts, heads), "
            "choose `every` so that an update meets all",
        )

    absent = [name for name, has in inputs.has_gradient.items() if not has]
    if absent and last_update:
        yield (
            "final",
            "the final sparsity is missed: these got no gradient at the last update, "
            f"step {step}, and stay as they are: {listed(absent)}. Choose `every`, `stop` and "
            "total_steps so that all layers are used in that step",
        )

    if needs_dense and inputs.any_gradient:
        for name in inputs.zero_gradient:
            yield (
                f"zero {name}",
                f"the dense gradient of {name} is 0 everywhere at step {step}, so growth there is "
                "by chance: is a layer near it so sparse that nothing passes, or a scale behind it "
                "still 0?",
            )

    advice = "take a method that gives small layers more (ERK)"
    if across_layers:
        advice = "set the floor of MaskScheduler, the least density of a layer"
    for name, itop in masks.items():
        active = inputs.active[name]
        if active < itop.outputs:
            yield (
                f"few {name}",
                f"{name} has fewer active weights than outputs, {active} and {itop.outputs}, so "
                f"some have none: lower the sparsity, or {advice}",
            )
