#!/usr/bin/env python
"""Draw the report of runs; --help explains."""

import sys

from itop_prune_tools.reports.report import main

if __name__ == "__main__":
    sys.exit(main())
