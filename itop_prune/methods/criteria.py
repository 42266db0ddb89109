"""Criteria: one score per weight. The smallest are pruned, the largest grow.

A criterion is a function whose parameter names say what it needs, each a tensor of the weight's
shape (or a generator):

| name | what it is |
|---|---|
| `weight` | the effective weight after this step, float32 |
| `mask` | bool, True = active; to grow, what pruning kept |
| `grad` | the dense gradient of this step, float32: sum of what adds up in `.grad`, mean over ranks |
| `momentum` | the average 0.9 * `momentum` + 0.1 * `grad`: listened for at every step, 4 bytes per weight |
| `explored` | bool, True = was active at least once |
| `generator` | a `torch.Generator` on the mask's device, equal on all ranks |

Asking for `grad` is all it takes to get it: the scheduler reads the signature and listens on the
steps that need it (with `gradient_steps=n` it is the sum of the last n). `grad` and `momentum`
carry a GradScaler's scale: after it has changed, `momentum` weighs old and new steps unequally. A
parameter with a default is the criterion's own. Layers come in no promised order, and several may
be asked about before one of them moves. Pruning and growth have a menu each: by `magnitude` nothing
would grow but what has just been pruned.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from itop_prune.messages import describe
from itop_prune.methods.lookup import CheckedFunction, lookup, needed_arguments
from itop_prune.methods.validation import check_scores

Criterion = Callable[..., Tensor]

OFFERED = ("weight", "mask", "grad", "momentum", "explored", "generator")


def magnitude(weight: Tensor) -> Tensor:
    """Return |w|: the smallest weights matter least (Zhu & Gupta, 2017, arXiv 1710.01878).

    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return weight.abs()


def by_sign(weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return each active weight's rank in size among those of its sign, as a share of them; 0 for a weight of 0.

    So an update prunes the same share of the smallest positive weights as of the negative ones
    nearest to 0. Weights of one size, of which half precision has many, get their ranks by lot.

    Reference: SET, Mocanu et al., 2018, arXiv 1707.04780. The ITOP authors' code takes the same
    number of each sign, and so misses the count where a sign has fewer.

    >>> weight = torch.tensor([0.1, 0.2, 0.3, 0.4, -5.0, -6.0])
    >>> by_sign(weight, torch.ones(6, dtype=torch.bool), torch.Generator())
    tensor([0.2500, 0.5000, 0.7500, 1.0000, 0.5000, 1.0000])
    """
    scores = torch.zeros_like(weight)
    for side in (mask & (weight > 0), mask & (weight < 0)):
        sizes = weight.masked_select(side).abs()
        scores.masked_scatter_(side, (_ranks(sizes, generator) + 1) / max(1, len(sizes)))
    return scores


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """Return (w dL/dw)^2, what the loss would change to first order (Molchanov et al., 2019, arXiv 1906.10771).

    The weight is the one after the step, the gradient that of the weight before it.

    >>> taylor(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.5]))
    tensor([4.0000, 2.2500])
    """
    return (weight * grad).square()


def mest(weight: Tensor, grad: Tensor, strength: float = 0.01) -> Tensor:
    """Return |w| + strength * |dL/dw|: a small weight that is moving stays (MEST: Yuan et al., 2021, arXiv 2110.14032).

    The weight is the one after the step, the gradient that of the weight before it. The strength is
    our choice; for another: `functools.partial(mest, strength=0.1)`. A GradScaler (float16) makes
    the gradient up to 65,536 times as large, and the weight count for nothing: train in bfloat16,
    or divide the strength by the scale.

    >>> mest(torch.tensor([-2.0, 0.5]), torch.tensor([0.0, -100.0]))
    tensor([2.0000, 1.5000])
    """
    return weight.abs() + strength * grad.abs()


def sampled_magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return |w| over an exponential draw: who is kept is drawn without replacement, with chances as |w|.

    Reference: soft removal, Zhang et al., CHTs, 2025, arXiv 2501.19107. The draws: Efraimidis &
    Spirakis, 2006.

    >>> bool((sampled_magnitude(torch.tensor([0.0, 3.0]), torch.Generator()) == 0).tolist() == [True, False])
    True
    """
    return weight.abs() / _exponential(weight, generator)


