"""List the packaged recipes, copy one, or explain the keys of recipes.

itop-prune recipes                         # what each recipe trains
itop-prune recipes quickstart > my.yaml    # copy one, to change it
itop-prune recipes --keys                  # the keys of every section
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..config.packaged import find_recipe, packaged_recipes, summary

if TYPE_CHECKING:
    from ..config.reference import SectionKeys

HINT = """
itop-prune train NAME                trains one
itop-prune recipes NAME > my.yaml    copies one, to change it
itop-prune recipes --keys            explains the keys of a recipe"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the command line asks for; return 0, or 1 if there is no such recipe."""
    args = parse(argv)
    console = Console(highlight=False, emoji=False, markup=False)
    if args.keys:
        from ..config.reference import reference  # needs timm and torch, which take a while

        print_keys(console, reference())
    elif args.name is None:
        print_recipes(console, packaged_recipes())
    else:
        try:
            print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        except FileNotFoundError as error:
            reason = f"{args.name}: no such file" if error.filename else error
            print(f"error: {reason}", file=sys.stderr)
            return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("name", nargs="?", type=Path, help="the recipe to print")
    what.add_argument("--keys", action="store_true", help="explain the keys of every section")
    return parser.parse_args(argv)


def print_recipes(console: Console, recipes: Mapping[str, Path]) -> None:
    """Print name and summary of each recipe: a line each, two in a narrow terminal."""
    summaries = {name: summary(path) for name, path in recipes.items()}
    width = max(map(len, summaries))
    if not console.is_terminal:
        for name, trains in summaries.items():
            print(f"{name:{width}}  {trains}")
        return

    if width + 2 + max(map(len, summaries.values())) <= console.width:
        table = Table("recipe", "trains", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name, trains in summaries.items():
            table.add_row(Text(name, "bold"), trains)
        console.print(table)
    else:
        for name, trains in summaries.items():
            console.print(Text(name, "bold"), Padding(Text(trains, "dim"), (0, 0, 0, 2)), sep="")
    console.print(HINT)


def print_keys(console: Console, sections: Sequence["SectionKeys"]) -> None:
    """Print the keys of sections: a table each, or a line for each key in a pipe."""
    for section in sections:
        name = section.name or "top level"
        title = f"{name} ({section.condition})" if section.condition else name
        about = " ".join(section.about)
        if not console.is_terminal:
            print(f"\n# {title}. {about}".rstrip())
            for line in plain_lines(section):
                print(line)
            continue

        console.print(Text(f"\n{title}", "bold magenta"))
        if about:
            console.print(Text(about, "dim"))
        columns = ("key", "value", "default", "meaning")
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for key in section.keys:
            table.add_row(Text(key.name, "bold"), key.values, key.default, key.meaning)
        if section.keys:
            console.print(table)


def plain_lines(section: "SectionKeys") -> Iterator[str]:
    """Write a line for each key, with the name that an override takes."""
    for key in section.keys:
        name = f"{section.name}.{key.name}" if section.name else key.name
        default = key.default
        if default not in ("", "needed"):
            default = f"default {default}"
        yield f"{name}: {'; '.join(filter(None, (key.values, default, key.meaning)))}"
