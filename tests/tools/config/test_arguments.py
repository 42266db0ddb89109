"""Keyword arguments against a signature: unknown, missing, of a wrong type, or text by accident."""

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from itop_prune_tools.config.arguments import argument_problems, type_problem

YAML_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.dates()
    | st.binary()
)
YAML_VALUES = st.recursive(
    YAML_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(YAML_SCALARS, inner, max_size=3),
    max_leaves=5,
)


def create(name: str, lr: float, nesterov: bool = False, steps: int | None = None) -> None: ...


def open_ended(name: str, momentum: float = 0.9, **others: object) -> None: ...


class Transform:
    """A class: its signature is that of its constructor."""

    def __init__(self, size: int, mode: Literal["crop", "pad"] = "crop") -> None: ...


def test_arguments_that_fit_have_no_problems() -> None:
    assert (
        argument_problems({"name": "sgd", "lr": 0.1, "nesterov": True, "steps": None}, create) == {}
    )


def test_an_unknown_key_is_answered_with_the_known_and_the_nearest() -> None:
    problems = argument_problems({"name": "sgd", "lr": 0.1, "nestrov": True}, create)
    assert problems == {
        "nestrov": "unknown key; known are name, lr, nesterov, steps (nearest: 'nesterov')"
    }


def test_every_needed_argument_that_is_missing_is_named() -> None:
    assert argument_problems({}, create) == {
        "name": "missing; it is needed",
        "lr": "missing; it is needed",
    }


def test_all_problems_are_returned_at_once() -> None:
    assert set(argument_problems({"nesterov": "maybe", "lr": "1e-3", "foo": 1}, create)) == {
        "name",
        "nesterov",
        "lr",
        "foo",
    }


def test_what_somebody_else_gives_is_refused() -> None:
    problems = argument_problems({"name": "sgd", "lr": 0.1}, create, given=("lr",))
    assert problems == {"lr": "given by the runner itself"}


def test_what_somebody_else_gives_is_neither_missing_nor_offered() -> None:
    problems = argument_problems({"name": "sgd", "lrr": 0.1}, create, given=("lr",))
    assert set(problems) == {"lrr"}
    assert problems["lrr"] == "unknown key; known are name, nesterov, steps"


def test_a_call_with_open_keywords_may_know_any_key() -> None:
    assert argument_problems({"name": "x", "eps": 1e-8}, open_ended) == {}


def test_a_number_that_yaml_reads_as_text_is_found_behind_open_keywords() -> None:
    problems = argument_problems({"name": "x", "eps": "1e-8"}, open_ended)
    assert problems == {"eps": "'1e-8' is text to YAML; write 1e-08"}


def test_positional_and_keyword_collectors_are_not_offered_as_keys() -> None:
    def call(first: int, *args: int) -> None: ...

    assert argument_problems({"first": 1, "args": 2}, call) == {
        "args": "unknown key; known are first"
    }


def test_a_class_is_checked_by_its_constructor() -> None:
    assert argument_problems({"size": "big", "sze": 2}, Transform) == {
        "size": "is 'big'; allowed is a whole number",
        "sze": "unknown key; known are size, mode (nearest: 'size')",
    }


@pytest.mark.parametrize(
    ("value", "allowed"),
    [({"flag": 1}, "true or false"), ({"word": 3}, "text"), ({"number": "x"}, "a number")],
    ids=str,
)
def test_without_annotations_the_defaults_say_the_type(value: dict[str, Any], allowed: str) -> None:
    def call(flag=False, word="a", number=3, nothing=None) -> None: ...  # type: ignore[no-untyped-def]

    (problem,) = argument_problems(value, call).values()
    assert problem.endswith(f"allowed is {allowed}")


def test_an_untyped_default_of_none_allows_anything() -> None:
    def call(nothing=None) -> None: ...  # type: ignore[no-untyped-def]

    assert argument_problems({"nothing": {"a": [1]}}, call) == {}


