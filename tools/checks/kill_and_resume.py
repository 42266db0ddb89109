"""Kill a run at random moments, resume it each time, and compare its end with an undisturbed run.

  python tools/kill_and_resume.py --kills 50
  python tools/kill_and_resume.py --kills 10 --ranks 2

All ranks get SIGKILL at a random moment, also in the middle of a write. After each kill every
checkpoint must be whole. At the end weights and metrics must be the same, bit for bit.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file

from ..run_folder.metrics import Metrics
from ..training.checkpoint import Checkpoints, damage
from ..training.display import counted

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SETTINGS = (
    "epochs=8",
    "checkpoint={every: 1, keep: 2}",
    "regrow={every: 7, grow: gradient}",
    "ema={decay: 0.9}",
)
TIMES = ("seconds", "images_per_second")


class Lost(Exception):
    """A kill has lost or changed something; the message says what."""


def main(argv: list[str] | None = None) -> int:
    """Kill, resume and compare; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, metavar="N", help="how often to kill (default: 50)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes per run (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)"
    )
    options = parser.parse_args(argv)
    for name in ("kills", "ranks"):
        number = getattr(options, name)
        if number < 1:
            parser.error(f"--{name} is {number}; allowed is from 1")

    console = Console()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = kill_runs(Path(folder), options.kills, options.ranks, moments, console)
        except Lost as lost:
            console.print(f"lost: {lost}", markup=False)
            return 1
    done = f"{counted(options.kills, 'kill')} in {counted(runs, 'run')}"
    console.print(f"{done}: each ended with the weights and metrics of the run left alone")
    return 0


def kill_runs(
    folder: Path, kills: int, ranks: int, moments: random.Random, console: Console
) -> int:
    """Kill and resume runs until there were enough kills; return the number of runs.

    Raises:
        Lost: A checkpoint was damaged, a run did not continue, or it ended differently.
    """
    alone = folder / "alone"
    began = time.perf_counter()
    if train(alone, ranks, resume=False, limit=None) != 0:
        raise Lost("the run that was left alone did not end")
    duration = time.perf_counter() - began

    runs = done = 0
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=kills)
        while done < kills:
            runs += 1
            run = folder / f"killed{runs}"
            status = None
            while status is None:  # killed
                limit = moments.uniform(0.0, duration) if done < kills else None
                resume = (run / "recipe.yaml").exists()
                status = train(run, ranks, resume, limit)
                if status is None:
                    done += 1
                    progress.update(task, completed=done)
                    check_checkpoints(run, done)

            if status != 0:
                raise Lost(f"{run.name} did not go on after kill {done}: exit status {status}")
            check_same_end(alone, run)
    return runs


def train(folder: Path, ranks: int, resume: bool, limit: float | None) -> int | None:
    """Train in processes of their own; return the exit status, or None if the limit killed them."""
    arguments = [str(RECIPE), *SETTINGS, "--out", str(folder)]
    if resume:
        arguments.append("--resume")
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=train_silently, args=(arguments, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()

    deadline = math.inf if limit is None else time.monotonic() + limit
    while running := [process for process in processes if process.is_alive()]:
        left = deadline - time.monotonic()
        failed = any(process.exitcode for process in processes)
        if left <= 0 or failed:  # after a failure of one rank the others would wait for it
            for process in running:
                process.kill()
            for process in running:
                process.join()
            return None if left <= 0 else 1
        sentinels = [process.sentinel for process in running]
        multiprocessing.connection.wait(sentinels, min(left, 60.0))
    return max(abs(process.exitcode or 0) for process in processes)


def train_silently(arguments: list[str], rank: int, ranks: int, port: int) -> None:
    """Train in this process as torchrun would start it, without output."""
    from ..training import loop as runner

    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(runner.main(arguments))


def free_port() -> int:
    """Find a port at which the ranks can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def checkpoints(run: Path) -> list[Path]:
    """List the folders of all checkpoints of a run, the best one included."""
    best = run / "checkpoints" / "best"
    found = list(Checkpoints(best.parent, 2).all())
    if best.exists():
        found.append(best)
    return found


def check_checkpoints(run: Path, kill: int) -> None:
    """Refuse checkpoints that a kill has damaged."""
    found = [damage(checkpoint) for checkpoint in checkpoints(run)]
    problems = [problem for problem in found if problem]
    if problems:
        raise Lost(f"after kill {kill}: {'; '.join(problems)}")


def check_same_end(alone: Path, killed: Path) -> None:
    """Refuse weights or metrics that differ from those of the run left alone."""
    for file in ("model.safetensors", "checkpoints/best/model.safetensors"):
        expected, found = load_file(alone / file), load_file(killed / file)
        differing = [name for name in expected if not expected[name].equal(found[name])]
        if differing:
            raise Lost(f"{killed.name} ended with other weights in {file}: {', '.join(differing)}")

    found_metrics = metrics_of(killed)
    if found_metrics != metrics_of(alone):
        raise Lost(f"{killed.name} wrote other metrics: {json.dumps(found_metrics)}")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, without times."""
    lines = Metrics(run).read()
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]
