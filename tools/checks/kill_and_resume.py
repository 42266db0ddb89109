"""Kill a run again and again, resume it each time, and compare what it ends with to a run that was left alone.

  python tools/survive.py --kills 50
  python tools/survive.py --kills 10 --ranks 2

Nothing is asked of the run: all its ranks get SIGKILL at a random moment, in the middle of a write
as well. After each kill every checkpoint must be whole, the best one too, and at the end weights
and metrics the same, bit for bit.
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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file

from ..run_folder.labels import counted
from ..run_folder.metrics import Metrics
from ..training.checkpoint import Checkpoints, damage

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SETTINGS = (
    "epochs=8",
    "checkpoint={every: 1, keep: 2}",
    "regrow={every: 7, grow: gradient}",
    "ema={decay: 0.9}",
)
TIMES = ("seconds", "images_per_second")


class Lost(Exception):
    """Something did not survive; the message says what."""


def main(argv: list[str] | None = None) -> int:
    """Do it; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often to kill (50)")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that train together (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args(argv)
    for name in ("kills", "ranks"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name} is {number}; allowed is from 1")
    console, moments = Console(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = survive(Path(folder), options.kills, options.ranks, moments, console)
        except Lost as lost:
            console.print(f"lost: {lost}", markup=False)
            return 1
    done = f"{counted(options.kills, 'kill')} in {counted(runs, 'run')}"
    console.print(f"{done}: each ended with the weights and metrics of the run left alone")
    return 0


def survive(folder: Path, kills: int, ranks: int, moments: random.Random, console: Console) -> int:
    """Kill runs until there were enough kills; return how many runs it took.

    Raises:
        Lost: A checkpoint was not whole, a run did not go on, or its end is another one.
    """
    began = time.perf_counter()
    if finish(folder / "alone", ranks, resume=False, limit=None) != 0:
        raise Lost("the run that was left alone did not end")
    lasts = time.perf_counter() - began
    runs = done = 0
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=kills)
        while done < kills:
            runs += 1
            run = folder / f"killed{runs}"
            status = None
            while status is None:
                limit = moments.uniform(0.0, lasts) if done < kills else None
                status = finish(run, ranks, resume=(run / "recipe.yaml").exists(), limit=limit)
                if status is None:
                    done += 1
                    progress.update(task, completed=done)
                    if problems := list(filter(None, map(damage, checkpoints(run)))):
                        raise Lost(f"after kill {done}: {'; '.join(problems)}")
            if status != 0:
                raise Lost(f"{run.name} did not go on after kill {done}: exit status {status}")
            compare(folder / "alone", run)
    return runs


def finish(folder: Path, ranks: int, resume: bool, limit: float | None) -> int | None:
    """Run or resume in processes of their own; return the exit status, or None where all were killed at the limit."""
    arguments = [str(RECIPE), *SETTINGS, "--out", str(folder), *(["--resume"] if resume else [])]
    port, context = free_port(), multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=quietly, args=(arguments, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = math.inf if limit is None else time.monotonic() + limit
    while running := [process for process in processes if process.is_alive()]:
        left = deadline - time.monotonic()
        if left <= 0 or any(
            process.exitcode for process in processes
        ):  # without one rank the others would wait
            for process in running:
                process.kill()
            for process in running:
                process.join()
            return None if left <= 0 else 1
        multiprocessing.connection.wait([process.sentinel for process in running], min(left, 60.0))
    return max(abs(process.exitcode or 0) for process in processes)


def quietly(arguments: list[str], rank: int, ranks: int, port: int) -> None:
    """In a process: train as torchrun would start it, saying nothing."""
    from ..training import command as train

    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        numbers |= {"MASTER_PORT": port}
        os.environ.update(
            {name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1"
        )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(train.main(arguments))


def free_port() -> int:
    """Return a port at which the ranks can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of all checkpoints of a run, the best one among them if there is one."""
    best = run / "checkpoints" / "best"
    return [*Checkpoints(best.parent, 2).all(), *([best] if best.exists() else [])]


def compare(alone: Path, killed: Path) -> None:
    """Refuse an end that is not that of the run that was left alone."""
    for file in ("model.safetensors", "checkpoints/best/model.safetensors"):
        expected, found = (load_file(run / file) for run in (alone, killed))
        if differing := [name for name in expected if not expected[name].equal(found[name])]:
            raise Lost(f"{killed.name} ended with other weights in {file}: {', '.join(differing)}")
    lines = [
        [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in Metrics(run).read()
        ]
        for run in (alone, killed)
    ]
    if lines[0] != lines[1]:
        raise Lost(f"{killed.name} wrote other metrics: {json.dumps(lines[1])}")
