"""Train LeNet-300-100 as the code of the paper's authors does (Liu et al., 2021), and hold this project's runs to it.

  python tools/authors.py --method static --seeds 10 python tools/authors.py --method RigL-ITOP
  --seeds 10 --ours runs/fashion_mnist_lenet300_erk98_rigl-itop

Data, first weights, optimizer and learning rate are the runner's, by the recipe of the method. The
masks are theirs, and all of them is here: floats that multiply weights and momentum after every
step, drawn and (at random) grown position by position, so that the number of active weights drifts.
--ours shows whether exact counts cost accuracy.
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
from ..data.datasets import open_data
from ..data.source import CPU, DataError
from ..reports import comparison as compare
from ..run_folder.folder import RunError
from ..training.build import build_lr_schedule, build_model

METHODS = {
    "dense": "dense",
    "static": "erk98_static",
    "SET-ITOP": "erk98_set-itop",
    "RigL-ITOP": "erk98_rigl-itop",
}
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {
    method: FOLDER / f"fashion_mnist_lenet300_{name}.yaml" for method, name in METHODS.items()
}
MIN_RATE = 0.005


def move(
    mask: Tensor,
    weight: Tensor,
    rate: float,
    generator: torch.Generator,
    grad: Tensor | None = None,
) -> Tensor:
    """Return the mask of a layer after an update.

    The smallest `ceil(rate * active)` weights leave, and what is as small as the largest of them.
    Of the dense gradient as many positions grow; without it every free one with the same
    probability, so that as many do on average.
    """
    active = int(mask.sum())
    largest = (
        mask.numel() - active + math.ceil(rate * active)
    )  # of those that leave, off the mask or on
    kept = weight.abs() > weight.abs().flatten().sort().values[largest - 1]
    pruned, free = active - int(kept.sum()), int((~kept).sum())
    if grad is None:
        return (kept | (torch.rand(mask.shape, generator=generator) < pruned / free)).float()
    moved = kept.float()
    moved.view(-1)[(grad.abs() * ~kept).flatten().topk(pruned).indices] = 1.0
    return moved


def train(recipe: Recipe) -> tuple[float, float, list[int]]:
    """Return test accuracy in percent, R_s, and how many weights were active as drawn and after every update."""
    data = open_data(**recipe.data, seed=recipe.seed, augment=recipe.augment)
    model = build_model(recipe, data, CPU)
    optimizer = timm.optim.create_optimizer_v2(model, **recipe.optimizer)
    lr_schedule = build_lr_schedule(recipe, optimizer, data.batches_per_epoch())
    epochs, regrow, step = recipe.epochs * recipe.multiplier, recipe.regrow or {}, 0
    total_steps, generator = epochs * data.batches_per_epoch(), seeded(CPU, recipe.seed, "authors")
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if recipe.masks and weight.ndim > 1
    }
    masks = draw(weights, generator, **recipe.masks) if recipe.masks else {}
    explored, active = {name: mask.bool() for name, mask in masks.items()}, [count(masks)]
    apply(masks, weights, optimizer)
    for epoch in range(epochs):
        for x, y in data.epoch(epoch):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            apply(masks, weights, optimizer)
            step += 1
            if regrow and step % regrow["every"] == 0:
                rate = (
                    MIN_RATE
                    + (regrow["rate"] - MIN_RATE) * (1 + math.cos(math.pi * step / total_steps)) / 2
                )
                for name, weight in weights.items():
                    grad = weight.grad if regrow["grow"] == "gradient" else None
                    masks[name] = move(masks[name], weight.detach(), rate, generator, grad)
                    explored[name] |= masks[name].bool()
                apply(masks, weights, optimizer)
                active.append(count(masks))
            optimizer.zero_grad()
        lr_schedule.step(epoch + 1)
    with torch.no_grad():
        right = sum(
            count({"": model.eval()(x).argmax(1) == y}) for x, y in data.evaluation(data.test)
        )
    share = count(explored) / sum(mask.numel() for mask in masks.values()) if masks else 1.0
    return 100.0 * right / len(data.test), share, active


def draw(
    weights: Mapping[str, Tensor], generator: torch.Generator, sparsity: float, method: str
) -> dict[str, Tensor]:
    """Return masks in which every position is 1 with the density of its layer, independently of the others."""
    density = DISTRIBUTIONS[method](
        {name: tuple(weight.shape) for name, weight in weights.items()}, 1.0 - sparsity
    )
    return {
        n: (torch.rand(weight.shape, generator=generator) < density[n]).float()
        for n, weight in weights.items()
    }


def apply(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Multiply weights and momentum by the masks."""
    for name, mask in masks.items():
        weights[name].data *= mask
        if state := optimizer.state[weights[name]]:
            state["momentum_buffer"] *= mask


