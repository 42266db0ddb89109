"""Checkpoints of a run: each a folder that appears whole or not at all, the last few and the best kept.

`model.safetensors` (weights and masks, and what `itop_prune.load` reads), `ema.safetensors` where
there is an average, `state.pt` with everything else, in tensors and plain Python values, read with
`weights_only=True`, and `checksums.json` with the SHA-256 of each.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from itop_prune.files import small_files as compact

from .sharded import load_model_state

State = dict[str, Tensor]
CHECKSUMS = "checksums.json"


class CheckpointError(Exception):
    """A checkpoint that can't be written or read; the message names it and says what to do."""


class Checkpoints:
    """The checkpoints of one run, newest last, named by optimizer step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self, step: int, models: dict[str, State], state: dict[str, Any], best: bool = False
    ) -> Path:
        """Write state dicts of models, and the rest, into a new folder, rename it into place, and drop the oldest.

        Raises: CheckpointError: Writing failed, on a full disk for one; the checkpoints before it
            stay whole.
        """
        target, unfinished = self.folder / f"step-{step:09d}", self.folder / ".unfinished"
        copy = self.folder / ".unfinished-best"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name, tensors in models.items():
                save_model(tensors, unfinished / f"{name}.safetensors")
            torch.save(state, unfinished / "state.pt")
            sums = {path.name: checksum(path) for path in sorted(unfinished.iterdir())}
            (unfinished / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
            if best:  # first: a run that is killed in between goes on from before, and comes by here again
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(unfinished, copy, copy_function=link)
                replace_folder(copy, self.folder / "best")
            replace_folder(unfinished, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            for folder in (unfinished, copy):
                shutil.rmtree(folder, ignore_errors=True)
            last = self.last()
            kept = f"{last} is whole" if last else "there is none before it"
            raise CheckpointError(f"{target} could not be written: {error}; {kept}") from None
        for old in self.all()[: -self.keep]:
            remove_folder(old)
        return target

    def all(self) -> list[Path]:
        """Return the folders, oldest first, the best one not among them."""
        return sorted(self.folder.glob("step-*"))

    def last(self) -> Path | None:
        """Return the newest, or None."""
        return next(reversed(self.all()), None)

    def last_before(self, step: int) -> Path | None:
        """Return the newest of this step or an earlier one, or None."""
        return next(
            (
                folder
                for folder in reversed(self.all())
                if int(folder.name.removeprefix("step-")) <= step
            ),
            None,
        )

    def last_whole(self) -> tuple[Path | None, list[str]]:
        """Return the newest that is as it was written, and what is wrong with newer ones; None if there are none.

        Raises:
            CheckpointError: There are some, and all are damaged.
        """
        problems: list[str] = []
        for folder in reversed(self.all()):
            problem = damage(folder)
            if not problem:
                return folder, problems
            problems.append(problem)
        if problems:
            raise CheckpointError(
                f"no checkpoint is whole: {'; '.join(problems)}; start a new run with --out FOLDER"
            )
        return None, []


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, by the checksums that were written with it, or ""."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        files = {name: folder / name for name in sums if Path(name).name == name}
        if not files.keys() >= {"model.safetensors", "state.pt"}:
            return f"{folder / CHECKSUMS} names no model and state"
        return next(
            (f"{path} is damaged" for name, path in files.items() if checksum(path) != sums[name]),
            "",
        )
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError) as error:
        return f"{folder / CHECKSUMS} can't be read: {error}"


def save_model(state: State, path: Path) -> None:
    """Write a state dict as safetensors, all of it or nothing."""
    tensors: State = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        shared = (
            tensor.data_ptr() in seen
        )  # a module under two names: safetensors refuses shared memory
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.data_ptr())
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError):
        unfinished.unlink(missing_ok=True)
        raise


def save_result(state: State, path: Path) -> None:
    """Write the weights that a run ends with; of a sparse model a small file too, first, for with the other it is over.

    Raises:
        CheckpointError, OSError: They can't be written, on a full disk for one.
    """
    if compact.masked(state):
        compact.write(state, path.with_name("sparse.safetensors"))
    try:
        save_model(state, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}; once it can be, go on with --resume"
        ) from None


def replace_folder(source: Path, target: Path) -> None:
    """Put a finished folder in place, once its files are on the disk."""
    for path in (*source.iterdir(), source):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    removed = set_aside(target)
    source.rename(target)
    shutil.rmtree(removed, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there, so that a part of it never has its name."""
    shutil.rmtree(set_aside(folder), ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Give a folder, if it is there, a name under which nobody looks for it; return that name."""
    removed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
    return removed


def link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load(folder: Path, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Put a checkpoint's weights and masks into models and return the rest.

    Raises:
        CheckpointError: A part is missing or damaged, or is of another model.
    """

    def read(name: str, how: Callable[[Path], Any]) -> Any:
        try:
            return how(folder / name)
        except Exception as error:  # a damaged file may raise anything
            raise CheckpointError(
                f"{folder / name} can't be read: {error}; remove {folder} to use the one before"
            ) from None

    state = read("state.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True))
    for name, model in models.items():
        read(f"{name}.safetensors", lambda path: load_model_state(model, load_file(path)))  # noqa: B023  (called at once)
    return state
