"""Stop a run whose losses are no longer finite, and keep its bad weights out of checkpoints."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from itop_prune.sharding import local

from ..run_folder.folder import RunError
from .checkpoint import Checkpoints
from .ranks import on_main


class BadLosses:
    """Count consecutive steps with a non-finite loss, and stop the run after too many.

    The count stays on the device. The ranks compare it every `allowed` steps only, since each
    comparison waits for the device.
    """

    def __init__(self, allowed: int | None, model: nn.Module, accelerator: Accelerator) -> None:
        self._allowed, self._model, self._accelerator = allowed, model, accelerator
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._in_this_step = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def see(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch."""
        if self._allowed:
            self._in_this_step |= ~loss.detach().isfinite()

    def end_step(self, step: int, checkpoints: Checkpoints) -> None:
        """Count the step, and stop the run if it was one too many.

        Raises:
            RunError: A rank had too many non-finite losses in a row.
            OtherRankFailed: The same, on other ranks than the main process.
        """
        if not self._allowed:
            return

        self._in_a_row = torch.where(self._in_this_step, self._in_a_row + 1, 0)
        self._in_this_step.zero_()
        if step % self._allowed:
            return

        longest = self._longest(self._in_a_row)
        if longest >= self._allowed:
            on_main(self._accelerator, _refuse, step, longest, checkpoints)

    def has_nonfinite(self) -> bool:
        """Tell whether the last loss or a weight is not finite on any rank.

        A checkpoint of such a run would replace a good one.
        """
        if not self._allowed:
            return False

        finite = [local(parameter).isfinite().all() for parameter in self._model.parameters()]
        return self._longest(self._in_a_row + ~torch.stack(finite).all()) > 0

    def _longest(self, in_a_row: Tensor) -> int:
        return int(self._accelerator.gather(in_a_row.view(1)).max())


def _refuse(step: int, longest: int, checkpoints: Checkpoints) -> None:
    good = checkpoints.last_before(step - longest) or "none"
    raise RunError(
        f"the loss was not finite for {longest} steps, at step {step}; last good checkpoint: {good}"
    )
