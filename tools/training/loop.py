"""The training loop: from where a run stands to its end."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import itop_prune
from itop_prune.distributed import check_equal
from itop_prune.layers.handle import active_weights

from ..config.recipe import Recipe
from ..config.sections import CheckpointSettings
from ..data.datasets import Data
from ..data.seeding import seed_everything
from ..data.source import Batch
from ..reports.report import attempt
from ..run_folder.metrics import Metrics
from .bad_losses import BadLosses
from .checkpoint import Checkpoints, save_result
from .display import Display
from .dry_run import explain_no_update
from .evaluation import evaluate
from .layer_log import LayerLog
from .ranks import on_main
from .resume import restore, save
from .run import Run
from .sharded import model_state
from .stop import StopRequest
from .trackers import Trackers

STOPPED = 130
"""The exit status of a run that a signal stopped."""


def train(
    run: Run, recipe: Recipe, accelerator: Accelerator, data: Data, folder: Path, resume: bool
) -> int:
    """Train from where the run stands to its end; return the exit status."""
    training = Training(run, recipe, accelerator, data, folder)
    training.begin(resume)

    with training.display, StopRequest(accelerator.num_processes) as stop, training.trackers:
        for epoch in range(run.progress.epoch, run.epochs):
            if not training.train_epoch(epoch, stop):
                return training.leave()

            measured = training.validate(stop)
            if measured is None:
                return training.leave()  # the resumed run begins with this evaluation

            training.end_epoch(measured)

        tested = evaluate(run.averaged_model, accelerator, data, data.test, "test", stop)
        if tested is None:
            return training.leave()

        training.record({"epoch": run.progress.epoch, "step": run.progress.step, **tested})

    training.finish(tested)
    return 0


class Training:
    """A run while it trains: the steps of `train`, and what they share."""

    def __init__(
        self, run: Run, recipe: Recipe, accelerator: Accelerator, data: Data, folder: Path
    ) -> None:
        self.run, self.recipe, self.accelerator = run, recipe, accelerator
        self.data, self.folder, self.progress = data, folder, run.progress
        self.is_main = accelerator.is_main_process
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes

        self.micro_batches = accelerator.gradient_accumulation_steps
        self.images_per_step = self.micro_batches * data.batch_size * self.ranks
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        """Sum of the losses of this epoch's images, on this rank."""
        self.averaged_masks = itop_prune.find_masks(run.ema.module) if run.ema else {}

        self.settings = CheckpointSettings(**(recipe.checkpoint or {}))
        self.checkpoints = Checkpoints(folder / "checkpoints", self.settings.keep)
        self.bad_losses = BadLosses(recipe.stop_after_bad_losses, run.unwrapped_model, accelerator)

        self.metrics = Metrics(folder)
        self.trackers = Trackers(accelerator, recipe, folder)
        self.layer_log = LayerLog(folder, run, data.shape, self.ranks, enabled=self.is_main)

    def begin(self, resume: bool) -> None:
        """Restore a run that goes on, and show where it begins."""
        messages: list[str] = []
        if resume:
            messages = restore(
                self.run, self.accelerator, self.checkpoints, self.loss_sum, self.images_per_step
            )
        self.check_ranks()

        self.display = Display(
            str(self.folder),
            self.run.epochs,
            self.run.total_steps,
            self.progress.step,
            enabled=self.is_main,
        )
        messages += filter(None, [explain_no_update(self.run, self.recipe)])
        if self.data.test is self.data.validation:
            messages.append(
                "there is no test set: the final accuracy is that of the images of every epoch; "
                "data.validation=N holds out training images for the epochs instead"
            )
        for message in messages:
            self.display.say(message)

        # Drop the lines past the checkpoint: the resumed run writes them again.
        if resume:
            for line in on_main(self.accelerator, self.metrics.cut, self.progress.epoch) or ():
                self.display.remember(line)
            on_main(self.accelerator, self.layer_log.cut)

        on_main(self.accelerator, self.trackers.start, self.progress.step, resume)

    def check_ranks(self) -> None:
        """Refuse to train from weights that differ between the ranks."""
        for name, model in self.run.models.items():
            tensors = {f"{key} of the {name}": tensor for key, tensor in model.state_dict().items()}
            check_equal(tensors, "before the first step; is the run folder on a disk that all see?")

    def train_epoch(self, epoch: int, stop: StopRequest) -> bool:
        """Train the remaining steps of an epoch; return False if a signal stopped it."""
        steps = self.run.steps_per_epoch
        first = self.progress.step - epoch * steps
        batches = self.data.epoch(
            epoch, start=first * self.micro_batches, rank=self.rank, ranks=self.ranks
        )
        began = time.perf_counter()
        self.run.model.train()

        for step in range(first, steps):
            moved = self.train_step(batches)
            self.after_step(moved)
            if self.display.is_due():
                self.show(epoch, step)
            if stop.wanted():
                self.progress.epoch_seconds += time.perf_counter() - began
                return False

        self.progress.epoch_seconds += time.perf_counter() - began
        return True

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """Do one optimizer step, and an update of the masks if one is due.

        Returns:
            Whether the masks moved.
        """
        run, accelerator = self.run, self.accelerator
        dense_gradient = run.regrow is not None and run.regrow.listens
        moved = False

        for micro_batch in range(self.micro_batches):
            x, y = next(batches)
            seed_everything(self.recipe.seed, "step", self.progress.step, micro_batch, self.rank)
            if run.mixup:
                x, y = run.mixup(x, y)

            with accelerator.accumulate(run.model):
                loss = run.loss(run.model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    moved = self.optimizer_step()

            self.loss_sum.add_(loss.detach(), alpha=len(x))
            self.bad_losses.see(loss)

        self.progress.step += 1
        if run.cost:
            self.progress.train_flops += run.cost.step(dense_gradient)
        return moved

    def optimizer_step(self) -> bool:
        """Step the optimizer and the mask scheduler; return whether the masks moved."""
        run, accelerator = self.run, self.accelerator
        if self.recipe.clip_grad_norm:
            accelerator.clip_grad_norm_(
                run.unwrapped_model.parameters(), self.recipe.clip_grad_norm
            )

        run.optimizer.step()

        moved = False
        if run.regrow and not accelerator.optimizer_step_was_skipped:
            moved = run.regrow.step()

        # The optimizer within: Accelerate's wrapper inspects a signature at every call.
        run.optimizer.optimizer.zero_grad()
        return moved

    def after_step(self, moved: bool) -> None:
        """Bring everything that follows the weights up to date."""
        run = self.run
        if moved:
            self.layer_log.note_update()
            if run.cost:
                run.cost.measure(run.unwrapped_model)

        if run.lr_schedule:
            run.lr_schedule.step_update(self.progress.step)

        if run.ema:
            if moved:
                self.clean_average()  # parameters in sparse storage may be longer now
            run.ema.update(run.unwrapped_model, step=self.progress.step)
            self.clean_average()

        self.bad_losses.end_step(self.progress.step, self.checkpoints)

    def clean_average(self) -> None:
        """Set weights of the average to 0 that are not active.

        The average remembers pruned weights, and some optimizers move weights off the mask.
        """
        if self.run.regrow:
            self.run.regrow.clean_average(self.averaged_masks)
            return
        for itop in self.averaged_masks.values():
            itop.zero_off_mask()

    def show(self, epoch: int, step: int) -> None:
        """Draw the numbers of the epoch so far."""
        images = (step + 1) * self.micro_batches * self.data.batch_size
        numbers = {
            "epoch": epoch + 1,
            "train_loss": float(self.loss_sum) / images,
            "lr": learning_rate(self.run),
            **sparse_numbers(self.run),
        }
        self.display.step(self.progress.step, numbers)

    def validate(self, stop: StopRequest) -> dict[str, float] | None:
        """Evaluate on the validation images, if any; return None if a signal stopped it."""
        data = self.data
        if not data.validation:
            return {}

        model = self.run.averaged_model
        return evaluate(model, self.accelerator, data, data.validation, "val", stop)

    def end_epoch(self, measured: dict[str, float]) -> None:
        """Record an epoch, and write a checkpoint if one is due."""
        run, progress = self.run, self.progress
        progress.epoch += 1
        progress.seconds += progress.epoch_seconds

        images = run.steps_per_epoch * self.images_per_step
        line: dict[str, Any] = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": float(self.accelerator.reduce(self.loss_sum)) / images,
            "lr": learning_rate(run),
            **sparse_numbers(run),
            "images_per_second": images / progress.epoch_seconds,
            "seconds": progress.seconds,
            **measured,
        }
        if run.lr_schedule:
            run.lr_schedule.step(progress.epoch)

        bad = self.bad_losses.has_nonfinite()
        best = not bad and line.get("val_top1", -1.0) > progress.best
        if best:
            progress.best = line["val_top1"]
        progress.epoch_seconds = 0.0
        self.loss_sum.zero_()

        # The checkpoint counts on these lines, so it comes after them.
        self.record(line)
        on_main(self.accelerator, self.layer_log.write)
        self.display.epoch(line)
        due = progress.epoch % self.settings.every == 0 or progress.epoch == run.epochs
        if not bad and (best or due):
            self.save(best)

    def record(self, line: dict[str, Any]) -> None:
        """Write a line of metrics, and pass it on to the trackers."""
        on_main(self.accelerator, self.metrics.append, line)
        on_main(self.accelerator, self.trackers.log, line)

    def save(self, best: bool = False) -> Path | None:
        """Write a checkpoint; return its folder on the main process."""
        return save(
            self.run, self.accelerator, self.checkpoints, self.loss_sum, self.images_per_step, best
        )

    def leave(self) -> int:
        """Write a checkpoint, unless the weights are bad, and say how to go on."""
        bad = self.bad_losses.has_nonfinite()
        on_main(self.accelerator, self.layer_log.write)
        saved = self.checkpoints.last() if bad else self.save()

        origin = saved or "the beginning"
        self.display.say(
            f"stopped at step {self.progress.step}; "
            f"the same command with --resume goes on from {origin}"
        )
        return STOPPED

    def finish(self, tested: dict[str, float]) -> None:
        """Write the final weights and the report, and show the results."""
        run = self.run
        weights = model_state(run.averaged_model, keep=self.is_main)
        on_main(self.accelerator, save_result, weights, self.folder / "model.safetensors")

        explored = run.regrow.explored if run.regrow else None
        whole = f"{self.folder / 'report.html'} has a row for each"
        self.display.table(itop_prune.summarize(run.unwrapped_model, explored), whole)
        self.display.finish({**tested, **sparse_numbers(run)}, self.progress.seconds)
        if self.is_main:
            self.display.say(attempt(self.folder))


