"""Keyword arguments that come from a file, checked against the signature of the call they are for."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from itop_prune.messages import nearest


def argument_problems(
    arguments: Mapping[str, Any], call: Callable[..., Any], given: Sequence[str] = ()
) -> dict[str, str]:
    """Return what of the arguments does not fit the signature of a call, by name.

    Args: arguments: By name, as YAML gives them. call: A function or a class. One that takes
        `**kwargs` may know more names than its signature: try it as well. given: Parameters that
        somebody else passes; they are not allowed here.

    >>> def create(name: str, lr: float, nesterov: bool = False): ...
    >>> argument_problems({"name": "sgd", "lr": "1e-3"}, create)
    {'lr': "'1e-3' is text to YAML; write 0.001"}
    """
    parameters = dict(inspect.signature(call).parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {
        n: p
        for n, p in parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in given
    }
    target = call.__init__ if inspect.isclass(call) else call
    try:
        hints = typing.get_type_hints(target)
    except (NameError, TypeError):  # annotations that only their author's imports can resolve
        hints = {}
    needed = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    problems = {name: "missing; it is needed" for name in needed if name not in arguments}
    for name, value in arguments.items():
        if name in given:
            problems[name] = "given by the runner itself"
        elif name not in named and not open_ended:
            problems[name] = f"unknown key; known are {', '.join(named)}{nearest(name, named)}"
        elif problem := type_problem(value, hints.get(name, _type_of_default(named.get(name)))):
            problems[name] = problem
    return problems


def _type_of_default(parameter: inspect.Parameter | None) -> Any:
    default = None if parameter is None else parameter.default
    return (
        type(default)
        if isinstance(default, (bool, str))
        else float
        if isinstance(default, (int, float))
        else Any
    )


def type_problem(value: object, hint: Any) -> str:
    """Return why a value is not of a type, or ""; types that YAML can't write are taken on trust."""
    kinds = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    if isinstance(value, str) and str not in kinds and _reads_as_number(value):
        number = float(value)
        whole = int in kinds and float not in kinds and number.is_integer()
        return f"{value!r} is text to YAML; write {int(number) if whole else number}"
    if typing.get_origin(hint) is typing.Literal:
        known = typing.get_args(hint)
        return (
            ""
            if value in known
            else f"unknown {value!r}; known are {', '.join(known)}{nearest(value, known)}"
        )
    if isinstance(value, list) and (
        problem := next(filter(None, (type_problem(item, Any) for item in value)), "")
    ):
        return problem
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    plain[dict] = plain[dict[str, Any]] = "a mapping of keys to values"
    allowed = [kind for kind in kinds if kind in plain]
    if len(allowed) < len(kinds) or any(_is_of(value, kind) for kind in allowed):
        return ""
    return f"is {value!r}; allowed is {' or '.join(plain[kind] for kind in allowed)}"


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
