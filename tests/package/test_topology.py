"""The algorithm on plain tensors: exact counts, chosen positions, ties, bad numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from itop_prune.topology import NaNScores, draw, prune_and_regrow, seeded, select, shares_of_best

UPDATES = json.loads((Path(__file__).parents[1] / "reference" / "update.json").read_text())["cases"]


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best(scores: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    return select(scores, torch.ones_like(scores, dtype=torch.bool), count, generator)


def half(*shape: int) -> Tensor:
    """A mask whose every second position is active."""
    return (torch.arange(math.prod(shape)) % 2 == 0).view(shape)


def test_eight_numbers() -> None:
    mask = bits("11110000")
    weight = torch.tensor([0.9, -0.1, 0.4, -0.2, 0.0, 0.0, 0.0, 0.0])
    gradient = torch.tensor([0.8, 0.1, 0.1, 0.1, -0.2, 0.7, 0.3, -0.6])
    moved = prune_and_regrow(mask, weight.abs(), gradient.abs(), n_prune=2, n_grow=2)
    assert moved.tolist() == bits("10100101").tolist()


def test_a_pruned_position_may_grow_again_at_once() -> None:
    mask = bits("11110000")
    weight = torch.tensor([0.9, -0.1, 0.4, -0.2, 0.0, 0.0, 0.0, 0.0])
    gradient = torch.tensor([0.0, 0.9, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    moved = prune_and_regrow(mask, weight.abs(), gradient.abs(), n_prune=2, n_grow=2)
    assert moved.tolist() == bits("11100001").tolist()


@pytest.mark.parametrize(
    "case", UPDATES, ids=lambda case: f"{case['shape']} at {case['drop_fraction']}"
)
def test_reference_updates_exactly(case: dict) -> None:
    mask = torch.tensor(case["mask"]).bool()
    weight, gradient = torch.tensor(case["weight"]), torch.tensor(case["dense_grad"])
    count = math.ceil(case["drop_fraction"] * int(mask.sum()))
    assert count == case["itop"]["n_prune"]
    moved = prune_and_regrow(mask, weight.abs(), gradient.abs(), count, count, rng())
    assert moved.int().tolist() == case["itop"]["new_mask"]


def test_there_are_reference_updates() -> None:
    assert UPDATES


@pytest.mark.parametrize(
    ("n_prune", "n_grow", "active"), [(2, 5, 13), (5, 2, 7), (10, 0, 0), (0, 10, 20), (10, 20, 20)]
)
def test_any_count_in_range_is_met_exactly(n_prune: int, n_grow: int, active: int) -> None:
    moved = prune_and_regrow(half(20), torch.rand(20), torch.rand(20), n_prune, n_grow)
    assert moved.sum() == active


def test_nothing_to_move_returns_the_mask() -> None:
    mask = half(6, 4)
    assert torch.equal(
        prune_and_regrow(mask, torch.rand(6, 4), torch.rand(6, 4), 0, 0, rng()), mask
    )


def test_everything_pruned_and_regrown_goes_where_growth_scores_are_largest() -> None:
    moved = prune_and_regrow(
        bits("11000000"), torch.ones(8), torch.arange(8.0), n_prune=2, n_grow=2
    )
    assert moved.tolist() == bits("00000011").tolist()


@pytest.mark.parametrize("generator", [None, 7], ids=["index order", "at random"])
def test_count_is_exact_when_all_weights_and_gradients_are_zero(generator: int | None) -> None:
    mask, zeros = torch.rand(50, 40, generator=rng()) < 0.3, torch.zeros(50, 40)
    draws = None if generator is None else rng(generator)
    assert prune_and_regrow(mask, zeros, zeros, 73, 73, draws).sum() == mask.sum()


def test_zero_weights_prune_active_positions_only() -> None:
    mask = torch.rand(50, 40, generator=rng()) < 0.3
    moved = prune_and_regrow(mask, torch.zeros(50, 40), torch.zeros(50, 40), 73, 0, rng())
    assert moved.sum() == mask.sum() - 73
    assert not (moved & ~mask).any()


def test_ties_without_a_generator_are_taken_in_index_order() -> None:
    ones, zeros = torch.ones(8), torch.zeros(8)
    grown = prune_and_regrow(bits("01000010"), ones, zeros, n_prune=0, n_grow=3)
    assert grown.tolist() == bits("11110010").tolist()
    pruned = prune_and_regrow(bits("01101011"), zeros, zeros, n_prune=3, n_grow=0)
    assert pruned.tolist() == bits("00000011").tolist()


def test_ties_drawn_with_a_generator_spread_over_the_whole_tensor() -> None:
    grown = best(torch.zeros(10_000), 1000, rng()).nonzero().squeeze(1)
    # Uniform draws: mean 4999.5, standard error 2887 / sqrt(1000) * sqrt(0.9) = 87.
    assert abs(grown.double().mean().item() - 4999.5) < 6 * 87


def test_every_tied_position_has_the_same_chance() -> None:
    generator = rng()
    counts = sum(best(torch.zeros(10), 3, generator).int() for _ in range(2000))
    # Binomial(2000, 0.3): mean 600, standard deviation 20.5.
    assert (counts - 600).abs().max() < 6 * 20.5


def test_a_generator_never_overrules_the_scores() -> None:
    scores = torch.tensor([0.0, 5.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    for seed in range(20):
        chosen = best(scores, 3, rng(seed))
        assert chosen[1]
        assert not chosen[scores == 0.0].any()


def test_the_generator_decides_among_ties() -> None:
    first, second, other = (
        prune_and_regrow(half(100), torch.zeros(100), torch.zeros(100), 9, 9, rng(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_channels_last_tensors_give_the_same_mask_as_contiguous_ones() -> None:
    mask = torch.rand(8, 6, 3, 3, generator=rng()) < 0.4
    prune, grow = (torch.rand(8, 6, 3, 3, generator=rng(seed)) for seed in (1, 2))
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (mask, prune, grow)]
    assert not last[0].is_contiguous()
    assert torch.equal(prune_and_regrow(*last, 20, 20), prune_and_regrow(mask, prune, grow, 20, 20))

    zeros = torch.zeros_like(last[1])
    assert prune_and_regrow(last[0], zeros, zeros, 30, 30, rng()).sum() == mask.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_precision(dtype: torch.dtype) -> None:
    scores = torch.tensor([4, 1, 3, 2, 0, 0, 5, 0], dtype=dtype)
    moved = prune_and_regrow(bits("11110000"), scores, scores, n_prune=1, n_grow=2)
    assert moved.tolist() == bits("11110010").tolist()


def test_bfloat16_ties_keep_the_count() -> None:
    scores = torch.rand(4000, generator=rng()).bfloat16()
    assert scores.unique().numel() < 1000
    assert prune_and_regrow(half(4000), scores, scores, 777, 777, rng()).sum() == 2000


def test_float64_scores_that_float32_can_not_tell_apart() -> None:
    scores = 1.0 + torch.tensor([0, 3, 1, 2], dtype=torch.float64) * 1e-12
    assert best(scores, 2).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_scores_may_be_whole_numbers(dtype: torch.dtype) -> None:
    """A criterion may answer with what it was given, such as `explored`."""
    scores = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0]).to(dtype)
    moved = prune_and_regrow(bits("11110000"), scores, scores, n_prune=1, n_grow=2)
    assert moved.tolist() == bits("10111100").tolist()


def test_infinite_scores_keep_the_count() -> None:
    """A criterion may be a logarithm, whose value at a zero gradient is -inf."""
    high, ones, low = torch.full((12,), math.inf), torch.ones(12), torch.full((12,), -math.inf)
    for seed in range(10):
        assert prune_and_regrow(half(12), ones, low, 3, 3, rng(seed)).sum() == 6
        assert prune_and_regrow(half(12), high, ones, 4, 2, rng(seed)).sum() == 4


@pytest.mark.parametrize("where", ["prune", "grow"])
def test_nan_scores_raise(where: str) -> None:
    scores = {"prune": torch.ones(8), "grow": torch.ones(8)}
    scores[where][2 if where == "prune" else 5] = math.nan
    with pytest.raises(NaNScores, match=rf"{where}_scores hold NaN.*check the function") as error:
        prune_and_regrow(bits("11110000"), scores["prune"], scores["grow"], 1, 1)
    assert error.value.role == where


def test_nan_where_a_score_is_not_asked_for_does_no_harm() -> None:
    prune = torch.tensor([4.0, 1.0, 3.0, 2.0] + [math.nan] * 4)
    grow = torch.tensor([math.nan, 0.5, math.nan, math.nan, 1.0, 2.0, 3.0, 4.0])
    assert (
        prune_and_regrow(bits("11110000"), prune, grow, 1, 1).tolist() == bits("10110001").tolist()
    )


def test_counts_out_of_range_raise_with_the_range() -> None:
    mask, ones = bits("11110000"), torch.ones(8)
    for count in (-1, 5):
        message = rf"n_prune is {count}; .*4 active positions: allowed are 0 to 4"
        with pytest.raises(ValueError, match=message):
            prune_and_regrow(mask, ones, ones, count, 0)
    for count in (-1, 6):
        message = rf"n_grow is {count}; after pruning 5 positions are inactive"
        with pytest.raises(ValueError, match=message):
            prune_and_regrow(mask, ones, ones, 1, count)


def test_best_chooses_the_largest() -> None:
    assert best(torch.tensor([[3.0, 1.0], [2.0, 5.0]]), 2).tolist() == [
        [True, False],
        [False, True],
    ]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (6, 6)])
def test_best_none_and_all(count: int, expected: int) -> None:
    assert best(torch.zeros(2, 3), count, rng()).sum() == expected


def test_mask_and_scores_are_never_written() -> None:
    given = half(30), torch.rand(30), torch.rand(30)
    before = [tensor.clone() for tensor in given]
    prune_and_regrow(*given, 5, 5, rng())
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_new_mask_is_bool_and_of_the_same_shape() -> None:
    moved = prune_and_regrow(half(4, 3, 2), torch.rand(4, 3, 2), torch.rand(4, 3, 2), 5, 5)
    assert (moved.dtype, moved.shape) == (torch.bool, (4, 3, 2))


@pytest.mark.parametrize("generator", [None, 5], ids=["index order", "at random"])
def test_the_global_generator_is_untouched(generator: int | None) -> None:
    before = torch.get_rng_state()
    prune_and_regrow(
        half(30),
        torch.zeros(30),
        torch.zeros(30),
        5,
        5,
        None if generator is None else rng(generator),
    )
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_count_is_exact_for_any_shape_and_ties(
    shape: list[int], levels: int, seed: int, data: st.DataObject
) -> None:
    generator = rng(seed)
    mask = torch.rand(shape, generator=generator) < torch.rand(1, generator=generator)
    prune, grow = (torch.randint(levels, shape, generator=generator).float() for _ in range(2))
    active = int(mask.sum())
    n_prune = data.draw(st.integers(0, active))
    n_grow = data.draw(st.integers(0, mask.numel() - active + n_prune))
    draws = data.draw(st.sampled_from([None, generator]))
    assert (
        prune_and_regrow(mask, prune, grow, n_prune, n_grow, draws).sum()
        == active - n_prune + n_grow
    )


@settings(deadline=None, max_examples=100)
@given(
    size=st.integers(1, 40), levels=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data()
)
def test_nothing_chosen_scores_below_anything_left(
    size: int, levels: int, seed: int, data: st.DataObject
) -> None:
    scores = torch.randint(levels, (size,), generator=rng(seed)).float()
    count = data.draw(st.integers(1, size))
    chosen = best(scores, count, rng(seed))
    assert chosen.sum() == count
    assert count == size or scores[chosen].min() >= scores[~chosen].max()


def test_growth_scores_may_be_made_from_what_pruning_kept() -> None:
    seen = []

    def scores(kept: Tensor) -> Tensor:
        seen.append(kept)
        return torch.arange(8.0)

    moved = prune_and_regrow(bits("11110000"), torch.arange(8.0), scores, n_prune=2, n_grow=1)
    assert seen[0].tolist() == bits("00110000").tolist()
    assert moved.tolist() == bits("00110001").tolist()


@pytest.mark.parametrize("kind", ["random", "tied", "clustered", "NaN nowhere near", "few allowed"])
def test_a_long_selection_is_that_of_a_full_sort(kind: str) -> None:
    """A sample of many scores brackets the last selected one; the selection must stay exact."""
    size, generator = 200_003, rng(5)
    scores = torch.rand(size, generator=generator)
    allowed = torch.rand(size, generator=generator) < (0.001 if kind == "few allowed" else 0.4)
    if kind == "tied":
        scores = (scores * 50).floor()
    if kind == "clustered":  # the sample sees other scores than the rest
        scores[::13] += 1.0
    if kind == "NaN nowhere near":
        scores[~allowed] = math.nan
    for share in (0.0001, 0.01, 0.3, 0.999, 1.0):
        count = max(1, round(share * int(allowed.sum())))
        chosen = select(scores, allowed, count, rng())
        assert int(chosen.sum()) == count
        assert not (chosen & ~allowed).any()
        best_scores = scores[allowed].sort(descending=True).values[:count]
        assert torch.equal(scores[chosen].sort(descending=True).values, best_scores)


@pytest.mark.parametrize("position", [0, 1, 130_001])
def test_one_nan_among_many_scores_raises(position: int) -> None:
    """In the sample and beside it."""
    scores = torch.rand(200_003, generator=rng())
    scores[position] = math.nan
    with pytest.raises(NaNScores):
        best(scores, 1000, rng())


# --- seeds ---------------------------------------------------------------------------------------


def test_seeded_depends_on_every_value_of_the_stream() -> None:
    streams = [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]
    draws = {torch.rand(1, generator=seeded(torch.device("cpu"), *each)).item() for each in streams}
    assert len(draws) == len(streams)


def test_seeded_is_equal_in_every_process_and_leaves_the_global_generator_alone() -> None:
    """The digest is fixed, unlike `hash`: every rank and tomorrow's run draw the same mask."""
    before = torch.get_rng_state()
    assert seeded(torch.device("cpu"), 0, 3, "fc.weight").initial_seed() == 8640601082391156305
    assert torch.equal(torch.get_rng_state(), before)


