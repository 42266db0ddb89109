"""Several runs side by side: a table, beside the dense twin, and a picture."""

import json
from pathlib import Path
from typing import Any

import pytest
from itop_prune_tools.reports import comparison as compare
from itop_prune_tools.reports import comparison_figure as side_by_side
from itop_prune_tools.run_folder.metrics import Metrics
from matplotlib.figure import Figure

MASKS = {"masks": {"sparsity": 0.98}, "regrow": {"every": 100}}


def write(folder: Path, top1: float | None, explored: float = 0.3, **recipe: Any) -> None:
    folder.mkdir(parents=True)
    seed = int(folder.name.removeprefix("seed"))
    (folder / "recipe.yaml").write_text(
        json.dumps({"model": {"model_name": "m"}, "seed": seed, **recipe})
    )
    metrics = Metrics(folder)
    metrics.append({"epoch": 1, "step": 600, "sparsity": 0.98, "exploration_rate": 0.1})
    metrics.append({"epoch": 2, "step": 1200, "sparsity": 0.98, "exploration_rate": explored})
    if top1 is not None:
        metrics.append({"epoch": 2, "step": 1200, "test_loss": 0.3, "test_top1": top1})


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]


def test_a_line_has_mean_and_spread_over_the_finished_seeds(tmp_path, capsys):
    for seed, top1 in enumerate((87.0, 88.0, 89.0)):
        write(tmp_path / "set" / f"seed{seed}", top1, 0.2 + 0.1 * seed)
    write(tmp_path / "set" / "seed3", None)
    assert compare.main([str(tmp_path / "set")]) == 0
    header, _, line = table(capsys)
    assert dict(zip(header, line, strict=True)) == {
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
    }


