"""The algorithm: which weights leave a mask and which enter it. Tensors in, a new bool mask out.

`prune_and_regrow` is all of it, and `MaskScheduler` calls it for every layer at every update. The
rest of this file selects the best of many scores without sorting them.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SAMPLE = 1 << 14
"""At most about so many scores are sorted to bracket the last score that is selected."""
STRIDE = 16
"""At most one in about so many is."""
FEW = 1 << 13
"""So many scores are sorted without a bracket."""
BYTE = 255
"""The largest number in a byte."""


class NaNScores(ValueError):
    """Scores hold NaN, which has no rank."""

    def __init__(self, role: Literal["prune", "grow"] | None = None) -> None:
        name = f"{role}_scores" if role else "scores"
        super().__init__(f"{name} hold NaN, which has no rank; check the function that made them")
        self.role = role


class ActiveScores(NamedTuple):
    """Scores of the active positions alone, in any order."""

    positions: Tensor
    """In the flattened mask; what is scored at a position of -1 is passed over."""
    scores: Tensor

    @property
    def scored(self) -> Tensor:
        """Bool: which are not passed over."""
        return self.positions >= 0


def prune_and_regrow(
    mask: Tensor,
    prune_scores: Tensor | ActiveScores,
    grow_scores: Tensor | Callable[[Tensor], Tensor] | None,
    n_prune: int,
    n_grow: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute a new mask: prune `n_prune` active positions, then grow `n_grow` inactive ones.

    A position that has just been pruned is inactive, so it may grow again at once, as in the
    authors' code. The share of active positions that really leave is therefore at most `n_prune`
    over all active.

    Args:
        mask: Bool, True = active. It is read, never written.
        prune_scores: Of the mask's shape, or of the active positions alone. Those with the smallest
            scores are pruned.
        grow_scores: Of the mask's shape, or a function that makes them from the mask after pruning.
            The inactive positions with the largest scores grow. None: all have the same chance.
        n_prune: How many to prune, 0 to the number of active positions.
        n_grow: How many to grow, 0 to the number of inactive positions after pruning.
        generator: Draws among ties, on the mask's device. None takes tied positions in index order.
            Without `grow_scores` it draws what grows.

    Returns:
        A bool tensor of the mask's shape with exactly `mask.sum() - n_prune + n_grow` active
        positions.

    Raises:
        ValueError: A number is out of range, or scores are NaN (`NaNScores`).

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv
    2102.02887.

    >>> mask = torch.tensor([True, True, True, False, False, False])
    >>> weight = torch.tensor([0.5, -0.1, 0.3, 0.0, 0.0, 0.0])
    >>> gradient = torch.tensor([0.0, 0.2, 0.0, 0.1, 0.4, 0.3])
    >>> prune_and_regrow(mask, weight.abs(), gradient.abs(), n_prune=1, n_grow=1).int()
    tensor([1, 0, 1, 0, 1, 0], dtype=torch.int32)
    """
    kept = prune(mask, prune_scores, n_prune, generator)
    del prune_scores  # frees memory before the scores to grow are computed

    if grow_scores is None:
        return draw(kept, n_grow, generator)
    if callable(grow_scores):
        grow_scores = grow_scores(kept)
    return grow(kept, grow_scores, n_grow, generator)


