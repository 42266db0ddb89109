"""layers.jsonl: the masks of a run after every update; a stopped run writes the same lines."""

import itertools
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import (
    QUICKSTART,
    finished,
    gloo,
    metrics,
    on_ranks,
    stopped_at,
    without_last_checkpoint,
)
from itop_prune_tools.training import command as train
from safetensors.torch import load_file

SETTINGS = (
    "epochs=3",
    "checkpoint={every: 1, keep: 3}",
    "regrow={every: 7, grow: gradient, survival: true}",
)
NAMES = ["layers.0.weight", "layers.1.weight", "head.weight"]


def run(folder: Path, *arguments: str) -> int:
    return train.main([QUICKSTART, *SETTINGS, *arguments, "--out", str(folder)])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "whole"
    assert run(folder) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A run that was killed in its third epoch, after the last checkpoint."""
    return without_last_checkpoint(whole, tmp_path / "run")


def test_the_first_line_says_what_the_run_is_made_of(whole: Path) -> None:
    first = lines_of(whole)[0]
    assert (first["epoch"], first["step"], first["image"]) == (0, 0, [1, 8, 8])
    assert (first["names"], first["masked"], first["weights"]) == (
        NAMES,
        [True] * 3,
        [19200, 30000, 1000],
    )
    assert sum(first["active"]) == round(0.05 * 50200)
    assert {"python", "torch", "timm", "itop_prune", "device", "processes"} <= first[
        "made_with"
    ].keys()


def test_there_is_a_line_for_every_update(whole: Path) -> None:
    assert [line["step"] for line in lines_of(whole)[1:]] == list(range(7, 3 * 38 + 1, 7))
    assert [line["epoch"] for line in lines_of(whole)[1:]] == [
        -(-step // 38) for step in range(7, 115, 7)
    ]


def test_the_lines_agree_with_the_metrics_and_the_masks_that_were_saved(whole: Path) -> None:
    first, *updates = lines_of(whole)
    for epoch in metrics(whole)[:-1]:
        last = [line for line in updates if line["step"] <= epoch["step"]][-1]
        assert sum(last["explored"]) / sum(first["weights"]) == epoch["exploration_rate"]
    saved = load_file(whole / "model.safetensors")
    assert updates[-1]["active"] == [int(saved[f"{name}_mask"].sum()) for name in NAMES]


def test_what_entered_is_new_to_the_mask_and_bounded_by_the_rate(whole: Path) -> None:
    first, *updates = lines_of(whole)
    for line in updates:
        bounds = [math.ceil(line["rate"] * active) for active in first["active"]]
        assert all(entered <= bound for entered, bound in zip(line["entered"], bounds, strict=True))
    assert all(entered > 0 for entered in updates[0]["entered"])
    explored = [(line["explored"][0], line["entered"][0]) for line in updates]
    assert all(
        now - before <= entered for (before, _), (now, entered) in itertools.pairwise(explored)
    )


def test_survival_is_there_from_the_second_update_on(whole: Path) -> None:
    first, *later = [line.get("survival") for line in lines_of(whole)[1:]]
    assert first is None
    shares = [share for survival in later for share in survival if share is not None]
    assert shares
    assert all(0.0 <= share <= 1.0 for share in shares)


@pytest.mark.parametrize("stop_at", [3, 7, 38, 39, 113])
def test_a_run_stopped_at_any_step_and_resumed_writes_the_same_bytes(
    whole: Path, tmp_path: Path, stop_at: int
) -> None:
    with stopped_at(stop_at):
        assert run(tmp_path / "run") == 130
    assert run(tmp_path / "run", "--resume") == 0
    assert (tmp_path / "run" / "layers.jsonl").read_bytes() == (whole / "layers.jsonl").read_bytes()


def test_lines_past_the_checkpoint_are_cut(whole: Path, copy: Path) -> None:
    assert run(copy, "--resume") == 0
    assert (copy / "layers.jsonl").read_bytes() == (whole / "layers.jsonl").read_bytes()


@pytest.mark.parametrize("half", ['{"epoch": 3, "st', ""], ids=["half a line", "nothing"])
def test_a_last_line_that_was_cut_off_is_written_again(whole: Path, copy: Path, half: str) -> None:
    lines = (copy / "layers.jsonl").read_text().splitlines(keepends=True)
    (copy / "layers.jsonl").write_text("".join(lines[:-1]) + half)
    assert run(copy, "--resume") == 0
    assert (copy / "layers.jsonl").read_bytes() == (whole / "layers.jsonl").read_bytes()


def test_a_damaged_line_that_must_stay_is_one_error_and_without_the_file_the_run_goes_on(
    whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "layers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "?\n", *lines[3:]]))
    assert run(copy, "--resume") == 1
    assert capsys.readouterr().err.startswith(
        f"error: {path} is damaged in line 3, and the run goes on after step 76; "
    )
    path.unlink()
    assert run(copy, "--resume") == 0
    first, *updates = lines_of(copy)
    assert updates == [line for line in lines_of(whole)[1:] if line["step"] > 76]
    before = [line for line in lines_of(whole)[1:] if line["step"] <= 76]
    found = {"epoch": 2, "step": 76, "updates_before": len(before)}
    assert first == {
        **lines_of(whole)[0],
        **found,
        **{key: before[-1][key] for key in ("active", "explored")},
    }


def test_a_file_begun_anew_is_checked_by_the_updates_that_it_lacks(
    whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged line that must stay is an error; one past the checkpoint is written again."""
    path = copy / "layers.jsonl"
    path.unlink()
    with stopped_at(30):
        assert run(copy, "--resume") == 130
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], "?\n"]))
    capsys.readouterr()
    assert run(copy, "--resume") == 1
    assert f"error: {path} is damaged in line {len(lines)}, " in capsys.readouterr().err
    path.write_text(text + '{"epoch": 3, "st')
    assert run(copy, "--resume") == 0
    assert lines_of(copy)[-1] == lines_of(whole)[-1]


