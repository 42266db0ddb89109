"""Every recipe in the folder: sound, plain to compare, and ending at exactly its sparsity."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.processes import photos
from itop_prune_tools.config.recipe import Recipe, read_recipe
from itop_prune_tools.training import command as train
from itop_prune_tools.training.build import build_lr_schedule
from torch import nn

import itop_prune

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
FASHION = [path for path in RECIPES if path.stem.startswith("fashion_mnist_lenet300")]
READ = {path: yaml.safe_load(path.read_text()) for path in RECIPES}
ALIKE = [
    (path, (recipe["model"]["model_name"], recipe["data"]["name"])) for path, recipe in READ.items()
]
TWINS = [(one, other) for (one, what), (other, same) in combinations(ALIKE, 2) if what == same]
CIFAR = [path for path in RECIPES if READ[path]["data"]["name"].startswith("cifar")]
RIGL_LAST = sorted(
    (path for path in RECIPES if "regrow" in READ[path]), key=lambda path: "rigl-itop" in path.stem
)
ONE_OF_EACH_MODEL = {READ[path]["model"]["model_name"]: path for path in RIGL_LAST}
"""Of each model the one that grows by gradient, if there is one."""
BY_STEPS = [path for path in RECIPES if "lr_schedule" in READ[path]]


def name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Forty random images of 28×28 as an .npz file."""
    draw = np.random.default_rng(0)
    arrays = {
        f"x_{split}": draw.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        for split in ("train", "test")
    }
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, **arrays, **{f"y_{split}": np.arange(40) % 10 for split in ("train", "test")})
    return path


def test_there_are_recipes():
    assert len(RECIPES) >= 30
    assert len(FASHION) == 15
    assert len(CIFAR) == 12
    assert len(BY_STEPS) == len(RECIPES)
    assert ONE_OF_EACH_MODEL.keys() == {recipe["model"]["model_name"] for recipe in READ.values()}
    of_cifar_and_imagenet = {path for pair in TWINS for path in pair} - set(FASHION)
    assert len(of_cifar_and_imagenet) == 12 + 3


@pytest.mark.parametrize("path", [path for path in RECIPES if "_" in path.stem], ids=name)
def test_a_name_says_data_distribution_sparsity_and_variant(path):
    recipe = READ[path]
    assert path.stem.startswith(recipe["data"]["name"].replace("folder", "imagenet") + "_")
    if not recipe.get("masks"):
        assert path.stem.endswith("_dense")
        return
    last = recipe.get("regrow", {}).get("final_sparsity", recipe["masks"]["sparsity"])
    *_, distribution, variant = path.stem.split("_")
    pattern = recipe["masks"].get("pattern")
    densities = (f"erk{100 * last:.0f}", f"global{100 * last:.0f}")
    assert distribution in ((pattern.replace(":", "of"),) if pattern else densities)
    without_updates = ("static", "snip", "grasp", "synflow")
    assert (variant in without_updates) == ("regrow" not in recipe)


@pytest.mark.parametrize("path", CIFAR, ids=name)
def test_a_cifar_recipe_has_the_settings_of_the_paper(path):
    recipe = READ[path]
    assert (recipe["data"]["batch_size"], recipe["data"]["validation"]) == (128, 5000)
    assert recipe["augment"] == {"padding": 4, "hflip": 0.5}
    sgd = {
        "opt": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.0005,
        "filter_bias_and_bn": False,
    }
    assert recipe["optimizer"] == sgd
    assert (recipe["epochs"], recipe["lr_schedule"]["decay_milestones"]) == (
        250,
        [250 // 2, 250 * 3 // 4],
    )
    assert recipe.get("masks", {}).get("method", "ERK") == "ERK"
    assert recipe.get("masks", {}).get("sparsity") == (
        None if path.stem.endswith("dense") else 0.98 if "resnet34" in path.stem else 0.95
    )
    settings = {"rate": 0.5, "prune": "magnitude"}
    assert recipe.get("regrow") == {
        "set-itop": {"every": 1500, "grow": "random", **settings},
        "rigl-itop": {"every": 4000, "grow": "gradient", **settings},
    }.get(path.stem.rpartition("_")[2])


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if READ[path]["data"]["name"] == "folder"], ids=name
)
def test_an_imagenet_recipe_has_the_settings_of_the_paper(path):
    recipe = READ[path]
    assert recipe["optimizer"] == {
        "opt": "momentum",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.0001,
    }
    schedule = recipe["lr_schedule"]
    assert (recipe["epochs"], schedule["decay_milestones"], schedule["warmup_epochs"]) == (
        100,
        [30, 60, 90],
        5,
    )
    assert (recipe["data"]["batch_size"], recipe["loss"]) == (64, {"smoothing": 0.1})
    assert recipe.get("masks") in (None, {"sparsity": 0.9, "method": "ERK"})
    assert learning_rates(Recipe(**recipe))[:6] == pytest.approx(
        [0.1 * k / 6 for k in range(1, 7)], rel=1e-5
    )
    rigl = {"every": 4000, "rate": 0.5, "prune": "magnitude", "grow": "gradient"}
    assert recipe.get("regrow") == (rigl if path.stem == "resnet50" else None)


