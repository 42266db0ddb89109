#!/usr/bin/env python
"""Compare R_s with what random growth should reach; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("reports.expected_exploration"))
