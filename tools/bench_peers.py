#!/usr/bin/env python
"""Measure other libraries' sparse training beside ours; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmarks.peers"))
