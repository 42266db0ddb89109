"""Where masks start: `apply` decides how many weights of each layer are active, and which, and places the masks."""

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from itop_prune import distributed as ranks
from itop_prune import topology
from itop_prune.layers.handle import ITOP
from itop_prune.layers.maskable import Place, indivisible, kernel_shape, matching, select
from itop_prune.layers.masked_layer import effective, standardizes
from itop_prune.methods import distributions, patterns
from itop_prune.methods.distributions import Distribution
from itop_prune.methods.lookup import choose, nearest
from itop_prune.methods.patterns import Pattern
from itop_prune.methods.saliency import ratios
from itop_prune.methods.validation import checked_seed, is_number

SCORES = ("random", "magnitude")


def apply(
    model: nn.Module,
    sparsity: float,
    method: str | Distribution | Mapping[str, Tensor] = "ERK",
    *,
    scores: str | Mapping[str, Tensor] = "random",
    densities: Mapping[str, float] | None = None,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
) -> dict[str, ITOP]:
    """Make a model sparse: every weight matrix of a convolution or linear map gets a mask, and is 0 outside it.

    Parameters stay the same objects in the same order, under the name `<name>_orig`; so an
    optimizer may be built before or after. Biases, norms, embeddings and position tables are left
    alone. A frozen weight is masked too, but never moved.

    Args: model: Any module; changed in place. On the meta device there are counts and no positions,
        for a look ahead. sparsity: Share of zeros over all masked weights together, in [0, 1).
        Exactly `round((1 - sparsity) * total)` stay active, at least 1 in each layer. method: How
        they are shared out: "ERK", "ERK+", "ER", "uniform", "uniform+"; a function `(shapes,
        density) -> densities`; or scores, "magnitude" or tensors by name: each layer gets what the
        best of all layers together would leave in it. A pattern "N:M", such as "2:4", keeps N of
        every M consecutive weights along dimension 1 (inputs, input channels), in every layer and
        at every update; `sparsity` is 1 - N / M then. scores: Which positions start active:
        "random"; "magnitude", for a pretrained model; or a tensor of the parameter's shape for
        every masked name, whose largest values stay (see `itop_prune.saliency`). The same scores as
        `method` make it a choice over all layers together. With a pattern they choose in each group
        of M. densities: Of some layers, in [0, 1] by pattern, such as {"head": 1.0}; the others
        share what they leave of the budget. (What `exclude` names is not masked at all and does not
        count.) They hold where the masks start: MaskScheduler's `final_method` and `redistribute`
        decide anew. include: Patterns (`fnmatch`) of what to mask. One matches a parameter by its
        name ("layer1.0.conv1.weight") or by its layer's ("layer1.0.conv1"). exclude: Patterns of
        what to leave dense, such as "head". It does not count in the budget. strict: Whether a
        layer that a pattern N:M does not divide is an error; otherwise it stays dense without a
        mask, and a warning lists it. seed: Of the random positions; equal seeds give equal masks,
        on every device and rank. Torch's global generators are not touched.

    Returns:
        The masks, keyed by the names that `model.named_parameters()` gave before.

    Raises: ValueError: A value is out of range, a name unknown, nothing is there to mask, a pattern
        matches nothing, or a selected weight can't be masked (masked already, tied, parametrized)
        or divided, with `strict`. The model is then as it was.

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv
    2102.02887.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> apply(model, sparsity=0.75, method="uniform")
    {'0.weight': ITOP(Linear.weight, 8 of 32 active), '2.weight': ITOP(Linear.weight, 2 of 8 active)}
    """
    if not is_number(sparsity) or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity is {sparsity!r}; allowed is a number in [0, 1), the share of zeros: 0.9 keeps a tenth"
        )
    sparsity, seed, pattern = float(sparsity), checked_seed(seed), patterns.parse(method)
    selected = select(model, include, exclude)
    if pattern is not None:
        _check_pattern(pattern, sparsity, densities)
        selected = _divided(selected, pattern, strict)
    shapes = {name: kernel_shape(layer, tensor) for name, (layer, tensor) in selected.items()}
    generators = {name: topology.seeded(torch.device("cpu"), seed, name) for name in selected}
    ranked: dict[str, Tensor] = {}
    if method == "magnitude" or isinstance(method, Mapping):
        ranked = {
            n: _initial_scores(method, n, place, generators[n]) for n, place in selected.items()
        }
        method = (
            distributions.uniform if any(t.is_meta for t in ranked.values()) else ratios(ranked)
        )
    if pattern is None:
        everything = {**distributions.DISTRIBUTIONS, "magnitude": None, "N:M": None}
        # A wrong name is answered with these, not with the distributions alone.
        choose(
            method,
            everything,
            "method",
            otherwise="; or scores by name, such as itop_prune.saliency makes",
        )
        fixed = {} if densities is None else _by_name(densities, selected)
        counts = distributions.active_counts(shapes, 1.0 - sparsity, method, fixed)
    else:
        counts = {
            name: math.prod(shape) * pattern[0] // pattern[1] for name, shape in shapes.items()
        }
    masks = {}
    for name, place in selected.items():
        first = _initial_scores(scores, name, place, generators[name])
        if first.is_meta:
            masks[name] = first
        elif pattern is None:
            masks[name] = topology.best(first, counts[name], generators[name])
        else:
            masks[name] = patterns.best_of_groups(first, *pattern, generators[name])
    applied = {
        n: ITOP.apply(layer, tensor, masks.pop(n), pattern)
        for n, (layer, tensor) in selected.items()
    }
    for name, (layer, tensor) in selected.items():
        if applied[name].mask.is_meta:
            setattr(layer, f"{tensor}_planned", counts[name])
    ranks.leave_out_of_ddp(model)
    if scores != "random" or ranked:
        ranks.check_equal_masks({name: itop.mask for name, itop in applied.items()})
    return applied


