"""Runs of the recipe runner, here and in processes of their own, and the files they leave."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from itop_prune_tools.training.checkpoint import Checkpoints, damage
from itop_prune_tools.training.stop import StopRequest
from PIL import Image
from safetensors.torch import load_file
from torch import distributed

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SETTINGS = (
    "checkpoint={every: 1, keep: 3}",
    "regrow={every: 7, grow: gradient}",
    "ema={decay: 0.9}",
)
PATIENCE = 600.0  # a busy disk may take minutes to flush a checkpoint

gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


@contextmanager
def stopped_at(question: int) -> Iterator[None]:
    """Stop runs of this process when they ask for the n-th time; they ask after every step and
    before every batch of an evaluation."""
    asked = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "wanted", lambda self: next(asked) == question)
        yield


def without_last_checkpoint(whole: Path, folder: Path) -> Path:
    """Copy a run as if it had been killed before its last checkpoint; return the copy."""
    shutil.copytree(whole, folder)
    shutil.rmtree(Checkpoints(folder / "checkpoints", 3).all()[-1])
    return folder


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(ROOT),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=ROOT, text=True, **pipes
    )


def on_ranks(
    *arguments: str,
    launcher: Sequence[str] = ("--standalone", "--nproc_per_node", "2"),
    runner: str = "tools/train.py",
) -> subprocess.Popen[str]:
    """Start the runner under torchrun; SIGTERM to the process is SIGTERM to all ranks."""
    return start(
        ["-m", "torch.distributed.run", *launcher, runner, QUICKSTART, *SETTINGS, *arguments]
    )


def changed_runner(path: Path, change: str) -> str:
    """Write a script that runs changed code first; it may use `train`, `loop` and `rank`."""
    lines = [
        "import os, sys, itop_prune",
        "from itop_prune_tools.training import command as train, loop",
        "rank = int(os.environ.get('RANK', 0))",
        change,
        "sys.exit(train.main())",
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def photos(folder: Path, count: int = 48) -> Path:
    """Write a folder of random images of two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
            place / f"{number}.png"
        )
    return folder


def of_photos(folder: Path, batch_size: int = 4) -> tuple[str, ...]:
    """Overrides: a small net with batch statistics on such a folder, read by two workers."""
    sizes = f"batch_size: {batch_size}, image_size: 8, workers: 2"
    return (
        f"data={{name: folder, train: ., test: ., {sizes}}}",
        f"data.root={folder}",
        "model={model_name: test_resnet, num_classes: 2}",
        "augment={scale: [0.5, 1.0], hflip: 0.5}",
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a run to end, and return what it printed; one that hangs ends with its stacks."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for rank in ranks.read_text().split() if ranks.exists() else ():
            os.kill(int(rank), signal.SIGABRT)  # faulthandler prints where each thread is
        process.terminate()
        pytest.fail(f"still running after {PATIENCE} s:\n{process.communicate()[0]}")


def finished(process: subprocess.Popen[str]) -> str:
    output = output_of(process)
    assert process.returncode == 0, output
    return output


def wait_for(path: Path, process: subprocess.Popen[str], lines: int = 0) -> None:
    """Wait until a run has written a file, of so many lines."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")}
        for line in lines
    ]


def assert_same_end(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert (one / "layers.jsonl").read_text() == (other / "layers.jsonl").read_text()
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def whole_checkpoints(folder: Path) -> list[Path]:
    found = Checkpoints(folder / "checkpoints", 3).all()
    assert [damage(checkpoint) for checkpoint in found if damage(checkpoint)] == []
    return found
