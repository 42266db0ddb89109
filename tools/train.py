#!/usr/bin/env python
"""Train a recipe; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("training.command"))
