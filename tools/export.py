#!/usr/bin/env python
"""Take a model out of a run into a file; --help explains."""

import sys

from itop_prune_tools.training.export import main

if __name__ == "__main__":
    sys.exit(main())
