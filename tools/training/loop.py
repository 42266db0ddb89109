"""Train what a recipe says: dense, with static masks, or with masks that move.

  accelerate launch tools/train.py recipes/quickstart.yaml accelerate launch tools/train.py
  recipes/resnet50.yaml data.root=/data/imagenet masks.sparsity=0.8 seed=1 torchrun --nproc_per_node
  2 tools/train.py recipes/quickstart.yaml        # two processes on a CPU accelerate launch
  tools/train.py recipes/quickstart.yaml --seeds 3        # mean and spread of seeds 0, 1 and 2

A run writes runs/<recipe>[-key=value...]/seed<k>/: recipe.yaml (as it was resolved), metrics.jsonl
(a line an epoch; the test set is used once, at the end), layers.jsonl (the masks after every
update), checkpoints/, model.safetensors, the same as a small file in sparse.safetensors, and
report.html, all of it to look at. Ctrl-C leaves a checkpoint, and the same command with --resume
goes on from it. The sections of a recipe are keyword arguments: itop_prune/sections.py says of
what.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

import itop_prune
from itop_prune.distributed import RanksDiffer, check_equal
from itop_prune.layers.handle import active_weights

from ..config.recipe import Recipe, RecipeError, read
from ..data.datasets import Data, augmentation_of, open_data
from ..data.source import DataError, seed_everything
from ..reports.report import attempt
from ..run_folder.folder import RunError, StopRequest, check_same_recipe, run_folder, start
from ..run_folder.layer_log import Layers
from ..run_folder.metrics import Metrics
from .build import Run, build, make_accelerator, open_for, steps_per_epoch
from .checkpoint import CheckpointError, Checkpoints, save_result
from .display import Display
from .dry_run import dry_run, without_updates
from .evaluation import evaluate, evaluate_only, read_for_weights
from .seeds import train_seeds
from .sharded import model_state
from .state import BadLosses, OtherRankFailed, on_main, restore, save
from .trackers import Trackers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a YAML file; see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="in place of what the recipe says"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the run, in place of runs/..."
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="train N seeds one after another; their mean and spread",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build, check, print layers and plan; train nothing"
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="PATH",
        help="test the weights in a file, checkpoint or run",
    )
    args = parser.parse_intermixed_args(argv)
    if args.seeds is not None and (args.seeds < 1 or args.evaluate):
        parser.error("--seeds is a number from 1, and trains; leave it out with --evaluate")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe; return the exit status: 0 done, 1 an error, 130 stopped by a signal."""
    args = parse(argv)
    try:
        if args.evaluate:
            recipe = read_for_weights(args.recipe, args.overrides)
        else:
            recipe = read(args.recipe, args.overrides, data=open_data, augment=augmentation_of)
        folder = run_folder(args.recipe, args.overrides, recipe.seed)
        if args.dry_run:
            return dry_run(recipe, make_accelerator(recipe))
        if args.evaluate:
            accelerator = make_accelerator(recipe)
            return evaluate_only(recipe, accelerator, open_for(recipe, accelerator), args.evaluate)
        if args.seeds:
            return train_seeds(
                recipe, args.seeds, args.out or folder.parent, args.resume, train_recipe
            )
        return train_recipe(recipe, args.out or folder, args.resume)
    except (
        RecipeError,
        DataError,
        RunError,
        CheckpointError,
        RanksDiffer,
        OSError,
        SafetensorError,
    ) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(
            error, (RecipeError, RanksDiffer)
        ):  # these all ranks see alike
            print(
                f"error: {error}" if rank == "0" else f"rank {rank}: error: {error}",
                file=sys.stderr,
            )
    except OtherRankFailed:  # which says why
        pass
    return 1


def train_recipe(recipe: Recipe, folder: Path, resume: bool) -> int:
    """Build what a recipe says and train it into a folder; return the exit status."""
    accelerator = make_accelerator(recipe)
    data = open_for(recipe, accelerator)
    run = build(recipe, accelerator, data, steps_per_epoch(data, accelerator))
    return train(run, recipe, accelerator, data, folder, resume)