def test_without_an_update_before_a_file_begun_anew_is_the_same(
    whole: Path, tmp_path: Path
) -> None:
    with stopped_at(3):
        assert run(tmp_path / "run") == 130
    (tmp_path / "run" / "layers.jsonl").unlink()
    assert run(tmp_path / "run", "--resume") == 0
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_a_full_disk_is_one_error_and_the_run_can_go_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count(1)

    def fsync(handle: int) -> None:
        if next(calls) == 2:  # the first is of metrics.jsonl
            raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "itop_prune_tools.run_folder.json_lines.os", types.SimpleNamespace(fsync=fsync)
        )
        assert run(folder) == 1
    assert f"{folder / 'layers.jsonl'} could not be written: " in capsys.readouterr().err
    assert run(folder, "--resume") == 0
    assert (folder / "layers.jsonl").read_bytes() == (whole / "layers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "masked"),
    [
        (("regrow=null",), [True] * 3),
        (("masks=null", "regrow=null"), [False] * 3),
        (("masks.exclude=[head]", "regrow=null"), [True, True, False]),
    ],
    ids=["static", "dense", "head without a mask"],
)
def test_where_no_mask_moves_there_is_the_first_line_alone(
    tmp_path: Path, overrides: tuple[str, ...], masked: list[bool]
) -> None:
    assert run(tmp_path / "run", "epochs=1", *overrides) == 0
    (first,) = lines_of(tmp_path / "run")
    assert first["masked"] == masked
    for active, weights, is_masked in zip(first["active"], first["weights"], masked, strict=True):
        assert (active == weights) == (not is_masked)


@pytest.mark.slow
@gloo
def test_on_two_ranks_the_first_alone_writes_lines_and_report(whole: Path, tmp_path: Path) -> None:
    output = finished(on_ranks(*SETTINGS, "data.batch_size=16", "--out", str(tmp_path / "run")))
    assert output.count("report: ") == 1
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [
        line["step"] for line in lines_of(whole)
    ]
    assert lines_of(tmp_path / "run")[0]["made_with"]["processes"] == 2