def gradient(grad: Tensor) -> Tensor:
    """Return |dL/dw|, dense: where the loss would fall fastest (RigL: Evci et al., 2020, arXiv 1911.11134).

    >>> gradient(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return grad.abs()


def momentum(momentum: Tensor) -> Tensor:
    """Return |moving average of dL/dw|: where the loss falls steadily (Dettmers & Zettlemoyer, 2019, arXiv 1907.04840).

    >>> momentum(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return momentum.abs()


def sampled_gradient(grad: Tensor, generator: torch.Generator) -> Tensor:
    """Return |dL/dw| over an exponential draw: who grows is drawn without replacement, with chances as |dL/dw|.

    Reference: soft regrowth, Zhang et al., CHTs, 2025, arXiv 2501.19107; of gradients as in RigL.

    >>> bool((sampled_gradient(torch.tensor([0.0, 3.0]), torch.Generator()) == 0).tolist() == [True, False])
    True
    """
    return grad.abs() / _exponential(grad, generator)


def random(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in [0, 1): all have the same chance (SET: Mocanu et al., 2018, arXiv 1707.04780).

    >>> random(torch.ones(2, 3, dtype=torch.bool), torch.Generator()).shape
    torch.Size([2, 3])
    """
    return torch.rand(mask.shape, generator=generator, device=mask.device)


def unexplored(mask: Tensor, explored: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform numbers, those of weights that were never active above all others.

    Reference: in the code of the ITOP authors, Liu et al., 2021, arXiv 2102.02887.

    >>> explored = torch.tensor([True, False])
    >>> bool((unexplored(explored, explored, torch.Generator()) >= 1).tolist() == [False, True])
    True
    """
    return random(mask, generator) + (~explored).float()


def mix(first: "str | Criterion", second: "str | Criterion", share: float = 0.5) -> Criterion:
    """Return the criterion for growth that gives a share of the places to one criterion and the rest to another.

    Places go to the two in turns, what ties is drawn. For an equal mix two names will do:
    "gradient+random". Ours.

    Args:
        first: A key of `GROW` or a function; it gets `share` of the places.
        second: The same; it gets the others.
        share: In (0, 1).

    Raises: ValueError: A name is unknown, or the share is out of range; in use: one gives NaN, or
        not one score per weight.

    >>> tensors = {"grad": torch.tensor([4.0, 3.0, 2.0, 1.0]), "momentum": torch.tensor([0.0, 0.1, 0.2, 0.3])}
    >>> scores = mix("gradient", "momentum")(mask=torch.tensor([False] * 4), generator=torch.Generator(), **tensors)
    >>> (scores == scores.max()).tolist()
    [True, False, False, True]
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is {share!r}; allowed is a number in (0, 1)")
    parts = [
        (*find(criterion, "grow"), part)
        for criterion, part in ((first, share), (second, 1.0 - share))
    ]

    def mixed(mask: Tensor, generator: torch.Generator, **offered: Tensor) -> Tensor:
        given = {"mask": mask, "generator": generator, **offered}
        turns = []
        for criterion, needs, part in parts:
            scores = _of_inactive(
                criterion, criterion(**{name: given[name] for name in needs}), mask
            )
            turns.append((len(scores) - 1 - _ranks(scores, generator)) / part)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter_(
            ~mask, -torch.minimum(*turns)
        )

    names = dict.fromkeys(("mask", "generator", *(name for _, needs, _ in parts for name in needs)))
    mixed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    mixed.__name__ = f"mix({describe(parts[0][0])}, {describe(parts[1][0])}, {share})"
    mixed.role = "grow"  # type: ignore[attr-defined]  # it ranks what is inactive; to pruning all would be alike
    return mixed


PRUNE: dict[str, Criterion] = {
    "magnitude": magnitude,
    "set": by_sign,
    "taylor": taylor,
    "mest": mest,
    "sampled_magnitude": sampled_magnitude,
    "random": random,
}
GROW: dict[str, Criterion] = {
    "random": random,
    "gradient": gradient,
    "momentum": momentum,
    "unexplored": unexplored,
    "sampled_gradient": sampled_gradient,
}


def find(criterion: str | Criterion, role: str) -> CheckedFunction:
    """Return the criterion behind a name or a function, and the names that it asks for.

    Args: criterion: A key of `PRUNE` or `GROW`, or a function of some of `OFFERED`; for growth also
        two keys with a "+". role: "prune" or "grow".

    Raises: ValueError: The name is unknown or of the other menu, or the function asks for something
        that is not offered.
    """
    menu, other, others = (PRUNE, GROW, "growth") if role == "prune" else (GROW, PRUNE, "pruning")
    if role == "grow" and isinstance(criterion, str) and criterion.count("+") == 1:
        first, second = criterion.split("+")
        criterion = mix(first, second)
    strangers = [
        entry for name, function in other.items() if name not in menu for entry in (name, function)
    ]
    if criterion in strangers or getattr(criterion, "role", role) != role:
        name = criterion if isinstance(criterion, str) else describe(criterion)
        raise ValueError(
            f"{role} is {name!r}, which is for {others}; known are {', '.join(menu)}; choose one of them"
        )
    function = lookup(criterion, menu, role)
    return CheckedFunction(function, needed_arguments(function, OFFERED, f"{role} criterion"))


def _of_inactive(criterion: Criterion, scores: Tensor, mask: Tensor) -> Tensor:
    """Return the scores of what a mask leaves out, checked: a rank hides what they are."""
    check_scores(scores, mask, criterion)
    scores = scores.masked_select(~mask)
    if scores.isnan().any():
        raise ValueError(f"{describe(criterion)} gave NaN; scores must be numbers")
    return scores


def _ranks(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return the place of each score in ascending order, from 0; those that tie get theirs by lot."""
    shuffled = torch.randperm(len(scores), generator=generator, device=scores.device)
    order = shuffled[scores[shuffled].argsort(stable=True)]
    places = torch.empty(len(scores), device=scores.device)
    places[order] = torch.arange(len(scores), dtype=places.dtype, device=scores.device)
    return places


def _exponential(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws from the exponential distribution, above 0."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -torch.log1p(-uniform).clamp(max=-1e-12)
