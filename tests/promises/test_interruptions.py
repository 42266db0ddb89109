"""Kills, signals, ranks that die, damage: a resumed run is the one that nobody stopped."""

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
    output_of,
    photos,
    start,
    wait_for,
    whole_checkpoints,
)
from itop_prune_tools.checks import kill_and_resume
from itop_prune_tools.run_folder.lock import locked
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import command as train
from itop_prune_tools.training import export
from itop_prune_tools.training.checkpoint import Checkpoints, damage
from itop_prune_tools.training.stop import StopRequest
from safetensors.torch import load_file


def run(folder: Path, *arguments: str) -> int:
    return train.main([QUICKSTART, *SETTINGS, *arguments, "--out", str(folder)])


def stopping_at(patch: pytest.MonkeyPatch, asked: int) -> None:
    """Ask the run to stop where it looks for the so-manieth time."""
    count = itertools.count(1)
    patch.setattr(StopRequest, "wanted", lambda self: next(count) == asked)


# --- two ranks -----------------------------------------------------------------------------------

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
    output = output_of(process)
    assert process.returncode != 0
    assert "the same command with --resume goes on from" in output
    return folder


@pytest.mark.slow
@gloo
def test_two_ranks_stopped_by_sigterm_and_resumed_are_the_two_that_never_stopped(
    two: Path, stopped: Path
) -> None:
    assert whole_checkpoints(stopped)
    again = stopped.with_name("again")
    shutil.copytree(stopped, again)
    finished(on_ranks(*TWO, "--out", str(again), "--resume"))
    assert_same_end(two, again)


