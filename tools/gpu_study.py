#!/usr/bin/env python
"""Run what only a GPU can show; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("checks.gpu_study"))
