"""What the masks cost, as ratios within one run: rounds of ours and of what it is compared with, in turns; medians.

  python tools/bench.py                                    # all of it, about ten minutes on two
  cores python tools/bench.py --quick --only update,step         # smaller models, fewer rounds
  python tools/bench.py --json new.json --against old.json python tools/bench.py --profile
  # what a masked training step spends its time on python tools/bench.py --deploy
  # how fast deployed models are, a table in Markdown instead python tools/bench.py --device cuda
  # on a GPU: bf16, channels last, eager and compiled

A ratio is how many times as fast ours is, or how many times as long it takes; beside it stands the
target. Seconds depend on the machine, ratios much less: let nothing else run beside it.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import deployed as bench_deploy
from .file_sizes import files
from .masks import profile, scaling, step, update, waits
from .measure import Measured, Settings
from .memory import memory
from .runner import images, imports, run

BENCHMARKS = {
    "update": update,
    "step": step,
    "memory": memory,
    "scaling": scaling,
    "images": images,
    "run": run,
    "import": imports,
    "files": files,
}
ON_A_GPU = {"waits": waits}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    ours: float
    """Median, in `unit`."""
    other: float | None
    """Of what it is compared with; None where the target is of ours alone."""
    unit: str
    ratio: float
    target: str
    met: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it; return 0, or 1 if a target is missed."""
    args = parse(argv)
    torch.backends.cudnn.benchmark = True  # of no account on a CPU
    settings = Settings(quick=args.quick, device=torch.device(args.device))
    machine = describe(settings.device)
    console = Console()
    console.print(machine, highlight=False)
    if args.profile:
        for model, operations in profile(settings):
            console.print(f"{model}: share of a step, operation, shapes", highlight=False)
            console.print("\n".join(operations), highlight=False, markup=False, soft_wrap=True)
        return 0
    if args.deploy:
        return deploy(settings, console)
    rows: list[Row] = []
    for name in args.only:
        for measured in (BENCHMARKS | ON_A_GPU)[name](settings):
            rows.append(row_of(measured))
            console.print(f"  {rows[-1].name}: {rows[-1].ratio:.3g}", highlight=False)
    before = (
        {row["name"]: row["ratio"] for row in json.loads(args.against.read_text())["rows"]}
        if args.against
        else {}
    )
    console.print(table(rows, before))
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    return 0 if all(row.met for row in rows) else 1


def deploy(settings: Settings, console: Console) -> int:
    """Print how fast deployed models are; return 0, or 1 if a target is missed."""
    lines = []
    for line in bench_deploy.lines(settings):
        lines.append(line)
        console.print(
            f"  {line.model}, {100 * line.sparsity:g} %: {line.dense / line.deployed:.3g}",
            highlight=False,
        )
    print(bench_deploy.table(lines))
    return 0 if all(line.met for line in lines) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller models and fewer rounds: a look, not a result"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the ten most expensive operations of a step"
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="cpu (as it is) or cuda"
    )
    only = f"of {', '.join(BENCHMARKS)}; with --device cuda of {', '.join(ON_A_GPU)} too"
    parser.add_argument("--only", metavar="NAMES", help=f"{only}; as it is all of them")
    parser.add_argument(
        "--deploy", action="store_true", help="time deployed models on the CPU, and nothing else"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="a former one, to show its ratios beside the new",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    known = BENCHMARKS | (ON_A_GPU if args.device == "cuda" else {})
    args.only = list(known) if args.only is None else args.only.split(",")
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only has {', '.join(unknown)}; known are {', '.join(known)}")
    if args.against and not args.against.is_file():
        parser.error(f"--against {args.against} is not there")
    return args


def row_of(measured: Measured) -> Row:
    """Reduce rounds to a line; its ratio is the median of the rounds', on which a drift of the machine has no part."""
    ours = statistics.median(measured.ours)
    other = statistics.median(measured.other) if measured.other else None
    ratio = statistics.median(
        one / two for one, two in zip(measured.ours, measured.other or repeat(1.0), strict=False)
    )
    if measured.faster:
        ratio = 1.0 / ratio
        return Row(
            measured.name,
            ours,
            other,
            measured.unit,
            ratio,
            f"≥ {measured.target:g}",
            ratio >= measured.target,
        )
    target = f"≤ {measured.target:g}" + ("" if other else f" {measured.unit}")
    return Row(measured.name, ours, other, measured.unit, ratio, target, ratio <= measured.target)


def table(rows: Sequence[Row], before: dict[str, float]) -> Table:
    """Return the table, with the ratios of a former run where there is one."""
    shown = Table("what", *(("ratio before",) if before else ()), header_style="bold")
    for heading in ("ours", "compared with", "ratio", "target", ""):
        shown.add_column(heading, justify="right")
    for row in rows:
        numbers = [
            f"{row.ours:.4g} {row.unit}",
            f"{row.other:.4g} {row.unit}" if row.other else "",
            f"{row.ratio:.3g}",
        ]
        former = [f"{before[row.name]:.3g}" if row.name in before else ""] if before else []
        shown.add_row(
            row.name,
            *former,
            *numbers,
            row.target,
            "[green]met[/]" if row.met else "[red]missed[/]",
        )
    return shown


def describe(device: torch.device) -> str:
    """Name the machine, without its name."""
    chip: Any = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if "model name" in line
        ]
        chip = models[0] if models else chip
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}; torch {torch.__version__}"
