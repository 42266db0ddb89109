"""Over positions alone an update moves what it moves with masks, also in weights of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itop_prune import sparse_topology, topology
from itop_prune.layers.sparse_storage import mask_of
from itop_prune.topology import ActiveScores, NaNScores, seeded

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_update_is_the_one_with_masks(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300), "size")
    slots = data.draw(st.integers(0, size), "slots")
    seed = data.draw(st.integers(0, 999), "seed")
    generator = seeded(CPU, seed)
    positions = torch.randperm(size, generator=generator)[:slots].to(torch.int32)
    positions[torch.rand(slots, generator=generator) < 0.2] = -1
    scores = torch.randint(5, (slots,), generator=generator).float()  # with ties
    active = int((positions >= 0).sum())
    n_prune = data.draw(st.integers(0, active), "prune")
    n_grow = data.draw(st.integers(0, size - active + n_prune), "grow")

    before = mask_of(positions, (size,))
    after = topology.prune_and_regrow(
        before, ActiveScores(positions, scores), None, n_prune, n_grow, seeded(CPU, seed, "draws")
    )
    stayed, entered = sparse_topology.prune_and_regrow(
        positions, scores, size, n_prune, n_grow, seeded(CPU, seed, "draws")
    )
    assert torch.equal(stayed, (positions >= 0) & after[positions.long()])
    assert entered.tolist() == (after & ~before).nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [2**31 - 1, 2**40, 2**62])
def test_of_any_number_of_places_exactly_as_many_are_drawn_and_none_twice(size: int) -> None:
    taken = sparse_topology.draw(torch.empty(0, dtype=torch.int64), size, 5000, seeded(CPU, 0))
    more = sparse_topology.draw(taken, size, 5000, seeded(CPU, 1))
    both = torch.cat([taken, more])
    assert len(taken) == len(more) == 5000
    assert len(both.unique()) == 10_000
    assert int(both.min()) >= 0
    assert int(both.max()) < size
    quarters = torch.bincount(both // (size // 4)).tolist()[:4]  # 2,500 each, deviation 43
    assert all(2200 < count < 2800 for count in quarters)


def test_a_place_that_is_drawn_twice_or_taken_is_drawn_again() -> None:
    """Of 100 places 50 are taken, and 25 are drawn: most draws of the first round would miss."""
    taken = torch.arange(0, 100, 2)
    for seed in range(20):
        drawn = sparse_topology.draw(taken, 100, 25, seeded(CPU, seed))
        assert len(drawn.unique()) == 25
        assert (drawn % 2 == 1).all()


def test_numbers_out_of_range_and_nan_are_refused() -> None:
    positions, scores = torch.tensor([0, 2]), torch.tensor([1.0, 2.0])
    for n_prune, n_grow, message in [(3, 0, "n_prune is 3; .* 0 to 2"), (0, 3, "n_grow is 3")]:
        with pytest.raises(ValueError, match=message):
            sparse_topology.prune_and_regrow(positions, scores, 4, n_prune, n_grow)
    with pytest.raises(NaNScores, match="prune_scores"):
        sparse_topology.prune_and_regrow(positions, scores * torch.nan, 4, 1, 1)
