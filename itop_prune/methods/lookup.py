"""Picking from a menu by name, or taking a function instead: what it is called and what it asks for."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Asked(NamedTuple):
    """A function from a menu or of one's own, and the names of what it asks for."""

    function: Callable[..., Any]
    needs: tuple[str, ...]


def nearest(name: object, known: Iterable[str]) -> str:
    """Return " (nearest: 'x')" for the known name most like `name`, or "" where none is alike."""
    by_letters = {other.lower(): other for other in known}
    match = difflib.get_close_matches(str(name).lower(), by_letters, n=1, cutoff=0.5)
    return f" (nearest: {by_letters[match[0]]!r})" if match else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names in a line, for a message; of many the first.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and others'
    """
    return f"{', '.join(names[:most])}{' and others' if names[most:] else ''}"


def choose(wanted: object, menu: Mapping[str, T], what: str, otherwise: str = "") -> T:
    """Return `menu[wanted]`, or `wanted` itself where it is a function.

    Raises: ValueError: `wanted` is neither a name on the menu nor callable; the message ends with
        `otherwise`.

    >>> choose("two", {"one": 1, "two": 2}, "number")
    2
    """
    if callable(wanted):
        return wanted  # type: ignore[return-value]  # a function of one's own in place of one from the menu
    if isinstance(wanted, str) and wanted in menu:
        return menu[wanted]
    raise ValueError(
        f"unknown {what} {wanted!r}; known are {', '.join(menu)}{nearest(wanted, menu)}{otherwise}"
    )


def needed(
    function: Callable[..., object], offered: Mapping[str, object], what: str
) -> tuple[str, ...]:
    """Return the names that a function asks for: its parameters without a default, which are its own.

    Args:
        function: Of some of what is offered.
        offered: What it may ask for, by name.
        what: The part it plays, for the message.

    Raises:
        ValueError: It asks for something that is not offered, or has no signature to read.

    >>> needed(lambda weight, grad, strength=0.1: weight, {"weight": 0, "mask": 0, "grad": 0}, "criterion")
    ('weight', 'grad')
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # many that are written in C, torch's own among them
        raise ValueError(
            f"the {what} {describe(function)} has no signature to read what it asks for; known are "
            f"{', '.join(offered)}: wrap it in a function whose parameters have some of these names"
        ) from None
    needs = tuple(p.name for p in parameters if p.default is p.empty)
    for name in needs:
        choose(name, offered, f"parameter of the {what} {describe(function)}")
    return needs


def describe(function: object) -> str:
    """Return the name of a function, for a `repr` or a message.

    >>> describe(describe)
    'describe'
    """
    return getattr(function, "__name__", repr(function))