def train(
    run: Run, recipe: Recipe, accelerator: Accelerator, data: Data, folder: Path, resume: bool
) -> int:
    """Train from where the run stands to its end."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batches, progress = accelerator.gradient_accumulation_steps, run.progress
    checkpointing = {"every": 1, "keep": 2, **(recipe.checkpoint or {})}
    metrics, checkpoints = (
        Metrics(folder),
        Checkpoints(folder / "checkpoints", checkpointing["keep"]),
    )
    trackers = Trackers(accelerator, recipe, folder)
    layers = Layers(folder, run, data.shape, ranks, takes_notes=accelerator.is_main_process)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    images_per_step, notes = micro_batches * data.batch_size * ranks, []
    if resume:
        on_main(accelerator, lambda: check_same_recipe(folder, recipe))
        notes = restore(run, accelerator, checkpoints, loss_sum, images_per_step)
        if run.cost:
            run.cost.forward = run.cost.share(run.bare)
    else:
        on_main(accelerator, lambda: start(folder, recipe))
    for name, model in run.models.items():
        tensors = {f"{key} of the {name}": tensor for key, tensor in model.state_dict().items()}
        check_equal(tensors, "before the first step; is the run folder on a disk that all see?")
    total_steps = run.epochs * run.steps_per_epoch
    display = Display(
        str(folder), run.epochs, total_steps, progress.step, speaks=accelerator.is_main_process
    )
    for note in filter(None, (*notes, without_updates(run, recipe))):
        display.say(note)
    for past in (
        on_main(accelerator, lambda: metrics.cut(progress.epoch)) if resume else None
    ) or ():
        display.remember(past)
    if resume:
        on_main(accelerator, layers.cut)
    bad_losses = BadLosses(recipe.stop_after_bad_losses, run.bare, accelerator)
    on_main(accelerator, lambda: trackers.start(progress.step, resume))

    def record(line: dict[str, Any]) -> None:
        metrics.append(line)
        trackers.log(line)

    def leave() -> int:
        bad = bad_losses.spoil()
        on_main(accelerator, layers.write)
        saved = (
            checkpoints.last()
            if bad
            else save(run, accelerator, checkpoints, loss_sum, images_per_step)
        )
        origin = saved or "the beginning"
        display.say(
            f"stopped at step {progress.step}; the same command with --resume goes on from {origin}"
        )
        return 130

    with display, StopRequest(ranks) as stop, trackers:
        for epoch in range(progress.epoch, run.epochs):
            first = progress.step - epoch * run.steps_per_epoch
            batches = data.epoch(epoch, start=first * micro_batches, rank=rank, ranks=ranks)
            began = time.perf_counter()
            run.model.train()
            for step in range(first, run.steps_per_epoch):
                moved, listens = False, run.regrow is not None and run.regrow.listens
                for micro_batch in range(micro_batches):
                    x, y = next(batches)
                    seed_everything(recipe.seed, "step", progress.step, micro_batch, rank)
                    if run.mixup:
                        x, y = run.mixup(x, y)
                    with accelerator.accumulate(run.model):
                        loss = run.loss(run.model(x), y)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients and recipe.clip_grad_norm:
                            accelerator.clip_grad_norm_(
                                run.bare.parameters(), recipe.clip_grad_norm
                            )
                        run.optimizer.step()
                        if accelerator.sync_gradients:
                            if run.regrow and not accelerator.optimizer_step_was_skipped:
                                moved = run.regrow.step()
                            run.optimizer.optimizer.zero_grad()  # Accelerate's looks up a signature at every call
                    loss_sum.add_(loss.detach(), alpha=len(x))
                    bad_losses.see(loss)
                progress.step += 1
                if moved:
                    layers.update()
                if run.cost:
                    progress.train_flops += run.cost.step(listens)
                    run.cost.forward = run.cost.share(run.bare) if moved else run.cost.forward
                if run.lr_schedule:
                    run.lr_schedule.step_update(progress.step)
                if run.ema:
                    run.ema.update(run.bare, step=progress.step)
                    for itop in itop_prune.find_masks(run.ema.module).values() if moved else ():
                        itop.zero_off_mask()  # the average remembers pruned weights, and they may grow again
                bad_losses.end_step(progress.step, checkpoints)
                if display.is_due():
                    mean = float(loss_sum) / ((step + 1) * micro_batches * data.batch_size)
                    shown = {
                        "epoch": epoch + 1,
                        "train_loss": mean,
                        "lr": learning_rate(run),
                        **sparse_numbers(run),
                    }
                    display.step(progress.step, shown)
                if stop.wanted():
                    progress.epoch_seconds += time.perf_counter() - began
                    return leave()

            progress.epoch_seconds += time.perf_counter() - began
            measured: dict[str, float] | None = {}
            if data.validation:
                measured = evaluate(run.averaged, accelerator, data, data.validation, "val", stop)
            if (
                measured is None
            ):  # all steps of the epoch are done, and the resumed run begins with its evaluation
                return leave()
            images = run.steps_per_epoch * images_per_step
            progress.epoch, progress.seconds = epoch + 1, progress.seconds + progress.epoch_seconds
            line: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step}
            line |= {
                "train_loss": float(accelerator.reduce(loss_sum)) / images,
                "lr": learning_rate(run),
            }
            line |= {**sparse_numbers(run), "images_per_second": images / progress.epoch_seconds}
            line |= {"seconds": progress.seconds, **measured}
            if run.lr_schedule:
                run.lr_schedule.step(progress.epoch)
            bad = bad_losses.spoil()
            best = not bad and line.get("val_top1", -1.0) > progress.best
            progress.best = line["val_top1"] if best else progress.best
            progress.epoch_seconds = 0.0
            loss_sum.zero_()
            on_main(accelerator, lambda: record(line))  # noqa: B023  (called at once)
            on_main(accelerator, layers.write)
            display.epoch(line)
            if not bad and (
                best or progress.epoch % checkpointing["every"] == 0 or progress.epoch == run.epochs
            ):
                save(run, accelerator, checkpoints, loss_sum, images_per_step, best)
        tested = evaluate(run.averaged, accelerator, data, data.test, "test", stop)
        if tested is None:
            return leave()
        on_main(
            accelerator, lambda: record({"epoch": progress.epoch, "step": progress.step, **tested})
        )

    weights = model_state(run.averaged, keep=accelerator.is_main_process)
    on_main(accelerator, lambda: save_result(weights, folder / "model.safetensors"))
    display.table(itop_prune.summarize(run.bare, run.regrow.explored if run.regrow else None))
    display.finish({**tested, **sparse_numbers(run)}, progress.seconds)
    if accelerator.is_main_process:
        display.say(attempt(folder))
    return 0


def learning_rate(run: Run) -> float:
    """Return the learning rate that the optimizer holds."""
    return float(run.optimizer.param_groups[0]["lr"])


def sparse_numbers(run: Run) -> dict[str, float | None]:
    """Return rate, sparsity, R_s (of static masks the density, of a dense model 1), and FLOPs as shares of dense."""
    masks = itop_prune.find_masks(run.bare)
    weights, active = (
        sum(itop.mask.numel() for itop in masks.values()),
        sum(active_weights(masks).values()),
    )
    numbers: dict[str, float | None] = {
        "rate": run.regrow.rate if run.regrow else None,
        "sparsity": (weights - active) / max(1, weights),
        "exploration_rate": run.regrow.exploration_rate()
        if run.regrow
        else active / weights
        if weights
        else 1.0,
    }
    if run.cost:
        numbers["forward_flops"] = run.cost.forward
        numbers["train_flops"] = run.progress.train_flops / max(1, run.progress.step)
    survival = run.regrow.survival_rate() if run.regrow else math.nan
    return numbers if math.isnan(survival) else {**numbers, "survival": survival}
