"""Every recipe is sound, listed, plain to compare, and ends at exactly its sparsity."""

import json
import re
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
from itop_prune.messages import in_digits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
READ = {path: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.rglob("*.yaml"))}
FASHION = [path for path in READ if path.stem.startswith("fashion_mnist_lenet300")]
CIFAR = [path for path in READ if READ[path]["data"]["name"].startswith("cifar")]
IMAGENET = [path for path in READ if READ[path]["data"]["name"] == "folder"]


def task(path: Path) -> tuple[str, str]:
    return READ[path]["model"]["model_name"], READ[path]["data"]["name"]


# Recipes whose learning rate, schedule, smoothing and length are tuned too.
TUNED = {path for path in READ if "_tuned_" in path.stem}
PAIRS = [
    (one, other)
    for one, other in combinations([path for path in READ if path not in TUNED], 2)
    if task(one) == task(other)
]

# Of each model the recipe that grows by gradient, if there is one.
GROWING = sorted(
    (path for path in READ if "regrow" in READ[path]), key=lambda path: "rigl-itop" in path.stem
)
ONE_OF_EACH_MODEL = {READ[path]["model"]["model_name"]: path for path in GROWING}


def stem(path: Path) -> str:
    return path.stem


def some_slow(values: Any, fast: set[str]) -> list[Any]:
    """Parameters of a test: all values, and those that are not named only for the slow tests."""
    names = [value.stem if isinstance(value, Path) else value for value in values]
    assert fast <= set(names)
    pairs = zip(values, names, strict=True)
    return [
        pytest.param(value, id=name, marks=() if name in fast else pytest.mark.slow)
        for value, name in pairs
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- names and lists -----------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert len(READ) >= 30
    assert (len(FASHION), len(CIFAR), len(TUNED)) == (20, 12, 7)
    assert all("lr_schedule" in recipe for recipe in READ.values())
    assert ONE_OF_EACH_MODEL.keys() == {model for model, _ in map(task, READ)}
    compared = {path for pair in PAIRS for path in pair} - set(FASHION)
    assert len(compared) == 12 + 3


def test_the_index_lists_every_recipe_and_no_other() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\S+\.yaml)\]\((\S+)\)", index, flags=re.MULTILINE)
    assert all(name == target for name, target in listed)
    assert sorted(name for name, _ in listed) == sorted(
        path.relative_to(FOLDER).as_posix() for path in READ
    )


@pytest.mark.parametrize("path", [path for path in READ if "_" in path.stem], ids=stem)
def test_a_name_says_data_distribution_sparsity_and_variant(path: Path) -> None:
    recipe = READ[path]
    assert path.stem.startswith(recipe["data"]["name"].replace("folder", "imagenet") + "_")
    if not recipe.get("masks"):
        assert path.stem.endswith("_dense")
        return
    last = recipe.get("regrow", {}).get("final_sparsity", recipe["masks"]["sparsity"])
    *_, distribution, variant = path.stem.split("_")
    pattern = re.search(r"\d+:\d+", str(recipe["masks"]))
    densities = (f"erk{100 * last:.6g}", f"global{100 * last:.6g}")
    assert distribution in ((pattern[0].replace(":", "of"),) if pattern else densities)
    without_updates = ("static", "snip", "grasp", "synflow")
    assert (variant in without_updates) == ("regrow" not in recipe)


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=stem)
def test_recipes_of_one_task_differ_by_whole_sections_of_masks_alone(
    one: Path, other: Path
) -> None:
    rest = [
        {key: value for key, value in READ[path].items() if key not in ("masks", "regrow")}
        for path in (one, other)
    ]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("path", sorted(TUNED), ids=stem)
def test_a_tuned_recipe_says_so_and_keeps_model_data_and_kind_of_optimizer(path: Path) -> None:
    recipe, text = READ[path], path.read_text()
    dense = READ[FOLDER / f"{path.stem.partition('_tuned_')[0]}_tuned_dense.yaml"]
    assert "tuned too" in text
    assert "recipes/results/beat_dense.md" in text
    assert {key: recipe[key] for key in ("model", "data", "seed", "multiplier")} == {
        key: dense[key] for key in ("model", "data", "seed", "multiplier")
    }
    assert {**recipe["optimizer"], "lr": dense["optimizer"]["lr"]} == dense["optimizer"]


# --- settings of the paper -----------------------------------------------------------------------


