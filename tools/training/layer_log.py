"""Write layers.jsonl: the layers of a run, and their masks after every update, for the report.

The first line holds the weights that are or could be masked, in model order, and the versions.
Each update adds a line. Lists of numbers are in the order of the names. If a run is resumed
without the file, the file begins at that step, and `updates_before` counts the earlier updates.
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

from ..run_folder.json_lines import JsonLines
from .run import Run

PACKAGES = ("torch", "timm", "accelerate", "torchvision")


class LayerLog:
    """Collect lines in memory, and write them before the checkpoint that counts on them."""

    def __init__(
        self, folder: Path, run: Run, image: tuple[int, ...], processes: int, enabled: bool
    ) -> None:
        self._file, self._run, self._enabled = JsonLines(folder / "layers.jsonl"), run, enabled
        self._masks = itop_prune.find_masks(run.unwrapped_model)
        self._weights: dict[str, int] = {}
        for name, layer, tensor in walk(run.unwrapped_model):
            masked = name in self._masks
            size = self._masks[name].size if masked else getattr(layer, tensor).numel()
            self._weights[name] = size

        self._lines = [self._first_line(image, processes)] if enabled else []

    def note_update(self) -> None:
        """Note the masks after an update."""
        regrow, progress = self._run.regrow, self._run.progress
        if not self._enabled or regrow is None:
            return

        line: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "rate": regrow.rate,
            "active": self._active(),
            "explored": self._explored(),
            "entered": self._by_layer(regrow.entered()),
        }
        survival = regrow.survival_rates()
        if survival:
            line["survival"] = [survival.get(name) for name in self._weights]
        self._lines.append(line)

    def write(self) -> None:
        """Write the lines collected so far.

        Raises:
            RunError: They can't be written; earlier lines stay.
        """
        if self._lines:
            self._file.append(*self._lines)
            self._lines = []

    def cut(self) -> None:
        """Drop the updates past the step of a resumed run; begin a missing file at that step.

        Raises:
            RunError: A line that must stay is damaged, or the rest can't be written.
        """
        regrow, progress = self._run.regrow, self._run.progress
        updates, step = regrow.updates if regrow else 0, progress.step

        def is_whole(lines: list[dict[str, Any]]) -> bool:
            return bool(lines) and lines[0].get("updates_before", 0) + len(lines) - 1 >= updates

        kept = self._file.keep(lambda line: line["step"] <= step, is_whole, f"step {step}")
        if kept:
            self._lines = []
        elif updates:
            self._lines[0] |= {
                "epoch": progress.epoch,
                "step": step,
                "updates_before": updates,
                "active": self._active(),
                "explored": self._explored(),
            }
        self.write()

    def _first_line(self, image: tuple[int, ...], processes: int) -> dict[str, Any]:
        place = {"device": device_name(self._run.unwrapped_model), "processes": processes}
        return {
            "epoch": 0,
            "step": 0,
            "names": list(self._weights),
            "masked": [name in self._masks for name in self._weights],
            "weights": list(self._weights.values()),
            "active": self._active(),
            "image": list(image),
            "made_with": versions() | place,
        }

    def _active(self) -> list[int]:
        return self._by_layer({**self._weights, **active_weights(self._masks)})

    def _explored(self) -> list[int]:
        counts = {}
        if self._run.regrow:
            explored = self._run.regrow.explored
            counts = {name: explored.count(name) for name in explored}
        return self._by_layer({**self._weights, **counts})

    def _by_layer(self, counts: dict[str, int]) -> list[int]:
        return [counts.get(name, 0) for name in self._weights]


def versions() -> dict[str, str]:
    """Read the versions of the installed packages that compute the numbers of a run."""
    found = {"python": platform.python_version(), "itop_prune": itop_prune.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(model: nn.Module) -> str:
    """Name the device that a model computes on."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
