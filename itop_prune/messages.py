"""Words that several error messages share."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest the known name most similar to `name`, as " (nearest: 'x')", or return "".

    >>> nearest("ekr", ["ERK", "uniform"])
    " (nearest: 'ERK')"
    """
    by_lower_case = {other.lower(): other for other in known}
    match = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.5)
    return f" (nearest: {by_lower_case[match[0]]!r})" if match else ""


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
