"""The algorithm: which weights leave a mask and which enter it. Pure tensors in, a new bool mask out.

`prune_and_regrow` is all of it. `MaskScheduler` does the same by `select_each`, which checks no
counts, and so never makes the host wait for a GPU.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from itop_prune.ranking import NAN, NaNScores, narrowed, ones, ranked, top

ANSWERS_AT_ONCE = {"cpu"}
"""Kinds of devices that can be asked for a count in passing; on others the host would wait for all that is queued."""


def prune_and_regrow(
    mask: Tensor,
    prune_scores: Tensor,
    grow_scores: Tensor,
    n_prune: int,
    n_grow: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a new mask: the `n_prune` worst active positions leave, then the `n_grow` best inactive ones enter.

    A position that has just been pruned is inactive and may grow again at once, as in the authors'
    code; so the share of active positions that are inactive afterwards is at most `n_prune` over
    the active ones.

    Args:
        mask: Bool, True = active. It is read, never written.
        prune_scores: Of the mask's shape; among active positions the smallest are pruned.
        grow_scores: Of the mask's shape; among inactive positions the largest grow.
        n_prune: How many to prune, 0 to the number of active positions.
        n_grow: How many to grow, 0 to the number of inactive positions after pruning.
        generator: Draws among ties, on the mask's device; None takes tied positions in index order.

    Returns: A bool tensor of the mask's shape with exactly `mask.sum() - n_prune + n_grow` active
        positions.

    Raises:
        ValueError: A number is out of range, or scores are NaN.

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv
    2102.02887.

    >>> mask = torch.tensor([True, True, True, False, False, False])
    >>> weight = torch.tensor([0.5, -0.1, 0.3, 0.0, 0.0, 0.0])
    >>> gradient = torch.tensor([0.0, 0.2, 0.0, 0.1, 0.4, 0.3])
    >>> prune_and_regrow(mask, weight.abs(), gradient.abs(), n_prune=1, n_grow=1).int()
    tensor([1, 0, 1, 0, 1, 0], dtype=torch.int32)
    """
    kept = prune(mask, prune_scores, n_prune, generator)
    return grow(kept, grow_scores, n_grow, generator)


