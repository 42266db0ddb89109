"""Every recipe in the folder: sound, plain to compare, and ending at exactly its sparsity."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import train
import yaml
from data import open_data

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
FASHION = [path for path in RECIPES if path.stem.startswith("fashion_mnist_lenet300")]
TWINS = list(combinations(FASHION, 2))


def name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Forty random images of 28×28 as an .npz file."""
    draw = np.random.default_rng(0)
    arrays = {f"x_{split}": draw.integers(0, 256, (40, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, **arrays, **{f"y_{split}": np.arange(40) % 10 for split in ("train", "test")})
    return path


def test_there_are_recipes():
    assert RECIPES
    assert len(FASHION) == 14


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_sound_and_says_in_its_first_lines_how_to_run_it(path):
    train.read(path, data=open_data, augment=train.augmentation_of)
    assert f"accelerate launch tools/train.py {path.relative_to(ROOT)}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_survives_being_written_resolved(path, tmp_path):
    recipe = train.read(path, data=open_data, augment=train.augmentation_of)
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    assert train.read(tmp_path / "again.yaml", data=open_data, augment=train.augmentation_of) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_dry_runs_without_its_data(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["data.download=false"] if "download" in path.read_text() else []
    assert train.main([str(path), *overrides, "--dry-run"]) == 0
    masks = yaml.safe_load(path.read_text()).get("masks")
    assert (f"sparsity {masks['sparsity']:.4f}" if masks else "dense model") in capsys.readouterr().out


@pytest.mark.parametrize(("one", "other"), TWINS, ids=lambda path: path.stem)
def test_twins_differ_by_whole_sections_of_masks_alone(one, other):
    recipes = [yaml.safe_load(path.read_text()) for path in (one, other)]
    for recipe in recipes:
        recipe.pop("masks", None)
        recipe.pop("regrow", None)
    assert recipes[0] == recipes[1]


@pytest.mark.filterwarnings("ignore:.*so some have none")  # what a ranking over all layers makes of eight steps
@pytest.mark.parametrize("path", FASHION, ids=name)
def test_a_recipe_trained_on_generated_images_ends_at_its_sparsity(path, images, tmp_path):
    shrunk = [f"data={{name: npz, root: {images}, batch_size: 10}}", "epochs=2"]
    recipe = yaml.safe_load(path.read_text())
    if "regrow" in recipe:
        shrunk.append("regrow.every=2")
    assert train.main([str(path), *shrunk, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:-1]
    sparsity = recipe.get("masks", {"sparsity": 0.0})["sparsity"]
    last = recipe.get("regrow", {}).get("final_sparsity", sparsity)
    active = round((1 - last) * 266_200)
    assert lines[-1]["sparsity"] == (266_200 - active) / 266_200
    assert last > sparsity or lines[0]["sparsity"] == lines[1]["sparsity"]
    explored = round(lines[-1]["exploration_rate"] * 266_200)
    assert (explored > active) == ("regrow" in recipe)
