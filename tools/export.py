#!/usr/bin/env python
"""Export a model from a run to a file; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("training.export"))
