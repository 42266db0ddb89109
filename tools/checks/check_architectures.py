"""Check every architecture: everything maskable is masked, and it trains exactly like a dense twin.

  python tools/check_architectures.py --all              # count every model of timm, torchvision
  python tools/check_architectures.py --real             # train the smallest of every module
  python tools/check_architectures.py --names 'vit_*'    # count these; with --real, train them

Counting builds a model on the meta device. Training takes two steps beside a dense twin. The
command writes a table, and beside it a file with the models done so far. After a stop the same
command continues there.
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
from itop_prune.layers.sparse_handle import STORAGES, Storage

from . import architectures, exactness

HEADER = ("model", "masked tensors", "share of weights", "check", "result", "reason", "seconds")
COUNTED = """# Can every architecture be masked?

{summary}

Each model is built on the meta device and masked at 90 % sparsity by ERK. \
Every weight matrix must have a mask, and the number of active weights must be exact. \
The parameters must stay the same objects in the same order, \
and `itop_prune.remove` must restore their names.

{command}

{versions}

The share of weights is that of all parameters which have a mask.
"""
TRAINED = """# Does every architecture train exactly like a dense twin?

{summary}

Each model takes two optimizer steps with an update between them, \
at 50 % sparsity in every layer{storage}. \
At each step a dense twin holds the same effective weights. \
Outputs, gradients and the weights after `itop_prune.remove` are compared; \
`exact` means bit for bit.

{command}

{versions}

The share of weights is that of all parameters which have a mask. \
A large model is made four blocks deep where it has a `depth`. \
The check refuses models that take more than a batch of images.
"""
RESULTS = {
    "masked": "masked in full",
    "exact": "bit for bit as the twin",
    "equal": "equal to float rounding",
    "refused": "refused",
    "failed": "failed",
}
"""The first word of a result, and how the summary words it."""


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


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="check every model")
    which.add_argument(
        "--names", metavar="GLOB", help="check the models whose names match, such as 'vit_*'"
    )
    parser.add_argument(
        "--real", action="store_true", help="train for two steps with an update between them"
    )
    parser.add_argument(
        "--storage",
        choices=tuple(STORAGES),
        default="mask",
        help="with --real, how the masked weights are stored",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the table there, in place of runs/architectures-*.md",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check the models and write their table; return 1 if a model failed."""
    arguments = parser()
    options = arguments.parse_args(argv)
    if not (options.all or options.names or options.real):
        arguments.error("give --all, --names GLOB or --real")

    console = Console()
    table = options.out or default_table(options)
    table.parent.mkdir(parents=True, exist_ok=True)
    progress_file = table.with_suffix(".jsonl")
    setup = {
        "real": options.real,
        "all": options.all,
        "names": options.names,
        "storage": options.storage,
        "versions": versions(),
    }
    try:
        lines, names = resume(progress_file, setup)
    except ValueError as error:
        arguments.error(str(error))

    if lines:
        console.print(f"continuing after {len(lines)} models that {progress_file} holds")
    if not names:
        with console.status("looking for the models"):
            names = choose(options.all, options.names)
        if not names:
            arguments.error(
                f"no model matches {options.names!r}; the names are those of timm.list_models()"
            )
        progress_file.write_text(json.dumps({"setup": setup, "names": names}) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as progress:
        task = progress.add_task("", total=len(names), completed=len(lines))
        for name in names[len(lines) :]:
            progress.update(task, description=name)
            try:
                line = check(name, options.real, options.storage)
            except KeyboardInterrupt:
                done = len(lines)
                progress.print(f"stopped after {done} models; the same command continues")
                return 130

            lines.append(line)
            with progress_file.open("a") as file:
                file.write(json.dumps(asdict(line)) + "\n")
            if line.result == "failed":
                progress.print(f"{name}: {line.reason}", markup=False)
            progress.advance(task)

    table.write_text(markdown(lines, options, versions()))
    progress_file.unlink()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"{summary_line(lines)} {table} has the table. Memory: at most {memory:.1f} GiB.",
        markup=False,
    )
    return int(any(line.result == "failed" for line in lines))


