"""The folder of a run: its name, its recipe, its metrics, never written over another; and the wish to stop it."""

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from itop_prune.recipe import Recipe

FREE = {
    "data": ("batch_size", "eval_batch_size", "root", "workers", "download"),
    "accelerator": ("gradient_accumulation_steps", "cpu", "log_with"),
}
"""What a resumed run may change: where and how things are read. How many images a step has is compared by itself."""
FREE_SECTIONS = ("checkpoint", "stop_after_bad_losses")


class RunError(Exception):
    """A run that can't start or go on; the message says why and what to do."""


def in_a_line(error: Exception) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split())


def run_folder(recipe: Path, overrides: Sequence[str], seed: int) -> Path:
    """Return runs/<recipe>[-key=value...]/seed<k>; where the data lie and the seed are not part of the name.

    >>> str(run_folder(Path("recipes/quickstart.yaml"), ["epochs=3", "seed=7", "data.root=/d"], 7))
    'runs/quickstart-epochs=3/seed7'
    """
    named = [override for override in overrides if override.partition("=")[0] not in ("seed", "data.root")]
    safe = ["".join(c if c.isalnum() or c in "=.,-_{}" else "_" for c in override) for override in named]
    return Path("runs") / "-".join([recipe.stem, *safe]) / f"seed{seed}"


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        RunError: This one does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists; continue that run with --resume, or write elsewhere with --out FOLDER")


def start(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write the recipe into it.

    Raises:
        RunError: The folder holds a run already, or can't be written.
    """
    try:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # beside: an empty folder may be started in again
        unfinished.write_text(recipe.as_yaml(), encoding="utf-8")
        unfinished.replace(folder / "recipe.yaml")
    except OSError as error:
        raise RunError(f"{folder} can't be written: {error}; write elsewhere with --out FOLDER") from None


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the run began with.

    Raises:
        RunError: There is no run, or its recipe differs.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        raise RunError(f"{folder} holds no run to resume; start it without --resume")
    now = yaml.safe_load(recipe.as_yaml())
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict) or not all(isinstance(before.get(key) or {}, dict) for key in FREE):
        raise RunError(f"{path} is damaged; start a new run with --out FOLDER")
    differing = [key for key in {**before, **now} if _bound(key, before.get(key)) != _bound(key, now.get(key))]
    if differing:
        lines = [f"  {key}: was {before.get(key)}, is {now.get(key)}" for key in differing]
        raise RunError(
            f"{folder} began with another recipe; give the same, or --out for a new run\n" + "\n".join(lines)
        )


def _bound(key: str, value: Any) -> Any:
    """Return what a resumed run must keep of a section; nothing of an empty one."""
    if key in FREE_SECTIONS:
        return None
    if key not in FREE:
        return value
    return {name: setting for name, setting in (value or {}).items() if name not in FREE[key]} or None


class Metrics:
    """metrics.jsonl, or another file of the run that has one JSON object a line, each with `epoch` and `step`."""

    def __init__(self, folder: Path, name: str = "metrics.jsonl") -> None:
        self.path = folder / name

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines, all of them or nothing.

        Raises:
            RunError: They can't be written, on a full disk for one; the lines before them stay.
        """
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        try:
            with self.path.open("ab", buffering=0) as file:  # or closing it would try to write the rest again
                before = file.tell()
                try:
                    if file.write(text) < len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())  # before the checkpoint that counts on the line
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise self._not_written(error) from None

    def read(self) -> list[dict[str, Any]]:
        """Return all lines before the first that is damaged, or was cut off while writing."""
        lines: list[dict[str, Any]] = []
        for text in self._texts():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict) or not all(isinstance(line.get(key), int) for key in ("epoch", "step")):
                break
            lines.append(line)
        return lines

    def cut(self, epoch: int) -> list[dict[str, Any]]:
        """Drop the lines past an epoch, of which a resumed run writes its own; return those that stay.

        Raises:
            RunError: One that must stay is damaged, or the rest can't be written; the file is as it was.
        """
        return self.keep(
            lambda line: line["epoch"] <= epoch and "test_top1" not in line,
            lambda lines: (lines[-1]["epoch"] if lines else 0) >= epoch,
            f"epoch {epoch}",
        )

    def keep(
        self, stays: Callable[[dict[str, Any]], bool], is_whole: Callable[[list[dict[str, Any]]], bool], last: str
    ) -> list[dict[str, Any]]:
        """Drop the lines that do not stay; return the others.

        Args:
            stays: Whether a line does.
            is_whole: Whether those that stay are all there; asked where a line is damaged.
            last: After what the run goes on, for the message.

        Raises:
            RunError: As `cut`.
        """
        found = self.read()
        lines = [line for line in found if stays(line)]
        if len(found) < self.count() and not is_whole(lines):
            raise RunError(
                f"{self.path} is damaged in line {len(found) + 1}, and the run goes on after {last}; put the "
                "line right, or remove the file to go on without what it holds"
            )
        unfinished = self.path.with_suffix(".unfinished")
        try:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            unfinished.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise self._not_written(error) from None
        return lines

    def count(self) -> int:
        """Return how many lines there are, damaged ones too."""
        return len(self._texts())

    def _texts(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path.exists() else []

    def _not_written(self, error: OSError) -> RunError:
        return RunError(f"{self.path} could not be written: {error}; once it can be, go on with --resume")


class StopRequest:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a question that is asked between batches; a second Ctrl-C interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ranks: int = 1) -> None:
        self._received = False
        # Ranks agree over gloo, whatever they train on: a byte between hosts at every step, and no device waits for it.
        self._group: Any = torch.distributed.new_group(backend="gloo") if ranks > 1 else None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if number == signal.SIGINT:  # SIGTERM may come twice, from a launcher and from who stops it
            signal.signal(number, signal.default_int_handler)

    def wanted(self) -> bool:
        """Return whether to stop here, the same on all ranks; all must ask as often."""
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)


def end_gloo() -> None:
    """Join gloo's threads before the interpreter ends: one that still works then aborts the process."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
