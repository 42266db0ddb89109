#!/usr/bin/env python
"""Train as the code of the paper's authors does; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("checks.authors_procedure"))