# --- over all layers -----------------------------------------------------------------------------


def test_shares_of_the_best_count_by_layer() -> None:
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b": torch.tensor([7.0, 3.0])}
    assert shares_of_best(scores, 4) == {"a": 2.0, "b": 2.0}
    assert shares_of_best(scores, 0) == {"a": 0.0, "b": 0.0}
    assert shares_of_best(scores, 6) == {"a": 4.0, "b": 2.0}


def test_shares_of_the_best_divide_places_that_tie() -> None:
    scores = {"a": torch.zeros(6), "b": torch.cat([torch.zeros(2), torch.ones(1)])}
    assert shares_of_best(scores, 5) == {"a": 3.0, "b": 2.0}


def test_a_full_layer_leaves_its_places_to_the_next_best() -> None:
    scores = {
        "a": torch.tensor([9.0, 8.0, 7.0]),
        "b": torch.tensor([6.0, 1.0]),
        "c": torch.tensor([5.0, 4.0]),
    }
    assert shares_of_best(scores, 4, {"a": 1, "b": 1, "c": 2}) == {"a": 1.0, "b": 1.0, "c": 2.0}


def test_shares_of_nan_name_the_layer() -> None:
    with pytest.raises(ValueError, match="scores of b hold NaN"):
        shares_of_best({"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}, 2)


def test_masks_and_scores_that_are_not_contiguous_are_selected_from_all_the_same() -> None:
    wide = torch.rand(16, 48, generator=rng()) < 0.5
    for mask in (wide[:, 0], wide[:, ::2], torch.tensor(True).expand(4, 4)):
        scores = torch.rand(mask.shape, generator=rng(1))
        moved = prune_and_regrow(mask, scores, scores, 2, 1, rng())
        assert torch.equal(moved, prune_and_regrow(mask.clone(), scores, scores, 2, 1, rng()))
        assert moved.sum() == mask.sum() - 1


# --- positions drawn at random -------------------------------------------------------------------


# By name: how many of 1000 positions are active, and how many grow. The first two are drawn among
# all positions, the others among the inactive ones.
DRAWS = {
    "few of many": (100, 90),
    "half are active": (500, 200),
    "most are active": (900, 20),
    "most grow": (100, 800),
    "all grow": (100, 900),
    "none grows": (100, 0),
    "nothing is inactive": (1000, 0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_as_many_positions_are_drawn_as_asked_for_and_none_is_active_already(name: str) -> None:
    active, count = DRAWS[name]
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[torch.randperm(1000, generator=rng(1))[:active]] = True
    for seed in range(20):
        before = mask.clone()
        found = draw(mask.view(20, 50), count, rng(seed))
        assert found.shape == (20, 50)
        assert torch.equal(mask, before)
        assert found.sum() == active + count
        assert found.flatten()[mask].all()


@pytest.mark.parametrize(("active", "count"), [(12, 6), (20, 2), (2, 18)])
def test_all_inactive_positions_are_drawn_equally_often(active: int, count: int) -> None:
    """Five standard deviations, over 4000 draws."""
    mask, draws, generator = torch.arange(24) < active, 4000, rng()
    hits = sum(draw(mask, count, generator).int() for _ in range(draws))
    share = count / (24 - active)
    deviation = math.sqrt(draws * share * (1 - share))
    assert ((hits[active:] - draws * share).abs() < 5 * deviation).all()
    assert (hits[:active] == draws).all()


def test_more_than_there_are_to_draw_is_refused_and_equal_generators_draw_the_same() -> None:
    with pytest.raises(ValueError, match="n_grow is 11; after pruning 10 positions are inactive"):
        draw(half(20), 11)
    for count in (3, 8):
        assert torch.equal(draw(half(20), count, rng(2)), draw(half(20), count, rng(2)))
        assert not torch.equal(draw(half(20), 3, rng(2)), draw(half(20), 3, rng(3)))


def test_masks_that_are_not_contiguous_are_drawn_from_as_others() -> None:
    mask = half(8, 3, 2, 2)
    other = mask.to(memory_format=torch.channels_last)
    assert torch.equal(draw(other, 10, rng()), draw(mask, 10, rng()))
