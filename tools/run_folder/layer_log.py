"""layers.jsonl of a run: what its layers are, and the masks of each after every update, for the report.

The first line says what the run is made of: the weights that are or could be masked, in model
order, and the versions. Then there is a line for every update. Numbers by layer are lists in the
order of the names. Where a run was resumed without the file it begins at that step, and its first
line says how many updates there were before.
"""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

import itop_prune
from itop_prune.layers.handle import active_weights
from itop_prune.layers.maskable import walk
from itop_prune.topology import count_true

from ..training.build import Run
from .metrics import Metrics

PACKAGES = ("torch", "timm", "accelerate", "torchvision")


class Layers:
    """Takes notes in memory, which is cheap, and writes them before the checkpoint that counts on them."""

    def __init__(
        self, folder: Path, run: Run, image: tuple[int, ...], processes: int, takes_notes: bool
    ) -> None:
        self._file, self._run, self._takes_notes = Metrics(folder, "layers.jsonl"), run, takes_notes
        self._masks = itop_prune.find_masks(run.bare)
        self._weights = {
            name: (
                self._masks[name].mask if name in self._masks else getattr(layer, tensor)
            ).numel()
            for name, layer, tensor in walk(run.bare)
        }
        self._notes = [self._beginning(image, processes)] if takes_notes else []

    def update(self) -> None:
        """Take a note of the masks, which have just moved."""
        if self._takes_notes and (regrow := self._run.regrow):
            counts: dict[str, list[Any]] = {
                "active": self._active(),
                "explored": self._explored(),
                "entered": self._by_layer(regrow.entered()),
            }
            survival = regrow.survival_rates()
            if survival:
                counts["survival"] = [survival.get(name) for name in self._weights]
            progress = self._run.progress
            self._notes.append(
                {"epoch": progress.epoch + 1, "step": progress.step, "rate": regrow.rate, **counts}
            )

    def write(self) -> None:
        """Write what was noted since.

        Raises:
            RunError: It can't be written; the lines before stay.
        """
        if self._notes:
            self._file.append(*self._notes)
            self._notes = []

    def cut(self) -> None:
        """Drop the updates past the step at which a resumed run goes on; without the file, begin it as of there.

        Raises:
            RunError: A line that must stay is damaged, or the rest can't be written.
        """
        regrow, progress = self._run.regrow, self._run.progress
        updates, step = regrow.updates if regrow else 0, progress.step

        def is_whole(lines: list[dict[str, Any]]) -> bool:
            return bool(lines) and lines[0].get("updates_before", 0) + len(lines) - 1 >= updates

        if self._file.keep(lambda line: line["step"] <= step, is_whole, f"step {step}"):
            self._notes = []
        elif updates:
            now = {"epoch": progress.epoch, "step": step, "updates_before": updates}
            self._notes[0] |= {**now, "active": self._active(), "explored": self._explored()}
        self.write()

    def _beginning(self, image: tuple[int, ...], processes: int) -> dict[str, Any]:
        return {
            "epoch": 0,
            "step": 0,
            "names": list(self._weights),
            "masked": [name in self._masks for name in self._weights],
            "weights": list(self._weights.values()),
            "active": self._active(),
            "image": list(image),
            "made_with": versions() | {"device": device(self._run.bare), "processes": processes},
        }

    def _active(self) -> list[int]:
        return self._by_layer(active_weights(self._masks), self._weights)

    def _explored(self) -> list[int]:
        explored = self._run.regrow.explored if self._run.regrow else {}
        return self._by_layer(
            {name: count_true(mask) for name, mask in explored.items()}, self._weights
        )

    def _by_layer(
        self, counts: dict[str, int], otherwise: dict[str, int] | None = None
    ) -> list[int]:
        return [counts.get(name, otherwise[name] if otherwise else 0) for name in self._weights]


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers of a run, those that are installed."""
    found = {"python": platform.python_version(), "itop_prune": itop_prune.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device(model: nn.Module) -> str:
    """Return the name of what a model computes on."""
    place = next(model.parameters()).device
    return (
        torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"{place.type} ({platform.machine()})"
    )
