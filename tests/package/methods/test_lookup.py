"""Menus: a name is looked up, a function is taken, a mistake is answered with what is known."""

from collections.abc import Callable

import pytest

from itop_prune.messages import describe, listed, nearest
from itop_prune.methods import criteria, distributions, redistribution, saliency, schedules
from itop_prune.methods.lookup import lookup, needed_arguments

MENUS: dict[str, dict[str, Callable]] = {
    "prune": criteria.PRUNE,
    "grow": criteria.GROW,
    "method": distributions.DISTRIBUTIONS,
    "redistribute": redistribution.REDISTRIBUTIONS,
    "schedule": schedules.SCHEDULES,
    "scores": saliency.SALIENCY,
    "beside them": {"mix": criteria.mix, "ratios": saliency.ratios},
}


def test_lookup_takes_a_name_or_a_function() -> None:
    assert lookup("b", {"a": 1, "b": 2}, "letter") == 2
    assert lookup(len, {"a": 1}, "letter") is len


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("unifrm", r"^unknown method 'unifrm'; known are ER, uniform \(nearest: 'uniform'\)$"),
        ("qqq", r"^unknown method 'qqq'; known are ER, uniform$"),
        (None, "unknown method None; known are ER"),
        (["a"], r"unknown method \['a'\]; known are ER"),
    ],
)
def test_what_is_not_known_is_answered_with_the_menu_and_the_nearest(
    wanted: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lookup(wanted, {"ER": 1, "uniform": 2}, "method")


def test_nearest_is_the_most_similar_name_if_one_is_similar() -> None:
    assert nearest("erk", ["uniform", "ERK"]) == " (nearest: 'ERK')"
    assert nearest("cosin", ["constant", "linear", "cosine"]) == " (nearest: 'cosine')"
    assert nearest("xyz", ["constant", "linear"]) == ""


def test_needed_are_the_parameters_without_a_default() -> None:
    def mine(weight: int, grad: int, strength: float = 0.1) -> None: ...

    assert needed_arguments(mine, ["weight", "mask", "grad"], "criterion") == ("weight", "grad")


def test_a_function_without_a_signature_is_refused_with_its_part_and_name() -> None:
    message = r"^the redistribution max has no signature .*; known are active, pruned: wrap"
    with pytest.raises(ValueError, match=message):
        needed_arguments(max, ["active", "pruned"], "redistribution")


def test_describe_is_the_name_or_else_the_repr() -> None:
    class Nameless:
        def __repr__(self) -> str:
            return "Nameless(2)"

    assert describe(lookup) == "lookup"
    assert describe(Nameless()) == "Nameless(2)"


def test_a_long_list_of_names_is_shortened() -> None:
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed(["a", "b", "c"], most=2) == "a, b and others"


@pytest.mark.parametrize("menu", MENUS)
def test_every_function_of_a_menu_has_an_example_and_a_reference(menu: str) -> None:
    assert MENUS[menu]
    for name, function in MENUS[menu].items():
        text = " ".join((function.__doc__ or "").split())
        assert ">>>" in text, name
        assert "arXiv" in text or "Ours" in text, name
