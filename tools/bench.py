#!/usr/bin/env python
"""Measure speed and memory as ratios; --help explains."""

import sys

from itop_prune_tools.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
