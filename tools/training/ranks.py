"""What the ranks of a run do together: one acts for all, and all end cleanly."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from ..run_folder.folder import RunError
from .checkpoint import CheckpointError

Result = TypeVar("Result")


class OtherRankFailed(Exception):
    """The main process failed at what all ranks wait for, and reports why itself."""


def on_main(accelerator: Accelerator, act: Callable[..., Result], *arguments: Any) -> Result | None:
    """Call a function on the main process alone; if it fails there, stop all ranks.

    Raises:
        CheckpointError, RunError, OSError: On the main process, as the function raised it.
        OtherRankFailed: On the other ranks.
    """
    result = failure = None
    if accelerator.is_main_process:
        try:
            result = act(*arguments)
        except (CheckpointError, RunError, OSError) as error:
            failure = error

    if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)):
        raise failure or OtherRankFailed

    return result


def end_gloo() -> None:
    """Join gloo's threads: one that still works when the interpreter ends aborts the process."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
