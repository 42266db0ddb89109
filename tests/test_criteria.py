"""Criteria: scores by plain tensors, and what a function's signature asks for."""

import pytest
import torch
from torch import Tensor

from itop_prune import criteria


def test_magnitude_is_the_absolute_weight() -> None:
    assert criteria.magnitude(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_gradient_is_the_absolute_gradient() -> None:
    assert criteria.gradient(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_random_gives_one_uniform_number_per_position() -> None:
    scores = criteria.random(torch.ones(100, 100, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert scores.shape == (100, 100)
    assert 0.0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1.0


def test_random_is_a_function_of_its_generator() -> None:
    mask = torch.ones(20, dtype=torch.bool)
    first, second, other = (criteria.random(mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    criteria.random(torch.ones(20, dtype=torch.bool), torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "needs"), [("magnitude", ("weight",)), ("gradient", ("grad",)), ("random", ("mask", "generator"))]
)
def test_find_reads_what_a_criterion_needs(name: str, needs: tuple[str, ...]) -> None:
    assert criteria.find(name, "grow") == (criteria.CRITERIA[name], needs)


def test_find_takes_a_function_of_all_that_is_offered() -> None:
    def everything(
        weight: Tensor, mask: Tensor, grad: Tensor, momentum: Tensor, explored: Tensor, generator: torch.Generator
    ) -> Tensor:
        return weight

    assert criteria.find(everything, "prune") == (everything, criteria.OFFERED)


def test_an_unknown_name_is_answered_with_the_menu_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown grow 'gradients'; known are magnitude, set, .*'gradient'"):
        criteria.find("gradients", "grow")


def test_an_unknown_parameter_name_is_answered_with_what_is_offered() -> None:
    def mine(weigth: Tensor) -> Tensor:
        return weigth

    with pytest.raises(ValueError, match=r"parameter of the prune criterion mine 'weigth'.*explored.*'weight'"):
        criteria.find(mine, "prune")


def test_describe_is_the_name_of_a_function() -> None:
    assert criteria.describe(criteria.magnitude) == "magnitude"


def test_describe_of_an_object_without_a_name_is_its_repr() -> None:
    class Nameless:
        def __call__(self, weight: Tensor) -> Tensor:
            return weight

        def __repr__(self) -> str:
            return "Nameless(2)"

    assert criteria.describe(Nameless()) == "Nameless(2)"
