#!/usr/bin/env python
"""Put finished runs side by side: mean and spread over their seeds, as a Markdown table.

python tools/compare.py runs/fashion_mnist_*
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from runs import Metrics, RunError

HEADER = ("run", "seeds", "test top-1", "each seed", "R_s", "sparsity", "steps")


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation, the latter from two values on.

    >>> spread([1.0, 2.0, 3.0], 1)
    '2.0 ± 1.0'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(folder: Path) -> tuple[str, ...]:
    """Return one line of the table: a folder of seed<k> runs.

    Raises:
        RunError: No run in the folder is finished.
    """
    finished = [
        lines for seed in sorted(folder.glob("seed*")) if "test_top1" in (lines := Metrics(seed).read() or [{}])[-1]
    ]
    if not finished:
        raise RunError(f"{folder} holds no finished run; give folders of seed<k>/, such as runs/quickstart")
    top1 = [lines[-1]["test_top1"] for lines in finished]
    explored = [lines[-2]["exploration_rate"] for lines in finished]
    sparsities = sorted({f"{line['sparsity']:.4f}" for lines in finished for line in lines[:-1]})
    each = " ".join(f"{value:.2f}" for value in top1)
    steps = f"{finished[0][-1]['step']:,}"
    return (
        folder.name,
        str(len(top1)),
        spread(top1, 2),
        each,
        f"{statistics.mean(explored):.3f}",
        " ".join(sparsities),
        steps,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, without folders that hold no finished run; return 1 where none does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold seed<k>/ runs of one recipe each")
    rows = []
    for folder in parser.parse_args(argv).runs:
        try:
            rows.append(row(folder))
        except RunError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not rows:
        return 1
    for line in (HEADER, ("---",) * len(HEADER), *rows):
        print(f"| {' | '.join(line)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
