"""The algorithm over positions alone, for weights whose dense mask would be large or too large.

For magnitude pruning and random growth it needs no more than the active weights. With one generator
it moves the same weights as `itop_prune.topology` does with masks.
"""

import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.topology import NaNScores, as_float, select, true_positions


def prune_and_regrow(
    positions: Tensor,
    scores: Tensor,
    size: int,
    n_prune: int,
    n_grow: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune the smallest scores, and grow as many positions at random as are asked for.

    Args:
        positions: (slots,), in the flattened weight; -1 marks a free slot.
        scores: (slots,); those of free slots are passed over.
        size: How many weights the dense tensor has.
        n_prune: How many to prune, 0 to the number of active positions.
        n_grow: How many to grow, 0 to the number of inactive positions after pruning.
        generator: Draws among ties, and what grows.

    Returns:
        Bool, (slots,): which slots keep their weight. And the positions that enter, in rising
        order. A position that is pruned and grown again at once keeps its slot.

    Raises:
        ValueError: A number is out of range, or scores are NaN (`NaNScores`).

    >>> positions, sizes = torch.tensor([3, -1, 0]), torch.tensor([0.5, 0.0, 0.1])
    >>> stayed, entered = prune_and_regrow(positions, sizes, size=4, n_prune=1, n_grow=0)
    >>> stayed.tolist(), entered.tolist()
    ([True, False, False], [])
    """
    used = positions >= 0
    active = topology.count_true(used)
    topology.check_prune_count(n_prune, active)
    try:
        gone = select(-as_float(scores), used, n_prune, generator, positions)
    except NaNScores:
        raise NaNScores("prune") from None

    kept = positions.masked_select(used & ~gone).sort().values
    grown = draw(kept, size, n_grow, generator)
    again = gone & contains(grown, positions)
    entered = grown
    if topology.count_true(again):
        entered = grown[~contains(positions.masked_select(again).sort().values, grown)]
    return (used & ~gone) | again, entered


def draw(taken: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw positions that are not taken, all with the same chance, as `topology.draw` does.

    Args:
        taken: (n,), in rising order.
        size: Positions are below it.
        count: How many to draw.
        generator: On the device of `taken`.

    Returns:
        (count,), in rising order, of the type of `taken`.

    >>> draw(torch.tensor([0, 2]), size=3, count=1)
    tensor([1])
    """
    inactive = topology.check_grow_count(count, size - len(taken))
    if topology.draws_among_inactive(inactive, size, count):
        mask = torch.zeros(size, dtype=torch.bool, device=taken.device)
        mask.index_fill_(0, taken.long(), True)
        return true_positions(topology.draw(mask, count, generator) ^ mask).to(taken.dtype)

    drawn = taken.new_empty(0, dtype=torch.int64)
    while len(drawn) < count:
        left = (count - len(drawn),)
        more = torch.randint(size, left, generator=generator, device=taken.device)
        drawn = torch.cat([drawn, more[~contains(taken, more)]]).unique()
    return drawn.to(taken.dtype)


def contains(rising: Tensor, places: Tensor) -> Tensor:
    """Tell which places are among those of a tensor in rising order.

    >>> contains(torch.tensor([1, 4]), torch.tensor([4, 2]))
    tensor([ True, False])
    """
    if not len(rising):
        return torch.zeros_like(places, dtype=torch.bool)
    nearest = torch.searchsorted(rising, places.to(rising.dtype)).clamp_(max=len(rising) - 1)
    return rising.index_select(0, nearest) == places
