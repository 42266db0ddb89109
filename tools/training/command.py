"""Train a recipe: dense, with static masks, or with masks that move.

  itop-prune train quickstart
  itop-prune train my.yaml data.root=/data/imagenet seed=1
  itop-prune train quickstart --seeds 3                             # seeds 0, 1 and 2
  accelerate launch -m itop_prune_tools train quickstart            # as many processes as GPUs
  torchrun --nproc_per_node 2 -m itop_prune_tools train quickstart  # two, on a CPU too

In a clone, tools/train.py stands for -m itop_prune_tools train.

A run writes into runs/<recipe>[-key=value...]/seed<k>/:

  recipe.yaml          the recipe with its overrides
  metrics.jsonl        one line per epoch; the test set is used once, at the end
  layers.jsonl         the masks of every layer after every update
  checkpoints/         the last few checkpoints and the best one
  model.safetensors    the final weights; sparse.safetensors is the same as a small file
  checksums.json       the SHA-256 of model.safetensors
  report.html          pictures of all of it

Ctrl-C leaves a checkpoint; the same command with --resume goes on from it. The sections of a
recipe are keyword arguments; itop-prune recipes --keys lists them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError

from itop_prune.distributed import RanksDiffer

from ..config.packaged import find_recipe
from ..config.recipe import Recipe, RecipeError, read_recipe
from ..data.source import DataError
from ..run_folder.folder import RunError, opened, run_folder
from .build import build, make_accelerator, open_for, steps_per_epoch
from .checkpoint import CheckpointError
from .dry_run import dry_run
from .evaluation import evaluate_only, read_recipe_for_weights
from .loop import train
from .ranks import OtherRankFailed, on_main
from .seeds import train_seeds
from .threads import limited_threads

ERRORS = (
    RecipeError,
    DataError,
    RunError,
    CheckpointError,
    RanksDiffer,
    OSError,
    SafetensorError,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", type=Path, help="a YAML file, or a name that itop-prune recipes lists"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the run, instead of runs/..."
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="train N seeds in sequence; print mean and spread"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build, check, print layers and plan; do not train, do not download",
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="PATH",
        help="test the weights of a file, a checkpoint or a run; do not train",
    )
    args = parser.parse_intermixed_args(argv)

    if args.seeds is not None and (args.seeds < 1 or args.evaluate):
        parser.error("--seeds is a number from 1, and trains; leave it out with --evaluate")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 done, 1 an error, 130 stopped by a signal."""
    args = parse(argv)
    try:
        return run_command(args)
    except OtherRankFailed:
        return 1  # the main process reports why
    except ERRORS as error:
        report_error(error)
        return 1


def run_command(args: argparse.Namespace) -> int:
    """Read the recipe and do what the command line asks for; return the exit status."""
    args.recipe = find_recipe(args.recipe)
    if args.evaluate:
        recipe = read_recipe_for_weights(args.recipe, args.overrides)
    else:
        recipe = read_recipe(args.recipe, args.overrides)
    folder = run_folder(args.recipe, args.overrides, recipe.seed)

    if args.dry_run:
        return dry_run(recipe, make_accelerator(recipe))
    if args.evaluate:
        accelerator = make_accelerator(recipe)
        return evaluate_only(recipe, accelerator, open_for(recipe, accelerator), args.evaluate)
    if args.seeds:
        return train_seeds(recipe, args.seeds, args.out or folder.parent, args.resume, train_recipe)
    return train_recipe(recipe, args.out or folder, args.resume)


def train_recipe(recipe: Recipe, folder: Path, resume: bool) -> int:
    """Build the run of a recipe and train it into a folder; return the exit status."""
    accelerator = make_accelerator(recipe)
    data = open_for(recipe, accelerator)
    run = build(recipe, accelerator, data, steps_per_epoch(data, accelerator))
    with ExitStack() as held:
        if run.cost and accelerator.device.type == "cpu":
            held.enter_context(limited_threads(run.cost.dense_forward * data.batch_size))
        on_main(accelerator, held.enter_context, opened(folder, recipe, resume))
        return train(run, recipe, accelerator, data, folder, resume)


def report_error(error: Exception) -> None:
    """Print an error to stderr; one that all ranks raise equally only on the first."""
    # A value of the recipe may hold control characters, which a terminal would obey.
    message = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(error))
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif not isinstance(error, (RecipeError, RanksDiffer)):
        print(f"rank {rank}: error: {message}", file=sys.stderr)
