"""Kill a run again and again, resume it each time, and compare what it ends with to a run that was left alone.

  python tools/survive.py --kills 50

Nothing is asked of the run: it gets SIGKILL at a random moment, in the middle of a write as well. After each kill
every checkpoint must be whole, and at the end weights and metrics the same, bit for bit.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from checkpoint import Checkpoints, damage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runs import Metrics
from safetensors.torch import load_file

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
SETTINGS = ("epochs=8", "checkpoint={every: 1, keep: 2}", "regrow={every: 7, grow: gradient}", "ema={decay: 0.9}")
TIMES = ("seconds", "images_per_second")


class Lost(Exception):
    """Something did not survive; the message says what."""


def main(argv: list[str] | None = None) -> int:
    """Do it; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often to kill (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; allowed is from 1")
    console, moments = Console(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = survive(Path(folder), options.kills, moments, console)
        except Lost as lost:
            console.print(f"lost: {lost}", markup=False)
            return 1
    console.print(
        f"{options.kills} kills in {runs} runs: each ended with the weights and metrics of the run left alone"
    )
    return 0


def survive(folder: Path, kills: int, moments: random.Random, console: Console) -> int:
    """Kill runs until there were enough kills; return how many runs it took.

    Raises:
        Lost: A checkpoint was not whole, a run did not go on, or its end is another one.
    """
    began = time.perf_counter()
    if finish(folder / "alone", resume=False, limit=None) != 0:
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
                status = finish(run, resume=(run / "recipe.yaml").exists(), limit=limit)
                if status is None:
                    done += 1
                    progress.update(task, completed=done)
                    if problems := list(filter(None, map(damage, Checkpoints(run / "checkpoints", 2).all()))):
                        raise Lost(f"after kill {done}: {'; '.join(problems)}")
            if status != 0:
                raise Lost(f"{run.name} did not go on after kill {done}: exit status {status}")
            compare(folder / "alone", run)
    return runs


def finish(folder: Path, resume: bool, limit: float | None) -> int | None:
    """Run or resume in a process of its own; return its exit status, or None where it was killed at the limit."""
    arguments = [str(RECIPE), *SETTINGS, "--out", str(folder), *(["--resume"] if resume else [])]
    process = multiprocessing.get_context("forkserver").Process(target=quietly, args=(arguments,))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    return None if process.exitcode is not None and process.exitcode < 0 else process.exitcode


def quietly(arguments: list[str]) -> None:
    """In the process: train, saying nothing."""
    import train

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(train.main(arguments))


def compare(alone: Path, killed: Path) -> None:
    """Refuse an end that is not that of the run that was left alone."""
    expected, found = (load_file(run / "model.safetensors") for run in (alone, killed))
    if differing := [name for name in expected if not expected[name].equal(found[name])]:
        raise Lost(f"{killed.name} ended with other weights: {', '.join(differing)}")
    lines = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in Metrics(run).read()]
        for run in (alone, killed)
    ]
    if lines[0] != lines[1]:
        raise Lost(f"{killed.name} wrote other metrics: {json.dumps(lines[1])}")


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["train"])
    sys.exit(main())
