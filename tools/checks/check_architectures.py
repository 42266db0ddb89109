"""Check every architecture: all is masked that should be, and it trains exactly as a dense twin does.

  python tools/sweep.py --all              every model of timm and torchvision, counted on the meta
  device python tools/sweep.py --real             the smallest model of every model module, trained
  beside a dense twin python tools/sweep.py --names 'vit_*'    counted; with --real, trained

Writes a table, and beside it a file of what is done so far: the same command goes on where it was
stopped.
"""

import argparse
import fnmatch
import gc
import json
import platform
import resource
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import itop_prune

from . import architectures
from . import exactness as twins


@dataclass(frozen=True)
class Line:
    """A model in the table."""

    name: str
    masked: int
    covered: float
    check: str
    result: str
    reason: str
    seconds: float


HEADER = ("model", "masked tensors", "share of weights", "check", "result", "reason", "seconds")


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every model")
    which.add_argument(
        "--names", metavar="GLOB", help="the models whose names match, such as 'vit_*'"
    )
    parser.add_argument(
        "--real", action="store_true", help="train for two steps with an update between them"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table, in place of runs/sweep-*.md"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; return 1 if a model failed."""
    parser = arguments()
    options = parser.parse_args(argv)
    if not (options.all or options.names or options.real):
        parser.error("give --all, --names GLOB or --real")
    console = Console()
    which = (
        "all"
        if options.all
        else "".join(c if c.isalnum() else "_" for c in options.names or "smallest")
    )
    table = options.out or Path(f"runs/sweep-{which}-{'trained' if options.real else 'counted'}.md")
    table.parent.mkdir(parents=True, exist_ok=True)
    progress_file = table.with_suffix(".jsonl")

    setup = {
        "real": options.real,
        "all": options.all,
        "names": options.names,
        "versions": versions(),
    }
    try:
        lines, names = resume(progress_file, setup)
    except ValueError as error:
        parser.error(str(error))
    if lines:
        console.print(f"going on after {len(lines)} models that {progress_file} holds")
    if not names:
        with console.status("looking for the models"):
            names = choose(options.all, options.names)
        if not names:
            parser.error(
                f"no model matches {options.names!r}; the names are those of timm.list_models()"
            )
        progress_file.write_text(json.dumps({"setup": setup, "names": names}) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(names), completed=len(lines))
        for name in names[len(lines) :]:
            progress.update(task, description=name)
            try:
                lines.append(look_at(name, options.real))
            except KeyboardInterrupt:
                progress.print(
                    f"stopped after {len(lines)} models; the same command goes on", markup=False
                )
                return 130
            with progress_file.open("a") as file:
                file.write(json.dumps(asdict(lines[-1])) + "\n")
            if lines[-1].result == "failed":
                progress.print(f"{name}: {lines[-1].reason}", markup=False)
            progress.advance(task)

    table.write_text(markdown(lines, options.real))
    progress_file.unlink()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"{in_words(lines)} {table} has the table. Memory: at most {memory:.1f} GiB.", markup=False
    )
    return int(any(line.result == "failed" for line in lines))


def choose(everything: bool, glob: str | None) -> list[str]:
    """Return the names to look at: all, those that match, or the smallest of every module."""
    if everything:
        return architectures.names()
    if glob:
        return fnmatch.filter(architectures.names(), glob)
    return list(architectures.smallest().values())


def look_at(name: str, real: bool) -> Line:
    """Make the check of one model, whatever happens in it."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the models, about versions to come
            found = (twins.trained if real else twins.counts)(name)
    except Exception as error:  # the sweep goes on, and the table says what happened
        found = twins.Finding(wrong=[f"{type(error).__name__}: {error}"])
    gc.collect()
    check = f"trained, {found.size} px" if found.size else "trained" if real else "counted"
    result = (
        "failed" if found.wrong else "refused" if found.refused else "exact" if real else "masked"
    )
    if real and result == "exact" and found.difference:
        result = f"equal to {found.difference:.0e}"
    reason = "; ".join(found.wrong) or found.refused
    return Line(
        name, found.masked, found.covered, check, result, reason, time.perf_counter() - start
    )


def resume(path: Path, setup: dict[str, object]) -> tuple[list[Line], list[str]]:
    """Return what a stopped sweep with the same arguments and versions has done, and all names of it.

    Raises:
        ValueError: There is something else.
    """
    if not path.exists():
        return [], []
    first, *rest = path.read_text().splitlines() or [""]
    head = json.loads(first) if first.endswith("}") else {}
    if head.get("setup") != setup:
        raise ValueError(
            f"{path} is of a sweep with other arguments or versions; remove it, or give --out FILE"
        )
    lines = [
        Line(**json.loads(line)) for line in rest if line.endswith("}")
    ]  # the last may be torn
    path.write_text("\n".join([first, *(json.dumps(asdict(line)) for line in lines)]) + "\n")
    return lines, head["names"]


def versions() -> str:
    """Return the versions that a table is of."""
    packages = (timm, torch, torchvision, itop_prune)
    return ", ".join(
        f"{package.__name__} {package.__version__.partition('+')[0]}" for package in packages
    )


def in_words(lines: list[Line]) -> str:
    """Return what a table says in one line."""
    results = Counter(line.result.partition(" ")[0] for line in lines)
    said = {
        "masked": "masked in full",
        "exact": "bit for bit as the twin",
        "equal": "equal to float rounding",
    }
    parts = [
        f"{results[key]:,} {said.get(key, key)}"
        for key in ("masked", "exact", "equal", "refused", "failed")
    ]
    return (
        f"{len(lines):,} models: {', '.join(part for part in parts if not part.startswith('0 '))}."
    )


def markdown(lines: list[Line], real: bool) -> str:
    """Return the table as a page."""
    what = "trained for two steps beside a dense twin" if real else "counted on the meta device"
    text = [
        f"# Architectures, {what}",
        "",
        in_words(lines),
        "",
        f"Versions: {versions()}, Python {platform.python_version()}. "
        f"{sum(line.seconds for line in lines) / 60:.0f} minutes in all.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        reason = line.reason.replace("|", "/").replace("\n", " ")
        cells = (
            line.name,
            line.masked,
            f"{line.covered:.4f}",
            line.check,
            line.result,
            reason,
            f"{line.seconds:.1f}",
        )
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"
