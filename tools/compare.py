#!/usr/bin/env python
"""Put finished runs side by side; --help explains."""

import sys

from itop_prune_tools import run_command

if __name__ == "__main__":
    sys.exit(run_command("reports.comparison"))