def test_one_seed_has_no_spread(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", 87.0)
    compare.main([str(tmp_path / "set")])
    assert table(capsys)[2][2] == "87.00"


def test_every_sparsity_that_occurred_is_shown(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    Metrics(tmp_path / "set" / "seed0").append(
        {"epoch": 3, "step": 1800, "sparsity": 0.97, "exploration_rate": 0.3}
    )
    Metrics(tmp_path / "set" / "seed0").append(
        {"epoch": 3, "step": 1800, "test_loss": 0.3, "test_top1": 87.0}
    )
    compare.main([str(tmp_path / "set")])
    assert table(capsys)[2][7] == "0.9800 0.9700"


def test_a_sparsity_that_goes_a_way_is_shown_by_its_ends(tmp_path, capsys):
    metrics = Metrics(tmp_path / "gmp" / "seed0")
    metrics.path.parent.mkdir(parents=True)
    for epoch, sparsity in enumerate((0.5, 0.8, 0.95), start=1):
        line = {"epoch": epoch, "step": 600 * epoch, "sparsity": sparsity, "exploration_rate": 1.0}
        metrics.append({**line, "survival": 0.25, "train_flops": 0.1 * epoch})
    metrics.append({"epoch": 3, "step": 1800, "test_loss": 0.3, "test_top1": 87.0})
    compare.main([str(tmp_path / "gmp")])
    assert table(capsys)[2][6:9] == ["0.250", "0.5000 to 0.9500", "0.300"]


def test_a_dense_run_that_is_the_same_but_for_the_masks_is_what_to_reach(tmp_path, capsys):
    """Of the same length and learning rate; where the data lie and how they are read does not matter."""
    for name, multiplier, masks, top1 in [
        ("dense", 1, {}, 89.0),
        ("dense5", 5, {}, 90.0),
        ("set", 1, MASKS, 88.5),
        ("set5", 5, MASKS, 90.25),
        ("set2", 2, MASKS, 90.0),
    ]:
        for seed in (0, 1):
            data = {"name": "digits", "root": name, "workers": multiplier}
            write(
                tmp_path / name / f"seed{seed}",
                top1 + seed,
                multiplier=multiplier,
                data=data,
                **masks,
            )
    given = [str(tmp_path / name) for name in ("set", "set5", "set2", "dense", "dense5")]
    compare.main(given)
    assert [line[3] for line in table(capsys)[2:]] == ["−0.50", "+0.25", "", "", ""]
    compare.main(given[:3])
    assert [line[3] for line in table(capsys)[2:]] == ["", "", ""]


def test_seeds_are_in_the_order_of_their_numbers(tmp_path, capsys):
    for seed in (10, 2, 1):
        write(tmp_path / "set" / f"seed{seed}", 80.0 + seed)
    compare.main([str(tmp_path / "set")])
    assert table(capsys)[2][4] == "81.00 82.00 90.00"


@pytest.mark.parametrize("text", [None, "", "[]", "masks: {", "\x00", "data: 3"], ids=repr)
def test_without_a_recipe_that_can_be_read_the_numbers_are_there(tmp_path, capsys, text):
    write(tmp_path / "set" / "seed0", 87.0, **MASKS)
    write(tmp_path / "dense" / "seed0", 88.0)
    path = tmp_path / "set" / "seed0" / "recipe.yaml"
    path.unlink() if text is None else path.write_text(text)
    assert compare.main([str(tmp_path / "set"), str(tmp_path / "dense")]) == 0
    assert table(capsys)[2][2:4] == ["87.00", ""]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What was drawn, in place of its files."""
    drawn: list[Figure] = []
    monkeypatch.setattr(
        side_by_side.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    return drawn


def drawn(path: Path) -> str:
    assert path.stat().st_size > 10_000
    return path.read_text()


@pytest.mark.parametrize("experiments", [1, 30])
def test_the_picture_holds_a_point_for_each_experiment(tmp_path, capsys, experiments):
    names = [f"a_net_erk98_{place}" for place in range(experiments)]
    for place, name in enumerate(names):
        write(tmp_path / name / "seed0", 80.0 + place / 10, 0.1 + place / 100)
        write(tmp_path / name / "seed1", 81.0 + place / 10, 0.1 + place / 100)
    picture = tmp_path / "compare.svg"
    assert compare.main([*(str(tmp_path / name) for name in names), "--picture", str(picture)]) == 0
    labels = [name.removeprefix("a_net_erk98_") for name in names] if experiments > 1 else names
    assert all(drawn(picture).count(f"<!-- {label} -->") >= 1 for label in labels)


def test_the_points_are_the_means_and_a_dense_one_is_a_level(tmp_path, figures):
    for name, top1, recipe in (("dense", 90.0, {}), ("set", 88.0, MASKS)):
        for seed in (0, 1):
            write(tmp_path / name / f"seed{seed}", top1 + seed, 0.5 + 0.1 * seed, **recipe)
    assert compare.main([str(tmp_path / "dense"), str(tmp_path / "set"), "--picture", "x.png"]) == 0
    explored, flops, steps = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in explored.lines}
    assert lines["dense"] == [[pytest.approx(0.55), 90.5]]
    assert lines["set"] == [[pytest.approx(0.55), 88.5]]
    assert {line.get_label(): line.get_xydata().tolist() for line in steps.lines}["set"] == [
        [1200, 88.5]
    ]
    assert all(
        len(line.get_xdata()) == 0 for line in flops.lines if line.get_label() == "set"
    )  # nobody counted
    for axis in (explored, flops, steps):
        levels = [line.get_ydata() for line in axis.lines if list(line.get_xdata()) == [0, 1]]
        assert levels == ([[90.5, 90.5]] if axis is not flops else [])


@pytest.mark.parametrize("shared", ["-epochs=2", ""])
def test_experiments_that_differ_in_what_varies_alone_are_one_line_with_its_values_beside_it(
    tmp_path, figures, shared
):
    """By the recipes: in the last the value is that of the file, and not part of the name."""
    for grow in ("set", "rigl"):
        for every in (50, 1500, 200):
            name = (
                f"erk_{grow}-regrow.every={every}{shared}"
                if every < 1500
                else f"erk_{grow}{shared}"
            )
            recipe = {"masks": {"sparsity": 0.9}, "regrow": {"every": every, "grow": grow}}
            write(tmp_path / name / "seed0", 80.0 + every / 1000, every / 1500, **recipe)
    folders = sorted(tmp_path.iterdir())
    assert compare.main([*map(str, folders), "--vary", "regrow.every", "--picture", "x.png"]) == 0
    lines = {line.get_label(): len(line.get_xdata()) for line in figures[0].axes[0].lines}
    assert {name: lines[name] for name in ("set", "rigl")} == {"set": 3, "rigl": 3}
    assert (
        sorted(text.get_text() for text in figures[0].axes[0].texts)
        == ["1500"] * 2 + ["200"] * 2 + ["50"] * 2
    )
    assert figures[0].legends[0].get_title().get_text() == "beside the points: regrow.every"
    found = [compare.read(folder) for folder in folders]
    values = [
        [runs.setting("regrow.every") for runs in members]
        for members in compare.families(found, "regrow.every")
    ]
    assert values == [["50", "200", "1500"]] * 2


def test_values_beside_points_do_not_lie_on_each_other(tmp_path, figures):
    for place in range(8):
        recipe = {"masks": {"sparsity": 0.9}, "regrow": {"every": 1000 + place}}
        write(
            tmp_path / f"set-regrow.every={place}" / "seed0",
            80 + 3 * (place % 4),
            0.5 + place / 200,
            **recipe,
        )
    given = [str(folder) for folder in tmp_path.iterdir()]
    assert compare.main([*given, "--vary", "regrow.every", "--picture", "x.png"]) == 0
    figures[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(boxes) == 8
    assert not any(
        one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[place + 1 :]
    )


def test_the_picture_can_be_told_what_to_call_them(tmp_path, capsys):
    for name in ("a_dense", "a_erk98_set-itop-regrow.every=100"):
        write(tmp_path / name / "seed0", 80.0)
    given = [str(folder) for folder in sorted(tmp_path.iterdir())]
    picture = tmp_path / "named.svg"
    assert (
        compare.main([*given, "--names", "Dense", "SET-ITOP, $98 %$", "--picture", str(picture)])
        == 0
    )
    assert all(
        drawn(picture).count(f"<!-- {label} -->") == 1 for label in ("Dense", "SET-ITOP, $98 %$")
    )
    assert compare.main([*given, "--names", "Dense", "--picture", str(picture)]) == 1
    assert capsys.readouterr().err == (
        "error: --names gives 1 for 2 experiments, in their order: dense; erk98_set-itop, regrow.every=100\n"
    )


@pytest.mark.parametrize("option", [("--vary", "regrow.every"), ("--names", "Dense")])
def test_what_only_a_picture_shows_is_refused_without_one(option, tmp_path, capsys):
    write(tmp_path / "a_dense" / "seed0", 80.0)
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a_dense"), *option])
    assert "--vary and --names are of the picture; add --picture FILE" in capsys.readouterr().err


def test_folders_of_one_name_are_told_apart_or_named_in_full():
    assert side_by_side.labels([["a_set"], ["a_set"]]) == ["a_set", "a_set"]
    assert side_by_side.labels([["one_x", "two_y"], ["three_z"]]) == ["one_x", "three_z"]


def test_a_setting_that_no_recipe_has_is_an_error(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", 87.0, **MASKS)
    assert (
        compare.main(
            [str(tmp_path / "set"), "--vary", "regrow.evry", "--picture", str(tmp_path / "x.svg")]
        )
        == 1
    )
    assert capsys.readouterr().err.startswith(
        "error: --vary is regrow.evry, which no recipe of these has; "
    )


@pytest.mark.parametrize("name", ["nowhere/compare.png", "compare.doc"])
def test_a_picture_that_can_not_be_written_is_one_line(tmp_path, capsys, name):
    write(tmp_path / "set" / "seed0", 87.0)
    assert compare.main([str(tmp_path / "set"), "--picture", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name} can't be written: ")


def test_a_folder_without_finished_runs_is_left_out_and_named(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    write(tmp_path / "static" / "seed0", 86.0)
    assert compare.main([str(tmp_path / "set"), str(tmp_path / "static")]) == 0
    out, err = capsys.readouterr()
    assert "no finished run" in err
    assert str(tmp_path / "set") in err
    assert len(out.splitlines()) == 3


def test_a_folder_given_twice_is_one_line(tmp_path, capsys):
    write(tmp_path / "a" / "seed0", 87.0)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "a" / ".." / "a")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_run_itself_is_left_out_with_where_it_lies(tmp_path, capsys):
    write(tmp_path / "a" / "seed0", 87.0)
    assert compare.main([str(tmp_path / "a" / "seed0")]) == 1
    assert (
        f"seed0 is a run itself; give the folder that holds it, {tmp_path / 'a'}"
        in capsys.readouterr().err
    )


def test_nothing_finished_at_all_is_an_error(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    assert compare.main([str(tmp_path / "set")]) == 1
    assert capsys.readouterr().out == ""
