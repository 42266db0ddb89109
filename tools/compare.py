#!/usr/bin/env python
"""Put finished runs side by side; --help explains."""

import sys

from itop_prune_tools.reports.comparison import main

if __name__ == "__main__":
    sys.exit(main())
