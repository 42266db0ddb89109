#!/usr/bin/env python
"""Kill runs, resume them and compare their ends; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("checks.kill_and_resume"))