def learning_rate(run: Run) -> float:
    """Read the learning rate from the optimizer."""
    return float(run.optimizer.param_groups[0]["lr"])


def sparse_numbers(run: Run) -> dict[str, float | None]:
    """Compute the metrics of the masks: rate, sparsity, R_s, survival and shares of FLOPs.

    Without a mask scheduler R_s is the density of the masks; 1 for a dense model.
    """
    masks = itop_prune.find_masks(run.unwrapped_model)
    weights = sum(itop.size for itop in masks.values())
    active = sum(active_weights(masks).values())

    numbers: dict[str, float | None] = {
        "rate": None,
        "sparsity": (weights - active) / max(1, weights),
        "exploration_rate": active / weights if weights else 1.0,
    }
    if run.regrow:
        numbers["rate"] = run.regrow.rate
        numbers["exploration_rate"] = run.regrow.exploration_rate()
        if not run.regrow.explored.exact:
            numbers["exploration_error"] = run.regrow.exploration_error()

    if run.cost:
        numbers["forward_flops"] = run.cost.forward
        numbers["train_flops"] = run.progress.train_flops / max(1, run.progress.step)

    survival = run.regrow.survival_rate() if run.regrow else math.nan
    if not math.isnan(survival):
        numbers["survival"] = survival
    return numbers