def prune(
    mask: Tensor,
    scores: Tensor | ActiveScores,
    count: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Remove the `count` active positions with the smallest scores; see `prune_and_regrow`.

    >>> prune(torch.tensor([True, True, False]), torch.tensor([2.0, 1.0, 0.0]), 1)
    tensor([ True, False, False])
    """
    check_prune_count(count, count_true(mask))
    try:
        if isinstance(scores, Tensor):
            return mask ^ select(-as_float(scores), mask, count, generator)

        positions = scores.positions
        gone = select(-as_float(scores.scores), scores.scored, count, generator, positions)
        gone = positions.masked_select(gone).long()
        kept = mask.flatten().index_fill(0, gone, False)
        return kept.view(mask.shape)
    except NaNScores:
        raise NaNScores("prune") from None


def grow(
    mask: Tensor, scores: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Add the `count` inactive positions with the largest scores; see `prune_and_regrow`.

    >>> grow(torch.tensor([True, False, False]), torch.tensor([3.0, 1.0, 2.0]), 1)
    tensor([ True, False,  True])
    """
    check_grow_count(count, mask.numel() - count_true(mask))
    try:
        return mask ^ select(scores, ~mask, count, generator)
    except NaNScores:
        raise NaNScores("grow") from None


def draw(mask: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Add `count` inactive positions drawn at random, all with the same chance.

    Positions are drawn among all, and active ones are drawn again. So the time depends on how many
    grow, not on how many there are, unless most are active.

    >>> int(draw(torch.zeros(2, 3, dtype=torch.bool), 4).sum())
    4
    """
    inactive = check_grow_count(count, mask.numel() - count_true(mask))
    flat = mask.flatten().clone()
    if draws_among_inactive(inactive, len(flat), count):
        free = (~flat).nonzero().squeeze(1)
        flat[free[torch.randperm(inactive, generator=generator, device=mask.device)[:count]]] = True
        return flat.view(mask.shape)

    left, wanted = count, len(flat) - inactive + count
    while left:
        drawn = torch.randint(len(flat), (left,), generator=generator, device=mask.device)
        flat.index_fill_(0, drawn, True)
        left = wanted - count_true(flat)
    return flat.view(mask.shape)


def draws_among_inactive(inactive: int, size: int, count: int) -> bool:
    """Tell whether most draws among all positions would meet one that is active."""
    return inactive < size // 4 or count > inactive // 2


def check_prune_count(count: int, active: int) -> None:
    """Refuse to prune more than is active."""
    if not 0 <= count <= active:
        raise ValueError(
            f"n_prune is {count}; the mask has {active} active positions: allowed are 0 to {active}"
        )


def check_grow_count(count: int, inactive: int) -> int:
    """Refuse to grow more than is inactive, and return how many are."""
    if not 0 <= count <= inactive:
        raise ValueError(
            f"n_grow is {count}; after pruning {inactive} positions are inactive: allowed are 0 to "
            "that"
        )
    return inactive


def select(
    scores: Tensor,
    allowed: Tensor,
    count: int,
    generator: torch.Generator | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Select exactly `count` allowed positions: those with the largest scores.

    Positions are selected by index and never by a threshold, so ties cannot change the count.
    Positions that tie for the last places are drawn at random.

    Args:
        scores: One number per position, of any shape and memory format.
        allowed: Bool, of the shape of `scores`; at least `count` positions are True.
        count: How many positions to select.
        generator: Draws among ties, on the device of `scores`. None takes tied positions in index
            order.
        order: Numbers that stand for the indices in the order of ties, for 1-d `scores`.

    Returns:
        A bool tensor of the shape of `scores`.

    Raises:
        NaNScores: An allowed score is NaN, and `count` is not 0.

    >>> select(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([False, True, True, True]), 1)
    tensor([False,  True, False, False])
    """
    if count == 0:
        return torch.zeros_like(allowed)

    flat = as_float(scores).flatten()
    certain, candidates, rest = _split_search(flat, allowed.flatten(), count)
    values = flat.index_select(0, candidates)
    order = candidates if order is None else order.index_select(0, candidates)
    chosen = candidates.index_select(0, _top(values, rest, generator, order))
    return certain.index_fill_(0, chosen, True).view(allowed.shape)


def _split_search(scores: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Split the search: certain positions, remaining candidates, how many candidates to select.

    A sample brackets the last selected score from above and below. Where the bracket misses it, or
    where the scores are few, all allowed positions are candidates. NaN is always a candidate.
    """
    size = len(scores)
    if size > FEW:
        stride = max(size // SAMPLE, STRIDE) | 1  # odd: an even one could follow a dimension
        sample = scores[::stride][allowed[::stride]]
        share = count / size
        margin = 4.0 * math.sqrt(size / stride * share * (1.0 - share))  # four standard deviations
        above = math.floor(count / stride - margin)
        below = math.ceil(count / stride + margin) + 1
        if below < len(sample):
            largest = sample.topk(below).values
            certain = torch.zeros_like(allowed)
            if above > 0:
                certain = (scores > largest[above]).bitwise_and_(allowed)

            excluded = (scores <= largest[-1]).bitwise_or_(certain)
            candidates = true_positions(excluded.bitwise_not_().bitwise_and_(allowed))
            rest = count - count_true(certain)
            if 0 < rest <= len(candidates):
                return certain, candidates, rest

    return torch.zeros_like(allowed), true_positions(allowed), count


def true_positions(mask: Tensor) -> Tensor:
    """Find the True positions of a 1-d bool tensor, most of which are False.

    Eight positions are seen as one whole number first, so most of them are passed over at once.
    """
    if len(mask) % 8 or mask.storage_offset() % 8 or not mask.is_contiguous():
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    found = mask.view(-1, 8).index_select(0, words).flatten().nonzero().squeeze(1)
    return 8 * words.index_select(0, found >> 3) + (found & 7)


def _top(values: Tensor, count: int, generator: torch.Generator | None, order: Tensor) -> Tensor:
    """Find the indices of the `count` largest values of a 1-d tensor, exactly; draw among ties.

    Tied values are drawn by what `order` has for them, so that their own order plays no part.
    """
    largest = values.topk(count, sorted=False)
    threshold = largest.values.amin()  # topk ranks NaN above all numbers, and amin passes it on
    if threshold.isnan():
        raise NaNScores

    if count_true(values >= threshold) == count:
        return largest.indices

    above = (values > threshold).nonzero().squeeze(1)
    tied = (values == threshold).nonzero().squeeze(1)
    tied = tied[order[tied].argsort()]
    if generator is not None:
        tied = tied[torch.randperm(len(tied), generator=generator, device=values.device)]
    return torch.cat([above, tied[: count - len(above)]])


def shares_of_best(
    scores: Mapping[str, Tensor], count: int, most: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Share out the `count` largest scores of all layers together: how many lie in each layer.

    Args:
        scores: One number per position, by layer; of any shapes, on any devices.
        count: How many positions to select, 0 to all.
        most: Upper bounds by layer. What exceeds a bound goes to the next best scores of other
            layers.

    Returns:
        Numbers that sum to `count`. They are whole unless positions tie for the last places. Each
        layer then gets its share of the tied positions.

    Raises:
        ValueError: Scores are NaN.

    >>> shares_of_best({"a": torch.tensor([5.0, 4.0, 1.0]), "b": torch.tensor([3.0, 0.0])}, 3)
    {'a': 2.0, 'b': 1.0}
    """
    if most is None:
        most = {name: tensor.numel() for name, tensor in scores.items()}

    full: dict[str, int] = {}  # layers at their upper bound
    while True:
        left = count - sum(full.values())
        open_layers = {name: tensor for name, tensor in scores.items() if name not in full}
        shares = _shares_of_best(open_layers, left) if left else dict.fromkeys(open_layers, 0.0)
        above = {name: most[name] for name, share in shares.items() if share > most[name]}
        if not above:
            shares |= full
            return {name: float(shares[name]) for name in scores}
        full |= above


def _shares_of_best(scores: Mapping[str, Tensor], count: int) -> dict[str, float]:
    flat = {name: tensor.detach().flatten().float().cpu() for name, tensor in scores.items()}
    threshold = torch.cat([*flat.values()]).topk(count, sorted=False).values.amin()
    if threshold.isnan():
        names = [name for name, tensor in scores.items() if tensor.isnan().any()]
        raise ValueError(
            f"scores of {', '.join(names)} hold NaN, which has no rank; scores must be numbers"
        )

    above = {name: count_true(tensor > threshold) for name, tensor in flat.items()}
    tied = {name: count_true(tensor == threshold) for name, tensor in flat.items()}
    share = (count - sum(above.values())) / sum(tied.values())
    return {name: above[name] + share * tied[name] for name in scores}


def count_true(mask: Tensor) -> int:
    """Count the True positions of a bool tensor."""
    return int(true_count(mask))


def true_count(mask: Tensor) -> Tensor:
    """Count the True positions of a bool tensor, as a tensor on its device.

    Eight positions are one whole number. The bytes of a sum of 255 of these do not overflow.
    """
    counted = mask.numel() // (8 * BYTE) * 8 * BYTE
    if not counted or mask.storage_offset() % 8 or not mask.is_contiguous():
        return mask.count_nonzero()
    flat = mask.view(-1)
    sums = flat[:counted].view(torch.int64).view(-1, BYTE).sum(1)
    return sums.view(torch.uint8).sum() + flat[counted:].count_nonzero()


def as_float(scores: Tensor) -> Tensor:
    """Convert whole numbers and bools to float64, so that scores can be negated."""
    return scores if scores.is_floating_point() else scores.double()


def seeded(device: torch.device, *stream: object) -> torch.Generator:
    """Make a generator seeded by the values of `stream` alone, such as (seed, update, name).

    So every rank and every resumed run draws the same numbers.

    >>> cpu = torch.device("cpu")
    >>> one, two = seeded(cpu, 0, "fc.weight"), seeded(cpu, 0, "fc.weight")
    >>> torch.equal(torch.rand(2, generator=one), torch.rand(2, generator=two))
    True
    """
    digest = hashlib.blake2b(repr(stream).encode(), digest_size=8).digest()
    # Shifted, since some devices take seeds of 63 bits.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
