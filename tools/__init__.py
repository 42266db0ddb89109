"""The parts that the commands in this folder are made of, as one package: `itop_prune_tools`."""

import importlib
import sys


def run_command(module: str) -> int | None:
    """Import a module of this package and call its `main`; return the exit status.

    Ctrl-C ends it with a line instead of a traceback, also during the import, which takes seconds.
    """
    try:
        return importlib.import_module(f"{__name__}.{module}").main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
