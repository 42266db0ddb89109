"""Kills, signals, ranks that die, damage: a good checkpoint is left, and a resumed run is the one nobody stopped."""

import itertools
import os
import pickle
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import (
    PATIENCE,
    QUICKSTART,
    ROOT,
    SETTINGS,
    assert_same_end,
    changed_runner,
    finished,
    gloo,
    metrics,
    of_photos,
    on_ranks,
    photos,
    start,
    wait_for,
    whole_checkpoints,
)
from itop_prune_tools.checks import kill_and_resume as survive
from itop_prune_tools.run_folder import folder as runs
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import loop as train
from itop_prune_tools.training.checkpoint import Checkpoints, damage

# --- ranks ---------------------------------------------------------------------------------------

TWO = ("epochs=4", "data.batch_size=8", "accelerator={gradient_accumulation_steps: 2}")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nobody stopped."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    finished(on_ranks(*TWO, "--out", str(folder)))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped by SIGTERM in the middle."""
    folder = tmp_path_factory.mktemp("two") / "stopped"
    process = on_ranks(*TWO, "--out", str(folder))
    wait_for(folder / "metrics.jsonl", process, lines=1)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "the same command with --resume goes on from" in output
    return folder


@gloo
def test_two_ranks_stopped_by_sigterm_and_resumed_are_the_two_that_never_stopped(
    two: Path, stopped: Path
) -> None:
    assert whole_checkpoints(stopped)
    again = stopped.with_name("again")
    shutil.copytree(stopped, again)
    finished(on_ranks(*TWO, "--out", str(again), "--resume"))
    assert_same_end(two, again)


