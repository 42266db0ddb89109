r"""Train LeNet-300-100 as the code of the paper's authors does, and compare with our runs.

  python tools/authors_procedure.py --method static --seeds 10
  python tools/authors_procedure.py --method RigL-ITOP --seeds 10 \
      --ours runs/fashion_mnist_lenet300_erk98_rigl-itop

Data, first weights, optimizer and learning rate are the runner's, by the recipe of the method. The
masks are those of Liu et al. (2021), and all of their procedure is in this file. Masks are floats
that multiply weights and momentum after every step. They are drawn, and at random also grown,
position by position, so that the number of active weights drifts. --ours shows whether exact counts
cost accuracy.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import timm.optim
import torch
from torch import Tensor
from torch.nn import functional as F

from itop_prune.methods.distributions import DISTRIBUTIONS
from itop_prune.topology import seeded

from ..config.recipe import Recipe, RecipeError, read_recipe
from ..data.datasets import Data, open_data
from ..data.source import CPU, DataError
from ..reports import comparison
from ..run_folder.folder import RunError
from ..training.build import build_lr_schedule, build_model

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {
    "dense": FOLDER / "fashion_mnist_lenet300_dense.yaml",
    "static": FOLDER / "fashion_mnist_lenet300_erk98_static.yaml",
    "SET-ITOP": FOLDER / "fashion_mnist_lenet300_erk98_set-itop.yaml",
    "RigL-ITOP": FOLDER / "fashion_mnist_lenet300_erk98_rigl-itop.yaml",
}
MIN_RATE = 0.005


def main(argv: Sequence[str] | None = None) -> int:
    """Train the seeds and print a line of each and their mean; return the exit status."""
    args = parse(argv)
    given = {"masks.sparsity": args.sparsity, "multiplier": args.multiplier, "data.root": args.root}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]

    top1s, shares, drifts = [], [], []
    try:
        recipe = read_recipe(RECIPES[args.method], overrides)
        ours = accuracies(args.ours, recipe) if args.ours else None
        for seed in range(args.seeds):
            top1, explored, active = train(replace(recipe, seed=seed))
            top1s.append(top1)
            shares.append(explored)
            counts = ""
            if active[0]:
                drifts += [100.0 * number / active[0] - 100.0 for number in active]
                counts = f"  active weights {active[0]:,} to {active[-1]:,}"
            print(f"seed {seed}: test top-1 {top1:.2f} %  R_s {explored:.4f}{counts}", flush=True)
    except (RecipeError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    theirs, explored_all = comparison.spread(top1s, 2), comparison.spread(shares, 4)
    print(f"the authors' procedure, {args.seeds} seeds: {theirs} %  R_s {explored_all}")
    if drifts:
        span = f"{min(drifts):+.1f} to {max(drifts):+.1f} %"
        print(f"active weights while training, against those drawn: {span}")
    if ours:
        gap = difference(ours, top1s)
        print(f"ours, {len(ours)} seeds: {comparison.spread(ours, 2)} %  ours less theirs: {gap}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", choices=list(RECIPES), required=True, help="the method whose recipe to train"
    )
    parser.add_argument("--sparsity", type=float, help="in place of the recipe's")
    parser.add_argument(
        "--multiplier", type=int, help="of epochs and milestones, in place of the recipe's"
    )
    parser.add_argument("--root", help="folder of the data, in place of the recipe's")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0 on (default: 3)"
    )
    parser.add_argument(
        "--ours", type=Path, metavar="FOLDER", help="folder with seed<k>/ runs of the same recipe"
    )
    args = parser.parse_args(argv)
    if args.method == "dense" and args.sparsity is not None:
        parser.error("--sparsity is of masks, and --method dense has none; leave it out")
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; a deviation needs two, so give a number from 2")
    return args


def train(recipe: Recipe) -> tuple[float, float, list[int]]:
    """Train a recipe by the authors' procedure.

    Returns test accuracy in percent, R_s, and the number of active weights as drawn and after
    every update.
    """
    data = open_data(**recipe.data, seed=recipe.seed, augment=recipe.augment)
    model = build_model(recipe, data, CPU)
    optimizer = timm.optim.create_optimizer_v2(model, **recipe.optimizer)
    lr_schedule = build_lr_schedule(recipe, optimizer, data.batches_per_epoch())
    epochs = recipe.epochs * recipe.multiplier
    total_steps = epochs * data.batches_per_epoch()
    regrow = recipe.regrow or {}

    weights: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    generator = seeded(CPU, recipe.seed, "authors")
    if recipe.masks:
        weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
        masks = draw_masks(weights, generator, **recipe.masks)
    explored = {name: mask.bool() for name, mask in masks.items()}
    active = [count(masks)]
    multiply(masks, weights, optimizer)

    step = 0
    for epoch in range(epochs):
        for x, y in data.epoch(epoch):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            multiply(masks, weights, optimizer)
            step += 1
            if regrow and step % regrow["every"] == 0:
                cosine = 1 + math.cos(math.pi * step / total_steps)
                rate = MIN_RATE + (regrow["rate"] - MIN_RATE) * cosine / 2
                for name, weight in weights.items():
                    grad = weight.grad if regrow["grow"] == "gradient" else None
                    masks[name] = update_mask(masks[name], weight.detach(), rate, generator, grad)
                    explored[name] |= masks[name].bool()
                multiply(masks, weights, optimizer)
                active.append(count(masks))
            optimizer.zero_grad()
        lr_schedule.step(epoch + 1)

    share = count(explored) / sum(mask.numel() for mask in masks.values()) if masks else 1.0
    return accuracy_on_test_set(model, data), share, active


def update_mask(
    mask: Tensor,
    weight: Tensor,
    rate: float,
    generator: torch.Generator,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the mask of a layer after an update.

    The smallest `ceil(rate * active)` weights are pruned, and those that tie with the largest of
    them. With a dense gradient as many positions grow. Without one every inactive position grows
    with the same probability, so that as many grow on average.
    """
    active = int(mask.sum())
    inactive = mask.numel() - active
    largest_pruned = inactive + math.ceil(rate * active) - 1  # inactive weights are 0: they lead
    threshold = weight.abs().flatten().sort().values[largest_pruned]
    kept = weight.abs() > threshold
    pruned = active - int(kept.sum())

    if grad is None:
        free = int((~kept).sum())
        grown = torch.rand(mask.shape, generator=generator) < pruned / free
        return (kept | grown).float()

    new = kept.float()
    new.view(-1)[(grad.abs() * ~kept).flatten().topk(pruned).indices] = 1.0
    return new