def prune(
    mask: Tensor, scores: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mask without its `count` active positions of the smallest scores; see `prune_and_regrow`.

    >>> prune(torch.tensor([True, True, False]), torch.tensor([2.0, 1.0, 0.0]), 1)
    tensor([ True, False, False])
    """
    active = int(ones(mask))
    if not 0 <= count <= active:
        raise ValueError(
            f"n_prune is {count}; the mask has {active} active positions: allowed are 0 to {active}"
        )
    return mask ^ _whole(select(scores, mask, count, generator, smallest=True), count)


def grow(
    mask: Tensor, scores: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mask with its `count` inactive positions of the largest scores; see `prune_and_regrow`.

    >>> grow(torch.tensor([True, False, False]), torch.tensor([3.0, 1.0, 2.0]), 1)
    tensor([ True, False,  True])
    """
    inactive = mask.numel() - int(ones(mask))
    if not 0 <= count <= inactive:
        raise ValueError(
            f"n_grow is {count}; after pruning {inactive} positions are inactive: allowed are 0 to that"
        )
    return mask ^ _whole(select(scores, ~mask, count, generator), count)


def _whole(chosen: Tensor, count: int) -> Tensor:
    """Return what was selected, if it is as many as asked for."""
    if ones(chosen) != count:
        raise NaNScores(NAN)
    return chosen


def best(scores: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a bool mask of exactly `count` positions: those with the largest scores.

    Positions are chosen by index and never by a threshold, so that ties cannot change the count.
    Positions that tie for the last places are drawn at random.

    Args: scores: One number per position, of any shape and memory format; NaN is an error. count:
        How many positions to choose, 0 to `scores.numel()`. generator: Draws among ties, on the
        device of `scores`; None takes tied positions in index order.

    Raises:
        ValueError: `count` is out of range, or scores are NaN.

    >>> best(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2)
    tensor([ True, False,  True, False])
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(
            f"asked for {count} of {scores.numel()} positions; allowed are 0 to {scores.numel()}"
        )
    flat = scores.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.index_fill_(0, top(flat, count, generator), True).view(scores.shape)


def select(
    scores: Tensor,
    allowed: Tensor,
    count: int,
    generator: torch.Generator | None = None,
    smallest: bool = False,
) -> Tensor:
    """Return a bool mask of the `count` allowed positions of the largest scores, or of the smallest.

    It is what `prune` and `grow` do, without their checks: at least `count` positions must be
    allowed. So the host need not wait for the device. Where scores are NaN a CPU raises, and on
    another device none is chosen.

    >>> select(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([False, True, True, True]), 1)
    tensor([False,  True, False, False])
    """
    if count == 0:
        return torch.zeros_like(allowed)
    if allowed.device.type not in ANSWERS_AT_ONCE:
        return select_each([scores], [allowed], count, [generator], smallest)[0]
    flat, open_ones = as_numbers(scores.flatten()), allowed.flatten()
    chosen, places, rest = narrowed(flat, open_ones, count, smallest)
    values = flat.index_select(0, places)
    places = places[top(-values if smallest else values, rest, generator)]
    return chosen.index_fill_(0, places, True).view(allowed.shape)


def select_each(
    scores: Iterable[Tensor],
    allowed: Sequence[Tensor],
    count: int,
    generators: Sequence[torch.Generator | None],
    smallest: bool = False,
) -> list[Tensor]:
    """Do what `select` does for each of several layers of one size; where the host would wait, for all at once.

    >>> both = [torch.tensor([False, True, True]), torch.tensor([True, True, False])]
    >>> draws = [seeded(torch.device("cpu"), name) for name in ("a", "b")]
    >>> select_each([torch.tensor([3.0, 2.0, 1.0])] * 2, both, 1, draws)
    [tensor([False,  True, False]), tensor([ True, False, False])]
    """
    if count and allowed[0].device.type not in ANSWERS_AT_ONCE:
        return _select_rows(
            _in_rows(map(as_numbers, scores), len(allowed)), allowed, count, generators, smallest
        )
    layers = zip(scores, allowed, generators, strict=True)
    return [
        select(part, open_ones, count, generator, smallest) for part, open_ones, generator in layers
    ]


def _select_rows(
    scores: Tensor,
    allowed: Sequence[Tensor],
    count: int,
    generators: Sequence[torch.Generator | None],
    smallest: bool,
) -> list[Tensor]:
    """Do what `select` does in each row of `scores`, one for each of `allowed`."""
    open_ones = (
        allowed[0].flatten()[None]
        if len(allowed) == 1
        else torch.stack([mask.flatten() for mask in allowed])
    )
    closed, values = ~open_ones, scores
    values = (
        (-values).masked_fill_(closed, -math.inf)
        if smallest
        else values.masked_fill(closed, -math.inf)
    )
    del scores, closed  # where nobody else holds them, they make room
    chosen = ranked(values, open_ones, count, generators)
    return [row.view(mask.shape) for row, mask in zip(chosen, allowed, strict=True)]


def _in_rows(tensors: Iterable[Tensor], count: int) -> Tensor:
    """Return tensors of one size as rows; each is copied before the next is asked for, and one alone is not copied."""
    rows = torch.empty(0)
    for row, tensor in enumerate(tensors):
        if count == 1:
            return tensor.flatten()[None]
        if row == 0:
            rows = tensor.new_empty(count, tensor.numel())
        elif tensor.dtype != rows.dtype:
            rows = rows.to(torch.promote_types(rows.dtype, tensor.dtype))
        rows[row].view(tensor.shape).copy_(tensor)
    return rows


def shares_of_best(
    scores: Mapping[str, Tensor], count: int, most: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return how many of the `count` largest scores of all layers together lie in each layer.

    Args: scores: One number per position, by layer; of any shapes, on any devices. count: How many
        positions to choose, 0 to all. most: Upper bounds by layer; what a full layer may not have
        goes to the next best of the others.

    Returns: Numbers that sum to `count`. They are whole, unless positions tie for the last places:
        then each layer has its share of those.

    Raises:
        ValueError: Scores are NaN.

    >>> shares_of_best({"a": torch.tensor([5.0, 4.0, 1.0]), "b": torch.tensor([3.0, 0.0])}, 3)
    {'a': 2.0, 'b': 1.0}
    """
    full: dict[str, int] = {}
    most = most or {name: tensor.numel() for name, tensor in scores.items()}
    while True:
        left = count - sum(full.values())
        open_ones = {name: tensor for name, tensor in scores.items() if name not in full}
        shares = _shares_of_best(open_ones, left) if left else dict.fromkeys(open_ones, 0.0)
        above = {name: most[name] for name, share in shares.items() if share > most[name]}
        if not above:
            return {name: float(full[name]) if name in full else shares[name] for name in scores}
        full |= above


def _shares_of_best(scores: Mapping[str, Tensor], count: int) -> dict[str, float]:
    flat = torch.cat([tensor.detach().flatten().float().cpu() for tensor in scores.values()])
    threshold = flat.topk(count, sorted=False).values.amin()
    if threshold.isnan():
        names = [name for name, tensor in scores.items() if tensor.isnan().any()]
        raise ValueError(
            f"scores of {', '.join(names)} hold NaN, which has no rank; scores must be numbers"
        )
    parts = flat.split([tensor.numel() for tensor in scores.values()])
    above = {name: int(ones(part > threshold)) for name, part in zip(scores, parts, strict=True)}
    tied = {name: int(ones(part == threshold)) for name, part in zip(scores, parts, strict=True)}
    share = (count - sum(above.values())) / sum(tied.values())
    return {name: above[name] + share * tied[name] for name in scores}


def as_numbers(scores: Tensor) -> Tensor:
    """Return scores that can be negated: whole numbers and bools as float64."""
    return scores if scores.is_floating_point() else scores.double()


def seeded(device: torch.device, *words: object) -> torch.Generator:
    """Return a generator seeded by words alone, such as (seed, update, name): equal on all ranks and after a resume.

    >>> a, b = (torch.rand(2, generator=seeded(torch.device("cpu"), 0, "fc.weight")) for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
