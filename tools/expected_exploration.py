#!/usr/bin/env python
"""Compare R_s with what random growth should reach; --help explains."""

import sys

from itop_prune_tools.reports.expected_exploration import main

if __name__ == "__main__":
    sys.exit(main())
