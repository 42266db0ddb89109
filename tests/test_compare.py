"""The table of several runs."""

from pathlib import Path

import compare
import pytest
from metrics import Metrics


def write(folder: Path, top1: float | None, explored: float = 0.3) -> None:
    folder.mkdir(parents=True)
    metrics = Metrics(folder)
    metrics.append({"epoch": 1, "step": 600, "sparsity": 0.98, "exploration_rate": 0.1})
    metrics.append({"epoch": 2, "step": 1200, "sparsity": 0.98, "exploration_rate": explored})
    if top1 is not None:
        metrics.append({"epoch": 2, "step": 1200, "test_loss": 0.3, "test_top1": top1})


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in capsys.readouterr().out.splitlines()]


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
    Metrics(tmp_path / "set" / "seed0").append({"epoch": 3, "step": 1800, "sparsity": 0.97, "exploration_rate": 0.3})
    Metrics(tmp_path / "set" / "seed0").append({"epoch": 3, "step": 1800, "test_loss": 0.3, "test_top1": 87.0})
    compare.main([str(tmp_path / "set")])
    assert table(capsys)[2][6] == "0.9800 0.9700"


def test_a_sparsity_that_goes_a_way_is_shown_by_its_ends(tmp_path, capsys):
    metrics = Metrics(tmp_path / "gmp" / "seed0")
    metrics.path.parent.mkdir(parents=True)
    for epoch, sparsity in enumerate((0.5, 0.8, 0.95), start=1):
        line = {"epoch": epoch, "step": 600 * epoch, "sparsity": sparsity, "exploration_rate": 1.0}
        metrics.append({**line, "survival": 0.25, "train_flops": 0.1 * epoch})
    metrics.append({"epoch": 3, "step": 1800, "test_loss": 0.3, "test_top1": 87.0})
    compare.main([str(tmp_path / "gmp")])
    assert table(capsys)[2][5:8] == ["0.250", "0.5000 to 0.9500", "0.300"]


@pytest.mark.parametrize("experiments", [1, 30])
def test_the_picture_holds_a_point_for_each_experiment(tmp_path, capsys, experiments):
    names = [f"erk98_{place}" for place in range(experiments)]
    for place, name in enumerate(names):
        write(tmp_path / name / "seed0", 80.0 + place / 10, 0.1 + place / 100)
        write(tmp_path / name / "seed1", 81.0 + place / 10, 0.1 + place / 100)
    picture = tmp_path / "compare.svg"
    assert compare.main([*(str(tmp_path / name) for name in names), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    labels = {name.removeprefix("erk98_") for name in names}
    assert all(f"<!-- {label} -->" in picture.read_text() for label in labels)


def test_experiments_that_differ_in_what_varies_alone_are_one_line_with_its_values_beside_it(tmp_path, capsys):
    names = [f"{kind}-every={every}-epochs=2" for kind in ("erk_set", "erk_rigl") for every in (50, 1500, 200)]
    for place, name in enumerate(names):
        write(tmp_path / name / "seed0", 80.0 + place / 10, 0.1 + place / 100)
    picture = tmp_path / "vary.svg"
    given = [str(tmp_path / name) for name in names]
    assert compare.main([*given, "--vary", "every", "--picture", str(picture)]) == 0
    drawn = picture.read_text()
    assert all(drawn.count(f"<!-- {label} -->") == 1 for label in ("set-epochs=2", "rigl-epochs=2"))
    assert all(drawn.count(f"<!-- {value} -->") == 2 for value in (50, 200, 1500))


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


def test_nothing_finished_at_all_is_an_error(tmp_path, capsys):
    write(tmp_path / "set" / "seed0", None)
    assert compare.main([str(tmp_path / "set")]) == 1
    assert capsys.readouterr().out == ""
