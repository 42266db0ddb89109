"""Criteria: one score per weight. The smallest are pruned, the largest grow.

A criterion is a function whose parameter names say what it needs. Each is a tensor of the weight's
shape, or a generator:

| name | what it is |
|---|---|
| `weight` | the effective weight after this step, float32 |
| `mask` | bool, True = active; for growth the mask after pruning |
| `grad` | the dense gradient of this step, float32: summed as `.grad` is, mean over ranks |
| `momentum` | the average 0.9 * `momentum` + 0.1 * `grad` over all steps, 4 bytes per weight |
| `explored` | bool, True = was active at least once |
| `generator` | a `torch.Generator` on the mask's device, equal on all ranks |

The scheduler reads the signature, so a criterion gets `grad` by naming it. The dense gradient is
then collected on the steps that need it. With `gradient_steps=n` it is the sum of the last n.
`grad` and `momentum` carry a GradScaler's scale. After the scale has changed, `momentum` weighs old
and new steps unequally. A parameter with a default is the criterion's own. Layers come in no fixed
order.

Pruning and growth have a menu each: growth by `magnitude` would only bring back what was just
pruned.
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
    """Score by |w|: the smallest weights matter least.

    Reference: Zhu & Gupta, 2017, arXiv 1710.01878.

    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return weight.abs()


