"""The command `itop-prune` as `python -m itop_prune_tools`, which launchers start on many ranks."""

import sys

from itop_prune_tools.console.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
