"""R_s under random growth is what the settings of a run foretell: in the paper's figures, in training, in recipes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
import yaml
from itop_prune_tools.models import registration as models  # noqa: F401  (registers the paper's)
from itop_prune_tools.reports.expected_exploration import explored as in_expectation

import itop_prune
from itop_prune.methods.distributions import DISTRIBUTIONS
from itop_prune.methods.schedules import cosine

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("cifar*set-itop.yaml"))
IMAGES = 50_000
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model_name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=num_classes)
        return {name: tuple(itop.mask.shape) for name, itop in itop_prune.apply(model, 0.5).items()}


def explored(density: float, every: int, steps: int) -> float:
    """The share of one layer that random growth explores at the paper's rates."""
    return in_expectation(
        density, [0.005 + (0.5 - 0.005) * cosine(s / steps) for s in range(every, steps + 1, every)]
    )


def of_all(shapes: Shapes, rates: Mapping[str, float]) -> float:
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(weights[name] * rates[name] for name in shapes) / sum(weights.values())


def expected(shapes: Shapes, sparsity: float, every: int, steps: int) -> float:
    densities = DISTRIBUTIONS["ERK"](shapes, 1 - sparsity)
    return of_all(
        shapes, {name: explored(density, every, steps) for name, density in densities.items()}
    )


@pytest.mark.parametrize(
    ("model", "classes", "sparsity", "every", "steps_per_epoch", "normal", "extended"),
    [
        (
            "cifar_vgg_c",
            10,
            0.95,
            1500,
            352,
            0.436,
            0.864,
        ),  # 45,000 images, the last batch a small one
        ("cifar_vgg_c", 10, 0.95, 4000, 352, 0.243, 0.598),
        ("cifar_resnet34", 100, 0.98, 1500, 391, 0.262, 0.718),  # 50,000 images
        ("cifar_mlp", 10, 0.95, 1500, 352, 0.530, 0.965),
    ],
)
def test_our_models_explore_what_is_known_of_the_paper_s(
    model: str,
    classes: int,
    sparsity: float,
    every: int,
    steps_per_epoch: int,
    normal: float,
    extended: float,
) -> None:
    shapes = shapes_of(model, classes)
    steps = 250 * steps_per_epoch
    assert expected(shapes, sparsity, every, steps) == pytest.approx(normal, abs=0.0005)
    assert expected(shapes, sparsity, every, 5 * steps) == pytest.approx(extended, abs=0.0005)


@pytest.mark.parametrize(
    ("model", "classes", "sparsity", "every", "steps", "updates", "known"),
    [  # 88,000 and 97,750 steps with an update at each 1500th, told in 3 and 6 instead
        ("cifar_vgg_c", 10, 0.95, 3, 176, 58, 0.436),
        ("cifar_resnet34", 100, 0.98, 6, 391, 65, 0.262),
    ],
)
def test_the_scheduler_explores_what_is_expected(
    model: str, classes: int, sparsity: float, every: int, steps: int, updates: int, known: float
) -> None:
    """All updates of a run at their rates. Layers of one shape have one density: one is moved, and stands for all.

    What trains between updates decides which weights leave, and so not how many are new among those
    that enter.
    """
    net = timm.create_model(model, num_classes=classes)
    masks = itop_prune.apply(net, sparsity)
    shapes = {name: tuple(itop.mask.shape) for name, itop in masks.items()}
    stands_for = {shape: name for name, shape in reversed(shapes.items())}
    moving = {name: masks[name] for name in stands_for.values()}
    for itop in moving.values():
        itop.parameter.grad = itop.parameter.detach()
    regrow = itop_prune.MaskScheduler(
        moving, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=steps, every=every
    )
    for _ in range(steps):
        regrow.step()
    assert regrow.updates == updates
    rates = {
        name: regrow.explored[stands_for[shape]].float().mean().item()
        for name, shape in shapes.items()
    }
    assert of_all(shapes, rates) == pytest.approx(known, rel=0.01)
    for name, itop in moving.items():
        density = itop.active / itop.mask.numel()
        if itop.mask.numel() > 250_000:  # smaller ones stray further
            assert rates[name] == pytest.approx(explored(density, every, steps), rel=0.01), name


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_explores(path: Path) -> None:
    text = path.read_text()
    recipe = yaml.safe_load(text)
    shapes = shapes_of(recipe["model"]["model_name"], recipe["model"]["num_classes"])

    def found(multiplier: int, validation: int) -> tuple[str, str]:
        steps = (
            (IMAGES - validation) // recipe["data"]["batch_size"] * recipe["epochs"] * multiplier
        )
        every = recipe["regrow"]["every"]
        rate = expected(shapes, recipe["masks"]["sparsity"], every, steps)
        return f"{rate:.3f}".removeprefix("0"), str(steps // every)

    said = re.search(
        r"Expected R_s (\.\d+) after (\d+) updates, and (\.\d+) with multiplier=5", text
    )
    assert said is not None
    held_out = recipe["data"]["validation"]
    assert said.groups() == (*found(1, held_out), found(5, held_out)[0])
    if whole := re.search(r"\(data\.validation=0\) (\.\d+) after (\d+)", text):
        assert whole.groups() == found(1, 0)
