"""Checkpoints of a run: each is a folder that appears whole or not at all.

- `model.safetensors`: weights and masks; `itop_prune.load` reads it.
- `ema.safetensors`: the same of the average, if the recipe has one.
- `state.pt`: everything else, read with `weights_only=True`.
- `checksums.json`: the SHA-256 of each file.

A run folder has the final `model.safetensors`, with checksums of the same form.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from itop_prune.files import small_files
from itop_prune.files.state_dicts import check_archive
from itop_prune.files.writing import flush, replacing, unfinished_name

from ..run_folder.folder import CHECKPOINTS
from .sharded import load_model_state

StateDict = dict[str, Tensor]
CHECKSUMS = "checksums.json"


class CheckpointError(Exception):
    """A checkpoint that can't be written or read; the message names it and says what to do."""


class Checkpoints:
    """The checkpoints of one run, named by optimizer step: the last few and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self, step: int, models: dict[str, StateDict], state: dict[str, Any], best: bool = False
    ) -> Path:
        """Write a new checkpoint beside the others, rename it into place, and drop the oldest.

        Raises:
            CheckpointError: Writing failed, for example on a full disk. Earlier checkpoints
                stay whole.
        """
        target = self.folder / f"step-{step:09d}"
        unfinished, copy = unfinished_name(target), unfinished_name(self.folder / "best")
        try:
            unfinished.mkdir(parents=True)
            for name, tensors in models.items():
                save_model(tensors, unfinished / f"{name}.safetensors")
            torch.save(state, unfinished / "state.pt")
            write_checksums(sorted(unfinished.iterdir()), unfinished / CHECKSUMS)

            # The best comes first: a run killed between the two resumes from before both.
            if best:
                shutil.copytree(unfinished, copy)
                replace_folder(copy, self.folder / "best")
            replace_folder(unfinished, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(copy, ignore_errors=True)
            last = self.last()
            kept = f"{last} is whole" if last else "there is none before it"
            raise CheckpointError(f"{target} could not be written: {error}; {kept}") from None

        for old in self.all()[: -self.keep]:
            remove_folder(old)
        return target

    def all(self) -> list[Path]:
        """List the folders, oldest first, without the best."""
        return sorted(self.folder.glob(CHECKPOINTS))

    def last(self) -> Path | None:
        """Find the newest checkpoint."""
        return next(reversed(self.all()), None)

    def last_before(self, step: int) -> Path | None:
        """Find the newest checkpoint of this step or an earlier one."""
        for folder in reversed(self.all()):
            if int(folder.name.removeprefix("step-")) <= step:
                return folder
        return None

    def last_whole(self) -> tuple[Path | None, list[str]]:
        """Find the newest undamaged checkpoint, and the problems of newer ones.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
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


def load_checkpoint(folder: Path, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Load weights and masks into models, and return the rest of the state.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another model.
    """
    try:
        path = folder / "state.pt"
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, model in models.items():
            path = folder / f"{name}.safetensors"
            load_model_state(model, load_file(path))
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(
            f"{path} can't be read: {error}; remove {folder} to use the one before"
        ) from None
    return state


def damage(folder: Path, only: str | None = None) -> str:
    """Describe what differs from the checksums of a folder; "" if nothing does.

    Args:
        folder: A checkpoint.
        only: Name of a single file to check, if the checksums have it. The folder may then be any.
    """
    path = folder / CHECKSUMS
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sums, dict) or not all(isinstance(text, str) for text in sums.values()):
            return f"{path} is damaged: it holds no checksums by file name"

        files = {name: folder / name for name in sums if Path(name).name == name}
        if only:
            files = {name: file for name, file in files.items() if name == only}
        elif not files.keys() >= {"model.safetensors", "state.pt"}:
            return f"{path} names no model and state"

        for name, file in files.items():
            if checksum(file) != sums[name]:
                return f"{file} is damaged"
        return ""
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} can't be read: {error}"


def check_weights(path: Path) -> None:
    """Refuse a file that differs from the checksums beside it, if there are any.

    Raises:
        CheckpointError: This one does, or the checksums are damaged.
    """
    sums = path.with_name(CHECKSUMS)
    problem = damage(path.parent, only=path.name) if sums.exists() else ""
    if problem:
        raise CheckpointError(
            f"{problem}; allowed are files that match {sums}: take other weights, or remove it if "
            "you changed them yourself"
        )


def write_checksums(files: Sequence[Path], path: Path) -> None:
    """Write the checksums of files in one folder."""
    sums = {file.name: checksum(file) for file in files}
    path.write_text(json.dumps(sums, indent=1), encoding="utf-8")


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_model(state: StateDict, path: Path) -> None:
    """Write a state dict as safetensors."""
    # safetensors refuses shared memory, which a module under two names has.
    tensors: StateDict = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        shared = tensor.data_ptr() in seen
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.data_ptr())

    save_file(tensors, path)


def save_result(state: StateDict, path: Path) -> None:
    """Write the final weights of a run, of a sparse model also as a small file.

    Raises:
        CheckpointError, OSError: They can't be written, for example on a full disk.
    """
    # The small file comes first, since the other one marks the run as finished.
    if small_files.masked(state):
        small_files.write(state, path.with_name("sparse.safetensors"))

    try:
        # Weights without checksums are not checked: if a kill comes between, they count as good.
        path.with_name(CHECKSUMS).unlink(missing_ok=True)
        with replacing(path) as unfinished:
            save_model(state, unfinished)
        with replacing(path.with_name(CHECKSUMS)) as unfinished:
            write_checksums([path], unfinished)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}; once it can be, go on with --resume"
        ) from None


def replace_folder(source: Path, target: Path) -> None:
    """Flush a finished folder to the disk and rename it into place."""
    for path in (*source.iterdir(), source):
        flush(path)

    removed = set_aside(target)
    source.replace(target)
    flush(target.parent)
    shutil.rmtree(removed, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists, so that a part of it never has its name."""
    shutil.rmtree(set_aside(folder), ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a folder, if it exists, to a name that nothing reads; return that name."""
    removed = unfinished_name(folder)
    if folder.exists():
        folder.replace(removed)
    return removed
