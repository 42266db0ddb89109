"""Check keyword arguments from a file against the signature of the call they are for."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from itop_prune.messages import nearest

PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping of keys to values",
    dict[str, Any]: "a mapping of keys to values",
}
"""Types that YAML can write, and how a message names them."""


def argument_problems(
    arguments: Mapping[str, Any], call: Callable[..., Any], given: Sequence[str] = ()
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
    hints = _type_hints(call)

    problems = {}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in arguments:
            problems[name] = "missing; it is needed"

    for name, value in arguments.items():
        if name in given:
            problems[name] = "given by the runner itself"
        elif name not in known and not open_ended:
            problems[name] = f"unknown key; known are {', '.join(known)}{nearest(name, known)}"
        else:
            hint = hints.get(name, _type_of_default(known.get(name)))
            problem = type_problem(value, hint)
            if problem:
                problems[name] = problem
    return problems


def _type_hints(call: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except (NameError, TypeError):  # annotations that only their own module can resolve
        return {}


def _type_of_default(parameter: inspect.Parameter | None) -> Any:
    default = parameter.default if parameter else None
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, (int, float)):
        return float
    return Any


def type_problem(value: object, hint: Any) -> str:
    """Explain why a value is not of a type; "" if it is, or if YAML can't write the type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)

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

    plain = [kind for kind in kinds if kind in PLAIN]
    if len(plain) < len(kinds) or any(_is_of(value, kind) for kind in plain):
        return ""
    return f"is {value!r}; allowed is {' or '.join(PLAIN[kind] for kind in plain)}"


def _is_of(value: object, kind: Any) -> bool:
    if kind in (dict, dict[str, Any]):
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
