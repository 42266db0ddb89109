"""Names of test cases that are equal in all processes, as pytest-xdist needs them."""

import re


def as_text(value: object) -> str:
    """Print a parameter without the addresses of functions and iterators."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
