"""Criteria: scores by plain tensors, and what a function's signature asks for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from itop_prune import criteria, topology


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


# --- the criteria of the literature, by hand -------------------------------------------------------------------------


def leaves(scores: Tensor, mask: Tensor, count: int) -> list[int]:
    """The places that an update prunes."""
    kept = topology.prune(mask, scores, count)
    return (mask & ~kept).nonzero().flatten().tolist()


def test_set_prunes_the_same_share_of_each_sign() -> None:
    """Half of four positive and of two negative weights: the two smallest and the one nearest to 0."""
    weight = torch.tensor([0.4, 0.1, 0.3, 0.2, -9.0, -8.0, 0.0, 5.0])
    mask = torch.tensor([True] * 6 + [False] * 2)
    assert leaves(criteria.by_sign(weight, mask), mask, 3) == [1, 3, 5]


def test_set_prunes_a_weight_of_zero_first() -> None:
    weight = torch.tensor([0.4, 0.0, -0.3])
    assert leaves(criteria.by_sign(weight, torch.ones(3, dtype=torch.bool)), torch.ones(3, dtype=torch.bool), 1) == [1]


def test_set_counts_exactly_where_all_weights_have_one_sign_or_none() -> None:
    for weight in (torch.arange(1.0, 9.0), -torch.arange(1.0, 9.0), torch.zeros(8)):
        mask = torch.ones(8, dtype=torch.bool)
        assert len(leaves(criteria.by_sign(weight, mask), mask, 3)) == 3


def test_taylor_prunes_what_changes_the_loss_least() -> None:
    weight, grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, -2.0])
    assert leaves(criteria.taylor(weight, grad), torch.ones(3, dtype=torch.bool), 1) == [1]


def test_mest_keeps_a_small_weight_that_moves() -> None:
    weight, grad = torch.tensor([0.5, 0.6]), torch.tensor([20.0, 0.0])
    ones = torch.ones(2, dtype=torch.bool)
    assert leaves(criteria.mest(weight, grad), ones, 1) == [1]
    assert leaves(criteria.mest(weight, grad, strength=0.0), ones, 1) == [0]


@pytest.mark.parametrize("criterion", [criteria.sampled_magnitude, criteria.sampled_gradient])
def test_a_sample_is_drawn_with_chances_as_the_sizes(criterion: Callable[..., Tensor]) -> None:
    """The first of two drawn has 3 of 4 chances; over 20,000 draws within four standard deviations."""
    sizes = torch.tensor([[-3.0, 1.0]]).expand(20_000, 2)
    scores = criterion(sizes, generator=torch.Generator().manual_seed(0))
    share = (scores[:, 0] > scores[:, 1]).double().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("criterion", [criteria.sampled_magnitude, criteria.sampled_gradient])
def test_a_sample_never_holds_nan(criterion: Callable[..., Tensor]) -> None:
    scores = criterion(torch.zeros(200_000), generator=torch.Generator().manual_seed(0))
    assert not scores.any()


def test_unexplored_comes_first_and_at_random() -> None:
    mask, explored = torch.zeros(2, 50, dtype=torch.bool), torch.zeros(2, 50, dtype=torch.bool)
    explored[0] = True
    scores = criteria.unexplored(mask, explored, torch.Generator().manual_seed(0))
    assert scores[1].min() >= 1.0 > scores[0].max()
    assert len(scores.unique()) == 100


def test_a_mix_takes_its_share_from_each() -> None:
    """Of 8 places a quarter to the best of the first, the rest to the best of the second."""
    tensors = {"weight": torch.arange(40.0), "grad": torch.arange(40.0, 0.0, -1.0)}
    mask = torch.zeros(40, dtype=torch.bool)
    chosen = topology.grow(mask, criteria.mix("magnitude", "gradient", 0.25)(mask=mask, **tensors), 8)
    assert chosen.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 38, 39]


def test_a_mix_does_not_count_places_that_are_taken() -> None:
    tensors = {"weight": torch.arange(10.0), "grad": torch.arange(10.0, 0.0, -1.0)}
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[9, 8]] = True
    chosen = topology.grow(mask, criteria.mix("magnitude", "gradient")(mask=mask, **tensors), 4) & ~mask
    assert chosen.nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_a_mix_asks_for_what_both_ask_for() -> None:
    mixed = criteria.mix("gradient", "unexplored")
    assert criteria.find(mixed, "grow")[1] == ("mask", "grad", "explored", "generator")
    assert criteria.describe(mixed) == "mix(gradient, unexplored, 0.5)"


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_mix_of_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share is .*; allowed is a number in"):
        criteria.mix("gradient", "random", share)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_every_criterion_ranks_half_precision_and_ties_and_zeros(name: str) -> None:
    criterion, needs = criteria.find(name, "prune")
    for sizes in (torch.zeros(4, 6), torch.ones(4, 6), torch.randn(4, 6)):
        offered = {need: sizes.bfloat16().float() for need in ("weight", "grad", "momentum")}
        offered |= {"mask": torch.ones(4, 6, dtype=torch.bool), "explored": torch.zeros(4, 6, dtype=torch.bool)}
        offered["generator"] = torch.Generator().manual_seed(0)
        scores = criterion(**{need: offered[need] for need in needs})
        assert scores.shape == (4, 6)
        assert int(topology.best(scores, 7).sum()) == 7


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
