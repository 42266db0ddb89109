"""Menus: look a function up by its name, or take the user's own, and read what it asks for."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from itop_prune.messages import describe, nearest

T = TypeVar("T")


class CheckedFunction(NamedTuple):
    """A function of a menu or the user's own, with the names of the arguments it asks for."""

    function: Callable[..., Any]
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return describe(self.function)


def lookup(wanted: object, menu: Mapping[str, T], argument: str, more: str = "") -> T:
    """Find `menu[wanted]`, or return `wanted` itself if it is a function.

    Raises:
        ValueError: `wanted` is neither a name on the menu nor callable; the message ends with
            `more`.

    >>> lookup("two", {"one": 1, "two": 2}, "number")
    2
    """
    if callable(wanted):
        return wanted  # type: ignore[return-value]  # the user's own function
    if isinstance(wanted, str) and wanted in menu:
        return menu[wanted]
    raise ValueError(
        f"unknown {argument} {wanted!r}; known are {', '.join(menu)}{nearest(wanted, menu)}{more}"
    )


def needed_arguments(
    function: Callable[..., object], offered: Iterable[str], role: str
) -> tuple[str, ...]:
    """List the arguments that a function asks for: its parameters without a default.

    Args:
        function: Of some of the arguments offered.
        offered: The names that it may ask for.
        role: What the function is, for the message.

    Raises:
        ValueError: It asks for something that is not offered, or has no signature to read.

    >>> needed_arguments(lambda weight, grad, strength=0.1: weight, ["weight", "grad"], "criterion")
    ('weight', 'grad')
    """
    known = dict.fromkeys(offered)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # many functions written in C, torch's own among them
        raise ValueError(
            f"the {role} {describe(function)} has no signature that says which arguments it needs; "
            f"known are {', '.join(known)}: wrap it in a function whose parameters have some of "
            "these names"
        ) from None

    needs = tuple(
        parameter.name for parameter in parameters if parameter.default is parameter.empty
    )
    for name in needs:
        lookup(name, known, f"parameter of the {role} {describe(function)}")
    return needs