@pytest.mark.slow
@gloo
def test_one_rank_goes_on_where_two_stopped_with_as_many_images_a_step_and_no_others(
    two: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped.with_name("on one rank")
    shutil.copytree(stopped, again)
    assert run(again, *TWO, "--resume") == 1
    assert "trained on 32 images a step, this run would train on 16" in capsys.readouterr().err
    assert run(again, "epochs=4", "data.batch_size=32", "--resume") == 0
    for ours, theirs in zip(metrics(again), metrics(two), strict=True):
        assert ours["step"] == theirs["step"]
        if "train_loss" in ours:
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@gloo
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_leaves_its_checkpoints_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = on_ranks("epochs=400", "data.batch_size=16", "--out", str(folder))
    wait_for(folder / "metrics.jsonl", process, lines=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("processes are not listed under /proc here")
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    output = output_of(process)
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert whole_checkpoints(folder)


@gloo
@pytest.mark.slow
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
@pytest.mark.slow
def test_two_ranks_with_mixup_augmentation_and_workers_stopped_in_an_epoch_go_on(
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
    change = (
        "import itertools\n"
        "asked = itertools.count(1)\n"
        "loop.StopRequest.wanted = lambda self: next(asked) == 5"
    )
    runner = changed_runner(tmp_path / "stopping.py", change)
    process = on_ranks(*settings, "--out", str(tmp_path / "stopped"), runner=runner)
    output = output_of(process)
    assert "stopped at step 5; the same command with --resume" in output
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [3]
    finished(on_ranks(*settings, "--out", str(tmp_path / "stopped"), "--resume"))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


# --- evaluations ---------------------------------------------------------------------------------

SLOW = """
import pathlib, time
from itop_prune_tools.data.datasets import Data
plain = Data.evaluation
def evaluation(self, source, **ranks):
    pathlib.Path({marker!r}).touch()
    for batch in plain(self, source, **ranks):
        time.sleep(0.1)
        yield batch
Data.evaluation = evaluation
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=gloo)])
def test_sigterm_in_an_evaluation_stops_it_and_the_resumed_run_does_it_again(
    tmp_path: Path, ranks: int
) -> None:
    """An odd number of images: the first rank has a batch more than the second."""
    settings = ("epochs=2", "data.batch_size=16", "data.validation=101", "data.eval_batch_size=1")

    def begin(out: str, *more: str, runner: str = "tools/train.py") -> subprocess.Popen[str]:
        arguments = [*settings, "--out", str(tmp_path / out), *more]
        if ranks == 1:
            return start([runner, QUICKSTART, *SETTINGS, *arguments])
        return on_ranks(*arguments, runner=runner)

    finished(begin("whole"))
    marker = tmp_path / "evaluating"
    runner = changed_runner(tmp_path / "slow.py", SLOW.format(marker=str(marker)))
    process = begin("stopped", runner=runner)
    wait_for(marker, process)
    process.terminate()
    output = output_of(process)
    assert "the same command with --resume goes on from" in output
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
    finished(begin("stopped", "--resume"))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


COSINE = "lr_schedule={sched: cosine, step_on_epochs: false}"
SPARSE = (
    "masks.storage=sparse",
    "regrow={every: 7, grow: gradient, redistribute: magnitude}",
)
"""Parameters get longer where a layer gets more weights than it has slots."""


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ((), {21: 0, 39: 0, 78: 1, 79: 2}),
        ((COSINE,), {3: 0, 78: 1}),
        pytest.param(SPARSE, {21: 0, 78: 1}, marks=pytest.mark.slow),
    ],
    ids=["", "cosine", "sparse storage"],
)
def test_a_run_stopped_at_any_place_and_resumed_is_the_one_that_never_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    stops: dict[int, int],
) -> None:
    """In a step of an epoch, and in each evaluation: of 38 steps and one batch each asks once."""
    whole = tmp_path / "whole"
    assert run(whole, *settings, "epochs=2") == 0
    for asked, lines in stops.items():
        stopped = tmp_path / str(asked)
        with monkeypatch.context() as patch:
            stopping_at(patch, asked)
            assert run(stopped, *settings, "epochs=2") == 130
        written = (stopped / "metrics.jsonl").exists() and metrics(stopped)
        assert len(written or []) == lines
        assert run(stopped, *settings, "epochs=2", "--resume") == 0
        assert_same_end(whole, stopped)
        speeds = [line["images_per_second"] for line in Metrics(stopped).read()[:-1]]
        assert all(0 < speed < 1e7 for speed in speeds)


def test_a_line_written_after_a_stop_in_its_evaluation_and_before_a_kill_is_not_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stopping_at(monkeypatch, 39)
    assert run(folder, "epochs=2") == 130
    Metrics(folder).append({"epoch": 1, "step": 38})
    assert run(folder, "epochs=2", "--resume") == 0
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 2]


# --- one process ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(["tools/train.py", QUICKSTART, *SETTINGS, "epochs=400", "--out", str(folder)])
    wait_for(folder / "metrics.jsonl", process, lines=1)
    process.terminate()
    output = output_of(process)
    assert process.returncode == 130
    step = int(whole_checkpoints(folder)[-1].name.removeprefix("step-"))
    assert f"stopped at step {step}; the same command with --resume" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "ranks"), [(5, ()), pytest.param(3, ("--ranks", "2"), marks=gloo)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_left_alone(
    kills: int, ranks: tuple[str, ...]
) -> None:
    output = finished(start(["tools/kill_and_resume.py", "--kills", str(kills), *ranks]))
    assert f"{kills} kills in" in output
    assert "each ended with the weights and metrics of the run left alone" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "ranks"),
    [(SPARSE, ()), pytest.param(SPARSE[:1], ("--ranks", "2"), marks=gloo)],
)
def test_a_killed_run_in_sparse_storage_ends_as_the_one_left_alone(
    settings: tuple[str, ...],
    ranks: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kill_and_resume, "SETTINGS", (*kill_and_resume.SETTINGS, *settings))
    assert kill_and_resume.main(["--kills", "1", *ranks]) == 0
    assert "each ended with the weights and metrics" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["--kills", "--ranks"])
def test_no_kills_and_no_ranks_are_an_error(capsys: pytest.CaptureFixture[str], what: str) -> None:
    for number in ("0", "-3"):
        with pytest.raises(SystemExit, match="2"):
            kill_and_resume.main([what, number])
        assert f"{what} is {number}; allowed is from 1" in capsys.readouterr().err


# --- two processes on one folder -----------------------------------------------------------------


def in_use(folder: Path) -> str:
    return (
        f"error: {folder} is in use by another run, and only one may write into it; wait until "
        "that one ends, or write elsewhere with --out FOLDER\n"
    )


@pytest.mark.slow
def test_a_second_process_on_a_run_is_one_clear_error_and_the_first_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    process = start(["tools/train.py", QUICKSTART, *SETTINGS, "epochs=400", "--out", str(folder)])
    wait_for(folder / "metrics.jsonl", process, lines=1)

    stopping_at(monkeypatch, 1)  # the second run, should it begin
    assert run(folder, "epochs=400", "--resume") == 1
    assert capsys.readouterr().err == in_use(folder)
    assert run(folder, "epochs=400") == 1
    assert f"error: {folder} exists; continue that run with --resume" in capsys.readouterr().err

    process.terminate()
    output_of(process)
    assert process.returncode == 130
    assert run(folder, "epochs=400", "--resume") == 130
    epochs = [line["epoch"] for line in metrics(folder)]
    assert epochs == list(range(1, 1 + len(epochs)))


def test_a_run_in_use_can_be_evaluated_but_not_resumed(
    whole: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(copied):
        assert run(copied, "epochs=3", "--resume") == 1
        assert capsys.readouterr().err == in_use(copied)
        assert run(copied, "epochs=3", f"--evaluate={copied}") == 0
    assert_same_end(whole, copied)


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    assert run(folder, "epochs=3") == 0
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": flip,
    "foreign": lambda path: shutil.copy(ROOT / "tools" / "data" / "digits.npz", path),
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}
PARTS = ("model.safetensors", "ema.safetensors", "state.pt", "checksums.json")


def checkpoints(folder: Path) -> list[Path]:
    return Checkpoints(folder / "checkpoints", 3).all()


@pytest.mark.parametrize("how", DAMAGE)
def test_every_damage_of_every_part_is_found(copied: Path, tmp_path: Path, how: str) -> None:
    last = checkpoints(copied)[-1]
    assert damage(last) == ""
    for part in PARTS:
        spoiled = shutil.copytree(last, tmp_path / part)
        DAMAGE[how](spoiled / part)
        assert damage(spoiled).startswith(str(spoiled))


@pytest.mark.parametrize(
    ("part", "how"),
    [("state.pt", "a bit flipped"), ("model.safetensors", "truncated"), (PARTS[3], "missing")],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_user_is_told(
    whole: Path, copied: Path, capsys: pytest.CaptureFixture[str], part: str, how: str
) -> None:
    *_, before, last = checkpoints(copied)
    DAMAGE[how](last / part)
    assert run(copied, "epochs=3", "--resume") == 0
    told = capsys.readouterr().out
    assert str(last) in told
    assert f"going on from {before}, the one before" in told
    assert_same_end(whole, copied)


def test_a_run_without_a_whole_checkpoint_is_one_clear_error(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint, spoil in zip(checkpoints(copied), itertools.cycle(DAMAGE.values())):
        spoil(checkpoint / "state.pt")
    assert run(copied, "epochs=3", "--resume") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: no checkpoint is whole: ")
    assert "start a new run with --out FOLDER" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("name", ["best", "step-000000114"])
def test_any_damaged_checkpoint_after_a_kill_is_a_loss(copied: Path, name: str) -> None:
    folders = kill_and_resume.checkpoints(copied)
    assert {damage(folder) for folder in folders} == {""}
    part = copied / "checkpoints" / name / "state.pt"
    flip(part)
    found = [damage(folder) for folder in folders]
    assert [told for told in found if told] == [f"{part} is damaged"]


def test_checksums_that_are_not_ours_are_damage(copied: Path) -> None:
    path = checkpoints(copied)[-1] / "checksums.json"
    for text in ("{}", '{"state.pt": "0"}', '{"../../x": "0"}', "[1]", '"text"', "null"):
        path.write_text(text)
        assert damage(path.parent).startswith(str(path))


def test_a_flipped_bit_of_weights_is_found_wherever_they_are_read(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--to", "dense", "--shape", "1,8,8")
    best = copied / "checkpoints" / "best"
    files = {
        copied: copied / "model.safetensors",
        copied / "model.safetensors": copied / "model.safetensors",
        best: best / "ema.safetensors",  # of a recipe with an average it is the one to read
        best / "model.safetensors": best / "model.safetensors",
    }
    for given in files:
        assert run(tmp_path / "run", f"--evaluate={given}") == 0

    for file in {*files.values()}:
        flip(file)

    capsys.readouterr()
    for number, (given, file) in enumerate(files.items()):
        assert run(tmp_path / "run", f"--evaluate={given}") == 1
        assert f"{file} is damaged; allowed are files that match" in capsys.readouterr().err
        assert export.main([str(given), str(tmp_path / f"{number}.pth"), *out]) == 1
        assert f"{file} is damaged; allowed are files that match" in capsys.readouterr().err
        assert not (tmp_path / f"{number}.pth").exists()

    # A run that goes on from its last checkpoint writes its final weights anew.
    assert run(copied, "epochs=3", "--resume") == 0
    assert run(tmp_path / "run", f"--evaluate={copied}") == 0


@pytest.mark.parametrize("key", ["init", "model.checkpoint_path"])
def test_a_flipped_bit_of_the_weights_that_a_run_begins_with_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    dense = ("epochs=1", "masks=null", "regrow=null")
    assert run(tmp_path / "dense", *dense) == 0
    weights, copy = tmp_path / "dense" / "model.safetensors", tmp_path / "weights.pt"
    torch.save(load_file(weights), copy)
    for path, found in ((weights, "is damaged; allowed are"), (copy, "is damaged: Bad CRC-32")):
        assert run(tmp_path / "run", *dense, f"{key}={path}", "--dry-run") == 0
        flip(path)
        assert run(tmp_path / "run", *dense, f"{key}={path}", "--dry-run") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: the model can't be built: {path} {found}")


class Hostile:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def plain_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))  # torch reads protocol 2


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
@pytest.mark.parametrize("how", ["--evaluate={}", "init={}"])
def test_a_pickle_that_would_run_code_does_not_wherever_one_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    write: Callable[[Any, Path], object],
) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    write({"weight": Hostile(trace)}, path)
    assert run(tmp_path / "run", "epochs=3", how.format(path)) == 1
    assert not trace.exists()
    assert capsys.readouterr().err.startswith("error: ")
