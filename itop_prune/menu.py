"""Picking from a menu by name, with an answer that teaches when the name is unknown."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: object, known: Iterable[str]) -> str:
    """Return " (nearest: 'x')" for the known name most like `name`, or "" where none is alike."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (nearest: {match[0]!r})" if match else ""


def choose(wanted: object, menu: Mapping[str, T], what: str) -> T:
    """Return `menu[wanted]`, or `wanted` itself where it is a function.

    Raises:
        ValueError: `wanted` is neither a name on the menu nor callable.

    >>> choose("two", {"one": 1, "two": 2}, "number")
    2
    """
    if callable(wanted):
        return wanted  # type: ignore[return-value]  # a function of one's own in place of one from the menu
    if isinstance(wanted, str) and wanted in menu:
        return menu[wanted]
    raise ValueError(f"unknown {what} {wanted!r}; known are {', '.join(menu)}{nearest(wanted, menu)}")
