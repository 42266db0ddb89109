"""N:M patterns such as 2:4: of every M consecutive weights along the inputs, N are active.

Dimension 1 holds the inputs of a linear layer and the input channels of a convolution; other layers
have them in another one, `dim`. A group is M of them at equal other indices, as kernels for 2:4
sparsity read them. Tensors in, masks out, as in `topology`.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from itop_prune import topology

Pattern = tuple[int, int]

AT_ONCE = 1 << 20
"""Positions ranked at once, at some 20 bytes each."""


def parse(pattern: object) -> Pattern | None:
    """Read N and M from a pattern "N:M"; None stays None.

    Raises:
        ValueError: It is no pattern, or the number that YAML makes of one without quotes.

    >>> parse("2:4")
    (2, 4)
    """
    if pattern is None:
        return None
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        raise ValueError(
            f"pattern is {pattern}, a number; allowed is text N:M: without quotes YAML reads 2:4 "
            "as 124, "
            'so write pattern: "2:4"'
        )
    numbers = (
        re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", pattern) if isinstance(pattern, str) else None
    )
    n, m = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= n < m:
        raise ValueError(
            f"pattern is {pattern!r}; allowed is text N:M with whole numbers, N from 1 and below "
            "M: '2:4' keeps 2 of every 4 weights"
        )
    return n, m


def best_of_groups(
    scores: Tensor, n: int, m: int, generator: torch.Generator | None = None, dim: int = 1
) -> Tensor:
    """Select exactly `n` positions of every group of `m`: those with the largest scores in it.

    Args:
        scores: One number per position, of two or more dimensions and any memory format.
        n: How many to select in a group, 0 to `m`.
        m: How many positions a group has, at least 1.
        generator: Draws among ties, on the device of `scores`. None takes tied positions in index
            order.
        dim: The dimension of the inputs, along which groups are formed; a multiple of `m`.

    Returns:
        A bool mask of the shape of `scores`.

    Raises:
        ValueError: The groups can't be formed, `n` is out of range, or scores are NaN.

    >>> best_of_groups(torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 7.0, 6.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    return grow_in_groups(nothing, scores, n, m, generator, dim)


def grow_in_groups(
    kept: Tensor,
    scores: Tensor,
    n: int,
    m: int,
    generator: torch.Generator | None = None,
    dim: int = 1,
) -> Tensor:
    """Grow the best inactive positions of every group of `m`, until `n` of the group are active.

    Args:
        kept: Bool, True = active; at most `n` in a group. It is read, never written.
        scores: Of the mask's shape. Among the inactive positions of a group the largest grow.
        n: How many positions of a group are active afterwards, 0 to `m`.
        m: How many positions a group has.
        generator: Draws among ties, on the mask's device. None takes tied positions in index order.
        dim: The dimension of the inputs, along which groups are formed; a multiple of `m`.

    Returns:
        A bool mask of the shape of `kept`.

    Raises:
        ValueError: The groups can't be formed, `n` is out of range, a group has more than `n`
            active positions, or scores are NaN.

    >>> kept = torch.tensor([[True, False, False, False, False, True, True, False]])
    >>> grow_in_groups(kept, torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0, 0.0, 0.0, 9.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    if m < 1 or kept.dim() <= max(1, dim) or kept.shape[dim] % m:
        raise ValueError(
            f"groups of {m} can't be formed along dimension {dim} of {tuple(kept.shape)}; it must "
            "be divisible"
        )
    if dim != 1:
        kept, scores = kept.movedim(dim, 1), scores.movedim(dim, 1)
        return grow_in_groups(kept, scores, n, m, generator).movedim(1, dim)

    if not 0 <= n <= m:
        raise ValueError(f"asked for {n} of every {m} positions; allowed are 0 to {m}")
    if (scores.isnan() & ~kept).any():
        raise topology.NaNScores("grow")
    most = int(_by_place(kept, m).sum(0).amax()) if kept.numel() else 0
    if most > n:
        raise ValueError(f"a group of {m} has {most} active positions; allowed are 0 to {n}")

    scores = topology.as_float(scores)
    rows = max(1, AT_ONCE * len(kept) // max(1, kept.numel()))
    parts = zip(kept.split(rows), scores.split(rows), strict=True)
    return kept | torch.cat([_grown(*part, n, m, generator) for part in parts])


def _grown(
    kept: Tensor, scores: Tensor, n: int, m: int, generator: torch.Generator | None
) -> Tensor:
    """Find the positions that grow."""
    active = _by_place(kept, m).contiguous()
    missing = n - active.sum(0, dtype=torch.int32)

    values = _by_place(scores, m).clone(memory_format=torch.contiguous_format)
    values.masked_fill_(active, -math.inf)
    grown = _ranks(values, active, generator) < missing
    return grown.movedim(0, -1).flatten(-2).movedim(-1, 1)


def holds(mask: Tensor, n: int, m: int, dim: int = 1) -> bool:
    """Tell whether exactly `n` of every group of `m` along a dimension are active.

    >>> mask = torch.tensor([[True, False, False, True]])
    >>> holds(mask, 2, 4), holds(mask, 1, 2)
    (True, True)
    """
    if mask.dim() <= max(1, dim) or mask.shape[dim] % m:
        return False
    return bool((_by_place(mask.movedim(dim, 1), m).sum(0, dtype=torch.int32) == n).all())


def check_held(
    masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern], dims: Mapping[str, int]
) -> None:
    """Refuse masks that do not hold their patterns along their dimensions.

    Raises:
        ValueError: Some do not; the message names them.
    """
    broken = [
        f"{name} ({n}:{m})"
        for name, (n, m) in patterns.items()
        if not holds(masks[name], n, m, dims[name])
    ]
    if broken:
        raise ValueError(
            f"the masks of {', '.join(broken)} do not hold their patterns, and something else has "
            "written into them; load the masks again, or call itop_prune.remove and "
            "itop_prune.apply"
        )


def _by_place(tensor: Tensor, m: int) -> Tensor:
    """View a tensor by the place in the group: (m, ..., groups along dimension 1)."""
    return tensor.movedim(1, -1).unflatten(-1, (-1, m)).movedim(-1, 0)


def _ranks(values: Tensor, last: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rank the places of every group, 0 for the largest value; places in `last` come last.

    One of every two places is ahead, so no rank occurs twice in a group. Comparing all pairs is
    faster than sorting for groups of up to about 32.
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
