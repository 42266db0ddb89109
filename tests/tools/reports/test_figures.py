"""The pictures of a report: what is drawn is what the run wrote."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.processes import metrics
from helpers.reported_runs import KINDS, stop_at, train, write_deep_run
from itop_prune_tools.reports import figures, layer_figures
from itop_prune_tools.run_folder import history
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def figure(drawn: Figure | str) -> Figure:
    assert isinstance(drawn, Figure), drawn
    return drawn


def moving(folder: Path) -> tuple[history.History, history.Masks]:
    found = history.read_history(folder)
    assert found.masks
    return found, found.masks


def test_the_lines_of_accuracy_and_loss_are_the_metrics(made: dict[str, Path]) -> None:
    found, (*lines, test) = history.read_history(made["moving"]), metrics(made["moving"])
    drawn = {line.get_label(): line for line in figure(figures.accuracy(found)).axes[0].lines}
    points = [[line["step"], line["val_top1"]] for line in lines]
    assert drawn["validation"].get_xydata().tolist() == points
    assert drawn[f"test {test['test_top1']:.2f}"].get_ydata()[-1] == test["test_top1"]
    drawn = {line.get_label(): line for line in figure(figures.loss(found)).axes[0].lines}
    assert drawn["training"].get_ydata().tolist() == [line["train_loss"] for line in lines]
    assert drawn["validation"].get_ydata().tolist() == [line["val_loss"] for line in lines]


def test_the_lines_of_r_s_end_at_the_metrics_and_each_layer_has_one(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    lines = figure(layer_figures.exploration(found)).axes[0].lines
    assert len(lines) == 1 + len(masks.names)
    assert lines[0].get_ydata()[0] == pytest.approx(0.05)
    assert lines[0].get_ydata()[-1] == metrics(made["moving"])[-2]["exploration_rate"]
    assert lines[0].get_xdata()[-1] == 3 * 38
    looks = {(line.get_color(), str(line.get_linestyle())) for line in lines}
    assert len(looks) == len(lines)


def test_survival_over_all_layers_is_that_of_the_metrics(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    survived = dict(zip(masks.steps[2:], layer_figures.survival(masks), strict=True))
    for line in found.epochs:
        last = max(step for step in survived if step <= line["step"])
        assert survived[last] == pytest.approx(line["survival"], rel=1e-12)


def test_the_bars_are_the_sparsities(made: dict[str, Path]) -> None:
    found, masks = moving(made["moving"])
    widths = [bar.get_width() for bar in figure(layer_figures.sparsity(found)).axes[0].patches]
    assert widths == pytest.approx(1 - masks.active[-1] / masks.weights)


def test_a_dense_layer_is_marked(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "epochs=1", "masks.exclude=[head]") == 0
    drawn = figure(layer_figures.sparsity(history.read_history(tmp_path / "run")))
    assert [text.get_text() for text in drawn.axes[0].texts][-1] == "no mask"


def test_all_pictures_over_steps_reach_the_last_update_of_a_stopped_run(tmp_path: Path) -> None:
    stop_at(39 + 20, tmp_path / "run", *KINDS["moving"])  # 56 is its last update
    found = history.read_history(tmp_path / "run")
    for picture in (layer_figures.exploration, layer_figures.changes, figures.loss, figures.rates):
        low, high = figure(picture(found)).axes[-1].get_xlim()
        assert low <= 0
        assert high >= 56


def test_300_layers_are_drawn_as_bands_and_maps_with_few_labels(tmp_path: Path) -> None:
    found = history.read_history(write_deep_run(tmp_path / "run"))
    lines = figure(layer_figures.exploration(found))
    assert len(lines.axes[0].lines) == 1
    assert sum(len(legend.texts) for legend in lines.legends) <= 4
    for drawn in (layer_figures.exploration_map(found), layer_figures.sparsity(found)):
        axes = figure(drawn).axes[0]
        ticks = [*axes.xaxis.get_ticklabels(), *axes.yaxis.get_ticklabels()]
        labels = [label for label in ticks if label.get_text()]
        assert len(labels) <= layer_figures.NAMES_AT_MOST + 12
        assert figure(drawn).get_figheight() < 8
    assert len(figure(layer_figures.sparsity(found)).axes[0].patches) == 300


# --- the mask of the first layer ---


def test_a_first_layer_of_filters_is_drawn_with_a_tile_each() -> None:
    mask = np.zeros((6, 3, 2, 2), bool)
    mask[0], mask[5, 0, 1, 1] = True, True
    image = layer_figures.draw_filters("conv", mask).axes[0].images[0]
    canvas = np.ma.filled(image.get_array(), np.nan)
    shown = canvas[np.isfinite(canvas)]
    assert len(shown) == 6 * 4
    assert (np.sort(shown)[-5:] == [1 / 3, 1, 1, 1, 1]).all()


def test_a_first_layer_that_reads_an_image_is_drawn_by_pixel_and_as_a_matrix() -> None:
    mask = np.random.default_rng(0).random((5, 12)) < 0.5
    axes = layer_figures.draw_matrix("fc", mask, [3, 2, 2]).axes
    assert (axes[0].images[0].get_array() == mask.reshape(5 * 3, 2, 2).sum(0)).all()
    assert (axes[1].images[0].get_array() == mask).all()


def test_a_large_mask_is_drawn_as_shares_of_blocks() -> None:
    mask = np.zeros((601, 801), bool)
    mask[:3, :2] = True
    cells = layer_figures.blocks(mask)
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
    sentence = "There is neither a file of weights nor a layer small enough to draw its mask."
    assert layer_figures.first_layer(found) == sentence


# --- how it looks ---


def differ_in_print(one: Line2D, other: Line2D) -> bool:
    """Whether dashes or markers differ, or the greys of the colours."""
    if one.get_linestyle() != other.get_linestyle() or one.get_marker() != other.get_marker():
        return True
    luminance = (0.299, 0.587, 0.114)
    greys = [np.dot(matplotlib.colors.to_rgb(line.get_color()), luminance) for line in (one, other)]
    return abs(greys[0] - greys[1]) > 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_in_print_lines_that_cross_can_be_told_apart(made: dict[str, Path], kind: str) -> None:
    found = history.read_history(made[kind])
    over_steps = (figures.accuracy, figures.loss, figures.cost)
    for drawing in (*over_steps, layer_figures.exploration, layer_figures.changes):
        drawn = drawing(found)
        if isinstance(drawn, Figure):
            lines = drawn.axes[0].lines
            for place, line in enumerate(lines):
                assert all(differ_in_print(line, other) for other in lines[place + 1 :])


def test_a_machine_with_its_own_look_draws_the_same(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [row for row in figures.PICTURES if row[0] in ("accuracy", "loss")]
    monkeypatch.setattr(figures, "PICTURES", two)
    own = {"font.size": 30, "axes.facecolor": "black", "text.parse_math": True}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        drawn = figures.draw(history.read_history(made["moving"]))
        assert dict(matplotlib.rcParams) == before
    for picture in drawn:
        file = made["moving"] / "pictures" / f"{picture.name}.png"
        assert picture.content == file.read_bytes()