def count(masks: Mapping[str, Tensor]) -> int:
    """Return how many positions are active."""
    return sum(int(mask.sum()) for mask in masks.values())


def accuracies(folder: Path, recipe: Recipe) -> list[float]:
    """Return what the runs of a folder reached.

    Raises: RunError: Fewer than two are finished, or one trained another recipe, seed and place of
        the data aside.
    """
    for path in folder.glob("seed*/recipe.yaml"):
        ours = read_recipe(path)
        if (
            replace(ours, seed=recipe.seed, data={**ours.data, "root": recipe.data["root"]})
            != recipe
        ):
            raise RunError(
                f"{path} is not the recipe of --method, --sparsity and --multiplier; give runs of the same"
            )
    if len(found := compare.read(folder).top1) < 2:
        raise RunError(f"{folder} holds one finished run; a deviation needs two")
    return found


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Return the difference of two means with its standard error, of unequal deviations (Welch, 1947).

    >>> difference([3.0, 4.0, 5.0], [1.0, 3.0])
    '+2.00 ± 1.15'
    """
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (one, other)))
    return f"{statistics.mean(one) - statistics.mean(other):+.2f} ± {error:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Train the seeds, print a line of each and what they come to; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", choices=list(RECIPES), required=True, help="whose recipe is trained"
    )
    parser.add_argument("--sparsity", type=float, help="in place of the recipe's")
    parser.add_argument(
        "--multiplier", type=int, help="of epochs and milestones, in place of the recipe's"
    )
    parser.add_argument("--root", help="folder of the data, in place of the recipe's")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how many, from 0 on (default: 3)"
    )
    parser.add_argument(
        "--ours", type=Path, metavar="FOLDER", help="holds seed<k>/ runs of the same recipe"
    )
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds is a number from 2, or there is no deviation")
    given = {"masks.sparsity": args.sparsity, "multiplier": args.multiplier, "data.root": args.root}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    found, drifts = [], []
    try:
        recipe = read_recipe(RECIPES[args.method], overrides)
        ours = accuracies(args.ours, recipe) if args.ours else None
        for seed in range(args.seeds):
            top1, explored, active = train(replace(recipe, seed=seed))
            found.append((top1, explored))
            drifts += [100.0 * number / active[0] - 100.0 for number in active if number]
            counts = f"  active weights {active[0]:,} to {active[-1]:,}" if active[0] else ""
            print(f"seed {seed}: test top-1 {top1:.2f} %  R_s {explored:.4f}{counts}", flush=True)
    except (RecipeError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    theirs, shares = zip(*found, strict=True)
    print(
        f"the authors' procedure, {args.seeds} seeds: {compare.spread(theirs, 2)} %  R_s {compare.spread(shares, 4)}"
    )
    if drifts:
        print(
            f"active weights while training, against those drawn: {min(drifts):+.1f} to {max(drifts):+.1f} %"
        )
    if ours:
        print(
            f"ours, {len(ours)} seeds: {compare.spread(ours, 2)} %  ours less theirs: {difference(ours, theirs)}"
        )
    return 0
