"""Menus: a name is looked up, a function is taken, and a mistake is answered with what is known."""

from collections.abc import Callable

import pytest

from itop_prune.methods import criteria, distributions, redistribution, saliency, schedules
from itop_prune.methods.lookup import choose, describe, nearest, needed

MENUS: dict[str, dict[str, Callable]] = {
    "prune": criteria.PRUNE,
    "grow": criteria.GROW,
    "method": distributions.DISTRIBUTIONS,
    "redistribute": redistribution.REDISTRIBUTIONS,
    "schedule": schedules.SCHEDULES,
    "scores": saliency.SALIENCY,
    "beside them": {"mix": criteria.mix, "ratios": saliency.ratios},
}
FUNCTIONS = {
    f"{menu} {name}": function
    for menu, entries in MENUS.items()
    for name, function in entries.items()
}


def test_choose_by_name() -> None:
    assert choose("b", {"a": 1, "b": 2}, "letter") == 2


def test_choose_takes_a_function_as_it_is() -> None:
    assert choose(len, {"a": 1}, "letter") is len


def test_an_unknown_name_is_answered_with_the_menu_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown method 'unifrm'; known are ER, uniform \(nearest: 'uniform'\)$"
    ):
        choose("unifrm", {"ER": 1, "uniform": 2}, "method")


def test_the_nearest_may_have_other_capitals() -> None:
    assert nearest("erk", ["uniform", "ERK"]) == " (nearest: 'ERK')"


def test_a_name_like_none_is_answered_with_the_menu_alone() -> None:
    with pytest.raises(ValueError, match=r"^unknown method 'qqq'; known are ER, ERK$"):
        choose("qqq", {"ER": 1, "ERK": 2}, "method")


@pytest.mark.parametrize("wanted", [None, 3, ["a"]])
def test_what_is_neither_name_nor_function_is_refused(wanted: object) -> None:
    with pytest.raises(ValueError, match=r"unknown letter .*; known are a"):
        choose(wanted, {"a": 1}, "letter")


def test_nearest_names_the_most_alike() -> None:
    assert nearest("cosin", ["constant", "linear", "cosine"]) == " (nearest: 'cosine')"


def test_nearest_is_silent_where_nothing_is_alike() -> None:
    assert nearest("xyz", ["constant", "linear"]) == ""


def test_needed_are_the_parameters_without_a_default() -> None:
    def mine(weight: int, grad: int, strength: float = 0.1) -> None: ...

    assert needed(mine, {"weight": 1, "mask": 1, "grad": 1}, "criterion") == ("weight", "grad")


def test_a_function_without_a_signature_is_refused_with_its_part_and_name() -> None:
    with pytest.raises(
        ValueError,
        match=r"^the redistribution max has no signature .*; known are active, pruned: wrap",
    ):
        needed(max, {"active": 1, "pruned": 1}, "redistribution")


def test_describe_is_the_name_or_else_the_repr() -> None:
    class Nameless:
        def __repr__(self) -> str:
            return "Nameless(2)"

    assert describe(choose) == "choose"
    assert describe(Nameless()) == "Nameless(2)"


def test_there_are_menus() -> None:
    assert all(MENUS.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_a_menu_has_an_example_and_a_reference(name: str) -> None:
    text = FUNCTIONS[name].__doc__ or ""
    assert ">>>" in text
    assert "arXiv" in " ".join(text.split()) or "Ours" in text
