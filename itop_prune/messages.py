"""Words that several error messages share."""

import difflib
import math
from collections.abc import Iterable, Sequence


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest the known name most similar to `name`, as " (nearest: 'x')", or return "".

    >>> nearest("ekr", ["ERK", "uniform"])
    " (nearest: 'ERK')"
    """
    by_lower_case = {other.lower(): other for other in known}
    match = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.5)
    return f" (nearest: {by_lower_case[match[0]]!r})" if match else ""


def nearest_names(pattern: str, names: Iterable[str], most: int = 5) -> list[str]:
    """List the names that contain what a pattern says, or else those most similar to it.

    >>> nearest_names("head", ["stem.weight", "head.fc.weight"])
    ['head.fc.weight']
    >>> nearest_names("blocks.0.fcl", ["blocks.0.fc1.weight", "stem.weight"])
    ['blocks.0.fc1.weight']
    """
    known, text = list(names), pattern.strip("*.").lower()
    holding = [name for name in known if text and text in name.lower()]
    if holding:
        return holding[:most]
    layers: dict[str, str] = {}
    for name in known:
        layers.setdefault(name.rpartition(".")[0].lower(), name)
    return [layers[match] for match in difflib.get_close_matches(text, layers, most, cutoff=0.6)]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Join names for a message; of many names the first.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and others'
    """
    return f"{', '.join(names[:most])}{' and others' if names[most:] else ''}"


def describe(function: object) -> str:
    """Name a function, for a `repr` or a message.

    >>> describe(describe)
    'describe'
    """
    return getattr(function, "__name__", repr(function))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align the cells of a table: the first column to the left, all others to the right.

    >>> aligned([("a", "1"), ("longer", "23")])
    ['a        1', 'longer  23']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *cells in lines:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return text


def in_digits(share: float) -> str:
    """Print a share with four decimals, or as many as tell it from 0 and 1 in two digits.

    >>> in_digits(0.12345), in_digits(0.0000123), in_digits(0.9999877), in_digits(1.0)
    ('0.1235', '0.000012', '0.999988', '1.0000')
    """
    distance = min(share, 1.0 - share)
    decimals = 4
    if 0.0 < distance < 0.001:
        decimals = 1 - math.floor(math.log10(distance))
    return f"{share:.{decimals}f}"
