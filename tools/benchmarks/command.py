"""Measure what the masks cost, as ratios: our code alternates with what it is compared with.

  python tools/bench.py                                    # everything, twenty minutes on two cores
  python tools/bench.py --quick --only update,step         # smaller models, fewer rounds
  python tools/bench.py --only sparse --picture steps.svg  # sparse training on a CPU, drawn too
  python tools/bench.py --json new.json --against old.json
  python tools/bench.py --profile                          # the costliest operations of a step
  python tools/bench.py --deploy                           # deployed models, as a Markdown table
  python tools/bench.py --device cuda                      # bf16, channels last, eager and compiled

A ratio says how many times as fast our code is, or how many times as long it takes. The target
stands beside it. Seconds depend on the machine, ratios much less. Let nothing else run meanwhile.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import deployed
from .convolutions import convolutions
from .file_sizes import files
from .measure import Measured, Row, Settings
from .memory import memory
from .never_dense import scale
from .ranks import ranks
from .runner import images, imports, run
from .sparse_training import sparse
from .steps import profile, step
from .updates import scaling, update

BENCHMARKS = {
    "update": update,
    "step": step,
    "sparse": sparse,
    "convolutions": convolutions,
    "memory": memory,
    "ranks": ranks,
    "scale": scale,
    "scaling": scaling,
    "images": images,
    "run": run,
    "import": imports,
    "files": files,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; return 1 if a target is missed."""
    args = parse(argv)
    torch.backends.cudnn.benchmark = True  # a CPU ignores it
    settings = Settings(quick=args.quick, device=torch.device(args.device))
    console = Console()
    machine = describe(settings.device)
    console.print(machine, highlight=False)

    if args.profile:
        return print_profile(settings, console)
    if args.deploy:
        return print_deployed(settings, console)

    rows: list[Row] = []
    for name in args.only:
        for measured in BENCHMARKS[name](settings):
            row = row_of(measured)
            console.print(f"  {row.name}: {row.ratio:.3g}", highlight=False)
            rows.append(row)

    before: dict[str, float] = {}
    if args.against:
        before = {row["name"]: row["ratio"] for row in json.loads(args.against.read_text())["rows"]}
    console.print(table(rows, before))
    if args.json:
        found = {"machine": machine, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture:
        from . import sparse_figure  # needs matplotlib, which the table does without

        draw = sparse_figure.draw if "sparse" in args.only else sparse_figure.draw_scale
        draw(rows, args.picture)
    return 0 if all(row.met for row in rows) else 1


def print_profile(settings: Settings, console: Console) -> int:
    """Print the costliest operations of a step."""
    for model, operations in profile(settings):
        console.print(f"{model}: share of a step, operation, shapes", highlight=False)
        console.print("\n".join(operations), highlight=False, markup=False, soft_wrap=True)
    return 0


def print_deployed(settings: Settings, console: Console) -> int:
    """Print how fast deployed models are; return 1 if a target is missed."""
    lines = []
    for line in deployed.lines(settings):
        lines.append(line)
        ratio = line.dense / line.deployed
        console.print(f"  {line.model}, {100 * line.sparsity:g} %: {ratio:.3g}", highlight=False)
    print(deployed.table(lines))
    return 0 if all(line.met for line in lines) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="use smaller models and fewer rounds, for a first look"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the ten most expensive operations of a step"
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)"
    )
    parser.add_argument(
        "--only", metavar="NAMES", help=f"some of {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument(
        "--deploy", action="store_true", help="time deployed models on the CPU, and nothing else"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to a file")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw what `sparse` or `scale` found: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="show the ratios of such a file beside the new"
    )
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    args.only = list(BENCHMARKS) if args.only is None else args.only.split(",")
    unknown = [name for name in args.only if name not in BENCHMARKS]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; known are {', '.join(BENCHMARKS)}")
    if args.picture and (not {"sparse", "scale"} & set(args.only) or args.quick):
        parser.error(
            "--picture draws the full rows of sparse, or those of scale; use --only sparse or "
            "--only scale without --quick"
        )
    if args.against and not args.against.is_file():
        parser.error(f"--against {args.against} is not there; give a file that --json wrote")
    return args


def row_of(measured: Measured) -> Row:
    """Reduce rounds to a row; the median of the rounds' ratios is free of the machine's drift."""
    ratios = measured.ours
    if measured.other:
        ratios = [one / two for one, two in zip(measured.ours, measured.other, strict=True)]
    ratio = statistics.median(ratios)

    if measured.faster:
        ratio = 1.0 / ratio
        met = ratio >= measured.target
        target = f"≥ {measured.target:g}"
    else:
        met = ratio <= measured.target
        unit = "" if measured.other else f" {measured.unit}"
        target = f"≤ {measured.target:g}{unit}"

    other = statistics.median(measured.other) if measured.other else None
    ours = statistics.median(measured.ours)
    masked = statistics.median(measured.masked) if measured.masked else None
    return Row(measured.name, ours, other, measured.unit, ratio, target, met, masked)


def table(rows: Sequence[Row], before: dict[str, float]) -> Table:
    """Build the table, with the ratios of a former run if there is one."""
    shown = Table("what", header_style="bold")
    headings = ["ours", "compared with", "ratio", "target", ""]
    with_masks = any(row.masked is not None for row in rows)
    if with_masks:
        headings.insert(2, "with masks")
    if before:
        headings.insert(0, "ratio before")
    for heading in headings:
        shown.add_column(heading, justify="right")

    for row in rows:
        cells = [
            in_unit(row.ours, row.unit),
            in_unit(row.other, row.unit),
            f"{row.ratio:.3g}",
            row.target,
            "[green]met[/]" if row.met else "[red]missed[/]",
        ]
        if with_masks:
            cells.insert(2, in_unit(row.masked, row.unit))
        if before:
            cells.insert(0, f"{before[row.name]:.3g}" if row.name in before else "")
        shown.add_row(row.name, *cells)
    return shown


def in_unit(value: float | None, unit: str) -> str:
    """Format a number with its unit; nothing for None."""
    return "" if value is None else f"{value:.4g} {unit}"


def describe(device: torch.device) -> str:
    """Describe chip, cores, torch and Numba, without the name of the machine."""
    chip = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                chip = line.partition(":")[2].strip()
                break

    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    try:
        numba = f"numba {version('numba')}"
    except PackageNotFoundError:
        numba = "no numba"
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    vectors = "with AVX-512" if wide else "without AVX-512"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{chip} {vectors}, {threads}{gpu}; torch {torch.__version__}, {numba}"