def draw_masks(
    weights: Mapping[str, Tensor], generator: torch.Generator, sparsity: float, method: str
) -> dict[str, Tensor]:
    """Draw masks whose every position is active with the density of its layer, independently."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    densities = DISTRIBUTIONS[method](shapes, 1.0 - sparsity)
    return {
        name: (torch.rand(shape, generator=generator) < densities[name]).float()
        for name, shape in shapes.items()
    }


def multiply(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Multiply weights and momentum by the masks."""
    for name, mask in masks.items():
        weights[name].data *= mask
        state = optimizer.state[weights[name]]
        if state:
            state["momentum_buffer"] *= mask


def count(masks: Mapping[str, Tensor]) -> int:
    """Count the active positions."""
    return sum(int(mask.sum()) for mask in masks.values())


def accuracy_on_test_set(model: torch.nn.Module, data: Data) -> float:
    """Measure the accuracy on the test set, in percent."""
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in data.evaluation(data.test):
            right += int((model(x).argmax(1) == y).sum())
    return 100.0 * right / len(data.test)


def accuracies(folder: Path, recipe: Recipe) -> list[float]:
    """Read the test accuracies of the runs in a folder.

    Raises:
        RunError: Fewer than two are finished, or one trained another recipe. Seed and place of the
            data may differ.
    """
    for path in folder.glob("seed*/recipe.yaml"):
        found = read_recipe(path)
        data = {**found.data, "root": recipe.data["root"]}
        if replace(found, seed=recipe.seed, data=data) != recipe:
            raise RunError(
                f"{path} is not the recipe of --method, --sparsity and --multiplier; "
                "give runs of the same"
            )

    top1s = comparison.read(folder).top1
    if len(top1s) < 2:
        raise RunError(f"{folder} holds one finished run; a deviation needs two; train another")
    return top1s


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Compute the difference of two means and its standard error for unequal variances.

    Reference: Welch, 1947.

    >>> difference([3.0, 4.0, 5.0], [1.0, 3.0])
    '+2.00 ± 1.15'
    """
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (one, other)))
    return f"{statistics.mean(one) - statistics.mean(other):+.2f} ± {error:.2f}"
