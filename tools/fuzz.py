#!/usr/bin/env python
"""Look for broken promises with random cases; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("checks.fuzz"))
