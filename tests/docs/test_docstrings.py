"""The examples in docstrings are true: every module of the package and of the tools is asked."""

import doctest
import importlib
import pkgutil

import itop_prune_tools
import pytest

import itop_prune

MODULES = sorted(
    module.name
    for package in (itop_prune, itop_prune_tools)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def examples_of(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder().find(importlib.import_module(name), name)
    return [test for test in found if test.examples]


def test_both_packages_have_modules_with_examples() -> None:
    for package in ("itop_prune", "itop_prune_tools"):
        modules = [name for name in MODULES if name.startswith(f"{package}.")]
        assert len(modules) > 30
        assert sum(bool(examples_of(name)) for name in modules) > 10


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
