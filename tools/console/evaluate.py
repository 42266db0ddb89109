"""Print loss and accuracy of saved weights on the test set of their recipe.

itop-prune evaluate runs/quickstart/seed0
itop-prune evaluate runs/quickstart                            # every seed<k>/ in it
itop-prune evaluate runs/resnet50/seed0 data.root=/data/imagenet
itop-prune evaluate weights.pt --recipe resnet50
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..run_folder.folder import RunError
from ..run_folder.history import folders
from ..training import command
from ..training.export import find_run, recipe_path


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate each run; return 0, or the exit status of the first that fails."""
    args = parse(argv)
    if not args.source.exists():
        print(
            f"error: {args.source} does not exist; give a run folder, one of its checkpoints, or a "
            "file of weights",
            file=sys.stderr,
        )
        return 1

    found = folders([args.source])
    for source in found:
        args.source = source
        try:
            recipe = recipe_path(args, find_run(source))
        except (RunError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

        if len(found) > 1:
            print(source)
        status = command.main([str(recipe), *args.overrides, "--evaluate", str(source)])
        if status:
            return status
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="a run folder, one of its checkpoints, or a file of weights"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="RECIPE",
        help="a YAML file or a packaged recipe, if the source is not in a run folder",
    )
    return parser.parse_intermixed_args(argv)
