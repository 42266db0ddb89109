"""The fast selection against the simple one: a sample, and sizes known beforehand, choose what sorting all would."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topology import rng
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from itop_prune import ranking, topology
from itop_prune.topology import prune_and_regrow


def simple(
    mask: Tensor, prune_scores: Tensor, grow_scores: Tensor, n_prune: int, n_grow: int
) -> Tensor:
    """The algorithm as it is told: sort everything, take what is first; ties in index order."""
    new = mask.flatten().clone()
    active = new.nonzero().flatten()
    new[active[prune_scores.flatten()[active].sort(stable=True).indices[:n_prune]]] = False
    inactive = (~new).nonzero().flatten()
    new[
        inactive[
            grow_scores.flatten()[inactive].sort(descending=True, stable=True).indices[:n_grow]
        ]
    ] = True
    return new.view(mask.shape)


def every_third(tensor: Tensor) -> Tensor:
    return (torch.arange(tensor.numel()) % 3 == 0).view_as(tensor)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda scores: scores,
    "many ties": lambda scores: (4 * scores).round(),
    "mostly zero": lambda scores: scores * (scores > 2),
    "all equal": lambda scores: scores * 0,
    "infinite": lambda scores: torch.where(
        scores > 1, torch.inf, torch.where(scores < -1, -torch.inf, scores)
    ),
    "largest where the sample looks": lambda scores: scores + 9 * every_third(scores),
    "smallest where the sample looks": lambda scores: scores - 9 * every_third(scores),
    "sorted": lambda scores: scores.flatten().sort().values.view_as(scores),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("density", "rate"), [(0.02, 0.5), (0.1, 0.3), (0.9, 0.05), (0.1, 0.001), (0.5, 1.0)]
)
def test_of_many_weights_the_same_are_chosen_as_by_sorting_all(
    kind: str, density: float, rate: float
) -> None:
    draw = rng(1)
    mask = (
        torch.rand(401, 499, generator=draw) < density
    )  # 200,099 positions, every third looked at
    prune_scores, grow_scores = (
        KINDS[kind](torch.randn(mask.shape, generator=draw)) for _ in range(2)
    )
    count = int(rate * int(mask.sum()))
    expected = simple(mask, prune_scores, grow_scores, count, count)
    assert torch.equal(prune_and_regrow(mask, prune_scores, grow_scores, count, count), expected)


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["asks the device", "does not wait"])
@settings(deadline=None, max_examples=300)
@given(
    size=st.integers(20, 200),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 2**31),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_whatever_a_sample_says_the_same_are_chosen_as_by_sorting_all(
    at_once: set[str], size: int, levels: int, seed: int, shares: tuple[float, float, float]
) -> None:
    draw, (density, pruned, grown) = rng(seed), shares
    mask = torch.rand(size, generator=draw) < density
    prune_scores, grow_scores = (
        torch.randint(levels, (size,), generator=draw).float() for _ in range(2)
    )
    n_prune = int(pruned * int(mask.sum()))
    n_grow = int(grown * (size - int(mask.sum()) + n_prune))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SAMPLE", 6)  # so that a few numbers are a long tensor
        patch.setattr(topology, "ANSWERS_AT_ONCE", at_once)
        new = prune_and_regrow(mask, prune_scores, grow_scores, n_prune, n_grow)
    assert torch.equal(new, simple(mask, prune_scores, grow_scores, n_prune, n_grow))


@pytest.fixture(params=[{"cpu"}, set()], ids=["asks the device", "does not wait"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU selects, and as other devices do."""
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", request.param)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("place", [0, 1, 200_000])
def test_nan_among_many_scores_raises_wherever_it_is(place: int) -> None:
    mask, scores = torch.zeros(200_001, dtype=torch.bool), torch.randn(200_001, generator=rng(2))
    scores[place] = torch.nan
    with pytest.raises(ValueError, match="scores hold NaN"):
        topology.grow(mask, scores, 100)


@pytest.mark.usefixtures("both_ways")
def test_infinite_scores_are_ranked_and_never_taken_from_where_nothing_may_be() -> None:
    scores = torch.tensor([math.inf, -math.inf, 1.0, -math.inf, math.inf, math.inf])
    mask = torch.tensor([True, False, False, False, False, True])
    assert topology.grow(mask, scores, 3).tolist() == [True, True, True, False, True, True]
    assert topology.prune(mask, -scores, 2).tolist() == [False] * 6


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_of_many_that_tie_those_drawn_are_spread_over_the_whole_tensor(dtype: torch.dtype) -> None:
    scores = torch.zeros(200_001, dtype=dtype)
    grown = topology.grow(torch.zeros(200_001, dtype=torch.bool), scores, 600, rng(3))
    assert not scores.any()
    assert [int(part.sum()) for part in grown.split(66_667)] == pytest.approx([200] * 3, rel=0.2)


