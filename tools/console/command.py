"""Sparse training from recipes, without a clone of the repository.

  itop-prune recipes                                  # list the packaged recipes
  itop-prune train quickstart                         # train one of them, or a file: my.yaml
  itop-prune report runs/quickstart/seed0             # draw its pictures again
  itop-prune export runs/quickstart/seed0 digits.onnx --to onnx

Several processes: accelerate launch -m itop_prune_tools train RECIPE
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    help: str
    module: str
    """The module of `itop_prune_tools` whose `main` runs it, imported only then."""
    adds: tuple[str, ...] = ()
    """Arguments put behind those of the command line."""


COMMANDS = {
    "train": Command("train a recipe into a run folder", "training.command"),
    "dry-run": Command(
        "check a recipe, and print its layers and plan", "training.command", ("--dry-run",)
    ),
    "evaluate": Command("test the weights of a run", "console.evaluate"),
    "compare": Command("put finished runs side by side", "reports.comparison"),
    "report": Command("draw the report of a run", "reports.report"),
    "export": Command("write the model of a run as a file", "training.export"),
    "recipes": Command("list and copy recipes, and explain their keys", "console.recipes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit status, 1 if a package is missing, 130 after Ctrl-C."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command = COMMANDS[parse(name)]
    sys.argv[0] = f"itop-prune {name}"  # how the parser of the subcommand names itself
    try:
        try:
            module = importlib.import_module(f"itop_prune_tools.{command.module}")
        except ModuleNotFoundError as error:
            advice = "pip install 'itop_prune[train]' installs all that itop-prune needs"
            print(f"error: {error}; {advice}", file=sys.stderr)
            return 1

        status = module.main([*arguments, *command.adds])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as in `itop-prune recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # also while packages are imported, which takes seconds
        print("interrupted", file=sys.stderr)
        return 130


def parse(word: str) -> str:
    """Read the name of the subcommand; print the help or an error and exit if there is none."""
    parser = argparse.ArgumentParser(
        prog="itop-prune",
        usage="itop-prune COMMAND ...",
        description=__doc__,
        epilog="itop-prune COMMAND --help explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("itop_prune")
    parser.add_argument("--version", action="version", version=f"itop_prune {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser.parse_args([word]).command
