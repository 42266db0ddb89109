#!/usr/bin/env python
"""Train what a recipe says; --help explains."""

import sys

from itop_prune_tools.training.loop import main

if __name__ == "__main__":
    sys.exit(main())
