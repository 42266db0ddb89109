"""Menus: a name is looked up, a function is taken, and a mistake is answered with what is known."""

import pytest

from itop_prune.menu import choose, nearest


def test_choose_by_name() -> None:
    assert choose("b", {"a": 1, "b": 2}, "letter") == 2


def test_choose_takes_a_function_as_it_is() -> None:
    assert choose(len, {"a": 1}, "letter") is len


def test_an_unknown_name_is_answered_with_the_menu_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^unknown method 'unifrm'; known are ER, uniform \(nearest: 'uniform'\)$"):
        choose("unifrm", {"ER": 1, "uniform": 2}, "method")


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
