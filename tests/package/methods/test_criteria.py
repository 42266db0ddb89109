"""Criteria: scores by plain tensors, and what a function's signature asks for."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.methods import criteria

MENUS = {"prune": criteria.PRUNE, "grow": criteria.GROW}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_magnitude_is_the_absolute_weight() -> None:
    assert criteria.magnitude(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_gradient_is_the_absolute_gradient() -> None:
    assert criteria.gradient(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_random_gives_one_uniform_number_per_position() -> None:
    scores = criteria.random(
        torch.ones(100, 100, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    assert scores.shape == (100, 100)
    assert 0.0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1.0


def test_random_is_a_function_of_its_generator() -> None:
    mask = torch.ones(20, dtype=torch.bool)
    first, second, other = (
        criteria.random(mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    criteria.random(torch.ones(20, dtype=torch.bool), torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("role", "name", "needs"),
    [
        ("prune", "magnitude", ("weight",)),
        ("grow", "gradient", ("grad",)),
        ("grow", "random", ("mask", "generator")),
    ],
)
def test_find_reads_what_a_criterion_needs(role: str, name: str, needs: tuple[str, ...]) -> None:
    assert criteria.find(name, role) == (MENUS[role][name], needs)


def test_the_menus_are_those_of_the_literature() -> None:
    assert set(criteria.PRUNE) == {
        "magnitude",
        "set",
        "taylor",
        "mest",
        "sampled_magnitude",
        "random",
    }
    assert set(criteria.GROW) == {
        "random",
        "gradient",
        "momentum",
        "unexplored",
        "sampled_gradient",
    }


@pytest.mark.parametrize("name", [name for name in criteria.PRUNE if name != "random"])
@pytest.mark.parametrize("as_function", [False, True])
def test_growth_by_what_only_what_was_pruned_has_is_refused(name: str, as_function: bool) -> None:
    """It would grow exactly what an update has just pruned, and R_s would stay where it is."""
    wanted = criteria.PRUNE[name] if as_function else name
    with pytest.raises(
        ValueError,
        match=r"grow is '\w+', which is for pruning; known are random, gradient, momentum",
    ):
        criteria.find(wanted, "grow")


@pytest.mark.parametrize("name", [name for name in criteria.GROW if name != "random"])
def test_pruning_by_a_criterion_for_growth_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"prune is '{name}', which is for growth; known are magnitude, set"
    ):
        criteria.find(name, "prune")


def test_pruning_by_a_mix_is_refused() -> None:
    """It ranks what is inactive: all active weights would be alike, and leave at random."""
    with pytest.raises(
        ValueError, match=r"prune is 'mix\(gradient, random, 0\.5\)', which is for growth"
    ):
        criteria.find(criteria.mix("gradient", "random"), "prune")


@pytest.mark.parametrize("role", ["prune", "grow"])
def test_a_function_without_a_signature_is_refused_with_its_role_and_name(role: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"the {role} criterion abs has no signature .*known are weight, .*wrap it",
    ):
        criteria.find(torch.abs, role)


# --- the criteria of the literature, by hand -------------------------------------------------------------------------


def leaves(scores: Tensor, mask: Tensor, count: int) -> list[int]:
    """The places that an update prunes."""
    kept = topology.prune(mask, scores, count)
    return (mask & ~kept).nonzero().flatten().tolist()


def test_set_prunes_the_same_share_of_each_sign() -> None:
    """Half of four positive and of two negative weights: the two smallest and the one nearest to 0."""
    weight = torch.tensor([0.4, 0.1, 0.3, 0.2, -9.0, -8.0, 0.0, 5.0])
    mask = torch.tensor([True] * 6 + [False] * 2)
    assert leaves(criteria.by_sign(weight, mask, generator()), mask, 3) == [1, 3, 5]


def test_set_prunes_a_weight_of_zero_first() -> None:
    weight, mask = torch.tensor([0.4, 0.0, -0.3]), torch.ones(3, dtype=torch.bool)
    assert leaves(criteria.by_sign(weight, mask, generator()), mask, 1) == [1]


def test_set_counts_exactly_where_all_weights_have_one_sign_or_none() -> None:
    for weight in (torch.arange(1.0, 9.0), -torch.arange(1.0, 9.0), torch.zeros(8)):
        mask = torch.ones(8, dtype=torch.bool)
        assert len(leaves(criteria.by_sign(weight, mask, generator()), mask, 3)) == 3


def test_set_draws_among_weights_of_one_size() -> None:
    """40 equal weights, and 4,000: who leaves is drawn, every place by some seed."""
    mask = torch.ones(40, dtype=torch.bool)
    drawn = [
        leaves(criteria.by_sign(torch.ones(40), mask, generator(seed)), mask, 10)
        for seed in range(40)
    ]
    assert {place for one in drawn for place in one} == set(range(40))
    scores = criteria.by_sign(torch.ones(4000), torch.ones(4000, dtype=torch.bool), generator())
    assert abs(torch.corrcoef(torch.stack([scores, torch.arange(4000.0)]))[0, 1]) < 0.1


def test_set_prunes_the_same_share_of_each_sign_where_all_sizes_tie() -> None:
    weight, mask = torch.tensor([1.0, -1.0]).repeat(20), torch.ones(40, dtype=torch.bool)
    gone = leaves(criteria.by_sign(weight, mask, generator()), mask, 10)
    assert [int(weight[place]) for place in gone].count(1) == 5


def test_set_ranks_weights_of_half_precision_by_size_and_ties_by_lot() -> None:
    """bfloat16 has 8 bits: of 1,000 weights from 1 to 2 there are 129 sizes, and no smaller one stays."""
    weight = (1 + torch.rand(1000, generator=generator())).bfloat16().float()
    mask = torch.ones(1000, dtype=torch.bool)
    gone = {
        seed: leaves(criteria.by_sign(weight, mask, generator(seed)), mask, 300) for seed in (1, 2)
    }
    for places in gone.values():
        stays = torch.ones(1000, dtype=torch.bool)
        stays[places] = False
        assert weight[places].max() <= weight[stays].min()
    assert gone[1] != gone[2]


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


def falling(count: int) -> dict[str, Tensor]:
    """Two sizes that want opposite ends."""
    return {"momentum": torch.arange(float(count)), "grad": torch.arange(float(count), 0.0, -1.0)}


def test_a_mix_takes_its_share_from_each() -> None:
    """Of 8 places a quarter to the best of the first, the rest to the best of the second."""
    mask = torch.zeros(40, dtype=torch.bool)
    scores = criteria.mix("momentum", "gradient", 0.25)(
        mask=mask, generator=generator(), **falling(40)
    )
    assert topology.grow(mask, scores, 8).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 38, 39]


def test_a_mix_does_not_count_places_that_are_taken() -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[9, 8]] = True
    scores = criteria.mix("momentum", "gradient")(mask=mask, generator=generator(), **falling(10))
    assert (topology.grow(mask, scores, 4) & ~mask).nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_a_mix_draws_among_what_ties() -> None:
    """Zero gradients, and all weights explored: no place is better than another."""
    mask, zeros = torch.zeros(40, dtype=torch.bool), torch.zeros(40)
    mixed = criteria.mix("gradient", "momentum")
    drawn = [
        topology.grow(
            mask,
            mixed(mask=mask, generator=generator(seed), grad=zeros, momentum=zeros),
            10,
            generator(),
        )
        for seed in range(40)
    ]
    assert torch.stack(drawn).any(dim=0).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_a_mix_is_a_function_of_its_generator() -> None:
    mask, zeros = torch.zeros(40, dtype=torch.bool), torch.zeros(40)
    mixed = criteria.mix("gradient", "random")
    first, second = (mixed(mask=mask, generator=generator(3), grad=zeros) for _ in range(2))
    assert torch.equal(first, second)


def test_a_mix_asks_for_what_both_ask_for() -> None:
    mixed = criteria.mix("gradient", "unexplored")
    assert criteria.find(mixed, "grow")[1] == ("mask", "generator", "grad", "explored")
    assert criteria.describe(mixed) == "mix(gradient, unexplored, 0.5)"


def test_two_names_with_a_plus_are_an_equal_mix() -> None:
    mixed, needs = criteria.find("gradient+random", "grow")
    assert criteria.describe(mixed) == "mix(gradient, random, 0.5)"
    assert needs == ("mask", "generator", "grad")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradient+randon", r"unknown grow 'randon'; known are .*nearest: 'random'"),
        ("gradient+magnitude", r"grow is 'magnitude', which is for pruning"),
        ("gradient+random+momentum", r"unknown grow 'gradient\+random\+momentum'; known are"),
    ],
)
def test_a_mix_of_other_names_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criteria.find(name, "grow")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda grad: grad * math.nan, "broken gave NaN; scores must be numbers"),
        (
            lambda grad: torch.where(grad > 8.5, math.nan, grad),
            "broken gave NaN; scores must be numbers",
        ),
        (
            lambda grad: grad[0],
            r"broken gave \(\) on cpu; it must give one score per weight, \(10,\) on cpu",
        ),
        (lambda grad: None, r"broken gave None; it must give one score per weight"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_mix_names_the_one_whose_scores_are_none(
    answer: Callable, message: str, first: bool
) -> None:
    def broken(grad: Tensor) -> Tensor:
        return answer(grad)

    both = (broken, "random") if first else ("random", broken)
    mask = torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        criteria.mix(*both)(mask=mask, generator=generator(), grad=torch.arange(10.0))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_mix_of_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share is .*; allowed is a number in"):
        criteria.mix("gradient", "random", share)


@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role, menu in MENUS.items() for name in menu]
)
@pytest.mark.parametrize(
    "sizes", [torch.zeros(4, 6), torch.ones(4, 6), torch.randn(4, 6, generator=generator())]
)
def test_every_criterion_ranks_half_precision_and_ties_and_zeros(
    role: str, name: str, sizes: Tensor
) -> None:
    criterion, needs = criteria.find(name, role)
    mask = torch.tensor([True, False, True]).repeat(8).view(4, 6)
    offered = {need: sizes.bfloat16().float() for need in ("weight", "grad", "momentum")}
    offered |= {"mask": mask, "explored": mask, "generator": generator()}
    scores = criterion(**{need: offered[need] for need in needs})
    assert scores.shape == (4, 6)
    assert scores.isfinite().all()
    change = topology.prune(mask, scores, 5) if role == "prune" else topology.grow(mask, scores, 5)
    assert int(change.sum()) == 16 + (-5 if role == "prune" else 5)


@pytest.mark.parametrize("criterion", [criteria.taylor, criteria.mest])
def test_a_gradient_of_zero_leaves_the_weight_to_decide_or_nothing(
    criterion: Callable[..., Tensor],
) -> None:
    """By hand: (w 0)^2 is 0 for all; |w| + 0.01 * 0 is the magnitude."""
    weight = torch.tensor([3.0, -1.0])
    expected = [0.0, 0.0] if criterion is criteria.taylor else [3.0, 1.0]
    assert criterion(weight, torch.zeros(2)).tolist() == expected


def test_momentum_is_the_absolute_moving_average() -> None:
    assert criteria.momentum(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_find_takes_a_function_of_all_that_is_offered() -> None:
    def everything(
        weight: Tensor,
        mask: Tensor,
        grad: Tensor,
        momentum: Tensor,
        explored: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        return weight

    assert criteria.find(everything, "prune") == (everything, criteria.OFFERED)


def test_an_unknown_name_is_answered_with_the_menu_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown grow 'gradients'; known are random, gradient, .*'gradient'"
    ):
        criteria.find("gradients", "grow")


def test_an_unknown_parameter_name_is_answered_with_what_is_offered() -> None:
    def mine(weigth: Tensor) -> Tensor:
        return weigth

    with pytest.raises(
        ValueError, match=r"parameter of the prune criterion mine 'weigth'.*explored.*'weight'"
    ):
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