@pytest.mark.parametrize("path", CIFAR, ids=stem)
def test_a_cifar_recipe_has_the_settings_of_the_paper(path: Path) -> None:
    recipe = READ[path]
    assert (recipe["data"]["batch_size"], recipe["data"]["validation"]) == (128, 5000)
    assert recipe["augment"] == {"padding": 4, "hflip": 0.5}
    sgd = {"opt": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}
    assert recipe["optimizer"] == {**sgd, "filter_bias_and_bn": False}
    assert (recipe["epochs"], recipe["lr_schedule"]["decay_milestones"]) == (250, [125, 187])
    sparsity = 0.98 if "resnet34" in path.stem else 0.95
    masks = recipe.get("masks", {})
    assert masks.get("method", "ERK") == "ERK"
    assert masks.get("sparsity") == (None if path.stem.endswith("dense") else sparsity)
    settings = {"rate": 0.5, "prune": "magnitude"}
    rules = {
        "set-itop": {"every": 1500, "grow": "random", **settings},
        "rigl-itop": {"every": 4000, "grow": "gradient", **settings},
    }
    assert recipe.get("regrow") == rules.get(path.stem.rpartition("_")[2])


@pytest.mark.parametrize("path", IMAGENET, ids=stem)
def test_an_imagenet_recipe_has_the_settings_of_the_paper(path: Path) -> None:
    recipe, schedule = READ[path], READ[path]["lr_schedule"]
    sgd = {"opt": "momentum", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0001}
    assert recipe["optimizer"] == sgd
    assert (schedule["decay_milestones"], schedule["warmup_epochs"]) == ([30, 60, 90], 5)
    assert (recipe["epochs"], recipe["data"]["batch_size"]) == (100, 64)
    assert recipe["loss"] == {"smoothing": 0.1}
    assert recipe.get("masks") in (None, {"sparsity": 0.9, "method": "ERK"})
    warm = [0.1 * k / 6 for k in range(1, 7)]
    assert learning_rates(Recipe(**recipe))[:6] == pytest.approx(warm, rel=1e-5)
    rigl = {"every": 4000, "rate": 0.5, "prune": "magnitude", "grow": "gradient"}
    assert recipe.get("regrow") == (rigl if path.stem == "resnet50" else None)


