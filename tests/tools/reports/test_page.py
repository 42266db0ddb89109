"""The page of a report: whole in itself, true to the metrics, and there for every kind of run."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import metrics
from helpers.reported_runs import KINDS, Page, stop_at, train, write_deep_run
from itop_prune_tools.reports import layer_figures, page, report, style
from itop_prune_tools.run_folder import history
from itop_prune_tools.run_folder.metrics import Metrics
from PIL import Image

NO_MASKS = "No masks: a dense model."
STATIC = "The masks are static: R_s stays at the density, 0.0500."
NO_UPDATE = "No update of the masks was made: regrow.every is 1000, and the run has made 76 steps."
ABSENT = {
    ("static", "exploration"): STATIC,
    ("static", "changes"): STATIC,
    ("dense", "exploration"): NO_MASKS,
    ("dense", "changes"): NO_MASKS,
    ("dense", "sparsity"): NO_MASKS,
    ("dense", "first_layer"): NO_MASKS,
    ("dense", "flops"): "No masks, so a forward and the training cost what the dense model costs.",
    ("without validation", "accuracy"): (
        "No images are held out (data.validation): accuracy is measured at the end, on the test set"
    ),
    ("no update", "exploration"): NO_UPDATE,
    ("no update", "changes"): NO_UPDATE,
}
PICTURES = {"accuracy", "loss", "exploration", "changes", "flops", "rates", "sparsity"}
PICTURES.add("first_layer")


def pictures_of(found: Page) -> dict[str, bytes]:
    """By section, the picture in the page."""
    pictures, section = {}, ""
    for tag, attributes in found.tags:
        if tag == "section":
            section = str(attributes["id"])
        if tag == "img":
            data = str(attributes["src"]).removeprefix("data:image/png;base64,")
            pictures[section] = base64.b64decode(data)
    return pictures


# --- every kind of run ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_is_a_picture_or_a_sentence(made: dict[str, Path], kind: str) -> None:
    found = Page(made[kind])
    assert found.content.keys() >= PICTURES | {"settings", "numbers"}
    absent = PICTURES - pictures_of(found).keys()
    assert absent == {section for some, section in ABSENT if some == kind}
    for section in absent:
        assert ABSENT[kind, section] in found.content[section]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_are_those_of_the_folder_and_not_blank(
    made: dict[str, Path], kind: str
) -> None:
    pictures = pictures_of(Page(made[kind]))
    files = (made[kind] / "pictures").iterdir()
    assert {path.stem: path.read_bytes() for path in files} == pictures
    for data in pictures.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5
        assert pixels[0].min() == 255  # nothing runs over the edge
        assert pixels[:, -1].min() == 255


def test_no_row_of_pictures_has_a_gap(made: dict[str, Path]) -> None:
    """Two narrow ones stand side by side; a sentence is as wide as the picture it stands for."""
    for folder in made.values():
        found = Page(folder)
        shown = "".join("w" if wide else "n" for wide in found.sections.values())
        assert shown.replace("nn", "").strip("w") == ""
        for section, data in pictures_of(found).items():
            width, _ = Image.open(io.BytesIO(data)).size
            wide = found.sections[section] == "wide"
            assert width == pytest.approx(160 * (style.WIDE if wide else style.HALF), abs=1)


def test_a_sentence_stands_where_its_picture_would(made: dict[str, Path]) -> None:
    orders = [list(Page(folder).sections) for folder in made.values()]
    assert orders[0][:2] == ["accuracy", "loss"]
    assert all(order == orders[0] for order in orders if "layers" in order)
    assert Page(made["without validation"]).content["accuracy"].startswith("AccuracyNo images")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_in_itself(made: dict[str, Path], kind: str) -> None:
    found = Page(made[kind])
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        for key in ("src", "srcset", "poster", "background"):
            assert str(attributes.get(key, "data:image/png;base64,")).startswith("data:image/png")
        assert attributes.get("href", page.PAPER) == page.PAPER
        assert tag != "img" or attributes.get("alt")
    assert not re.search(r"url\(|@import|@font-face", found.text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_metrics(made: dict[str, Path], kind: str) -> None:
    lines = (made[kind] / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-2]), **json.loads(lines[-1])}
    found = Page(made[kind]).content
    assert all((f"number:{key}" in found) == (last[key] is not None) for key in last)
    for key, value in last.items():
        if value is None:
            continue
        number, _, unit = found[f"number:{key}"].partition(" ")
        assert float(number.replace(",", "")) == pytest.approx(value, rel=1e-3)
        assert sum(character.isdigit() for character in number) <= 9, (key, number)
        assert unit == {"forward_flops": "× dense", "train_flops": "× dense", "seconds": "s"}.get(
            key, ""
        )
    assert found["shown:test_top1"] == f"{last['test_top1']:.2f} %"
    for key in ("sparsity", "exploration_rate"):
        assert found[f"shown:{key}"] == f"{last[key]:.4f}"
    for key in ("forward_flops", "train_flops"):
        assert found[f"shown:{key}"] == f"{last[key]:.4f} × dense"


def test_the_settings_are_the_resolved_recipe(made: dict[str, Path]) -> None:
    found = Page(made["moving"]).content
    assert (made["moving"] / "recipe.yaml").read_text() in found["settings"]
    assert f"torch{torch.__version__.partition('+')[0]}" in found["numbers"]


@pytest.mark.usefixtures("unrendered")
def test_data_of_one_s_own_are_named_by_their_place(copy: Path) -> None:
    text = (copy / "recipe.yaml").read_text()
    assert "lenet300 on digits; " in Page(report.write(copy).parent).text
    own = text.replace("name: digits", "name: npz, root: /data/cifar100.npz")
    (copy / "recipe.yaml").write_text(own)
    assert "lenet300 on cifar100.npz; " in Page(report.write(copy).parent).text


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    evil = "<script>alert('&\"$x^$_')</script>"
    folder = write_deep_run(tmp_path / evil.replace("/", "|") / "seed1", layers=3)
    text = (folder / "layers.jsonl").read_text()
    name = "stages.0.blocks.1.conv_of_a_rather"
    (folder / "layers.jsonl").write_text(text.replace(name, json.dumps(evil)[1:-1]))
    recipe = {"model": {"model_name": evil}, "data": {"name": evil}, "masks": {"sparsity": evil}}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "epochs": 3}))
    report.write(folder)
    found = Page(folder)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(html.escape(evil)) >= 3
    assert found.content["layers"].count(evil) == 1


@pytest.mark.usefixtures("unrendered")
def test_a_long_table_of_layers_is_closed_and_marks_dense_layers(tmp_path: Path) -> None:
    found = Page(report.write(write_deep_run(tmp_path / "run")).parent)
    assert found.content["layers"].count("no mask") == 6
    assert "<details>" in found.text


# --- runs that were stopped, went wrong, or lost a file ---


@pytest.mark.usefixtures("unrendered")
def test_a_run_without_its_end_is_reported_as_such(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]))
    (copy / "model.safetensors").unlink()
    found = Page(report.write(copy).parent)
    notice = "This run has not come to its end: 2 of 3 epochs. The test set has not been used."
    assert notice in found.text
    assert "shown:val_top1" in found.content


@pytest.mark.usefixtures("unrendered")
def test_after_a_stop_within_an_epoch_each_number_has_its_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop_at(39 + 20, folder, *KINDS["moving"])  # in the second epoch, after 20 steps
    report.write(folder)
    drawn = history.read_history(folder)
    assert drawn.masks
    assert (drawn.steps, drawn.end) == ([38], 56)

    line = metrics(folder)[0]
    explored = drawn.masks.explored[-1].sum() / drawn.masks.weights.sum()
    assert explored > line["exploration_rate"]
    found = Page(folder)
    notice = (
        "It was stopped within epoch 2. Numbers by epoch, the large ones too, are of the end of "
        "epoch 1, step 38; layers and masks are of the last update, step 56, which left R_s at "
        f"{explored:.4f}."
    )
    assert notice in html.unescape(found.text)
    assert found.content["shown:exploration_rate"] == f"{line['exploration_rate']:.4f}"
    assert found.content["shown:updates"] == "5"
    assert "3 layers, as the run left them at step 56" in found.content["layers"]
    assert f"{explored:.4f}" in found.content["layers"]
    assert "after epoch 1" in found.content["numbers"]


@pytest.mark.usefixtures("unrendered")
def test_after_a_stop_before_any_further_update_there_is_one_step(tmp_path: Path) -> None:
    stop_at(39 + 2, tmp_path / "run", *KINDS["moving"])
    report.write(tmp_path / "run")
    text = Page(tmp_path / "run").text
    assert "It was stopped within" not in text
    assert "1 of 3 epochs" in text


@pytest.mark.usefixtures("unrendered")
def test_a_run_that_lost_layers_jsonl_shows_the_updates_after_it(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop_at(39 + 20, folder, *KINDS["moving"])
    (folder / "layers.jsonl").unlink()
    assert train(folder, *KINDS["moving"], "--resume") == 0
    report.write(folder)
    whole, masks = history.read_history(made["moving"]).masks, history.read_history(folder).masks
    assert whole
    assert masks
    assert (masks.updates_before, masks.updates) == (8, whole.updates)
    assert (masks.steps == [58, *whole.steps[9:]]).all()
    assert (masks.explored == whole.explored[8:]).all()
    assert (masks.active == whole.active[8:]).all()

    found, complete = Page(folder), Page(made["moving"])
    assert found.content["shown:updates"] == complete.content["shown:updates"] == "16"
    notice = (
        "Of 16 updates of the masks the first 8 are not known by layer: "
        "layers.jsonl was lost before step 58, "
    )
    assert notice in found.text
    assert "not known" not in complete.text


@pytest.mark.usefixtures("unrendered")
def test_a_run_that_lost_layers_jsonl_after_its_last_update_says_so(copy: Path) -> None:
    (copy / "layers.jsonl").unlink()
    (copy / "model.safetensors").unlink()
    assert train(copy, *KINDS["moving"], "--resume") == 0
    found = Page(report.write(copy).parent).content
    assert "The 16 updates of the masks were made before " in found["exploration"]
    assert found["shown:updates"] == "16"


@pytest.mark.usefixtures("unrendered")
def test_a_run_without_layers_jsonl_has_the_pictures_of_its_metrics(copy: Path) -> None:
    (copy / "layers.jsonl").unlink()
    found = Page(report.write(copy).parent)
    assert found.content["exploration"].endswith(layer_figures.NO_LAYERS)
    assert pictures_of(found).keys() >= {"accuracy", "loss", "rates", "flops"}


@pytest.mark.usefixtures("unrendered")
def test_epochs_that_were_lost_are_counted(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[1:]))
    text = Page(report.write(copy).parent).text
    assert "Of 3 epochs 1 are not known: metrics.jsonl was lost" in text
    assert "3 epochs, 114 steps" in text


@pytest.mark.usefixtures("unrendered")
def test_losses_and_learning_rates_that_are_not_finite_are_reported(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    (copy / "metrics.jsonl").unlink()
    for line in lines:
        line |= {"train_loss": math.nan, "val_loss": math.inf, "lr": math.inf}
    Metrics(copy).append(*lines)
    found = Page(report.write(copy).parent)
    assert "The training loss was not finite in 3 of 3 epochs." in found.text
    assert "The loss was not finite in any epoch." in found.content["loss"]
    assert "The learning rate was not a finite number." in found.content["rates"]
