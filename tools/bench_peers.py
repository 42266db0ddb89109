#!/usr/bin/env python
"""Measure other libraries' sparse training beside ours; --help explains."""

import sys

from itop_prune_tools.benchmarks.peers import main

if __name__ == "__main__":
    sys.exit(main())