@gloo
def test_one_rank_goes_on_where_two_stopped_with_as_many_images_a_step(
    two: Path, stopped: Path
) -> None:
    again = stopped.with_name("on one rank")
    shutil.copytree(stopped, again)
    arguments = [
        QUICKSTART,
        *SETTINGS,
        "epochs=4",
        "data.batch_size=32",
        "--out",
        str(again),
        "--resume",
    ]
    assert train.main(arguments) == 0
    for ours, theirs in zip(metrics(again), metrics(two), strict=True):
        assert ours["step"] == theirs["step"]
        if "train_loss" in ours:
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@gloo
def test_another_number_of_images_a_step_is_refused_with_both(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped.with_name("fewer images")
    shutil.copytree(stopped, again)
    assert train.main([QUICKSTART, *SETTINGS, *TWO, "--out", str(again), "--resume"]) == 1
    assert "trained on 32 images a step, this would on 16" in capsys.readouterr().err


@gloo
def test_a_rank_that_dies_ends_the_run_and_leaves_its_checkpoints_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = on_ranks("epochs=400", "data.batch_size=16", "--out", str(folder))
    wait_for(folder / "metrics.jsonl", process, lines=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("processes are not listed under /proc here")
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert whole_checkpoints(folder)


@gloo
def test_two_launchers_as_on_two_machines_train_as_two_ranks_of_one(
    two: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank in range(2):
        launcher = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        machines.append(on_ranks(*TWO, "--out", str(tmp_path / "run"), launcher=launcher))
    for machine in machines:
        finished(machine)
    assert_same_end(two, tmp_path / "run")


@gloo
def test_two_ranks_with_mixup_augmentation_and_workers_stopped_in_an_epoch_go_on_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    settings = (
        *of_photos(photos(tmp_path / "photos")),
        "mixup={mixup_alpha: 0.3}",
        "accelerator={gradient_accumulation_steps: 2}",
        "regrow={every: 2, grow: gradient}",
        "epochs=3",
    )
    finished(on_ranks(*settings, "--out", str(tmp_path / "whole")))
    stop = "import itertools\nasked = itertools.count(1)\ntrain.StopRequest.wanted = lambda self: next(asked) == 5"
    runner = changed_runner(tmp_path / "stopping.py", stop)
    process = on_ranks(*settings, "--out", str(tmp_path / "stopped"), runner=runner)
    assert (
        "stopped at step 5; the same command with --resume"
        in process.communicate(timeout=PATIENCE)[0]
    )
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [3]
    finished(on_ranks(*settings, "--out", str(tmp_path / "stopped"), "--resume"))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


# --- evaluations ---------------------------------------------------------------------------------

SLOW = """
import pathlib, time
from data import Data
plain = Data.evaluation
def evaluation(self, source, **ranks):
    pathlib.Path({marker!r}).touch()
    for batch in plain(self, source, **ranks):
        time.sleep(0.1)
        yield batch
Data.evaluation = evaluation
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=gloo)])
def test_sigterm_in_an_evaluation_stops_it_and_the_resumed_run_does_it_again(
    tmp_path: Path, ranks: int
) -> None:
    """An odd number of images: the first rank has a batch more than the second."""
    settings = ("epochs=2", "data.batch_size=16", "data.validation=101", "data.eval_batch_size=1")

    def run(out: str, *more: str, runner: str = "tools/train.py") -> subprocess.Popen[str]:
        arguments = [*settings, "--out", str(tmp_path / out), *more]
        return (
            start([runner, QUICKSTART, *SETTINGS, *arguments])
            if ranks == 1
            else on_ranks(*arguments, runner=runner)
        )

    finished(run("whole"))
    marker = tmp_path / "evaluating"
    process = run(
        "stopped", runner=changed_runner(tmp_path / "slow.py", SLOW.format(marker=str(marker)))
    )
    wait_for(marker, process)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert "the same command with --resume goes on from" in output
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
    finished(run("stopped", "--resume"))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("asked", "lines"), [(39, 0), (78, 1), (79, 2)], ids=["first", "second", "test set"]
)
@pytest.mark.parametrize(
    "schedule", [(), ("lr_schedule={sched: cosine, step_on_epochs: false}",)], ids=["", "cosine"]
)
def test_a_run_stopped_in_any_evaluation_and_resumed_is_the_one_that_never_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    lines: int,
    schedule: tuple[str, ...],
) -> None:
    """Of 38 steps and one batch of validation, each asks once."""

    def run(out: str, *more: str) -> int:
        return train.main(
            [QUICKSTART, *SETTINGS, *schedule, "epochs=2", "--out", str(tmp_path / out), *more]
        )

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        count = itertools.count(1)
        patch.setattr(runs.StopRequest, "wanted", lambda self: next(count) == asked)
        assert run("stopped") == 130
    assert (
        len(metrics(tmp_path / "stopped")) == lines
        if lines
        else not (tmp_path / "stopped/metrics.jsonl").exists()
    )
    assert run("stopped", "--resume") == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    speeds = [line["images_per_second"] for line in Metrics(tmp_path / "stopped").read()[:-1]]
    assert all(0 < speed < 1e7 for speed in speeds)


def test_a_line_written_after_a_stop_in_its_evaluation_and_before_a_kill_is_not_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    count = itertools.count(1)
    monkeypatch.setattr(runs.StopRequest, "wanted", lambda self: next(count) == 39)
    arguments = [QUICKSTART, *SETTINGS, "epochs=2", "--out", str(folder)]
    assert train.main(arguments) == 130
    Metrics(folder).append({"epoch": 1, "step": 38})
    assert train.main([*arguments, "--resume"]) == 0
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 2]


@pytest.mark.parametrize("stop_at", [3, 21])
def test_a_step_wise_learning_rate_in_the_metrics_does_not_tell_of_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    settings = [
        QUICKSTART,
        *SETTINGS,
        "epochs=1",
        "lr_schedule={sched: cosine, step_on_epochs: false}",
        "--out",
    ]
    assert train.main([*settings, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        count = itertools.count(1)
        patch.setattr(runs.StopRequest, "wanted", lambda self: next(count) == stop_at)
        assert train.main([*settings, str(tmp_path / "stopped")]) == 130
    assert train.main([*settings, str(tmp_path / "stopped"), "--resume"]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


# --- one process ---------------------------------------------------------------------------------


def test_sigterm_leaves_a_checkpoint_of_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(["tools/train.py", QUICKSTART, *SETTINGS, "epochs=400", "--out", str(folder)])
    wait_for(folder / "metrics.jsonl", process, lines=1)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    last = whole_checkpoints(folder)[-1]
    assert (
        f"stopped at step {int(last.name.removeprefix('step-'))}; the same command with --resume"
        in output
    )


def test_a_run_that_is_killed_again_and_again_ends_as_the_one_left_alone() -> None:
    output = finished(start(["tools/kill_and_resume.py", "--kills", "5"]))
    assert "5 kills in" in output
    assert "each ended with the weights and metrics of the run left alone" in output


@gloo
def test_two_ranks_that_are_killed_again_and_again_end_as_those_left_alone() -> None:
    output = finished(start(["tools/kill_and_resume.py", "--kills", "3", "--ranks", "2"]))
    assert "3 kills in" in output
    assert "each ended with the weights and metrics of the run left alone" in output


@pytest.mark.parametrize("what", ["--kills", "--ranks"])
@pytest.mark.parametrize("number", ["0", "-3"])
def test_no_kills_and_no_ranks_are_an_error(
    capsys: pytest.CaptureFixture[str], what: str, number: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        survive.main([what, number])
    assert f"{what} is {number}; allowed is from 1" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["best", "step-000000038"])
def test_any_damaged_checkpoint_after_a_kill_is_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    assert run(tmp_path, "epochs=1") == 0
    part = tmp_path / "checkpoints" / checkpoint / "state.pt"
    assert [damage(folder) for folder in survive.checkpoints(tmp_path)] == ["", ""]
    flip(part)
    assert f"{part} is damaged" in [damage(folder) for folder in survive.checkpoints(tmp_path)]


# --- damage --------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> int:
    return train.main([QUICKSTART, *SETTINGS, "epochs=3", *arguments, "--out", str(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    assert run(folder) == 0
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    shutil.copy(ROOT / "tools" / "digits.npz", path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": flip,
    "foreign": foreign,
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize(
    "part", ["model.safetensors", "ema.safetensors", "state.pt", "checksums.json"]
)
@pytest.mark.parametrize("how", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_user_is_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    *_, before, last = Checkpoints(folder / "checkpoints", 3).all()
    DAMAGE[how](last / part)
    assert run(folder, "--resume") == 0
    told = capsys.readouterr().out
    assert str(last) in told
    assert f"going on from {before}, the one before" in told
    assert_same_end(whole, folder)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_run_without_a_whole_checkpoint_is_one_clear_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for checkpoint in Checkpoints(folder / "checkpoints", 3).all():
        DAMAGE[how](checkpoint / "state.pt")
    assert run(folder, "--resume") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: no checkpoint is whole: ")
    assert "start a new run with --out FOLDER" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "names", ["{}", '{"state.pt": "0"}', '{"../../x": "0"}', "[1]", '"text"', "null"]
)
def test_checksums_that_are_not_ours_are_damage(whole: Path, tmp_path: Path, names: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(Checkpoints(whole / "checkpoints", 3).all()[-1], folder)
    assert damage(folder) == ""
    (folder / "checksums.json").write_text(names)
    assert damage(folder).startswith(str(folder / "checksums.json"))


class Hostile:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
@pytest.mark.parametrize("how", ["--evaluate={}", "init={}"])
def test_a_pickle_that_would_run_code_does_not_wherever_one_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    write: Callable[[Any, Path], object],
) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    write({"weight": Hostile(trace)}, path)  # torch reads protocol 2
    assert run(tmp_path / "run", how.format(path)) == 1
    assert not trace.exists()
    assert capsys.readouterr().err.startswith("error: ")
