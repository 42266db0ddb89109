"""Kills, signals, ranks that die, damage: a good checkpoint is left, and a resumed run is the one nobody stopped."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from checkpoint import Checkpoints, damage
from safetensors.torch import load_file
from torch import distributed

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SETTINGS = ("checkpoint={every: 1, keep: 3}", "regrow={every: 7, grow: gradient}", "ema={decay: 0.9}")
PATIENCE = 180.0

gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, text=True, **pipes)


def on_ranks(
    *arguments: str, launcher: Sequence[str] = ("--standalone", "--nproc_per_node", "2")
) -> subprocess.Popen[str]:
    """The runner under torchrun; SIGTERM to what comes back is SIGTERM to all ranks."""
    return start(["-m", "torch.distributed.run", *launcher, "tools/train.py", QUICKSTART, *SETTINGS, *arguments])


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def wait_for(folder: Path, process: subprocess.Popen[str], lines: int = 1) -> None:
    """Wait until a run has written so many lines of metrics."""
    deadline, path = time.monotonic() + PATIENCE, folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines
    ]


def assert_same_end(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def whole_checkpoints(folder: Path) -> list[Path]:
    found = Checkpoints(folder / "checkpoints", 3).all()
    assert [damage(checkpoint) for checkpoint in found if damage(checkpoint)] == []
    return found


# --- ranks -----------------------------------------------------------------------------------------------------------

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
    wait_for(folder, process)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "the same command with --resume goes on from" in output
    return folder


@gloo
def test_two_ranks_stopped_by_sigterm_and_resumed_are_the_two_that_never_stopped(two: Path, stopped: Path) -> None:
    assert whole_checkpoints(stopped)
    again = stopped.with_name("again")
    shutil.copytree(stopped, again)
    finished(on_ranks(*TWO, "--out", str(again), "--resume"))
    assert_same_end(two, again)


@gloo
def test_one_rank_goes_on_where_two_stopped_with_as_many_images_a_step(two: Path, stopped: Path) -> None:
    again = stopped.with_name("on one rank")
    shutil.copytree(stopped, again)
    arguments = [QUICKSTART, *SETTINGS, "epochs=4", "data.batch_size=32", "--out", str(again), "--resume"]
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
    wait_for(folder, process, lines=2)
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
def test_two_launchers_as_on_two_machines_train_as_two_ranks_of_one(two: Path, tmp_path: Path) -> None:
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


# --- one process -----------------------------------------------------------------------------------------------------


def test_sigterm_leaves_a_checkpoint_of_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(["tools/train.py", QUICKSTART, *SETTINGS, "epochs=400", "--out", str(folder)])
    wait_for(folder, process)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    last = whole_checkpoints(folder)[-1]
    assert f"stopped at step {int(last.name.removeprefix('step-'))}; the same command with --resume" in output


def test_a_run_that_is_killed_again_and_again_ends_as_the_one_left_alone() -> None:
    output = finished(start(["tools/survive.py", "--kills", "5"]))
    assert "5 kills in" in output
    assert "each ended with the weights and metrics of the run left alone" in output


@pytest.mark.parametrize("kills", ["0", "-3"])
def test_no_kills_are_an_error(kills: str) -> None:
    process = start(["tools/survive.py", "--kills", kills])
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert f"--kills is {kills}; allowed is from 1" in output


# --- damage ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("part", ["model.safetensors", "ema.safetensors", "state.pt", "checksums.json"])
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


@pytest.mark.parametrize("names", ["{}", '{"state.pt": "0"}', '{"../../x": "0"}', "[1]", '"text"', "null"])
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


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("how", ["--evaluate={}", "init={}"])
def test_a_pickle_that_would_run_code_does_not_wherever_one_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, write: Callable[[Any, Path], object]
) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    write({"weight": Hostile(trace)}, path)  # torch reads protocol 2
    assert run(tmp_path / "run", how.format(path)) == 1
    assert not trace.exists()
    assert capsys.readouterr().err.startswith("error: ")