def default_table(options: argparse.Namespace) -> Path:
    """Name the table after the models and the check."""
    which = "all" if options.all else options.names or "smallest"
    safe = "".join(letter if letter.isalnum() else "_" for letter in which)
    how = "counted"
    if options.real:
        how = "trained" if options.storage == "mask" else "trained-sparse"
    return Path(f"runs/architectures-{safe}-{how}.md")


def choose(everything: bool, glob: str | None) -> list[str]:
    """Choose the models: all, those that match, or the smallest of every module."""
    if everything:
        return architectures.names()
    if glob:
        return fnmatch.filter(architectures.names(), glob)
    return list(architectures.smallest().values())


def check(name: str, real: bool, storage: Storage = "mask") -> Line:
    """Check one model; an error in it becomes its result."""
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models warn about deprecations
            if real:
                found = exactness.train_beside_twin(name, storage)
            else:
                found = exactness.count_masks(name)
    except Exception as error:  # the other models are still checked
        found = exactness.Finding(wrong=[f"{type(error).__name__}: {error}"])
    gc.collect()

    if found.wrong:
        result = "failed"
    elif found.refused:
        result = "refused"
    elif not real:
        result = "masked"
    else:
        result = f"equal to {found.difference:.0e}" if found.difference else "exact"
    return Line(
        name,
        found.masked,
        found.covered,
        check=(f"trained, {found.size} px" if found.size else "trained") if real else "counted",
        result=result,
        reason="; ".join(found.wrong) or found.refused,
        seconds=time.perf_counter() - begin,
    )


def resume(path: Path, setup: dict[str, object]) -> tuple[list[Line], list[str]]:
    """Read the lines of a stopped check with the same arguments and versions, and all its names.

    Raises:
        ValueError: The file is of another check.
    """
    if not path.exists():
        return [], []

    first, *rest = path.read_text().splitlines() or [""]
    head = json.loads(first) if first.endswith("}") else {}
    if head.get("setup") != setup:
        raise ValueError(
            f"{path} is of a check with other arguments or versions; remove it, or give --out FILE"
        )

    whole = [line for line in rest if line.endswith("}")]  # a stop may have cut the last one short
    lines = [Line(**json.loads(line)) for line in whole]
    path.write_text("\n".join([first, *(json.dumps(asdict(line)) for line in lines)]) + "\n")
    return lines, head["names"]


def versions() -> str:
    """List the versions that a table belongs to."""
    found = []
    for package in (timm, torch, torchvision, itop_prune):
        found.append(f"{package.__name__} {package.__version__.partition('+')[0]}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def summary_line(lines: list[Line]) -> str:
    """Count the results of a table in one line."""
    counts = Counter(line.result.partition(" ")[0] for line in lines)
    parts = [f"{counts[key]:,} {words}" for key, words in RESULTS.items() if counts[key]]
    return f"{len(lines):,} models: {', '.join(parts)}."


def markdown(lines: list[Line], options: argparse.Namespace, versions: str) -> str:
    """Write the page of a check: the question, the answer, the command, the table."""
    minutes = sum(line.seconds for line in lines) / 60
    head = (TRAINED if options.real else COUNTED).format(
        summary=summary_line(lines),
        storage=", in sparse storage" if options.storage == "sparse" else "",
        command=f"```bash\n{command_line(options)}\n```",
        versions=f"Versions: {versions}. {minutes:.0f} minutes in all.",
    )

    rows = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for line in lines:
        reason = line.reason.replace("|", "/").replace("\n", " ")
        covered, seconds = f"{line.covered:.4f}", f"{line.seconds:.1f}"
        cells = (line.name, line.masked, covered, line.check, line.result, reason, seconds)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([head, *rows]) + "\n"


def command_line(options: argparse.Namespace) -> str:
    """Write the command that these options are from."""
    command = "python tools/check_architectures.py"
    if options.all:
        command += " --all"
    if options.names:
        command += f" --names '{options.names}'"
    if options.real:
        command += " --real"
    if options.storage != "mask":
        command += f" --storage {options.storage}"
    if options.all or options.names:
        return f"{command}        # seed 0"
    return f"{command}        # the smallest model of every model module, seed 0"
