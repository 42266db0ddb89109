#!/usr/bin/env python
"""Train a recipe; --help explains."""

import sys

from itop_prune_tools.training.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
