"""How the best of many scores are found without sorting them: in a long tensor by a sample, on a GPU without a wait."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 14
"""About how many scores are ranked to guess between which two the last of the chosen lies."""
NAN = "scores hold NaN, which has no rank; scores must be numbers: look at the criterion"


class NaNScores(ValueError):
    """Scores hold NaN: an error of its own, for those who know whose scores they are."""


def top(values: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return the indices of the `count` largest values, of a 1-d tensor; those that tie for the last places drawn."""
    if count == 0:
        return torch.zeros(0, dtype=torch.long, device=values.device)
    chosen = values.topk(count, sorted=False)
    threshold = chosen.values.amin()  # NaN is above all, and makes this NaN
    if threshold.isnan():
        raise NaNScores(NAN)
    if (values >= threshold).count_nonzero() == count:
        return chosen.indices
    above, tied = (
        (values > threshold).nonzero().squeeze(1),
        (values == threshold).nonzero().squeeze(1),
    )
    if generator is not None:
        tied = tied[torch.randperm(len(tied), generator=generator, device=values.device)]
    return torch.cat([above, tied[: count - len(above)]])


def narrowed(
    scores: Tensor, allowed: Tensor, count: int, smallest: bool
) -> tuple[Tensor, Tensor, int]:
    """Return a mask of what is surely among the `count` best of what is allowed, where the rest is, and its count.

    A sample tells two scores between which the last of the chosen lies. Should it mislead, or be
    all there is, nothing is sure. Everything is 1-d; NaN is never sure, and always among where the
    rest is.
    """
    size = len(scores)
    stride = size // SAMPLE | 1  # odd, so that it does not keep step with a dimension of the weight
    if stride > 1:
        sample, share = scores[::stride][allowed[::stride]], count / size
        spread = 4.0 * math.sqrt(size / stride * share * (1.0 - share))  # four standard deviations
        first, last = math.floor(count / stride - spread), math.ceil(count / stride + spread) + 1
        if last < len(sample):
            best = sample.topk(last, largest=not smallest).values
            better, out = (torch.lt, torch.ge) if smallest else (torch.gt, torch.le)
            sure = (
                better(scores, best[first]).bitwise_and_(allowed)
                if first > 0
                else torch.zeros_like(allowed)
            )
            places = positions(
                out(scores, best[-1]).bitwise_or_(sure).lt_(allowed)
            )  # of bools: allowed and not these
            rest = count - int(ones(sure))
            if 0 < rest <= len(places):
                return sure, places, rest
    return torch.zeros_like(allowed), allowed.nonzero().squeeze(1), count


def ones(mask: Tensor) -> Tensor:
    """Return how many positions of a bool tensor are True; in a long one on a CPU words of eight are added.

    >>> ones(torch.tensor([[True, False], [True, True]]))
    tensor(3)
    """
    if not _has_words(mask):
        return mask.count_nonzero()
    words = mask.view(-1).view(torch.int64)
    together = max(
        math.gcd(len(words), most) for most in (128, 192, 240)
    )  # a byte holds the sum of 255
    return words.view(-1, together).sum(1).view(torch.uint8).sum()


def positions(mask: Tensor) -> Tensor:
    """Return where a 1-d bool tensor is True, in order; where that is seldom, words without one are left out first.

    >>> positions(torch.tensor([False, True, True]))
    tensor([1, 2])
    """
    if not _has_words(mask) or 20 * ones(mask) > len(mask):
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)  # word w holds the positions from 8 w
    found = mask.view(-1, 8).index_select(0, words).flatten().nonzero().squeeze(1)
    return 8 * words.index_select(0, found >> 3) + (found & 7)


def _has_words(mask: Tensor) -> bool:
    """Return whether a mask can be read in words of eight positions, and is long enough for that to be faster."""
    in_words = (
        mask.is_contiguous() and mask.numel() % 8 == 0 and int(mask.storage_offset()) % 8 == 0
    )
    return in_words and mask.numel() >= SAMPLE and mask.device.type == "cpu"


def ranked(
    values: Tensor, allowed: Tensor, count: int, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Return a mask of the `count` largest values of each row, in sizes that are known beforehand: nobody has to wait.

    Values are 2-d, -inf where nothing is allowed, and overwritten: room and operations are what a
    GPU takes time for. Of half types ties are drawn in float32: they have few numbers themselves.
    Each row has a generator of its own, or none has.
    """
    threshold = values.topk(count, sorted=False).values.amin(
        -1, keepdim=True
    )  # NaN is above all, and makes this NaN
    above, level = values > threshold, (values == threshold) & allowed
    if None in generators:
        size = values.shape[-1]
        draws = (2.0 - torch.arange(size, dtype=torch.float64, device=values.device) / size).repeat(
            len(values), 1
        )
    else:
        draws = values.to(
            torch.promote_types(values.dtype, torch.float32)
        )  # of that type it is the same memory
        for row, generator in zip(draws, generators, strict=True):
            row.uniform_(1.0, 2.0, generator=generator)
    top = draws.mul_(level).masked_fill_(above, 3.0).topk(count, sorted=False)
    return torch.zeros_like(allowed).scatter_(-1, top.indices, top.values >= 1.0)