def test_annotations_that_can_not_be_resolved_are_passed_over() -> None:
    def call(x: "NoSuchType", y: int = 1) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert argument_problems({"x": 1, "y": "text"}, call) == {"y": "is 'text'; allowed is a number"}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, bool),
        (3, int),
        (3, float),
        (0.5, float),
        ("x", str),
        ("nan", str),
        (None, float | None),
        (None, typing.Optional[int]),  # noqa: UP045
        ({}, dict),
        ({"a": 1}, dict[str, Any]),
        ("x", float | str),
        ([1, 2], list[int]),
        ([1, 2], tuple[int, ...]),
        ((1, 2), tuple[int, int]),
        ("head", typing.Sequence[str]),
        ({"head": 1.0}, Mapping[str, float] | None),
        ("cpu", torch.device | None),
        (None, float | tuple[float, ...]),
        (2**63 - 1, int),
        (3, Any),
        ("pad", Literal["crop", "pad"]),
    ],
    ids=repr,
)
def test_a_value_of_the_type_passes(value: object, hint: Any) -> None:
    assert type_problem(value, hint) == ""


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        (1, bool, "true or false"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (1.5, int, "a whole number"),
        (float("nan"), int, "a whole number"),
        ("x", float, "a number"),
        ("nan", float, "a number"),
        (3, str, "text"),
        (None, float, "a number"),
        ("x", int | None, "a whole number or null"),
        (3, dict[str, Any], "a mapping of keys to values"),
        ({1: 2}, dict[str, Any], "a mapping of keys to values"),
        ({}, float, "a number"),
        ([1], dict[str, Any], "a mapping of keys to values"),
        ([1], dict[str, Any] | None, "a mapping of keys to values or null"),
        ([3], int, "a whole number"),
        ([], float, "a number"),
        (["sgd"], str, "text"),
        (3, list[int], "a list"),
        ("x", tuple[float, float] | None, "a list or null"),
        (3, str | Callable[[float], float], "text"),
        ({"a": 1}, torch.nn.Module | None, "null"),
        ([1], Mapping[str, float], "a mapping of keys to values"),
        (3, torch.device | None, "text or null"),
    ],
    ids=repr,
)
def test_a_value_of_another_type_is_answered_with_what_is_allowed(
    value: object, hint: Any, allowed: str
) -> None:
    assert type_problem(value, hint) == f"is {value!r}; allowed is {allowed}"


@pytest.mark.parametrize("text", ["1e-3", "1e5", "-2", " 0.5 ", "1_000"])
def test_text_that_reads_as_a_number_says_how_to_write_it(text: str) -> None:
    assert type_problem(text, float) == f"{text!r} is text to YAML; write {float(text)!r}"


def test_text_that_reads_as_a_number_is_written_as_what_is_wanted() -> None:
    assert type_problem("1e3", int | None) == "'1e3' is text to YAML; write 1000"
    assert type_problem("1.5e0", int) == "'1.5e0' is text to YAML; write 1.5"
    assert type_problem("1e9999", int) == "is '1e9999'; allowed is a whole number"


def test_text_that_reads_as_a_number_is_found_inside_a_list() -> None:
    assert type_problem([1, [2, "3e1"]], Any) == "'3e1' is text to YAML; write 30.0"


@pytest.mark.parametrize(
    "number", [math.nan, -math.inf, 2**63, -(10**400)], ids=["nan", "inf", "int", "digits"]
)
@pytest.mark.parametrize("hint", [float, int | float, Any, list[float]], ids=str)
def test_a_number_that_torch_does_not_take_is_found(number: float, hint: Any) -> None:
    value = [number] if hint == list[float] else number
    problem = type_problem(value, hint)
    assert problem.startswith(f"is {number!r}"[:80])
    assert len(problem) < 200


def test_digits_are_text_where_text_is_wanted() -> None:
    assert type_problem("2012", str) == ""


def test_a_name_off_a_fixed_list_is_answered_with_the_list_and_the_nearest() -> None:
    problem = type_problem("corp", Literal["crop", "pad"])
    assert problem == "unknown 'corp'; known are crop, pad (nearest: 'crop')"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "lr", "nesterov", "steps", "x"]), YAML_VALUES))
def test_whatever_yaml_gives_the_answer_is_problems_by_name(arguments: dict[str, Any]) -> None:
    problems = argument_problems(arguments, create)
    assert set(problems) <= {*arguments, "name", "lr"}
    assert ({"name", "lr"} - set(arguments)) <= set(problems)
    assert all(problems.values())
    assert ("x" in problems) == ("x" in arguments)
