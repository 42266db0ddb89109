#!/usr/bin/env python
"""Train as the code of the paper's authors does; --help explains."""

import sys

from itop_prune_tools.checks.authors_procedure import main

if __name__ == "__main__":
    sys.exit(main())
