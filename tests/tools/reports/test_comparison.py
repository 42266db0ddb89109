"""Several runs in one table, with the difference to the dense twin, and in one figure."""

import json
from pathlib import Path
from typing import Any

import pytest
from itop_prune_tools.reports import comparison, comparison_figure
from itop_prune_tools.run_folder.metrics import Metrics
from matplotlib.figure import Figure

MASKS = {"masks": {"sparsity": 0.98}, "regrow": {"every": 100}}


def write(folder: Path, top1: float | None, explored: float = 0.3, **recipe: Any) -> None:
    folder.mkdir(parents=True)
    seed = int(folder.name.removeprefix("seed"))
    recipe = {"model": {"model_name": "m"}, "seed": seed, **recipe}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    metrics = Metrics(folder)
    shared = {"sparsity": 0.98, "val_top1": 40.0}
    metrics.append({"epoch": 1, "step": 600, "exploration_rate": 0.1, "seconds": 4.0, **shared})
    line = {"epoch": 2, "step": 1200, **shared, "exploration_rate": explored}
    metrics.append({**line, "seconds": 8.0 + seed, "val_top1": 80.0})
    if top1 is not None:
        metrics.append({"epoch": 2, "step": 1200, "test_loss": 0.3, "test_top1": top1})


def table(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The rows of the printed table, by heading."""
    lines = capsys.readouterr().out.splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def compare(*arguments: object) -> int:
    return comparison.main([str(argument) for argument in arguments])


def test_a_row_has_mean_and_spread_over_the_finished_seeds(tmp_path, capsys):
    for seed, top1 in enumerate((87.0, 88.0, 89.0)):
        write(tmp_path / "set" / f"seed{seed}", top1, 0.2 + 0.1 * seed)
    write(tmp_path / "set" / "seed3", None)
    assert compare(tmp_path / "set") == 0
    assert table(capsys) == [
        {
            "run": "set",
            "seeds": "3",
            "test top-1": "88.00 ± 1.00",
            "to dense": "",
            "each seed": "87.00 88.00 89.00",
            "R_s": "0.300",
            "survival": "",
            "sparsity": "0.9800",
            "train FLOPs": "",
            "steps": "1,200",
            "seconds": "9",
        }
    ]


def test_one_seed_has_no_spread(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", 87.0)
    compare(tmp_path / "set")
    assert table(capsys)[0]["test top-1"] == "87.00"


@pytest.mark.parametrize(
    ("sparsities", "shown"),
    [((0.98, 0.97), "0.9800 0.9700"), ((0.5, 0.8, 0.95), "0.5000 to 0.9500")],
)
def test_sparsities_that_change_are_shown(tmp_path, capsys, sparsities, shown):
    metrics = Metrics(tmp_path / "gmp" / "seed0")
    metrics.path.parent.mkdir(parents=True)
    for epoch, sparsity in enumerate(sparsities, start=1):
        line = {"epoch": epoch, "step": 600 * epoch, "sparsity": sparsity, "exploration_rate": 1.0}
        metrics.append({**line, "survival": 0.25, "train_flops": 0.1 * epoch})
    metrics.append({"epoch": 3, "step": 1800, "test_loss": 0.3, "test_top1": 87.0})
    compare(tmp_path / "gmp")
    (row,) = table(capsys)
    flops = f"{0.1 * len(sparsities):.3f}"
    assert (row["survival"], row["sparsity"], row["train FLOPs"]) == ("0.250", shown, flops)


def test_the_dense_twin_is_the_run_with_the_same_recipe_but_for_masks(tmp_path, capsys):
    """Length and learning rate must be the same; place and workers of the data may differ."""
    for name, multiplier, masks, top1 in [
        ("dense", 1, {}, 89.0),
        ("dense5", 5, {}, 90.0),
        ("set", 1, MASKS, 88.5),
        ("set5", 5, MASKS, 90.25),
        ("set2", 2, MASKS, 90.0),
    ]:
        data = {"name": "digits", "root": name, "workers": multiplier}
        for seed in (0, 1):
            folder = tmp_path / name / f"seed{seed}"
            write(folder, top1 + seed, multiplier=multiplier, data=data, **masks)
    given = [tmp_path / name for name in ("set", "set5", "set2", "dense", "dense5")]
    compare(*given)
    assert [row["to dense"] for row in table(capsys)] == ["−0.50", "+0.25", "", "", ""]
    compare(*given[:3])
    assert [row["to dense"] for row in table(capsys)] == ["", "", ""]


def test_seeds_are_in_the_order_of_their_numbers(tmp_path, capsys):
    for seed in (10, 2, 1):
        write(tmp_path / "set" / f"seed{seed}", 80.0 + seed)
    compare(tmp_path / "set")
    assert table(capsys)[0]["each seed"] == "81.00 82.00 90.00"


@pytest.mark.parametrize("text", [None, "", "[]", "masks: {", "\x00", "data: 3"], ids=repr)
def test_the_numbers_need_no_readable_recipe(tmp_path, capsys, text):
    write(tmp_path / "set" / "seed0", 87.0, **MASKS)
    write(tmp_path / "dense" / "seed0", 88.0)
    path = tmp_path / "set" / "seed0" / "recipe.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert compare(tmp_path / "set", tmp_path / "dense") == 0
    row = table(capsys)[0]
    assert (row["test top-1"], row["to dense"]) == ("87.00", "")


# --- folders that are left out ---


def test_folders_without_finished_runs_are_left_out_and_named(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    write(tmp_path / "static" / "seed0", 86.0)
    run = tmp_path / "static" / "seed0"
    assert compare(tmp_path / "set", run, tmp_path / "static") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    unfinished, itself = err.splitlines()
    assert f"{tmp_path / 'set'} holds no finished run" in unfinished
    assert f"{run} is a run itself; give the folder that holds it, {run.parent}" in itself


def test_nothing_finished_at_all_is_an_error(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    assert compare(tmp_path / "set") == 1
    assert capsys.readouterr().out == ""


def test_a_folder_given_twice_is_one_row(tmp_path, capsys):
    write(tmp_path / "a" / "seed0", 87.0)
    assert compare(tmp_path / "a", tmp_path / "a" / ".." / "a") == 0
    assert len(table(capsys)) == 1


# --- the figure ---


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, in place of their files."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def test_the_panels_can_be_chosen(tmp_path, figures):
    for epochs, top1 in ((2, 88.0), (8, 89.0)):
        for name, recipe in (("dense", {}), ("set", MASKS)):
            write(
                tmp_path / f"{name}-epochs={epochs}" / f"seed{epochs}",
                top1,
                **recipe,
                epochs=epochs,
            )
    folders = sorted(tmp_path.iterdir())
    chosen = ("--against", "seconds", "steps")
    assert compare(*folders, "--vary", "epochs", "--picture", "x.png", *chosen) == 0
    seconds, steps = figures[0].axes
    assert (seconds.get_xlabel(), steps.get_xlabel()) == ("training time, s", "training steps")
    lines = {line.get_label(): line.get_xydata().tolist() for line in seconds.lines}
    assert lines["dense"] == lines["set"] == [[10.0, 88.0], [16.0, 89.0]]
    assert [text.get_text() for text in seconds.texts] == ["2", "8"] * 2
    assert not any(list(line.get_xdata()) == [0, 1] for line in seconds.lines)


def test_the_course_of_each_run_can_be_drawn(tmp_path, figures):
    """A line over the seconds of each run, beside its point of the test images."""
    for seed in (0, 1):
        write(tmp_path / "set" / f"seed{seed}", 88.0 + seed)
    assert compare(tmp_path / "set", "--picture", "x.png", "--against", "course") == 0
    (axis,) = figures[0].axes
    courses = [line.get_xydata().tolist() for line in axis.lines]
    assert [[4.0, 40.0], [8.0, 80.0]] in courses
    assert [[4.0, 40.0], [9.0, 80.0]] in courses
    assert [[8.5, 88.5]] in courses


@pytest.mark.parametrize("experiments", [1, 12])
def test_the_figure_names_each_experiment(tmp_path, experiments):
    names = [f"a_net_erk98_{place}" for place in range(experiments)]
    for place, name in enumerate(names):
        for seed in (0, 1):
            write(tmp_path / name / f"seed{seed}", 80.0 + seed + place / 10, 0.1 + place / 100)
    picture = tmp_path / "compare.svg"
    assert compare(*(tmp_path / name for name in names), "--picture", picture) == 0
    text = picture.read_text()
    labels = [name.removeprefix("a_net_erk98_") for name in names] if experiments > 1 else names
    assert all(f"<!-- {label} -->" in text for label in labels)


def test_the_points_are_the_means_and_a_dense_one_is_a_level(tmp_path, figures):
    for name, top1, recipe in (("dense", 90.0, {}), ("set", 88.0, MASKS)):
        for seed in (0, 1):
            write(tmp_path / name / f"seed{seed}", top1 + seed, 0.5 + 0.1 * seed, **recipe)
    assert compare(tmp_path / "dense", tmp_path / "set", "--picture", "x.png") == 0
    explored, flops, steps = figures[0].axes

    def points(axis, name):
        return [line.get_xydata().tolist() for line in axis.lines if line.get_label() == name]

    assert points(explored, "dense") == [[[pytest.approx(0.55), 90.5]]]
    assert points(explored, "set") == [[[pytest.approx(0.55), 88.5]]]
    assert points(steps, "set") == [[[1200, 88.5]]]
    assert points(flops, "set") == []  # nobody counted them
    for axis, levels in ((explored, [[90.5, 90.5]]), (flops, []), (steps, [[90.5, 90.5]])):
        across = [line for line in axis.lines if list(line.get_xdata()) == [0, 1]]
        assert [line.get_ydata() for line in across] == levels


def test_the_figure_and_its_panels_have_titles(tmp_path, figures):
    for name, data in (("dense", "digits"), ("set", "digits"), ("other", "cifar10")):
        write(tmp_path / name / "seed0", 88.0, data={"name": data})
    write(tmp_path / "set" / "seed1", 89.0, data={"name": "digits"})
    write(tmp_path / "own" / "seed0", 88.0, data={"name": "npz", "root": "/my/cats.npz"})
    dense, of_seeds, other, own = (tmp_path / name for name in ("dense", "set", "other", "own"))
    for folders in ((dense,), (dense, of_seeds), (dense, other), (own,)):
        assert compare(*folders, "--picture", "x.png") == 0
    assert [figure.get_suptitle() for figure in figures] == [
        "m on digits: test accuracy",
        "m on digits: test accuracy, mean ± deviation over seeds",
        "Test accuracy",
        "m on cats.npz: test accuracy",
    ]
    titles = [axis.get_title(loc="left") for axis in figures[0].axes]
    assert titles == ["Against exploration", "Against FLOPs", "Against steps"]


@pytest.mark.parametrize("last", [1200, 1201, 1900, 3000, 5999, 6001, 40000, 1200000])
def test_an_axis_of_costs_has_several_numbers(tmp_path, figures, last):
    write(tmp_path / "one" / "seed0", 88.0)
    write(tmp_path / "two" / "seed0", None)
    line = {"epoch": 2, "step": last, "test_loss": 0.3, "test_top1": 89.0}
    Metrics(tmp_path / "two" / "seed0").append(line)
    assert compare(tmp_path / "one", tmp_path / "two", "--picture", "x.png") == 0
    axis = figures[0].axes[2]
    figures[0].draw_without_rendering()
    low, high = axis.get_xlim()
    ticks = [
        tick.label1.get_text()
        for tick in axis.xaxis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]
    assert 2 <= len(ticks) <= 7
    assert len(set(ticks)) == len(ticks)
    assert "" not in ticks
    assert low <= 1200 < last + 1 <= high + 1


@pytest.mark.parametrize("shared", ["-epochs=2", ""])
def test_experiments_that_differ_in_one_setting_are_a_line_with_its_values(
    tmp_path, figures, shared
):
    """The recipe counts, not the name: the last value is the recipe's own and in no name."""
    for grow in ("set", "rigl"):
        for every in (50, 1500, 200):
            override = f"-regrow.every={every}" if every < 1500 else ""
            recipe = {"masks": {"sparsity": 0.9}, "regrow": {"every": every, "grow": grow}}
            folder = tmp_path / f"erk_{grow}{override}{shared}" / "seed0"
            write(folder, 80.0 + every / 1000, every / 1500, **recipe)
    folders = sorted(tmp_path.iterdir())
    assert compare(*folders, "--vary", "regrow.every", "--picture", "x.png") == 0
    panel = figures[0].axes[0]
    lines = {line.get_label(): line.get_xdata().tolist() for line in panel.lines}
    shares = [50 / 1500, 200 / 1500, 1.0]
    assert (lines["set"], lines["rigl"]) == (shares, shares)
    assert [text.get_text() for text in panel.texts] == ["50", "200", "1500"] * 2
    assert figures[0].legends[0].get_title().get_text() == "beside the points: regrow.every"


def test_a_line_joins_experiments_that_differ_in_two_settings(tmp_path, figures):
    """The interval grows with the length; the dense runs have none."""
    for epochs in (20, 5):
        recipe = {"regrow": {"every": 10 * epochs}, "masks": {"sparsity": 0.9}}
        write(
            tmp_path / f"set-epochs={epochs}" / "seed0", 80.0, epochs / 20, epochs=epochs, **recipe
        )
        write(tmp_path / f"dense-epochs={epochs}" / "seed0", 85.0, 1.0, epochs=epochs)
    folders = sorted(tmp_path.iterdir())
    assert compare(*folders, "--vary", "epochs", "regrow.every", "--picture", "x.png") == 0
    panel = figures[0].axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    assert lines["set"] == [0.25, 1.0]
    assert [text.get_text() for text in panel.texts] == ["5", "20"] * 2
    assert figures[0].legends[0].get_title().get_text() == "beside the points: epochs"


def test_the_experiments_of_a_figure_can_be_named(tmp_path, capsys):
    for name in ("a_dense", "a_erk98_set-itop-regrow.every=100"):
        write(tmp_path / name / "seed0", 80.0)
    given, picture = sorted(tmp_path.iterdir()), tmp_path / "named.svg"
    names = ("Dense", "SET-ITOP, $98 %$")
    assert compare(*given, "--picture", picture, "--names", *names) == 0
    assert all(picture.read_text().count(f"<!-- {name} -->") == 1 for name in names)

    assert compare(*given, "--picture", picture, "--names", "Dense") == 1
    message = "error: --names gives 1 for 2 experiments, in their order: "
    assert capsys.readouterr().err == f"{message}dense; erk98_set-itop, regrow.every=100\n"


def test_folders_of_one_name_are_told_apart_or_named_in_full():
    assert comparison_figure.labels([["a_set"], ["a_set"]]) == ["a_set", "a_set"]
    assert comparison_figure.labels([["one_x", "two_y"], ["three_z"]]) == ["one_x", "three_z"]


@pytest.mark.parametrize(
    "option", [("--vary", "regrow.every"), ("--names", "Dense"), ("--against", "FLOPs")]
)
def test_options_of_the_figure_are_refused_without_one(option, tmp_path, capsys):
    write(tmp_path / "a_dense" / "seed0", 80.0)
    with pytest.raises(SystemExit):
        compare(tmp_path / "a_dense", *option)
    assert "--against are of the picture; add --picture FILE" in capsys.readouterr().err


def test_a_setting_that_no_recipe_has_is_an_error(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", 87.0, **MASKS)
    options = ("--vary", "regrow.evry", "--picture", tmp_path / "x.svg")
    assert compare(tmp_path / "set", *options) == 1
    message = "error: --vary is regrow.evry, which no recipe of these has; give a setting such as "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("name", ["nowhere/compare.png", "compare.doc"])
def test_a_figure_that_can_not_be_written_is_one_line(tmp_path, capsys, name):
    write(tmp_path / "set" / "seed0", 87.0)
    assert compare(tmp_path / "set", "--picture", tmp_path / name) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name} can't be written: ")
