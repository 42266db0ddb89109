#!/usr/bin/env python
"""Kill runs, resume them and compare their ends; --help explains."""

import sys

from itop_prune_tools.checks.kill_and_resume import main

if __name__ == "__main__":
    sys.exit(main())