def learning_rates(recipe: Recipe) -> list[float]:
    """The learning rate of each epoch of a run with one step an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer["lr"])
    schedule, found = build_lr_schedule(recipe, optimizer, 1), []
    for epoch in range(recipe.epochs * recipe.multiplier):
        found.append(round(optimizer.param_groups[0]["lr"], 9))
        schedule.step_update(epoch + 1)
        schedule.step(epoch + 1)
    return found


def first_epochs(rates: list[float]) -> dict[float, int]:
    return {rate: epoch for epoch, rate in reversed(list(enumerate(rates)))}


@pytest.mark.parametrize("path", READ, ids=stem)
def test_an_extended_run_stretches_milestones_and_rate_but_neither_warm_up_nor_every(
    path: Path,
) -> None:
    sections = {key: value for key, value in READ[path].items() if key != "multiplier"}
    warm = sections["lr_schedule"].get("warmup_epochs", 0)
    normal, extended = (learning_rates(Recipe(**sections, multiplier=m)) for m in (1, 5))
    assert len(extended) == 5 * len(normal)
    assert extended[:warm] == normal[:warm]
    if sections["lr_schedule"].get("step_on_epochs") is False:  # falls at every step
        assert extended[::5] == pytest.approx(normal)
    else:
        stretched = {
            rate: 5 * epoch if epoch > warm else epoch
            for rate, epoch in first_epochs(normal).items()
        }
        assert first_epochs(extended) == stretched
    if "regrow" not in sections:
        return

    layer, every = nn.Linear(8, 8), sections["regrow"]["every"]
    masks, optimizer = itop_prune.apply(layer, 0.5), torch.optim.SGD(layer.parameters(), lr=0.1)
    rules = {**sections["regrow"], "gradient_steps": 1}
    one, five = (
        itop_prune.MaskScheduler(masks, optimizer, total_steps=m * 100 * every, **rules)
        for m in (1, 5)
    )
    assert five.update_steps().step == one.update_steps().step == every
    assert five.update_steps()[-1] == 5 * one.update_steps()[-1]


# --- run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READ, ids=stem)
def test_a_recipe_is_sound_says_how_to_run_it_and_survives_being_written_resolved(
    path: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(path)
    assert f"itop-prune train {path.stem}" in path.read_text()
    again = tmp_path / "again.yaml"
    again.write_text(recipe.as_yaml())
    assert read_recipe(again) == recipe


@pytest.mark.parametrize("path", some_slow(READ, {"quickstart", "cifar10_mlp_dense"}))
def test_a_recipe_dry_runs_without_its_data(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    is_missing = path in IMAGENET
    assert train.main([str(path), "--dry-run"]) == int(is_missing)
    masks = READ[path].get("masks")
    expected = f"sparsity {in_digits(masks['sparsity'])}" if masks else "dense model"
    out, err = capsys.readouterr()
    assert expected in out
    assert ("data/imagenet/train is not a folder" in err) == is_missing
    assert not list(tmp_path.iterdir())


def generated(path: Path, shape: tuple[int, ...], labels: np.ndarray, batch_size: int) -> str:
    """The data section of random images in an .npz file."""
    count = len(labels)
    draw = np.random.default_rng(0)
    images = {
        f"x_{split}": draw.integers(0, 256, (count, *shape), dtype=np.uint8)
        for split in ("train", "test")
    }
    np.savez(path, **images, y_train=labels, y_test=labels)
    return f"data={{name: npz, root: {path}, batch_size: {batch_size}}}"


@pytest.mark.filterwarnings("ignore:.*so some have none")  # a ranking over all layers, eight steps
@pytest.mark.parametrize(
    "path",
    some_slow(
        FASHION,
        {"fashion_mnist_lenet300_erk98_rigl-itop", "fashion_mnist_lenet300_global98_granet"},
    ),
)
def test_a_recipe_trained_on_generated_images_ends_at_its_sparsity(
    path: Path, tmp_path: Path
) -> None:
    recipe = READ[path]
    data = generated(tmp_path / "images.npz", (28, 28), np.arange(40) % 10, 10)
    short = [data, "epochs=2", *(["regrow.every=2"] if "regrow" in recipe else [])]
    if "gradient_steps" in recipe.get("regrow", {}):
        short.append("regrow.gradient_steps=2")
    assert train.main([str(path), *short, "--out", str(tmp_path / "run")]) == 0
    lines = metrics(tmp_path / "run")[:-1]
    sparsity = recipe.get("masks", {"sparsity": 0.0})["sparsity"]
    last = recipe.get("regrow", {}).get("final_sparsity", sparsity)
    active = round((1 - last) * 266_200)
    assert lines[-1]["sparsity"] == (266_200 - active) / 266_200
    assert last > sparsity or lines[0]["sparsity"] == lines[1]["sparsity"]
    explored = round(lines[-1]["exploration_rate"] * 266_200)
    assert (explored > active) == ("regrow" in recipe)


SIZES = {"fashion_mnist": (28, 28), "digits": (8, 8)}
SMALLER = {"mlp_of": ["model.widths=[40, 40]", "masks.sparsity=0.8"]}


@pytest.mark.parametrize("model", some_slow(ONE_OF_EACH_MODEL, {"cifar_mlp"}))
def test_one_recipe_of_each_model_takes_two_steps_with_an_update_after_each(
    model: str, tmp_path: Path
) -> None:
    """On generated images of the shape that it takes; those for ImageNet are smaller."""
    path = ONE_OF_EACH_MODEL[model]
    recipe = vars(read_recipe(path, SMALLER.get(model, ())))
    classes = recipe["model"]["num_classes"]
    if recipe["data"]["name"] == "folder":
        classes = 2
        place = f"name: folder, root: {photos(tmp_path / 'photos', 8)}, train: ., test: ."
        data = f"data={{{place}, batch_size: 4, image_size: 64, workers: 1}}"
    else:
        shape = SIZES.get(recipe["data"]["name"], (32, 32, 3))
        data = generated(tmp_path / "images.npz", shape, np.arange(8) * (classes - 1) // 7, 4)
    short = ["epochs=1", "regrow.every=1", data, f"model.num_classes={classes}"]
    short += SMALLER.get(model, ())
    if "gradient_steps" in recipe["regrow"]:
        short.append("regrow.gradient_steps=1")
    assert train.main([str(path), *short, "--out", str(tmp_path / "run")]) == 0
    epoch, test = metrics(tmp_path / "run")
    assert epoch["step"] == 2
    assert np.isfinite([epoch["train_loss"], test["test_loss"]]).all()
    net = timm.create_model(**{**recipe["model"], "num_classes": classes})
    dense = recipe["masks"].get("exclude", "nothing")
    weights = sum(
        p.numel() for name, p in net.named_parameters() if p.dim() > 1 and dense not in name
    )
    last = recipe["regrow"].get("final_sparsity", recipe["masks"]["sparsity"])
    active = round((1 - last) * weights)
    assert epoch["sparsity"] == (weights - active) / weights
    assert epoch["exploration_rate"] > active / weights
