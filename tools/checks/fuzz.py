"""Look for broken promises with random cases: recipes, files, trainings, kernels and processes.

  python tools/fuzz.py                              # all cases of all kinds; takes hours
  python tools/fuzz.py --cases 200 --minutes 10     # fewer of each kind, and a limit of time
  python tools/fuzz.py --only kernels --first 10000 # other cases of one kind
  python tools/fuzz.py --only files --seed 17       # one case, with its traceback

A case is decided by its seed alone. Each failure is one line with the command that repeats it. A
crash or a hang is a failure too: cases run in a process of their own. POSIX systems only.
"""

import argparse
import re
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import fuzz_files, fuzz_kernels, fuzz_processes, fuzz_recipes, fuzz_trainings
from .fuzz_runner import Case, run_cases

CAP_SYS_ADMIN = 21
"""The bit of Linux's capability to mount."""


class Kind(NamedTuple):
    """A kind of cases."""

    case: Case
    cases: int
    """How many a complete check tries."""


KINDS = {
    "kernels": Kind(fuzz_kernels.case, 10_000),
    "files": Kind(fuzz_files.case, 10_000),
    "recipes": Kind(fuzz_recipes.case, 10_000),
    "trainings": Kind(fuzz_trainings.case, 10_000),
    "disks": Kind(fuzz_processes.full_disks, 30),
    "races": Kind(fuzz_processes.races, 100),
    "kills": Kind(fuzz_processes.kills, 300),
}


class Count(NamedTuple):
    """What was tried of a kind."""

    cases: int
    failures: int
    seconds: float


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, metavar="N", help="run this case alone; needs --only")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="seed of the first case")
    parser.add_argument("--cases", type=int, metavar="N", help="cases of each kind")
    parser.add_argument("--minutes", type=float, metavar="M", help="limit of time for all kinds")
    options = parser.parse_args(argv)

    if options.seed is not None and not options.only:
        parser.error("--seed needs the kind of its case: add --only KIND")
    for name in ("cases", "minutes"):
        number = getattr(options, name)
        if number is not None and number <= 0:
            parser.error(f"--{name} is {number}; allowed is above 0")
    return options


def main(argv: list[str] | None = None) -> int:
    """Try random cases; return 1 if any failed."""
    options = parse(argv)
    if options.seed is not None:
        KINDS[options.only].case(options.seed)
        print(f"{options.only} {options.seed}: every promise holds")
        return 0

    console = Console()
    kinds = {options.only: KINDS[options.only]} if options.only else dict(KINDS)
    if "disks" in kinds and not may_mount():
        console.print("disks are left out: this process may not mount a small one")
        del kinds["disks"]

    counts: dict[str, Count] = {}
    end = time.monotonic() + 60 * (options.minutes or 1e9)
    for number, (name, kind) in enumerate(kinds.items()):
        # Kinds share the time that is left.
        now = time.monotonic()
        deadline = now + max(0.0, end - now) / (len(kinds) - number)
        counts[name] = try_cases(name, kind, options, deadline, console)
    console.print(table(counts))
    return int(any(count.failures for count in counts.values()))


def may_mount() -> bool:
    """Tell whether this process may mount a disk: on Linux, with the capability to do so."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(found and int(found[1], 16) >> CAP_SYS_ADMIN & 1)


def try_cases(
    name: str, kind: Kind, options: argparse.Namespace, deadline: float, console: Console
) -> Count:
    """Try the cases of a kind, and print a line for each that fails."""
    total, began, failures, done = options.cases or kind.cases, time.monotonic(), 0, 0
    columns = (TextColumn(f"{name:9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        seeds = range(options.first, options.first + total)
        for outcome in run_cases(kind.case, seeds, deadline):
            done += 1
            progress.advance(task)
            if outcome.problem:
                failures += 1
                command = f"python tools/fuzz.py --only {name} --seed {outcome.seed}"
                console.print(f"failed: {command}: {outcome.problem}", markup=False, soft_wrap=True)
    return Count(done, failures, time.monotonic() - began)


def table(counts: dict[str, Count]) -> Table:
    """Make the table of what was tried."""
    result = Table("kind")
    for head in Count._fields:
        result.add_column(head, justify="right")
    for name, count in counts.items():
        result.add_row(name, f"{count.cases:,}", f"{count.failures:,}", f"{count.seconds:.0f}")
    return result