def _check_pattern(
    pattern: Pattern, sparsity: float, densities: Mapping[str, float] | None
) -> None:
    n, m = pattern
    if abs(sparsity - (1.0 - n / m)) > 5e-5:  # 0.6667 is 1:3
        raise ValueError(
            f"sparsity is {sparsity!r}, and the pattern {n}:{m} keeps {n} of {m}; allowed is {1.0 - n / m:.4g}: give "
            "that, or another pattern"
        )
    if densities:
        raise ValueError(
            f"densities is {densities!r}, and the pattern {n}:{m} gives every layer the same; leave densities out, and "
            "exclude what shall stay dense"
        )


def _divided(selected: Mapping[str, Place], pattern: Pattern, strict: bool) -> dict[str, Place]:
    """Return the places in which groups of M can be formed; say which are left out."""
    n, m = pattern
    reasons = {
        name: reason for name, place in selected.items() if (reason := indivisible(*place, m))
    }
    divided = {name: place for name, place in selected.items() if name not in reasons}
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    if not divided:
        raise ValueError(
            f"the pattern {n}:{m} divides no weight, and nothing is left to mask; give another\n{lines}"
        )
    if reasons and strict:
        raise ValueError(
            f"the pattern {n}:{m} does not divide\n{lines}\nTo leave them dense: exclude={sorted(reasons)}"
        )
    if reasons and ranks.is_first():
        warnings.warn(
            f"the pattern {n}:{m} does not divide, so these stay dense, without a mask\n{lines}",
            stacklevel=3,
        )
    return divided


def _by_name(densities: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the densities of the layers that the patterns match; where several do, of the first."""
    if not isinstance(densities, Mapping):
        raise ValueError(
            f"densities is {densities!r}; allowed are shares by pattern, such as {{'head': 1.0}}"
        )
    fixed: dict[str, float] = {}
    for pattern, density in densities.items():
        if not is_number(density) or not 0.0 <= density <= 1.0:
            raise ValueError(
                f"densities[{pattern!r}] is {density!r}; allowed is a number in [0, 1], the share kept"
            )
        fixed |= {
            name: float(density)
            for name in matching([pattern], names, "densities")
            if name not in fixed
        }
    return fixed


def _initial_scores(
    scores: str | Mapping[str, Tensor], name: str, place: Place, generator: torch.Generator
) -> Tensor:
    layer, tensor = place
    parameter = layer.get_parameter(tensor)
    if isinstance(scores, Mapping):
        given = scores.get(name)
        if not isinstance(given, Tensor) or given.shape != parameter.shape:
            kind = f"{type(given).__name__} of shape {tuple(getattr(given, 'shape', ()))}"
            seen = kind if name in scores else f"only {sorted(scores)}"
            raise ValueError(
                f"scores for {name} must be a tensor of shape {tuple(parameter.shape)}; given: {seen}"
            )
        return _numbers(given.detach().float().cpu(), f"scores for {name} hold NaN")
    if scores not in SCORES:
        raise ValueError(
            f"unknown scores {scores!r}; known are {', '.join(SCORES)}{nearest(scores, SCORES)}; or tensors by name, "
            "such as itop_prune.saliency makes"
        )
    if parameter.is_meta:  # counts are all there is
        return parameter.detach()
    if scores == "random":
        return torch.rand(parameter.shape, generator=generator)
    weight = parameter.detach().float()
    sizes = (
        effective(weight, torch.ones_like(weight, dtype=torch.bool), standardizes(type(layer)))
        .abs()
        .cpu()
    )
    return _numbers(sizes, f"magnitude gave NaN for {name}")


def _numbers(scores: Tensor, otherwise: str) -> Tensor:
    """Return scores as they are if they can be ranked, or raise what is otherwise the case."""
    if scores.isnan().any():
        raise ValueError(
            f"{otherwise}; scores must be numbers: look at the function that made them and at the weight"
        )
    return scores
