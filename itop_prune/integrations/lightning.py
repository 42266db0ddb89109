"""Sparse training with Lightning's Trainer: one callback."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from itop_prune.files.state_dicts import dense_state_dict
from itop_prune.files.writing import replacing
from itop_prune.integrations.sparse_training import SparseTraining

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
except ImportError as error:
    raise ImportError(
        f"itop_prune.integrations.lightning needs lightning ({error}); "
        "pip install 'itop_prune[integrations]'"
    ) from error

DENSE_FILE = "dense.ckpt"
"""The dense copy for `load_from_checkpoint`, in the Trainer's `default_root_dir`."""


class SparseTrainingCallback(SparseTraining, Callback):
    """Trains a module sparse in Lightning: `Trainer(callbacks=[SparseTrainingCallback(...)])`.

    Masks are placed when fitting begins, before the optimizer is built; so build the layers in the
    module's `__init__`. Masks move after each optimizer step that a gradient scaler did not skip.
    Checkpoints hold weights, masks and the state of the MaskScheduler, so `fit(ckpt_path=...)`
    resumes. `sparsity` and `R_s` are logged at every step.

    When training ends, `default_root_dir/dense.ckpt` gets the last weights as an ordinary dense
    module: `load_from_checkpoint` of your class reads it. The module itself keeps its masks.

    Args:
        arguments: Keyword arguments of `itop_prune.apply` and of MaskScheduler together; `seed`
            goes to both. If the module has masks already, give those of MaskScheduler alone. Model,
            optimizer, `total_steps`, `scaler` and `one_backward` come from the Trainer.

    Raises:
        TypeError: An argument is unknown, comes from the Trainer, or is missing.
        ValueError: By `fit`: the module can't be masked or has no masks, or an argument is out of
            range. The Trainer uses DeepSpeed, FSDP1 or manual optimization, or has no last step. A
            checkpoint lacks the state of the callback.

    >>> SparseTrainingCallback(sparsity=0.8, exclude="head", every=1000).scheduler is None
    True
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._saved: Mapping[str, Any] = {}
        self._steps, self._scale = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Place the masks; the checkpoint, the optimizer and wrappers come later."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise ValueError(
                f"the Trainer uses {type(trainer.strategy).__name__}, which flattens parameters: "
                'masks can\'t follow; use DDP, or FSDP2 (ModelParallelStrategy) with storage="mask"'
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} sets automatic_optimization=False, and the callback "
                "can't see its optimizer steps; build a MaskScheduler in on_train_start and call "
                "its step() after each optimizer step"
            )
        self.place_masks(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the MaskScheduler; weights, masks and optimizer are loaded before."""
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("the Trainer has no last step; set max_epochs or max_steps")

        saved = None
        if trainer.global_step > 0:
            saved = self.state_dict()
            if not saved:
                raise ValueError(
                    "the checkpoint holds no state of SparseTrainingCallback; resume from one that "
                    "was saved with it"
                )
        changes = any(isinstance(one, GradientAccumulationScheduler) for one in trainer.callbacks)
        self.start(
            pl_module,
            trainer.optimizers[0],
            int(total),
            one_backward=trainer.accumulate_grad_batches == 1 and not changes,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            saved=saved,
        )
        self._steps, self._scale = trainer.global_step, _scale(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch_and_outputs: Any
    ) -> None:
        """Move the masks when it is time; Lightning clears gradients in the next step."""
        if trainer.global_step > self._steps:  # not in the middle of an accumulation
            scale = _scale(trainer)
            skipped = scale < self._scale
            self._steps, self._scale = trainer.global_step, scale
            if not skipped:
                self.step()
        pl_module.log_dict(self.metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the dense copy."""
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        checkpoint["state_dict"] = dense_state_dict(pl_module)  # by all ranks: FSDP2 gathers
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, DENSE_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                torch.save(checkpoint, unfinished)

    def state_dict(self) -> dict[str, Any]:
        """Copy the state of the MaskScheduler, for Lightning's checkpoints."""
        return dict(self._saved) if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training begins."""
        self._saved, self.scheduler = state_dict, None


def _scale(trainer: Trainer) -> float:
    """Look up the scale of the gradient scaler, which falls when it skips a step; or 0."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 0.0 if scaler is None else scaler.get_scale()
