"""The report of a run: whole in itself, true to the metrics, and there for every kind of run."""

import base64
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from helpers.processes import QUICKSTART, ROOT, changed_runner, finished, metrics, start
from itop_prune_tools.reports import curves, gallery, masks_seen, page, report, style
from itop_prune_tools.reports import layer_figures as topographies
from itop_prune_tools.run_folder import history
from itop_prune_tools.run_folder.json_lines import JsonLines
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import command as train
from itop_prune_tools.training.stop import StopRequest
from matplotlib.figure import Figure
from PIL import Image

pytestmark = pytest.mark.reports

KINDS: dict[str, tuple[str, ...]] = {
    "moving": ("epochs=3", "regrow={every: 7, grow: gradient, survival: true}"),
    "static": ("epochs=2", "regrow=null"),
    "dense": ("epochs=2", "regrow=null", "masks=null"),
    "without validation": ("epochs=2", "data.validation=0", "regrow.every=7"),
    "one epoch": ("epochs=1", "regrow.every=30"),
    "no update": ("epochs=2", "regrow.every=1000"),
}
ABSENT = {
    ("static", "exploration"): "The masks are static: R_s stays at the density, 0.0500.",
    ("static", "changes"): "The masks are static: R_s stays at the density, 0.0500.",
    ("dense", "exploration"): "No masks: a dense model.",
    ("dense", "changes"): "No masks: a dense model.",
    ("dense", "sparsity"): "No masks: a dense model.",
    ("dense", "first_layer"): "No masks: a dense model.",
    ("dense", "flops"): "No masks, so a forward and the training cost what the dense model costs.",
    (
        "without validation",
        "accuracy",
    ): "No images are held out (data.validation): accuracy is measured at the end, on ",
    (
        "no update",
        "exploration",
    ): "No update of the masks was made: regrow.every is 1000, and the run has made 76 steps.",
    (
        "no update",
        "changes",
    ): "No update of the masks was made: regrow.every is 1000, and the run has made 76 steps.",
}
SECTIONS = {
    "accuracy",
    "loss",
    "exploration",
    "changes",
    "flops",
    "rates",
    "sparsity",
    "first_layer",
}
ALWAYS = {"settings", "numbers"}


