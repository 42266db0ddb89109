#!/usr/bin/env python
"""Check that architectures train sparsely, exactly; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("checks.check_architectures"))