def by_sign(weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Rank each active weight's size among those of its sign, as a share; 0 for a weight of 0.

    An update then prunes the same share of the smallest positive weights and of the negative
    weights nearest to 0. Weights of equal size, frequent in half precision, are ranked at random.

    Reference: SET, Mocanu et al., 2018, arXiv 1707.04780. The ITOP authors' code takes the same
    number of each sign, so it misses the count where a sign has fewer.

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
    """Score by (w dL/dw)^2, the change of the loss to first order.

    The weight is the one after the step, the gradient that of the weight before it.

    Reference: Molchanov et al., 2019, arXiv 1906.10771.

    >>> taylor(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.5]))
    tensor([4.0000, 2.2500])
    """
    return (weight * grad).square()


def mest(weight: Tensor, grad: Tensor, strength: float = 0.01) -> Tensor:
    """Score by |w| + strength * |dL/dw|: a small weight that moves stays.

    The weight is the one after the step, the gradient that of the weight before it. The strength is
    our choice; for another: `functools.partial(mest, strength=0.1)`. A GradScaler (float16) makes
    the gradient up to 65,536 times as large, so the weight no longer counts. Train in bfloat16, or
    divide the strength by the scale.

    Reference: MEST, Yuan et al., 2021, arXiv 2110.14032.

    >>> mest(torch.tensor([-2.0, 0.5]), torch.tensor([0.0, -100.0]))
    tensor([2.0000, 1.5000])
    """
    return weight.abs() + strength * grad.abs()


def sampled_magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Sample what is kept without replacement, with chances proportional to |w|.

    The score is |w| over an exponential draw (Efraimidis & Spirakis, 2006).

    Reference: soft removal, Zhang et al., CHTs, 2025, arXiv 2501.19107.

    >>> (sampled_magnitude(torch.tensor([0.0, 3.0]), torch.Generator()) == 0).tolist()
    [True, False]
    """
    return weight.abs() / _exponential(weight, generator)


def gradient(grad: Tensor) -> Tensor:
    """Score by |dL/dw|, dense: where the loss would fall fastest.

    Reference: RigL, Evci et al., 2020, arXiv 1911.11134.

    >>> gradient(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return grad.abs()


def momentum(momentum: Tensor) -> Tensor:
    """Score by |moving average of dL/dw|: where the loss falls steadily.

    Reference: sparse momentum (SNFS), Dettmers & Zettlemoyer, 2019, arXiv 1907.04840.

    >>> momentum(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return momentum.abs()


def sampled_gradient(grad: Tensor, generator: torch.Generator) -> Tensor:
    """Sample what grows without replacement, with chances proportional to |dL/dw|.

    Reference: soft regrowth, Zhang et al., CHTs, 2025, arXiv 2501.19107; here of RigL's gradients.

    >>> (sampled_gradient(torch.tensor([0.0, 3.0]), torch.Generator()) == 0).tolist()
    [True, False]
    """
    return grad.abs() / _exponential(grad, generator)


def random(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers in [0, 1): all positions have the same chance.

    Reference: SET, Mocanu et al., 2018, arXiv 1707.04780.

    >>> random(torch.ones(2, 3, dtype=torch.bool), torch.Generator()).shape
    torch.Size([2, 3])
    """
    return torch.rand(mask.shape, generator=generator, device=mask.device)


def unexplored(mask: Tensor, explored: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers, and put weights that were never active above all others.

    Reference: in the code of the ITOP authors, Liu et al., 2021, arXiv 2102.02887.

    >>> explored = torch.tensor([True, False])
    >>> (unexplored(explored, explored, torch.Generator()) >= 1).tolist()
    [False, True]
    """
    return random(mask, generator) + (~explored).float()


def mix(first: "str | Criterion", second: "str | Criterion", share: float = 0.5) -> Criterion:
    """Make a growth criterion that shares the places between two criteria. Ours.

    The two take places alternately, in proportion to their shares. Ties are drawn. Two names joined
    by a plus are an equal mix: "gradient+random".

    Args:
        first: A key of `GROW` or a function; it gets `share` of the places.
        second: The same; it gets the other places.
        share: In (0, 1).

    Raises:
        ValueError: A name is unknown, or the share is out of range. In use: a criterion gives NaN,
            or not one score per weight.

    >>> grad, average = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.0, 0.1, 0.2, 0.3])
    >>> given = {"mask": torch.tensor([False] * 4), "generator": torch.Generator()}
    >>> scores = mix("gradient", "momentum")(grad=grad, momentum=average, **given)
    >>> (scores == scores.max()).tolist()
    [True, False, False, True]
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is {share!r}; allowed is a number in (0, 1)")
    parts = [(find(first, "grow"), share), (find(second, "grow"), 1.0 - share)]

    def mixed(mask: Tensor, generator: torch.Generator, **offered: Tensor) -> Tensor:
        given = {"mask": mask, "generator": generator, **offered}
        turns = []  # of every inactive position: when each criterion would take it
        for (criterion, needs), part in parts:
            scores = criterion(**{name: given[name] for name in needs})
            scores = _scores_of_inactive(criterion, scores, mask)
            turns.append((len(scores) - 1 - _ranks(scores, generator)) / part)
        first_turn = torch.minimum(*turns)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter_(~mask, -first_turn)

    names = ["mask", "generator"]
    for criterion, _ in parts:
        names += criterion.needs
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in dict.fromkeys(names)]
    mixed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    mixed.__name__ = f"mix({parts[0][0].name}, {parts[1][0].name}, {share})"
    mixed.role = "grow"  # type: ignore[attr-defined]  # it ranks inactive positions only
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
    """Look up a criterion and read which arguments it needs.

    Args:
        criterion: A key of `PRUNE` or `GROW`, or a function of some of `OFFERED`. For growth also
            two keys joined by a plus.
        role: "prune" or "grow".

    Raises:
        ValueError: The name is unknown or of the other menu, or the function asks for something
            that is not offered.
    """
    menu, other_menu, other_role = PRUNE, GROW, "growth"
    if role == "grow":
        menu, other_menu, other_role = GROW, PRUNE, "pruning"
        if isinstance(criterion, str) and criterion.count("+") == 1:
            first, second = criterion.split("+")
            criterion = mix(first, second)

    wrong_menu: list[str | Criterion] = []
    for name, function in other_menu.items():
        if name not in menu:
            wrong_menu += [name, function]
    if criterion in wrong_menu or getattr(criterion, "role", role) != role:
        name = criterion if isinstance(criterion, str) else describe(criterion)
        raise ValueError(
            f"{role} is {name!r}, which is for {other_role}; known are {', '.join(menu)}; choose "
            "one of them"
        )

    function = lookup(criterion, menu, role)
    return CheckedFunction(function, needed_arguments(function, OFFERED, f"{role} criterion"))


def _scores_of_inactive(criterion: Criterion, scores: Tensor, mask: Tensor) -> Tensor:
    """Take the scores of inactive positions, checked, since ranks would hide a NaN."""
    check_scores(scores, mask, criterion)
    scores = scores.masked_select(~mask)
    if scores.isnan().any():
        raise ValueError(f"{describe(criterion)} gave NaN; scores must be numbers")
    return scores


def _ranks(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Rank scores in ascending order, from 0; ties are ranked at random."""
    shuffled = torch.randperm(len(scores), generator=generator, device=scores.device)
    order = shuffled[scores[shuffled].argsort(stable=True)]
    ranks = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    ranks[order] = torch.arange(len(scores), dtype=ranks.dtype, device=scores.device)
    return ranks


def _exponential(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from the exponential distribution, above 0."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -torch.log1p(-uniform).clamp(max=-1e-12)
