#!/usr/bin/env python
"""Check that architectures train sparsely, exactly; --help explains."""

import sys

from itop_prune_tools.checks.check_architectures import main

if __name__ == "__main__":
    sys.exit(main())