class Page(HTMLParser):
    """What a test looks for in a page."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.text = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        """By the id, the class."""
        self.content: dict[str, str] = {}
        """By the id of a section, or by the key of a number after shown: or number:."""
        self._open: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "section":
            self.sections[str(found["id"])] = str(found["class"])
        self.tags.append((tag, found))
        prefixes = {"id": "", "data-shown": "shown:", "data-number": "number:"}
        self._open.append(
            next((f"{prefix}{found[key]}" for key, prefix in prefixes.items() if key in found), "")
        )
        self.content |= {self._open[-1]: ""} if self._open[-1] else {}
        if tag in ("meta", "img"):
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in filter(None, self._open):
            self.content[name] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind, with the report that the runner wrote."""
    folder = tmp_path_factory.mktemp("reports")
    for kind, overrides in KINDS.items():
        assert train.main([QUICKSTART, *overrides, "--out", str(folder / kind / "seed0")]) == 0
        assert report.attempt(folder / kind / "seed0").startswith("report: ")
    return {kind: folder / kind / "seed0" for kind in KINDS}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    """The run whose masks move, to be damaged; without its report."""
    shutil.copytree(made["moving"], tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path / "run"


def deep(folder: Path, layers: int = 300, updates: int = 20) -> Path:
    """Write the files of a run of so many layers."""
    folder.mkdir(parents=True)
    names = [
        f"stages.{place // 30}.blocks.{place % 30}.conv_of_a_rather_long_name.weight"
        for place in range(layers)
    ]
    weights = [64 * (place + 1) for place in range(layers)]
    masked = [place % 50 != 0 for place in range(layers)]
    active = [count // 10 if mask else count for count, mask in zip(weights, masked, strict=True)]
    first = {
        "epoch": 0,
        "step": 0,
        "names": names,
        "masked": masked,
        "weights": weights,
        "active": active,
    }
    lines = [{**first, "image": [3, 32, 32], "made_with": {"torch": "2"}}]
    for update in range(1, updates + 1):
        explored = [
            min(count, some * (1 + update)) for count, some in zip(weights, active, strict=True)
        ]
        entered = [some // (1 + update) for some in active]
        line = {
            "epoch": update,
            "step": 10 * update,
            "rate": 1 / update,
            "active": active,
            "explored": explored,
        }
        lines.append({**line, "entered": entered})
    JsonLines(folder / "layers.jsonl").append(*lines)
    for epoch in range(1, updates + 1):
        line = {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 1 / epoch,
            "lr": 0.1,
            "rate": 1 / epoch,
        }
        Metrics(folder).append(
            {**line, "sparsity": 0.9, "exploration_rate": 0.5, "val_top1": 50.0 + epoch}
        )
    (folder / "recipe.yaml").write_text(
        "model: {model_name: deep}\nregrow: {every: 10}\nepochs: 20\n"
    )
    return folder


def moving(folder: Path) -> tuple[history.History, history.Masks]:
    found = history.read_history(folder)
    assert found.masks
    return found, found.masks


def figure(drawn: Figure | str) -> Figure:
    assert isinstance(drawn, Figure), drawn
    return drawn


# --- every kind of run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_is_a_picture_or_a_sentence(made: dict[str, Path], kind: str) -> None:
    found = Page(made[kind])
    assert found.content.keys() >= SECTIONS | ALWAYS
    drawn = {path.stem for path in (made[kind] / "pictures").glob("*.png")}
    assert SECTIONS - drawn == {section for some, section in ABSENT if some == kind}
    for section in SECTIONS - drawn:
        assert ABSENT[kind, section] in found.content[section]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_pictures_has_a_gap(made: dict[str, Path], kind: str) -> None:
    """Two narrow ones stand side by side, so of an odd number one is wide, and drawn as wide as it is shown."""
    drawn = [
        picture
        for picture in gallery.draw(history.read_history(made[kind]))
        if isinstance(picture.drawn, bytes)
    ]
    assert sum(not picture.wide for picture in drawn) % 2 == 0
    assert (
        "".join("w" if picture.wide else "n" for picture in drawn).replace("nn", "").strip("w")
        == ""
    )
    for picture in drawn:
        width, _ = Image.open(io.BytesIO(picture.drawn)).size
        assert width == pytest.approx(160 * (style.WIDE if picture.wide else style.HALF), abs=1)
        assert ("wide" in Page(made[kind]).sections[picture.name].split()) == picture.wide


def test_some_kind_of_run_has_an_odd_number_of_pictures(made: dict[str, Path]) -> None:
    first = [gallery.draw(history.read_history(made[kind]))[0].wide for kind in KINDS]
    assert {True, False} == set(first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_in_the_page_are_those_in_the_folder_and_not_blank(
    made: dict[str, Path], kind: str
) -> None:
    embedded = [str(attributes["src"]) for tag, attributes in Page(made[kind]).tags if tag == "img"]
    inline = {base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in embedded}
    assert inline == {path.read_bytes() for path in (made[kind] / "pictures").iterdir()}
    for data in inline:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5
        assert pixels[0].min() == 255  # nothing runs over the edge
        assert pixels[:, -1].min() == 255


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_in_itself(made: dict[str, Path], kind: str) -> None:
    found = Page(made[kind])
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    sources = [
        str(a[key])
        for _, a in found.tags
        for key in ("src", "srcset", "poster", "background")
        if key in a
    ]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert {a["href"] for tag, a in found.tags if "href" in a} == {page.PAPER}
    assert not re.search(r"url\(|@import|@font-face", found.text)
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_metrics(made: dict[str, Path], kind: str) -> None:
    *_, epoch, test = [
        json.loads(line) for line in (made[kind] / "metrics.jsonl").read_text().splitlines()
    ]
    found = Page(made[kind]).content
    for key, value in {**epoch, **test}.items():
        assert found[f"number:{key}"] == str(value)
    forms = {
        "test_top1": "{:.2f} %",
        "sparsity": "{:.4f}",
        "exploration_rate": "{:.4f}",
        "train_flops": "{:.4f}",
    }
    for key, form in forms.items():
        assert found[f"shown:{key}"] == form.format({**epoch, **test}[key])


def test_the_settings_are_the_resolved_recipe(made: dict[str, Path]) -> None:
    text = (made["moving"] / "recipe.yaml").read_text()
    found = Page(made["moving"]).content
    assert text in found["settings"]
    assert f"torch{torch.__version__.partition('+')[0]}" in found["numbers"]


def test_data_of_one_s_own_are_named_by_where_they_lie(copy: Path) -> None:
    text = (copy / "recipe.yaml").read_text()
    assert "lenet300 on digits; " in Page(report.write(copy).parent).text
    (copy / "recipe.yaml").write_text(
        text.replace("name: digits", "name: npz, root: /data/cifar100.npz")
    )
    assert "lenet300 on cifar100.npz; " in Page(report.write(copy).parent).text


def test_a_dense_layer_is_marked_and_counted_apart(tmp_path: Path) -> None:
    assert (
        train.main([QUICKSTART, "epochs=1", "masks.exclude=[head]", "--out", str(tmp_path / "run")])
        == 0
    )
    drawn = figure(topographies.sparsity(history.read_history(tmp_path / "run")))
    assert [text.get_text() for text in drawn.axes[0].texts][-1] == "no mask"
    report.write(tmp_path / "run")
    assert "no mask" in Page(tmp_path / "run").content["layers"]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_lines_of_accuracy_and_loss_are_the_metrics(made: dict[str, Path]) -> None:
    found, lines = history.read_history(made["moving"]), metrics(made["moving"])
    drawn = {line.get_label(): line for line in figure(curves.accuracy(found)).axes[0].lines}
    assert drawn["validation"].get_xydata().tolist() == [
        [line["step"], line["val_top1"]] for line in lines[:-1]
    ]
    assert drawn[f"test {lines[-1]['test_top1']:.2f}"].get_ydata()[-1] == lines[-1]["test_top1"]
    drawn = {line.get_label(): line for line in figure(curves.loss(found)).axes[0].lines}
    assert drawn["training"].get_ydata().tolist() == [line["train_loss"] for line in lines[:-1]]
    assert drawn["validation"].get_ydata().tolist() == [line["val_loss"] for line in lines[:-1]]


def test_the_lines_of_r_s_end_at_the_metrics_and_each_layer_has_one(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    lines = figure(topographies.exploration(found)).axes[0].lines
    assert len(lines) == 1 + len(masks.names)
    assert lines[0].get_ydata()[0] == pytest.approx(0.05)
    assert lines[0].get_ydata()[-1] == metrics(made["moving"])[-2]["exploration_rate"]
    assert lines[0].get_xdata()[-1] == 3 * 38
    looks = {(line.get_color(), str(line.get_linestyle())) for line in lines}
    assert len(looks) == len(lines)


def test_survival_over_all_layers_is_that_of_the_metrics(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    survived = dict(zip(masks.steps[2:], topographies.survival(masks), strict=True))
    for line in found.epochs:
        last = max(step for step in survived if step <= line["step"])
        assert survived[last] == pytest.approx(line["survival"], rel=1e-12)


def test_the_bars_are_the_sparsities(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    widths = [bar.get_width() for bar in figure(topographies.sparsity(found)).axes[0].patches]
    assert widths == pytest.approx(1 - masks.active[-1] / masks.weights)


def test_300_layers_are_told_by_bands_and_maps_with_few_labels(tmp_path: Path) -> None:
    found = history.read_history(deep(tmp_path / "run"))
    lines = figure(topographies.exploration(found))
    assert len(lines.axes[0].lines) == 1
    assert sum(len(legend.texts) for legend in lines.legends) <= 4
    for drawn in (topographies.exploration_map(found), topographies.sparsity(found)):
        axes = figure(drawn).axes[0]
        labels = [
            label
            for axis in (axes.xaxis, axes.yaxis)
            for label in axis.get_ticklabels()
            if label.get_text()
        ]
        assert len(labels) <= topographies.NAMES_AT_MOST + 12
        assert figure(drawn).get_figheight() < 8
    assert len(figure(topographies.sparsity(found)).axes[0].patches) == 300
    report.write(tmp_path / "run")
    assert Page(tmp_path / "run").content["layers"].count("no mask") == 6
    assert (
        "<details>" in Page(tmp_path / "run").text
    )  # closed: 300 lines are not the first thing to see


def test_a_first_layer_of_filters_is_drawn_with_a_tile_each() -> None:
    mask = np.zeros((6, 3, 2, 2), bool)
    mask[0], mask[5, 0, 1, 1] = True, True
    canvas = np.ma.filled(masks_seen.filters("conv", mask).axes[0].images[0].get_array(), np.nan)
    shown = canvas[np.isfinite(canvas)]
    assert len(shown) == 6 * 4
    assert (np.sort(shown)[-5:] == [1 / 3, 1, 1, 1, 1]).all()


def test_a_first_layer_that_reads_an_image_is_drawn_by_pixel_and_as_a_matrix() -> None:
    mask = np.random.default_rng(0).random((5, 12)) < 0.5
    pixels, matrix = (
        axes.images[0].get_array() for axes in masks_seen.matrix("fc", mask, [3, 2, 2]).axes[:2]
    )
    assert (pixels == mask.reshape(5 * 3, 2, 2).sum(0)).all()
    assert (matrix == mask).all()


def test_a_large_mask_is_drawn_as_shares_of_blocks() -> None:
    mask = np.zeros((601, 801), bool)
    mask[:3, :2] = True
    cells = masks_seen.blocks(mask)
    assert cells.shape == (201, 401)
    assert cells[0, 0] == 1
    assert cells.sum() == 1


def test_the_first_mask_is_that_of_the_weights_or_of_the_last_checkpoint(copy: Path) -> None:
    found, masks = moving(copy)
    name, mask = found.first_mask() or ("", np.zeros(0))
    assert (name, mask.sum()) == ("layers.0.weight", masks.active[-1, 0])
    (copy / "model.safetensors").unlink()
    assert (found.first_mask() or ("", mask))[1].sum() == masks.active[-1, 0]
    shutil.rmtree(copy / "checkpoints")
    assert (
        masks_seen.first_layer(found)
        == "Neither model.safetensors nor a checkpoint is there to read the masks from."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_in_print_the_greys_of_lines_that_cross_differ_or_their_dashes_do(
    made: dict[str, Path], kind: str
) -> None:
    found = history.read_history(made[kind])
    for drawing in (
        curves.accuracy,
        curves.loss,
        curves.cost,
        topographies.exploration,
        topographies.changes,
    ):
        if isinstance(drawn := drawing(found), Figure):
            looks = [
                (line.get_linestyle(), line.get_marker(), line.get_color())
                for line in drawn.axes[0].lines
            ]
            for place, (dashes, marker, color) in enumerate(looks):
                for other_dashes, other_marker, other in looks[place + 1 :]:
                    greys = [
                        np.dot(matplotlib.colors.to_rgb(c), (0.299, 0.587, 0.114))
                        for c in (color, other)
                    ]
                    assert (dashes, marker) != (other_dashes, other_marker) or abs(
                        greys[0] - greys[1]
                    ) > 0.15


# --- names that are not meant well -----------------------------------------------------------------------------------

EVIL = "<script>alert('&\"$x^$_')</script>"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = deep(tmp_path / EVIL.replace("/", "|") / "seed1", layers=3)
    text = (folder / "layers.jsonl").read_text()
    (folder / "layers.jsonl").write_text(
        text.replace("stages.0.blocks.1.conv_of_a_rather", json.dumps(EVIL)[1:-1])
    )
    recipe = json.dumps(
        {
            "model": {"model_name": EVIL},
            "data": {"name": EVIL},
            "masks": {"sparsity": EVIL},
            "epochs": 3,
        }
    )
    (folder / "recipe.yaml").write_text(recipe)
    report.write(folder)
    found = Page(folder)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(html.escape(EVIL)) >= 3
    assert found.content["layers"].count(EVIL) == 1


def test_a_machine_with_its_own_look_draws_the_same(made: dict[str, Path]) -> None:
    found = history.read_history(made["moving"])
    plain = gallery.draw(found)
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "black", "text.parse_math": True}
    ):
        before = dict(matplotlib.rcParams)
        assert gallery.draw(found) == plain
        assert dict(matplotlib.rcParams) == before


def test_no_window_system_is_asked_for(made: dict[str, Path]) -> None:
    program = f"import sys, report; report.write(report.Path({str(made['moving'])!r})); print(*sys.modules)"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}",
        "MPLBACKEND": "TkAgg",
    }
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "matplotlib.figure" in loaded
    assert not {"matplotlib.pyplot", "tkinter"} & set(loaded)


# --- runs that were stopped, and files that are damaged ---------------------------------------------------------------


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def test_a_run_that_was_stopped_has_a_report_that_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]))
    (copy / "model.safetensors").unlink()
    assert report.main([str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert (
        "This run has not come to its end: 2 of 3 epochs. The test set has not been used."
        in Page(copy).text
    )
    assert "shown:val_top1" in Page(copy).content


def test_a_run_that_was_stopped_in_its_first_epoch_says_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "wanted", lambda self: True)
        assert train.main([QUICKSTART, "--out", str(tmp_path / "run")]) == 130
    capsys.readouterr()
    assert report.main([str(tmp_path / "run")]) == 1
    assert (
        "holds no finished epoch, so there is nothing to draw; go on with --resume"
        in only_error(capsys)
    )


def stop_at(step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Train the run whose masks move, at an update every 7 of 38 steps an epoch, until a signal comes."""
    with monkeypatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(StopRequest, "wanted", lambda self: next(asked) == step)
        assert train.main([QUICKSTART, *KINDS["moving"], *arguments, "--out", str(folder)]) == 130


def test_a_run_that_was_stopped_within_an_epoch_says_of_which_step_each_number_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """39 questions whether to stop are asked in an epoch: 38 after steps, one in its evaluation."""
    folder = tmp_path / "run"
    stop_at(39 + 20, folder, monkeypatch)
    report.write(folder)
    found, (drawn, masks) = Page(folder).content, moving(folder)
    assert (drawn.steps, drawn.end, masks.steps[-1]) == ([38], 56, 56)
    line = metrics(folder)[0]
    explored = masks.explored[-1].sum() / masks.weights.sum()
    assert explored > line["exploration_rate"]
    assert (
        "It was stopped within epoch 2. Numbers by epoch, the large ones too, are of the end of epoch 1, step 38; "
        f"layers and masks are of the last update, step 56, which left R_s at {explored:.4f}."
    ) in html.unescape(Page(folder).text)
    assert found["shown:exploration_rate"] == f"{line['exploration_rate']:.4f}"
    assert found["shown:updates"] == "5"
    assert "3 layers, as the run left them at step 56" in found["layers"]
    assert "after epoch 1" in found["numbers"]
    assert f"{explored:.4f}" in found["layers"]
    for picture in (topographies.exploration, topographies.changes, curves.loss, curves.rates):
        low, high = figure(picture(drawn)).axes[-1].get_xlim()
        assert low <= 0
        assert high >= 56


def test_a_run_that_was_stopped_before_any_further_update_has_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(39 + 2, tmp_path / "run", monkeypatch)
    report.write(tmp_path / "run")
    assert "It was stopped within" not in Page(tmp_path / "run").text
    assert "1 of 3 epochs" in Page(tmp_path / "run").text


def test_a_run_that_went_on_without_layers_jsonl_shows_the_updates_that_it_made(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stop_at(39 + 20, folder, monkeypatch)
    (folder / "layers.jsonl").unlink()
    assert train.main([QUICKSTART, *KINDS["moving"], "--out", str(folder), "--resume"]) == 0
    (_, whole), (found, masks) = moving(made["moving"]), moving(folder)
    assert (masks.updates_before, masks.updates) == (8, whole.updates)
    assert (masks.steps == [58, *whole.steps[9:]]).all()
    assert (masks.explored == whole.explored[8:]).all()
    assert (masks.active == whole.active[8:]).all()
    assert (
        Page(folder).content["shown:updates"]
        == Page(made["moving"]).content["shown:updates"]
        == "16"
    )
    notice = "Of 16 updates of the masks the first 8 are not known by layer: layers.jsonl was lost before step 58, "
    assert notice in Page(folder).text
    assert "not known" not in Page(made["moving"]).text
    lines = figure(topographies.exploration(found)).axes[0].lines
    assert (lines[0].get_xdata()[0], lines[0].get_xdata()[-1]) == (58, 114)
    assert lines[0].get_ydata()[-1] == metrics(made["moving"])[-2]["exploration_rate"]


def test_a_run_that_lost_layers_jsonl_after_its_last_update_says_so(copy: Path) -> None:
    (copy / "layers.jsonl").unlink()
    (copy / "model.safetensors").unlink()
    assert train.main([QUICKSTART, *KINDS["moving"], "--out", str(copy), "--resume"]) == 0
    assert "The 16 updates of the masks were made before " in Page(copy).content["exploration"]
    assert Page(copy).content["shown:updates"] == "16"


def test_epochs_that_were_lost_are_counted(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[1:]))
    report.write(copy)
    assert "Of 3 epochs 1 are not known: metrics.jsonl was lost" in Page(copy).text
    assert "3 epochs, 114 steps" in Page(copy).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.jsonl"])
@pytest.mark.parametrize("line", [1, 2, 4])
@pytest.mark.parametrize(
    "text", ["?", '{"epoch": 1, "st', "5", '{"epoch": 1, "step": 7}', ""], ids=repr
)
def test_a_damaged_file_is_one_clear_line(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, line: int, text: str
) -> None:
    lines = (copy / name).read_text().splitlines()
    lines[line - 1] = text
    (copy / name).write_text("\n".join(lines) + "\n")
    assert report.main([str(copy)]) == 1
    assert only_error(capsys).startswith(f"error: {copy / name} is damaged")
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize("recipe", ["", "[]", "a: {", "\x00"], ids=repr)
def test_a_damaged_recipe_is_one_clear_line(
    copy: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    (copy / "recipe.yaml").write_text(recipe)
    assert report.main([str(copy)]) == 1
    assert str(copy / "recipe.yaml") in only_error(capsys)


def test_damaged_weights_are_one_clear_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").write_bytes(b"no weights")
    assert report.main([str(copy)]) == 1
    assert f"{copy / 'model.safetensors'} can't be read" in only_error(capsys)


def test_a_run_of_before_has_what_its_metrics_give(copy: Path) -> None:
    (copy / "layers.jsonl").unlink()
    report.write(copy)
    assert Page(copy).content["exploration"].endswith(topographies.OLD)
    assert {path.stem for path in (copy / "pictures").iterdir()} >= {
        "accuracy",
        "loss",
        "rates",
        "flops",
    }


def test_a_loss_that_was_never_finite_is_said(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    (copy / "metrics.jsonl").unlink()
    Metrics(copy).append(
        *({**line, "train_loss": math.nan, "val_loss": math.inf} for line in lines)
    )
    report.write(copy)
    assert "The training loss was not finite in 3 of 3 epochs." in Page(copy).text
    assert "The loss was not finite in any epoch." in Page(copy).content["loss"]


def test_a_learning_rate_that_was_no_finite_number_is_said(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    (copy / "metrics.jsonl").unlink()
    Metrics(copy).append(*({**line, "lr": math.inf} if "lr" in line else line for line in lines))
    report.write(copy)
    assert "The learning rate was not a finite number." in Page(copy).content["rates"]


def test_several_runs_are_drawn_and_those_that_can_not_be_are_named(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of seeds is all of them."""
    assert report.main([str(made["static"].parent), str(tmp_path), str(made["dense"])]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(made[kind] / "report.html") for kind in ("static", "dense")]
    assert err.startswith(f"error: {tmp_path} holds no run: no recipe.yaml; give a folder such as ")


def test_a_report_that_is_drawn_again_is_the_same(copy: Path) -> None:
    before, again = ((report.write(copy), (copy / "report.html").read_bytes())[1] for _ in range(2))
    assert before == again
    assert not list(copy.glob("*.unfinished"))


# --- a run is not lost for its report ---------------------------------------------------------------------------------


def test_where_drawing_fails_the_weights_are_saved_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = []

    def fail(folder: Path) -> Path:
        saved.extend(path.name for path in folder.glob("model.safetensors"))
        raise RuntimeError("no\nink")

    monkeypatch.setattr(report, "write", fail)
    assert train.main([QUICKSTART, "epochs=1", "--out", str(tmp_path / "run")]) == 0
    assert saved == ["model.safetensors"]
    said = [line for line in capsys.readouterr().out.splitlines() if "report" in line]
    again = f"the run itself is whole, and python tools/report.py {tmp_path / 'run'} tries again"
    assert said == [f"no report: RuntimeError: no ink; {again}"]


def test_without_matplotlib_a_run_ends_well_and_says_so(tmp_path: Path) -> None:
    runner = changed_runner(tmp_path / "without.py", "sys.modules['matplotlib'] = None")
    output = finished(start([runner, QUICKSTART, "epochs=1", "--out", str(tmp_path / "run")]))
    assert len([line for line in output.splitlines() if line.startswith("no report: ")]) == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
PROBE = """<script>
const overflow = document.documentElement.scrollWidth - window.innerWidth;
const broken = [...document.images].filter(image => !image.complete || image.naturalWidth < 200).length;
document.title = `images ${document.images.length} broken ${broken} overflow ${Math.max(0, overflow)}`;
</script></body>"""


def browse(path: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={profile}",
    ]
    command += ["--enable-logging=stderr", "--window-size=1240,1000", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium to see the report rendered"
)
@pytest.mark.parametrize("kind", [*KINDS, "deep"])
def test_in_a_browser_the_page_renders_without_errors(
    made: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = made[kind] if kind in made else deep(tmp_path / "deep")
    report.write(folder)
    shown = browse(
        folder / "report.html", tmp_path / "profile", f"--screenshot={tmp_path / 'shot.png'}"
    )
    assert "CONSOLE" not in shown.stderr
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
    assert pixels.std() > 10
    text = (folder / "report.html").read_text(encoding="utf-8")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
    assert policy in text
    (tmp_path / "probed.html").write_text(
        text.replace(policy, "").replace("</body>", PROBE), encoding="utf-8"
    )
    for width in (1240, 400):
        probed = browse(
            tmp_path / "probed.html",
            tmp_path / "profile",
            "--dump-dom",
            f"--window-size={width},900",
        )
        images = text.count("<img ")
        assert f"<title>images {images} broken 0 overflow 0</title>" in probed.stdout