def test_elsewhere_than_on_the_cpu_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fake tensors have shapes and no values: whoever asks for one, or for a size that depends on one, fails."""
    sizes = torch.empty(50, 40), torch.empty(50, 40).bool()
    with FakeTensorMode() as fake:
        scores, mask = (fake.from_tensor(tensor) for tensor in sizes)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            topology.select(scores, mask, 7, rng(0))
        monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
        for smallest in (False, True):
            assert topology.select(scores, mask, 7, rng(0), smallest).shape == (50, 40)


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("smallest", [False, True], ids=["largest", "smallest"])
def test_of_several_layers_together_the_same_are_chosen_as_of_each_alone(
    monkeypatch: pytest.MonkeyPatch, levels: int, smallest: bool
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    shapes = [(20, 30), (600,), (2, 3, 10, 10)]
    scores = [torch.randint(levels, shape, generator=rng(len(shape))).float() for shape in shapes]
    scores[2] = scores[2].to(memory_format=torch.channels_last)
    allowed = [torch.rand(shape, generator=rng(9)) < 0.4 for shape in shapes]
    untouched = [part.clone() for part in (*scores, *allowed)]
    together = topology.select_each(
        iter(scores), allowed, 77, [rng(seed) for seed in range(3)], smallest
    )
    for seed, (part, mask, chosen) in enumerate(zip(scores, allowed, together, strict=True)):
        assert torch.equal(chosen, topology.select(part, mask, 77, rng(seed), smallest))
        assert chosen.sum() == 77
        assert not (chosen & ~mask).any()
    for part, before in zip((*scores, *allowed), untouched, strict=True):
        assert torch.equal(part, before)


def test_of_several_layers_together_nan_in_one_chooses_nothing_there_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    scores = torch.rand(3, 50, generator=rng(5))
    scores[1, 7] = torch.nan
    chosen = topology.select_each(scores, [torch.ones(50).bool()] * 3, 10, [rng(), rng(), rng()])
    assert [int(part.sum()) for part in chosen] == [10, 0, 10]


@pytest.mark.parametrize(
    "size", [0, 1, 8, ranking.SAMPLE - 8, ranking.SAMPLE, ranking.SAMPLE + 4, 8 * 1021 * 4, 300_000]
)
@pytest.mark.parametrize("density", [0.0, 0.002, 0.04, 0.3, 1.0])
def test_what_is_true_is_counted_and_found(size: int, density: float) -> None:
    mask = torch.rand(size, generator=rng(4)) < density
    for tensor in (
        mask,
        torch.cat([torch.ones(3, dtype=torch.bool), mask])[3:],
        mask.repeat(2)[::2],
    ):
        assert ranking.ones(tensor) == tensor.count_nonzero()
        assert ranking.ones(tensor).dtype == torch.int64
        assert torch.equal(ranking.positions(tensor), tensor.nonzero().squeeze(1))


def test_what_is_true_is_counted_in_any_layout() -> None:
    mask = torch.rand(64, 32, 3, 3, generator=rng(4)) < 0.5
    for tensor in (mask, mask.to(memory_format=torch.channels_last), mask.transpose(0, 1)):
        assert ranking.ones(tensor) == mask.count_nonzero()


def test_scores_of_several_layers_may_come_in_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    scores, buffer = torch.rand(3, 4, 25, generator=rng(6)), torch.empty(4, 25)
    allowed = [torch.ones(4, 25).bool()] * 3
    together = topology.select_each(
        (buffer.copy_(part) for part in scores), allowed, 10, [rng(), rng(), rng()]
    )
    assert [chosen.nonzero().tolist() for chosen in together] == [
        topology.select(part, mask, 10).nonzero().tolist()
        for part, mask in zip(scores, allowed, strict=True)
    ]


def test_scores_of_several_layers_may_be_of_several_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    large = 2**53 - torch.arange(8)
    scores = [
        torch.arange(8.0),
        large,
        1.0 + torch.arange(8, dtype=torch.float64) * 1e-12,
        torch.arange(8) % 2 == 0,
    ]
    together = topology.select_each(scores, [torch.ones(8).bool()] * 4, 4, [rng() for _ in scores])
    assert [chosen.int().tolist() for chosen in together] == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [1, 0, 1, 0, 1, 0, 1, 0],
    ]
