"""Criteria: scores by plain tensors, and what a function's signature asks for."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.methods import criteria


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_active(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def pruned(scores: Tensor, mask: Tensor, count: int) -> list[int]:
    """The places that an update prunes by these scores."""
    kept = topology.prune(mask, scores, count)
    return (mask & ~kept).nonzero().flatten().tolist()


# --- the menus -----------------------------------------------------------------------------------


def test_the_menus_are_those_of_the_literature() -> None:
    prune = {"magnitude", "set", "taylor", "mest", "sampled_magnitude", "random"}
    grow = {"random", "gradient", "momentum", "unexplored", "sampled_gradient"}
    assert set(criteria.PRUNE) == prune
    assert set(criteria.GROW) == grow


@pytest.mark.parametrize(
    ("role", "name", "needs"),
    [
        ("prune", "magnitude", ("weight",)),
        ("grow", "gradient", ("grad",)),
        ("grow", "random", ("mask", "generator")),
    ],
)
def test_find_reads_what_a_criterion_needs(role: str, name: str, needs: tuple[str, ...]) -> None:
    menu = {"prune": criteria.PRUNE, "grow": criteria.GROW}[role]
    assert criteria.find(name, role) == (menu[name], needs)


def test_find_takes_a_function_of_all_that_is_offered() -> None:
    def everything(weight, mask, grad, momentum, explored, generator) -> Tensor:
        return weight

    assert criteria.find(everything, "prune") == (everything, criteria.OFFERED)


def test_growth_by_what_only_pruned_weights_have_is_refused() -> None:
    """It would grow exactly what an update has just pruned, and R_s would stay where it is."""
    message = r"grow is '\w+', which is for pruning; known are random, gradient, momentum"
    for name in criteria.PRUNE.keys() - {"random"}:
        for wanted in (name, criteria.PRUNE[name]):
            with pytest.raises(ValueError, match=message):
                criteria.find(wanted, "grow")


def test_pruning_by_a_criterion_for_growth_or_a_mix_of_two_is_refused() -> None:
    for name in criteria.GROW.keys() - {"random"}:
        message = rf"prune is '{name}', which is for growth; known are magnitude, set"
        with pytest.raises(ValueError, match=message):
            criteria.find(name, "prune")
    message = r"prune is 'mix\(gradient, random, 0\.5\)', which is for growth"
    with pytest.raises(ValueError, match=message):
        criteria.find(criteria.mix("gradient", "random"), "prune")


def misspelled(weigth: Tensor) -> Tensor:
    return weigth


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("gradients", r"unknown grow 'gradients'; known are random, gradient, .*'gradient'"),
        (misspelled, r"parameter of the grow criterion misspelled 'weigth'.*explored.*'weight'"),
        (torch.abs, r"the grow criterion abs has no signature .*known are weight, .*wrap it"),
        ("gradient+randon", r"unknown grow 'randon'; known are .*nearest: 'random'"),
        ("gradient+magnitude", r"grow is 'magnitude', which is for pruning"),
        ("gradient+random+momentum", r"unknown grow 'gradient\+random\+momentum'; known are"),
    ],
)
def test_what_can_not_be_found_is_answered_with_what_is_known(wanted: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criteria.find(wanted, "grow")


@pytest.mark.parametrize(
    ("role", "name"),
    [(role, name) for role in ("prune", "grow") for name in getattr(criteria, role.upper())],
)
def test_every_criterion_ranks_half_precision_and_ties_and_zeros(role: str, name: str) -> None:
    criterion, needs = criteria.find(name, role)
    mask = torch.tensor([True, False, True]).repeat(8).view(4, 6)
    for sizes in (torch.zeros(4, 6), torch.ones(4, 6), torch.randn(4, 6, generator=generator())):
        offered = {need: sizes.bfloat16().float() for need in ("weight", "grad", "momentum")}
        offered |= {"mask": mask, "explored": mask, "generator": generator()}
        scores = criterion(**{need: offered[need] for need in needs})
        assert scores.shape == (4, 6)
        assert scores.isfinite().all()
        changed = getattr(topology, role)(mask, scores, 5)
        assert int(changed.sum()) == (11 if role == "prune" else 21)


# --- the criteria of the literature, by hand -----------------------------------------------------


@pytest.mark.parametrize(
    "criterion", [criteria.magnitude, criteria.gradient, criteria.momentum], ids=criteria.describe
)
def test_magnitude_gradient_and_momentum_are_absolute_values(criterion: Callable) -> None:
    assert criterion(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_random_gives_one_uniform_number_per_position_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    mask = all_active(10_000).view(100, 100)
    scores, again, other = (criteria.random(mask, generator(seed)) for seed in (0, 0, 1))
    assert scores.shape == (100, 100)
    assert 0.0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1.0
    assert torch.equal(scores, again)
    assert not torch.equal(scores, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_set_prunes_the_same_share_of_each_sign() -> None:
    """Half of four positive and two negative weights: the two smallest and the one nearest to 0."""
    weight = torch.tensor([0.4, 0.1, 0.3, 0.2, -9.0, -8.0, 0.0, 5.0])
    mask = torch.tensor([True] * 6 + [False] * 2)
    assert pruned(criteria.by_sign(weight, mask, generator()), mask, 3) == [1, 3, 5]

    weight = torch.tensor([1.0, -1.0]).repeat(20)  # all sizes tie
    gone = pruned(criteria.by_sign(weight, all_active(40), generator()), all_active(40), 10)
    assert [int(weight[place]) for place in gone].count(1) == 5


def test_set_prunes_a_weight_of_zero_first() -> None:
    weight, mask = torch.tensor([0.4, 0.0, -0.3]), all_active(3)
    assert pruned(criteria.by_sign(weight, mask, generator()), mask, 1) == [1]


def test_set_counts_exactly_where_all_weights_have_one_sign_or_none() -> None:
    mask = all_active(8)
    for weight in (torch.arange(1.0, 9.0), -torch.arange(1.0, 9.0), torch.zeros(8)):
        assert len(pruned(criteria.by_sign(weight, mask, generator()), mask, 3)) == 3


def test_set_draws_among_weights_of_one_size() -> None:
    """Of 40 equal weights every place leaves by some seed; of 4,000 the order is of no place."""
    mask, weight, gone = all_active(40), torch.ones(40), set()
    for seed in range(40):
        gone |= set(pruned(criteria.by_sign(weight, mask, generator(seed)), mask, 10))
    assert gone == set(range(40))
    scores = criteria.by_sign(torch.ones(4000), all_active(4000), generator())
    assert abs(torch.corrcoef(torch.stack([scores, torch.arange(4000.0)]))[0, 1]) < 0.1


def test_set_ranks_weights_of_half_precision_by_size_and_draws_among_ties() -> None:
    """Of 1,000 weights from 1 to 2 bfloat16 knows 129 sizes; no smaller one stays."""
    weight = (1 + torch.rand(1000, generator=generator())).bfloat16().float()
    mask, gone = all_active(1000), []
    for seed in (1, 2):
        places = pruned(criteria.by_sign(weight, mask, generator(seed)), mask, 300)
        stays = mask.clone()
        stays[places] = False
        assert weight[places].max() <= weight[stays].min()
        gone.append(places)
    assert gone[0] != gone[1]


def test_taylor_prunes_what_changes_the_loss_least() -> None:
    weight, grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, -2.0])
    assert pruned(criteria.taylor(weight, grad), all_active(3), 1) == [1]
    assert criteria.taylor(weight, torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_mest_keeps_a_small_weight_that_moves() -> None:
    weight, grad = torch.tensor([0.5, -0.6]), torch.tensor([20.0, 0.0])
    assert pruned(criteria.mest(weight, grad), all_active(2), 1) == [1]
    assert pruned(criteria.mest(weight, grad, strength=0.0), all_active(2), 1) == [0]
    assert torch.equal(criteria.mest(weight, torch.zeros(2)), weight.abs())


@pytest.mark.parametrize("criterion", [criteria.sampled_magnitude, criteria.sampled_gradient])
def test_a_sample_is_drawn_with_chances_as_the_sizes(criterion: Callable[..., Tensor]) -> None:
    """The first of two drawn has 3 of 4 chances; over 20,000 draws within four deviations."""
    sizes = torch.tensor([[-3.0, 1.0]]).expand(20_000, 2)
    scores = criterion(sizes, generator=generator())
    share = (scores[:, 0] > scores[:, 1]).double().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5
    assert not criterion(torch.zeros(200_000), generator=generator()).any()  # and never NaN


def test_unexplored_comes_first_and_at_random() -> None:
    mask, explored = torch.zeros(2, 50, dtype=torch.bool), torch.zeros(2, 50, dtype=torch.bool)
    explored[0] = True
    scores = criteria.unexplored(mask, explored, generator())
    assert scores[1].min() >= 1.0 > scores[0].max()
    assert len(scores.unique()) == 100


# --- mixes ---------------------------------------------------------------------------------------


def falling(count: int) -> dict[str, Tensor]:
    """Two sizes that want opposite ends."""
    return {"momentum": torch.arange(float(count)), "grad": torch.arange(float(count), 0.0, -1.0)}


def test_a_mix_takes_its_share_from_each_and_does_not_count_places_that_are_taken() -> None:
    """Of 8 places a quarter to the best of the first, the rest to the best of the second."""
    mask, mixed = ~all_active(40), criteria.mix("momentum", "gradient", 0.25)
    grown = topology.grow(mask, mixed(mask=mask, generator=generator(), **falling(40)), 8)
    assert grown.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 38, 39]

    mask, mixed = ~all_active(10), criteria.mix("momentum", "gradient")
    mask[[9, 8]] = True
    grown = topology.grow(mask, mixed(mask=mask, generator=generator(), **falling(10)), 4)
    assert (grown & ~mask).nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_a_mix_draws_among_what_ties_from_its_generator() -> None:
    """Zero gradients: no place is better than another."""
    mask, zeros = ~all_active(40), torch.zeros(40)
    mixed = criteria.mix("gradient", "momentum")

    def drawn(seed: int) -> Tensor:
        scores = mixed(mask=mask, generator=generator(seed), grad=zeros, momentum=zeros)
        return topology.grow(mask, scores, 10, generator())

    assert torch.stack([drawn(seed) for seed in range(40)]).any(dim=0).all()
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_a_mix_asks_for_what_both_ask_for() -> None:
    mixed = criteria.mix("gradient", "unexplored")
    assert criteria.find(mixed, "grow")[1] == ("mask", "generator", "grad", "explored")
    assert criteria.describe(mixed) == "mix(gradient, unexplored, 0.5)"


def test_two_names_with_a_plus_are_an_equal_mix() -> None:
    mixed, needs = criteria.find("gradient+random", "grow")
    assert criteria.describe(mixed) == "mix(gradient, random, 0.5)"
    assert needs == ("mask", "generator", "grad")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda grad: grad * math.nan, "broken gave NaN; scores must be numbers"),
        (lambda grad: torch.where(grad > 8.5, math.nan, grad), "broken gave NaN; scores must be"),
        (lambda grad: grad[0], r"gave \(\) on cpu; it must give one score per weight, \(10,\) on"),
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
    with pytest.raises(ValueError, match=message):
        criteria.mix(*both)(mask=~all_active(10), generator=generator(), grad=torch.arange(10.0))


def test_a_mix_of_one_is_refused() -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"share is .*; allowed is a number in"):
            criteria.mix("gradient", "random", share)
