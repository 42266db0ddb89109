#!/usr/bin/env python
"""Export a model from a run to a file; --help explains."""

import sys

from itop_prune_tools.training.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
