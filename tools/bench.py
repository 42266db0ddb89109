#!/usr/bin/env python
"""Measure speed and memory as ratios; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmarks.command"))