def learning_rates(recipe: Recipe) -> list[float]:
    """Of each epoch of a run, in one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer["lr"])
    schedule, found = build_lr_schedule(recipe, optimizer, 1), []
    for epoch in range(recipe.epochs * recipe.multiplier):
        found.append(round(optimizer.param_groups[0]["lr"], 9))
        schedule.step_update(epoch + 1)
        schedule.step(epoch + 1)
    return found


@pytest.mark.parametrize("path", BY_STEPS, ids=name)
def test_an_extended_run_stretches_milestones_and_rate_but_neither_warm_up_nor_every(path):
    sections: dict[str, Any] = {
        key: value for key, value in READ[path].items() if key != "multiplier"
    }
    warm = sections["lr_schedule"].get("warmup_epochs", 0)
    normal, extended = (learning_rates(Recipe(**sections, multiplier=m)) for m in (1, 5))
    assert len(extended) == 5 * len(normal)
    assert extended[:warm] == normal[:warm]
    begins = {rate: epoch for epoch, rate in reversed(list(enumerate(normal)))}
    stretched = {rate: 5 * epoch if epoch > warm else epoch for rate, epoch in begins.items()}
    assert {rate: epoch for epoch, rate in reversed(list(enumerate(extended)))} == stretched
    if "regrow" in sections:
        layer = nn.Linear(8, 8)
        masks, optimizer = itop_prune.apply(layer, 0.5), torch.optim.SGD(layer.parameters(), lr=0.1)
        settings, steps = (
            {**sections["regrow"], "gradient_steps": 1},
            100 * sections["regrow"]["every"],
        )
        one, five = (
            itop_prune.MaskScheduler(masks, optimizer, total_steps=m * steps, **settings)
            for m in (1, 5)
        )
        assert five.update_steps().step == one.update_steps().step == sections["regrow"]["every"]
        assert five.update_steps()[-1] == 5 * one.update_steps()[-1]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_sound_and_says_in_its_first_lines_how_to_run_it(path):
    read_recipe(path)
    assert f"accelerate launch tools/train.py {path.relative_to(ROOT)}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_survives_being_written_resolved(path, tmp_path):
    recipe = read_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    assert (
        read_recipe(tmp_path / "again.yaml") == recipe
    )


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_dry_runs_without_its_data(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["data.download=false"] if "download" in path.read_text() else []
    assert train.main([str(path), *overrides, "--dry-run"]) == 0
    masks = yaml.safe_load(path.read_text()).get("masks")
    assert (
        f"sparsity {masks['sparsity']:.4f}" if masks else "dense model"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(("one", "other"), TWINS, ids=lambda path: path.stem)
def test_twins_differ_by_whole_sections_of_masks_alone(one, other):
    recipes = [yaml.safe_load(path.read_text()) for path in (one, other)]
    for recipe in recipes:
        recipe.pop("masks", None)
        recipe.pop("regrow", None)
    assert recipes[0] == recipes[1]


@pytest.mark.filterwarnings(
    "ignore:.*so some have none"
)  # what a ranking over all layers makes of eight steps
@pytest.mark.parametrize("path", FASHION, ids=name)
def test_a_recipe_trained_on_generated_images_ends_at_its_sparsity(path, images, tmp_path):
    shrunk = [f"data={{name: npz, root: {images}, batch_size: 10}}", "epochs=2"]
    recipe = yaml.safe_load(path.read_text())
    if "regrow" in recipe:
        shrunk.append("regrow.every=2")
    assert train.main([str(path), *shrunk, "--out", str(tmp_path / "run")]) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ][:-1]
    sparsity = recipe.get("masks", {"sparsity": 0.0})["sparsity"]
    last = recipe.get("regrow", {}).get("final_sparsity", sparsity)
    active = round((1 - last) * 266_200)
    assert lines[-1]["sparsity"] == (266_200 - active) / 266_200
    assert last > sparsity or lines[0]["sparsity"] == lines[1]["sparsity"]
    explored = round(lines[-1]["exploration_rate"] * 266_200)
    assert (explored > active) == ("regrow" in recipe)


@pytest.mark.parametrize("model", ONE_OF_EACH_MODEL)
def test_one_recipe_of_each_model_takes_two_steps_with_an_update_after_each(model, tmp_path):
    """On generated images of the shape that it takes; those for ImageNet smaller."""
    path = ONE_OF_EACH_MODEL[model]
    recipe = READ[path]
    classes = recipe["model"]["num_classes"]
    if recipe["data"]["name"] == "folder":
        classes = 2
        place = photos(tmp_path / "photos", 8)
        data = f"{{name: folder, root: {place}, train: ., test: ., batch_size: 4, image_size: 64, workers: 1}}"
    else:
        size = {"fashion_mnist": (28, 28), "digits": (8, 8)}.get(
            recipe["data"]["name"], (32, 32, 3)
        )
        draw = np.random.default_rng(0)
        images = {
            f"x_{split}": draw.integers(0, 256, (8, *size), dtype=np.uint8)
            for split in ("train", "test")
        }
        labels = np.arange(8) * (classes - 1) // 7
        np.savez(tmp_path / "images.npz", **images, y_train=labels, y_test=labels)
        data = f"{{name: npz, root: {tmp_path / 'images.npz'}, batch_size: 4}}"
    short = ("epochs=1", "regrow.every=1", f"data={data}", f"model.num_classes={classes}")
    assert train.main([str(path), *short, "--out", str(tmp_path / "run")]) == 0
    epoch, test = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert epoch["step"] == 2
    assert np.isfinite([epoch["train_loss"], test["test_loss"]]).all()
    net = timm.create_model(**{**recipe["model"], "num_classes": classes})
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    last = recipe["regrow"].get("final_sparsity", recipe["masks"]["sparsity"])
    active = round((1 - last) * weights)
    assert epoch["sparsity"] == (weights - active) / weights
    assert epoch["exploration_rate"] > active / weights
