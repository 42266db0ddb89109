"""Sparse training with the Trainer of Hugging Face's transformers: one callback."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itop_prune.files.state_dicts import check_archive, dense_state_dict
from itop_prune.files.writing import replacing
from itop_prune.integrations.sparse_training import SparseTraining
from itop_prune.layers.maskable import unwrap

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"itop_prune.integrations.huggingface needs transformers and accelerate ({error}); "
        "pip install 'itop_prune[integrations]'"
    ) from error

STATE_FILE = "mask_scheduler.pt"
"""The state of the MaskScheduler, in each checkpoint of the Trainer."""

DENSE_FOLDER = "dense"
"""The dense copy for `from_pretrained`, in the Trainer's `output_dir`."""


class SparseTrainingCallback(SparseTraining, TrainerCallback):
    """Trains a model sparse: `Trainer(model, ..., callbacks=[SparseTrainingCallback(...)])`.

    Masks are placed when the Trainer is built, before its optimizer. They move after each optimizer
    step that a gradient scaler did not skip. Checkpoints hold weights, masks and the state of the
    MaskScheduler, so `train(resume_from_checkpoint=...)` and `load_best_model_at_end` work. If you
    resume from a folder outside of `output_dir`, name it in
    `TrainingArguments(resume_from_checkpoint=...)` too.

    Logs of the training loss hold `sparsity` and `R_s`, in `trainer.state.log_history` too. The
    Trainer calls the trackers of `report_to` earlier; give their callbacks after this one instead.

    When training ends, `output_dir/dense` gets the model as an ordinary dense one, with its config
    and tokenizer: `from_pretrained` reads it. The model itself keeps its masks.

    Args:
        arguments: Keyword arguments of `itop_prune.apply` and of MaskScheduler together; `seed`
            goes to both. If the model has masks already, give those of MaskScheduler alone. Model,
            optimizer, `total_steps`, `scaler` and `one_backward` come from the Trainer.

    Raises:
        TypeError: An argument is unknown, comes from the Trainer, or is missing.
        ValueError: By the Trainer: the model can't be masked or has no masks, or an argument is out
            of range. It uses DeepSpeed, FSDP1, a hyperparameter search, or two callbacks of this
            class. A checkpoint lacks the state of the MaskScheduler.

    >>> SparseTrainingCallback(sparsity=0.8, exclude="lm_head", every=1000).scheduler is None
    True
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **others: Any,
    ) -> None:
        """Place the masks; the optimizer is built later, and wrappers come later too."""
        self._check(args, control)
        self.place_masks(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Build the MaskScheduler; weights, masks and optimizer are loaded before."""
        self._check(args, control)
        if state.is_hyper_param_search:
            raise ValueError(
                "the Trainer searches hyperparameters, and a callback does not see where a trial "
                "saves; give each trial a Trainer and a callback of its own"
            )
        saved = _read_state(args, state) if state.global_step > 0 else None
        one_backward = args.gradient_accumulation_steps == 1
        self.start(model, optimizer, state.max_steps, one_backward=one_backward, saved=saved)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Move the masks when it is time; the Trainer clears gradients after this."""
        if not optimizer.step_was_skipped:
            self.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Add the state of the MaskScheduler to the checkpoint."""
        if args.should_save and self.scheduler is not None:
            with replacing(_checkpoint(args, state) / STATE_FILE) as unfinished:
                torch.save(self.scheduler.state_dict(), unfinished)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **others: Any,
    ) -> None:
        """Add sparsity and R_s to the logs of the training loss."""
        if "loss" in logs:
            logs.update(self.metrics)
            state.log_history[-1].update(self.metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        """Write the dense copy; the best model is loaded before."""
        weights = dense_state_dict(model)  # by all ranks: FSDP2 gathers
        if not args.should_save:
            return

        folder, model = Path(args.output_dir, DENSE_FOLDER), unwrap(model)
        save_pretrained: Any = getattr(model, "save_pretrained", None)
        if save_pretrained is not None:
            save_pretrained(folder, state_dict=weights)
        else:  # a module of the user's own
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(weights, folder / "pytorch_model.bin")
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _check(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Refuse a second callback, and what flattens parameters.

        Raises:
            ValueError: One of them is there.
        """
        # A Trainer keeps its TrainerControl, the one object that all of its callbacks see.
        owner = vars(control).setdefault("_sparse_training", self)
        if owner is not self:
            raise ValueError(
                "this Trainer has two SparseTrainingCallbacks; give one, with the arguments of both"
            )

        fsdp: Mapping[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
        found = "DeepSpeed" if args.deepspeed_plugin is not None else ""
        if fsdp.get("fsdp_version", 2) == 1:
            found = "FSDP1"
        if found:
            raise ValueError(
                f"the Trainer uses {found}, which flattens parameters, and masks can't follow; use "
                'DDP, or FSDP2 (fsdp_config={"version": 2}) with storage="mask"'
            )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _step_of(checkpoint: Path) -> int:
    """Read at which step the Trainer saved a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step


def _read_state(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Read the state of the MaskScheduler from the checkpoint that the Trainer resumes from.

    The Trainer does not tell its callbacks which folder that is.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    folders = [_checkpoint(args, state)]
    if isinstance(args.resume_from_checkpoint, str | os.PathLike):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        path = folder / STATE_FILE
        if path.exists() and _step_of(folder) == state.global_step:
            check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(
        f"there is no {STATE_FILE} in {' or '.join(map(str, folders))}; if the checkpoint lies "
        "elsewhere, name it in TrainingArguments(resume_from_checkpoint=...) too; if it was saved "
        "without SparseTrainingCallback, or a crash cut it short, resume from another one"
    )
