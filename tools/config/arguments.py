"""Check keyword arguments from a file against the signature of the call they are for."""

import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from itop_prune.messages import nearest

Section = dict[str, Any]
"""Keyword arguments of one call, as YAML gives them."""
Call = Callable[..., Any]

PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a mapping of keys to values",
}
"""Types that YAML can write, and how a message names them."""

LARGEST = 2**63 - 1
"""The largest whole number that torch takes."""


def argument_problems(
    arguments: Mapping[str, Any], call: Call, given: Sequence[str] = ()
) -> dict[str, str]:
    """Find the arguments that do not fit the signature of a call, by name.

    Args:
        arguments: The arguments by name, as YAML gives them.
        call: A function or a class. One that takes `**kwargs` may know more names than its
            signature, so try it as well.
        given: Parameters that the runner passes itself; not allowed here.

    >>> def create(name: str, lr: float, nesterov: bool = False): ...
    >>> argument_problems({"name": "sgd", "lr": "1e-3"}, create)
    {'lr': "'1e-3' is text to YAML; write 0.001"}
    """
    signature = inspect.signature(call).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature)
    known = {
        parameter.name: parameter
        for parameter in signature
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in given
    }
    hints = type_hints(call)

    problems = {}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in arguments:
            problems[name] = "missing; it is needed"

    for name, value in arguments.items():
        if name in given:
            problems[name] = "given by the runner itself"
        elif name not in known and not open_ended:
            problems[name] = unknown_key(name, known)
        else:
            hint = hints.get(name, type_of_default(known.get(name)))
            problem = type_problem(value, hint)
            if problem:
                problems[name] = problem
    return problems


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Describe a key that no parameter has.

    >>> unknown_key("lrr", ["lr", "momentum"])
    "unknown key; known are lr, momentum (nearest: 'lr')"
    """
    return f"unknown key; known are {', '.join(known)}{nearest(name, known)}"


def refused_argument(name: str, value: object, error: Exception, calls: Iterable[Call]) -> str:
    """Explain why a call with open keywords refused one argument.

    Args:
        name: The argument.
        value: Its value.
        error: What the call raised.
        calls: The call, and those that its `**kwargs` are passed on to.

    Returns:
        What the signatures tell; "" if that is nothing.
    """
    known: dict[str, Any] = {}
    for call in calls:
        hints = type_hints(call)
        for parameter in inspect.signature(call).parameters.values():
            if parameter.default is not parameter.empty:
                hint = hints.get(parameter.name, type_of_default(parameter))
                known[parameter.name] = hint

    if "unexpected keyword argument" in str(error) and repr(name) in str(error):
        return unknown_key(name, known)
    return type_problem(value, known.get(name, Any))


def type_hints(call: Call) -> dict[str, Any]:
    """Read the types of a call's parameters by name; {} if they can't be resolved."""
    try:
        return typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except (NameError, TypeError):  # annotations that only their own module can resolve
        return {}


def type_of_default(parameter: inspect.Parameter | None) -> Any:
    """Guess the type of a parameter without a hint by its default; Any if it tells nothing."""
    default = parameter.default if parameter else None
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, (int, float)):
        return float
    return Any


def type_problem(value: object, hint: Any) -> str:
    """Explain why a value is not of a type; "" if it is, or if YAML can't write the type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    hints = typing.get_args(hint) if is_union else (hint,)
    kinds = [yaml_type(part) for part in hints]

    if isinstance(value, str) and str not in kinds and _reads_as_number(value):
        number = float(value)
        whole = int in kinds and float not in kinds and number.is_integer()
        return f"{value!r} is text to YAML; write {int(number) if whole else number}"

    if typing.get_origin(hint) is typing.Literal:
        known = typing.get_args(hint)
        if value in known:
            return ""
        return f"unknown {value!r}; known are {', '.join(known)}{nearest(value, known)}"

    if isinstance(value, list):
        for item in value:
            problem = type_problem(item, Any)
            if problem:
                return problem

    # timm leaves null out of the hint of a list, or of a number or a list (color_jitter).
    null_is_unclear = value is None and (list in kinds or None in kinds)
    if Any not in kinds and not null_is_unclear and not any(_is_of(value, kind) for kind in kinds):
        allowed = [PLAIN[kind] for kind in dict.fromkeys(kinds) if kind]
        return f"is {shown(value)}; allowed is {' or '.join(allowed)}"

    if isinstance(value, int) and abs(value) > LARGEST:
        return f"is {shown(value)}; allowed are whole numbers of up to 18 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; allowed are finite numbers"
    return ""


def yaml_type(hint: Any) -> Any:
    """Find the type of `PLAIN` that a hint stands for.

    Returns:
        None if YAML can write no such value, as for a function or a plugin, and Any if it is not
        known.
    """
    kind = typing.get_origin(hint) or hint
    if kind in PLAIN:
        return kind
    if kind is torch.device:
        return str
    if kind is tuple:
        return list
    if kind is Any or not inspect.isclass(kind) or issubclass(kind, enum.Enum):
        return Any
    if issubclass(kind, Mapping):
        return dict
    return Any if issubclass(list, kind) else None  # Sequence, for example, also means text


def _is_of(value: object, kind: Any) -> bool:
    if kind is None:
        return False
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, {float: (int, float), list: (list, tuple)}.get(kind, kind))


def shown(value: object, most: int = 80) -> str:
    """Show a value in a message; of a long one the beginning.

    >>> shown("a" * 100, most=8)
    "'aaaaaaa..."
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def refusal(error: Exception, arguments: Mapping[str, Any]) -> str:
    """Describe what a library raised at the arguments of a call.

    A ValueError tells what is wrong. Anything else may be far from the cause: the arguments follow.

    >>> refusal(TypeError("'int' object is not iterable"), {"betas": 1})
    "'int' object is not iterable; look at the arguments {'betas': 1}"
    """
    message = str(error) or type(error).__name__
    if isinstance(error, ValueError):
        return message
    first_line = message.splitlines()[0].rstrip(".")
    return f"{first_line}; look at the arguments {shown(dict(arguments), most=400)}"


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
