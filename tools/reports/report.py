"""Draw the report of runs: one self-contained page and its pictures, in each run folder.

  itop-prune report runs/quickstart/seed0       # writes report.html and pictures/*.png there
  itop-prune report runs/fashion_mnist_*        # for every seed<k>/ in these

The runner does the same at the end of a run. This command draws any run folder, also of a run that
was stopped or is still training. It needs recipe.yaml and metrics.jsonl, and uses layers.jsonl and
the weights if they are there. The page opens from disk, without network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from itop_prune.files.writing import replacing

from ..run_folder import history
from ..run_folder.folder import RunError, in_a_line


def parse_runs(argv: Sequence[str] | None, description: str | None) -> list[Path]:
    """Read a command line of folders, and list the runs in them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, or one that holds seed<k>/ runs",
    )
    return history.folders(parser.parse_args(argv).runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of each run and print its path; return 1 if one could not be written."""
    status = 0
    for run in parse_runs(argv, __doc__):
        try:
            print(write(run))
        except (RunError, ImportError, OSError) as error:
            print(f"error: {in_a_line(error)}", file=sys.stderr)
            status = 1
    return status


def attempt(folder: Path) -> str:
    """Write the report of a run that has just ended; return a line that says what happened."""
    try:
        return f"report: {write(folder)}"
    except Exception as error:  # no error in drawing may end a run that is trained and saved
        again = f"the run itself is whole, and itop-prune report {folder} tries again"
        return f"no report: {type(error).__name__}: {in_a_line(error)}; {again}"


def write(folder: Path) -> Path:
    """Draw the pictures of a run and write them and the page into its folder; return its path.

    Raises:
        RunError: The folder holds no run that can be drawn; the message says why.
        ImportError: There is no matplotlib.
        OSError: The report can't be written.
    """
    found = history.read_history(folder)
    from .figures import draw  # needs matplotlib, without which runs train as well
    from .page import page

    pictures = draw(found)
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    for old in place.glob("*.png"):
        old.unlink()
    for picture in pictures:
        if isinstance(picture.content, bytes):
            (place / f"{picture.name}.png").write_bytes(picture.content)

    path = folder / "report.html"
    with replacing(path) as unfinished:
        unfinished.write_text(page(found, pictures), encoding="utf-8")
    return path
