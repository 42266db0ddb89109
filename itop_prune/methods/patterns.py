"""N:M patterns such as 2:4: of every M consecutive weights along dimension 1 N are active. Pure tensors, as `topology`.

Dimension 1 is the inputs of a linear layer and the input channels of a convolution; a group is M of
them at equal other indices, as kernels for 2:4 sparsity read them.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.counting import fetched

Pattern = tuple[int, int]

AT_ONCE = 1 << 20
"""Positions looked at at once, which takes some 20 bytes for each."""


def parse(method: object) -> Pattern | None:
    """Return N and M of a method "N:M", or None where the method is something else.

    Raises: ValueError: It is a pattern that can't be, or a number: what YAML makes of a pattern
        without quotes.

    >>> parse("2:4")
    (2, 4)
    """
    if isinstance(method, int) and not isinstance(method, bool):
        raise ValueError(
            f"method is {method}, a number; allowed are names, functions and patterns N:M in quotes: without them YAML "
            'reads 2:4 as 124, so write method: "2:4"'
        )
    if not isinstance(method, str) or ":" not in method:
        return None
    numbers = re.fullmatch("([0-9]+):([0-9]+)", method)
    n, m = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= n < m:
        raise ValueError(
            f"method is {method!r}; allowed in a pattern N:M are whole numbers, N from 1 and below M: '2:4' keeps 2 of "
            "every 4 weights"
        )
    return n, m


def best_of_groups(
    scores: Tensor, n: int, m: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return a bool mask of exactly `n` positions of every group of `m`: those with the largest scores in it.

    Args: scores: One number per position, of two or more dimensions and any memory format;
        dimension 1 a multiple of `m`. n: How many to choose in a group, 0 to `m`. m: How many
        positions a group has, at least 1. generator: Draws among ties, on the device of `scores`;
        None takes tied positions in index order.

    Raises: ValueError: The groups can't be formed, `n` is out of range, or scores are NaN on a
        device that tells at once; on another one nothing is chosen then.

    >>> best_of_groups(torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 7.0, 6.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    return grow_in_groups(torch.zeros_like(scores, dtype=torch.bool), scores, n, m, generator)


def grow_in_groups(
    kept: Tensor, scores: Tensor, n: int, m: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mask with the best inactive positions of every group of `m`, so many that `n` of it are active.

    The host does not wait for the device: on one that would have to be asked, nothing grows where
    scores are NaN.

    Args:
        kept: Bool, True = active; at most `n` in a group. It is read, never written.
        scores: Of the mask's shape; among the inactive positions of a group the largest grow.
        n: How many of a group are active afterwards, 0 to `m`.
        m: How many positions a group has; dimension 1 is a multiple of it.
        generator: Draws among ties, on the mask's device; None takes tied positions in index order.

    Raises: ValueError: The groups can't be formed, or `n` is out of range. On a device that tells
        at once: a group has more than `n`, or scores are NaN.

    >>> kept = torch.tensor([[True, False, False, False, False, True, True, False]])
    >>> grow_in_groups(kept, torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0, 0.0, 0.0, 9.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    if m < 1 or kept.dim() < 2 or kept.shape[1] % m:
        raise ValueError(
            f"groups of {m} can't be formed along dimension 1 of {tuple(kept.shape)}; it must be divisible"
        )
    if not 0 <= n <= m:
        raise ValueError(f"asked for {n} of every {m} positions; allowed are 0 to {m}")
    scores = topology.as_numbers(scores)
    numbers = ~(scores.isnan() & ~kept).any()
    most = _places(kept, m).sum(0, dtype=torch.int32).amax() if kept.numel() else kept.new_zeros(())
    if kept.device.type in topology.ANSWERS_AT_ONCE:
        if not numbers:
            raise topology.NaNScores(topology.NAN)
        if most > n:
            raise ValueError(
                f"a group of {m} has {int(most)} active positions; allowed are 0 to {n}"
            )
    rows = max(1, AT_ONCE * len(kept) // max(1, kept.numel()))
    parts = zip(kept.split(rows), scores.split(rows), strict=True)
    return kept | (torch.cat([_best(*part, n, m, generator) for part in parts]) & numbers)


def _best(
    kept: Tensor, scores: Tensor, n: int, m: int, generator: torch.Generator | None
) -> Tensor:
    """Return the positions that grow."""
    active = _places(kept, m).contiguous()
    lost = n - active.sum(0, dtype=torch.int32)
    values = (
        _places(scores, m)
        .clone(memory_format=torch.contiguous_format)
        .masked_fill_(active, -math.inf)
    )
    grown = _places_in_order(values, active, generator) < lost
    return grown.movedim(0, -1).flatten(-2).movedim(-1, 1)


def holds(mask: Tensor, n: int, m: int) -> Tensor:
    """Return whether exactly `n` of every group of `m` are active, a bool on the mask's device.

    >>> holds(torch.tensor([[True, False, False, True]]), 2, 4), holds(torch.tensor([[True, False, False, True]]), 1, 2)
    (tensor(True), tensor(True))
    """
    if mask.dim() < 2 or mask.shape[1] % m:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    return (_places(mask, m).sum(0, dtype=torch.int32) == n).all()


def check_held(masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> None:
    """Refuse masks that do not hold their patterns; the host waits once, for all of them.

    Raises:
        ValueError: Some do not, with their names.
    """
    held = fetched({name: holds(masks[name], *pattern) for name, pattern in patterns.items()})
    if odd := [f"{name} ({n}:{m})" for name, (n, m) in patterns.items() if not held[name]]:
        raise ValueError(
            f"the masks of {', '.join(odd)} do not hold their patterns, and something else has written into them; load "
            "the masks again, or call itop_prune.remove and itop_prune.apply"
        )


def _places(tensor: Tensor, m: int) -> Tensor:
    """Return the tensor seen by the place in the group: (m, ..., groups along dimension 1)."""
    return tensor.movedim(1, -1).unflatten(-1, (-1, m)).movedim(-1, 0)


def _places_in_order(values: Tensor, last: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the rank of each place among those of its group, 0 for the largest value; what is `last` after all others.

    Of every two places one is ahead, so no rank is there twice. Comparing all pairs is faster than
    sorting groups of up to about 32.
    """
    draws = torch.zeros(values.shape, device=values.device)
    if generator is not None:
        draws.uniform_(generator=generator)
    draws.masked_fill_(last, -1.0)
    ranks = torch.zeros(values.shape, dtype=torch.int32, device=values.device)
    for place in range(1, len(values)):
        one, others = values[place], values[:place]
        ahead = (others > one) | ((others == one) & (draws[:place] >= draws[place]))
        ranks[place] += ahead.sum(0, dtype=torch.int32)
        ranks[:place] += ~ahead
    return ranks
