"""Trackers get the numbers of metrics.jsonl, over a resume too; a missing one is an early error."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from helpers.processes import QUICKSTART, finished, gloo, on_ranks, stopped_at
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.run_folder.folder import RunError
from itop_prune_tools.training import command as train
from itop_prune_tools.training import trackers
from itop_prune_tools.training.trackers import Trackers, tracker_names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TENSORBOARD = "accelerator={log_with: tensorboard}"
WANDB = "accelerator={log_with: wandb}"


def run(folder: Path, *arguments: str) -> int:
    return train.main(
        [QUICKSTART, "epochs=3", "checkpoint={every: 1}", *arguments, "--out", str(folder)]
    )


def recipe(log_with: Any) -> Recipe:
    return Recipe(model={}, data={}, optimizer={}, epochs=1, accelerator={"log_with": log_with})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard shows of a run: by name, step and value."""
    events = EventAccumulator(str(folder / trackers.PROJECT)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {
        key for line in lines for key, value in line.items() if key != "step" and value is not None
    }
    return {
        key: [
            (line["step"], pytest.approx(line[key], rel=1e-6))
            for line in lines
            if line.get(key) is not None
        ]
        for key in keys
    }


@pytest.mark.parametrize("dense", [False, True])
def test_tensorboard_holds_the_numbers_of_the_metrics(tmp_path, dense):
    assert (
        run(tmp_path / "run", TENSORBOARD, *(("masks=null", "regrow=null") if dense else ())) == 0
    )
    found = curves(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert len(found["train_loss"]) == 3
    assert len(found["test_top1"]) == 1
    assert ("rate" in found) == (not dense)
    assert not (tmp_path / "run" / "wandb_id").exists()


@pytest.mark.parametrize("stop_at", [20, 60])
def test_a_resumed_run_has_each_number_once(tmp_path, stop_at):
    with stopped_at(stop_at):
        assert run(tmp_path / "run", TENSORBOARD) == 130
    assert run(tmp_path / "run", TENSORBOARD, "--resume") == 0
    assert curves(tmp_path / "run") == expected(tmp_path / "run")


def test_what_lies_past_the_checkpoint_is_dropped_on_resume(tmp_path, monkeypatch):
    """Killed in the third epoch, with a checkpoint of the first alone."""
    folder, whole = tmp_path / "run", Trackers.log

    def killed(self: Trackers, line: dict[str, Any]) -> None:
        whole(self, line)
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trackers, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, TENSORBOARD)
    assert len(curves(folder)["train_loss"]) == 2
    assert run(folder, TENSORBOARD, "--resume") == 0
    assert len(curves(folder)["train_loss"]) == 3
    assert curves(folder) == expected(folder)


class Wandb:
    """What Accelerate calls of wandb, which takes no step that lies before one that it has."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.runs: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.settings: list[dict[str, Any]] = []
        self.config = types.SimpleNamespace(update=lambda values, **_: self.settings.append(values))

    def init(self, **arguments: Any) -> Any:
        self.begun.append(arguments)
        name = arguments.get("id") or f"drawn {len(self.begun)}"
        assert name not in self.runs or arguments.get("resume") == "allow"
        held = self.runs.setdefault(name, {})

        def log(values: dict[str, float], step: int) -> None:
            if step >= max((last for curve in held.values() for last, _ in curve), default=0):
                for key, value in values.items():
                    held.setdefault(key, []).append((step, value))

        return types.SimpleNamespace(log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for module in ("itop_prune_tools.training.trackers", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType.WANDB])
    return fake


@pytest.mark.parametrize("stop_at", [20, 60])
def test_of_wandb_a_resumed_run_is_the_same_run(tmp_path, wandb, stop_at):
    folder = tmp_path / "moved" / "run"
    with stopped_at(stop_at):
        assert run(tmp_path / "run", WANDB) == 130
    folder.parent.mkdir()
    (tmp_path / "run").rename(folder)
    assert run(folder, WANDB, "--resume") == 0
    (held,) = wandb.runs.values()
    assert held == expected(folder)
    assert [each["dir"] for each in wandb.begun] == [str(tmp_path / "run"), str(folder)]
    assert [each["project"] for each in wandb.begun] == [trackers.PROJECT] * 2
    assert len(wandb.settings) == 1


def test_of_wandb_a_new_run_in_a_folder_of_before_is_another(tmp_path, wandb):
    for _ in range(2):
        assert run(tmp_path / "run", "epochs=1", WANDB) == 0
        shutil.rmtree(tmp_path / "run")
    assert run(tmp_path / "other", "epochs=1", "accelerator={log_with: all}") == 0
    assert len(wandb.runs) == 3


def test_a_run_may_get_its_tracker_on_resume(tmp_path):
    with stopped_at(60):
        assert run(tmp_path / "run") == 130
    assert run(tmp_path / "run", TENSORBOARD, "--resume") == 0
    found = curves(tmp_path / "run")
    assert [step for step, _ in found["train_loss"]] == [76, 114]


def test_a_run_without_trackers_writes_nothing_of_them(tmp_path):
    assert run(tmp_path / "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"recipe.yaml", "metrics.jsonl"}
    assert not (tmp_path / "run" / trackers.PROJECT).exists()


@pytest.mark.slow
@gloo
def test_of_two_ranks_one_tracks(tmp_path):
    finished(
        on_ranks(
            "epochs=1",
            "accelerator={cpu: true, log_with: tensorboard}",
            "--out",
            str(tmp_path / "run"),
        )
    )
    assert curves(tmp_path / "run") == expected(tmp_path / "run")


# Bad input


@pytest.mark.parametrize("log_with", ["tensorboard", "[tensorboard, wandb]", "all"])
def test_a_tracker_that_is_not_installed_is_one_line_before_training(
    tmp_path, capsys, monkeypatch, log_with
):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    assert run(tmp_path / "run", f"accelerator={{log_with: {log_with}}}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: accelerator.log_with is '")
    assert line.endswith("which is not installed, no tracker is; install it, or leave out log_with")
    assert not (tmp_path / "run").exists()


def test_of_several_trackers_the_missing_one_is_named(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(
        RunError, match="log_with is 'wandb', which is not installed, installed are tensorboard; "
    ):
        tracker_names(recipe(["tensorboard", "wandb"]))
    assert tracker_names(recipe("all")) == ["all"]


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path, capsys):
    assert run(tmp_path / "run", "accelerator={log_with: tensorbord}", "--dry-run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "log_with is 'tensorbord'; known are " in line
    assert line.endswith("(nearest: 'tensorboard')")


@pytest.mark.parametrize("when", ["init_trackers", "log"])
def test_a_tracker_that_fails_ends_the_run_with_one_line(tmp_path, capsys, monkeypatch, when):
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody there")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, when, fail)
        assert run(tmp_path / "run", TENSORBOARD) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: accelerator.log_with: tensorboard ")
    assert "nobody there" in line
    assert run(tmp_path / "run", "--resume") == 0


def test_a_dry_run_opens_no_tracker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, TENSORBOARD, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
