"""Where masks start: `apply` decides how many weights of each layer are active, and which ones.

Four steps: find the weights, count the active ones, draw masks, place them. `count_active` stops
after the second and leaves the model alone.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from itop_prune import distributed, patterns, sparse_topology, topology
from itop_prune.layers.handle import ITOP, exclude_masks_from_ddp
from itop_prune.layers.maskable import (
    ADD_A_ROW,
    Selection,
    Target,
    classes_of,
    count_matrix_weights,
    find_weights,
    matching,
    unwrap,
)
from itop_prune.layers.masked_layer import effective, is_standardized
from itop_prune.layers.matrices import (
    indivisible,
    input_dim,
    inputs_of_outputs,
    kernel_shape,
)
from itop_prune.layers.never_dense import check_can_be_made, check_memory, materialize
from itop_prune.layers.sparse_handle import STORAGES, SparseITOP, Storage
from itop_prune.layers.sparse_storage import position_type
from itop_prune.messages import listed, nearest
from itop_prune.methods.distributions import DISTRIBUTIONS, Distribution, active_counts
from itop_prune.methods.initialization import Init, check_init, fan_in_factors
from itop_prune.methods.lookup import lookup
from itop_prune.methods.presets import pointer
from itop_prune.methods.saliency import ratios
from itop_prune.methods.validation import checked_device, checked_seed, is_number
from itop_prune.patterns import Pattern

SCORES = ("random", "magnitude", "nonzero")

UNKNOWN_SHARE = 0.1
"""Weights of unknown classes are reported if they are a larger share of these and the masked."""

Patterns = str | Iterable[str]
Scores = Mapping[str, Tensor]


def apply(
    model: nn.Module,
    sparsity: float | None = None,
    method: str | Distribution | Scores = "ERK",
    *,
    scores: str | Scores = "random",
    densities: Mapping[str, float] | None = None,
    pattern: str | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    strict: bool = False,
    init: Init = "keep",
    storage: Storage = "mask",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> dict[str, ITOP]:
    """Make a model sparse: mask every weight matrix of a convolution or linear map.

    Weights are 0 where their mask is False. Biases, norms, embeddings and position tables stay as
    they are, and so does a head that is tied to an embedding; `itop_prune.MASKABLE` lists what can
    be masked. A frozen weight is masked too, but never moved. With the storage "mask" parameters
    stay the same objects in the same order, under the name `<name>_orig`, so an optimizer may be
    built before or after. With "sparse" build it after.

    Args:
        model: Any module with values, on any device; changed in place.
        sparsity: Share of zeros over all masked weights together, in [0, 1). Exactly
            `round((1 - sparsity) * total)` weights stay active, at least 1 in each layer. Needed
            unless `scores` is "nonzero".
        method: How the active weights are shared out over the layers: "ERK", "ERK+", "ER",
            "uniform", "uniform+", or a function `(shapes, density) -> densities`. Or scores:
            "magnitude", or tensors by name. Each layer then gets what the best scores of all layers
            together leave in it.
        scores: Which positions start active: "random"; "magnitude", for a pretrained model; or a
            tensor of the parameter's shape for every masked name, whose largest values stay (see
            `itop_prune.saliency`). Pass the same scores as `method` to rank all layers together.
            "nonzero", for a pruned model: exactly the stored weights that are not 0. It takes no
            `sparsity`, `method` or `densities`. A layer of zeros gets an empty mask, where weights
            grow only with `redistribute`, the scope "global" or `final_sparsity`.
        densities: Densities of some layers, in [0, 1] by pattern, such as {"head": 1.0}. The others
            share the rest of the budget. These densities hold at the start; `final_method` and
            `redistribute` of MaskScheduler decide anew.
        pattern: "N:M", such as "2:4", keeps N of every M consecutive weights along the inputs, in
            every layer and at every update. `itop_prune.MASKABLE` says which dimension holds them.
            `sparsity` is then 1 - N / M; leave `method` at its default. Scores choose within each
            group of M.
        include: Patterns (`fnmatch`) of what to mask. A pattern matches a parameter by its name
            ("layer1.0.conv1.weight") or by its layer's name ("layer1.0.conv1"). A weight tied to an
            embedding is an error if a pattern other than "*" matches it.
        exclude: Patterns of what to leave dense, such as "head". Excluded weights do not count in
            the sparsity.
        strict: Whether a layer that an N:M pattern does not divide is an error. Otherwise it stays
            dense without a mask, and a warning lists it.
        init: What becomes of the active weights. "keep" leaves them as they are. "fan_in", for a
            model that is not trained yet, multiplies those of each output by sqrt(fan_in / k), with
            k of its fan_in inputs active. Activations then keep the variance that they have in the
            dense model. It is refused with "magnitude" and "nonzero", which keep weights for their
            values. Scores given as tensors choose the positions before. Weight-standardized
            convolutions compute the same with both.
        storage: "mask" keeps the dense parameter and a bool mask, as torch's own pruning does.
            "sparse" keeps the active values, in a new parameter `<name>_values` of the shape (1,
            active), and their positions. Gradients and optimizer statistics are then as small. It
            trains the same. FSDP2 and optimizers that look at the matrix (Muon, Shampoo) can't
            take it.
        device: For a model on the meta device, with the storage "sparse" and random positions:
            where it is made. No dense weight ever is, so the layers may be larger than the memory.
            Active weights are drawn as each layer's `reset_parameters` draws them, which also fills
            all other parameters and buffers.
        seed: Of the random positions. Equal seeds give equal masks, on every device and rank.
            Torch's global generators are not touched.

    Returns:
        The masks, keyed by the names that `model.named_parameters()` gave before.

    Warns:
        UserWarning: A head tied to an embedding stays dense and was not excluded. Or more than a
            tenth of the weights of matrices are of classes that `itop_prune.MASKABLE` does not
            know, and were not excluded.

    Raises:
        ValueError: A value is out of range, a name is unknown, or a name pattern matches nothing.
            Or a selected weight can't be masked: it has a mask, is tied, parametrized, complex, of
            integers or, without `device`, on the meta device. Or `strict` is set and an N:M pattern
            does not divide it. Or a model on the meta device can't be made, or would take more
            memory than there is. The model is then unchanged.

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv
    2102.02887.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> apply(model, sparsity=0.75, method="uniform", include="0")
    {'0.weight': ITOP(Linear.weight, 8 of 32 active)}
    """
    seed = checked_seed(seed)
    _check_scores_name(scores)
    check_init(init, scores, method)
    if scores == "nonzero":
        _refuse_budget(sparsity, method, densities)
        groups = patterns.parse(pattern)
    else:
        groups = _check_budget(sparsity, method, densities, pattern)
    targets = _find_targets(model, include, exclude, groups, strict)
    handle = lookup(storage, STORAGES, "storage")
    if device is not None:
        check_can_be_made(targets, scores, method, groups, storage)
        # Only scores="nonzero" comes without a sparsity, and that is refused here.
        counts = _count(targets, cast(float, sparsity), method, densities, groups)
        return _make(model, targets, counts, checked_device(device), init, seed)

    _refuse_meta(targets)
    if sparsity is None:  # scores are "nonzero"
        masks = _nonzero_masks(targets, groups)
    else:
        counts = _count(targets, sparsity, method, densities, groups)
        masks = _draw_masks(targets, counts, scores, groups, seed)
    applied = {}
    for name, target in targets.items():
        mask = masks.pop(name)
        if init == "fan_in":
            _rescale(target, mask)
        applied[name] = handle.apply(*target, mask, groups)

    exclude_masks_from_ddp(unwrap(model))
    if scores != "random" or _is_scores(method):
        distributed.check_equal_masks({name: itop.mask for name, itop in applied.items()})
    return applied


def _make(
    model: nn.Module,
    targets: Mapping[str, Target],
    counts: Mapping[str, int],
    device: torch.device,
    init: Init,
    seed: int,
) -> dict[str, ITOP]:
    """Make a model on the meta device sparse, without any dense weight."""
    check_memory(targets, counts, device)
    made = materialize(model, targets, counts, device)
    applied: dict[str, ITOP] = {}
    for name, (layer, tensor) in targets.items():
        shape = tuple(layer.get_parameter(tensor).shape)
        nowhere = torch.empty(0, dtype=position_type(math.prod(shape)))
        generator = topology.seeded(torch.device("cpu"), seed, name)
        positions = sparse_topology.draw(nowhere, math.prod(shape), counts[name], generator)
        values = made.pop(name)
        if init == "fan_in":
            values *= fan_in_factors(positions, *inputs_of_outputs(layer, tensor, shape)).to(device)
        applied[name] = SparseITOP.place_values(layer, tensor, values, positions.to(device))
    exclude_masks_from_ddp(unwrap(model))
    return applied


def count_active(
    model: nn.Module,
    sparsity: float,
    method: str | Distribution | Scores = "ERK",
    *,
    densities: Mapping[str, float] | None = None,
    pattern: str | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    strict: bool = False,
) -> dict[str, int]:
    """Count the active weights that `apply` would leave in each layer, without touching the model.

    Args:
        model: Any module, also on the meta device, where `method="magnitude"` has no values to look
            at.
        sparsity: As all other arguments, those of `apply`.
        method: Likewise.
        densities: Likewise.
        pattern: Likewise.
        include: Likewise.
        exclude: Likewise.
        strict: Likewise.

    Returns:
        The counts, keyed by parameter name. They sum to exactly `round((1 - sparsity) * total)`.

    Raises:
        ValueError: As of `apply`.

    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> count_active(model, sparsity=0.75, method="uniform")
    {'0.weight': 8, '2.weight': 2}
    """
    groups = _check_budget(sparsity, method, densities, pattern)
    targets = _find_targets(model, include, exclude, groups, strict)
    if method == "magnitude":
        _refuse_meta(targets)
    return _count(targets, sparsity, method, densities, groups)


def _refuse_budget(
    sparsity: float | None,
    method: str | Distribution | Scores,
    densities: Mapping[str, float] | None,
) -> None:
    """Refuse arguments that say how many weights are active, beside scores that say which."""
    given: dict[str, object] = {"sparsity": sparsity, "densities": densities}
    if method != "ERK":
        given["method"] = method
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, and scores='nonzero' keeps every weight that is not 0: "
                f"leave {name} out, or take scores='magnitude'"
            )


def _check_budget(
    sparsity: float | None,
    method: str | Distribution | Scores,
    densities: Mapping[str, float] | None,
    pattern: str | None,
) -> Pattern | None:
    """Check how the active weights are to be shared out; return N and M of a pattern."""
    if sparsity is None or not is_number(sparsity) or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity is {sparsity!r}; allowed is a number in [0, 1), the share of zeros: 0.9 "
            "keeps a tenth. Only scores='nonzero' needs none"
        )
    is_number_of_yaml = isinstance(method, int) and not isinstance(method, bool)
    if is_number_of_yaml or (isinstance(method, str) and ":" in method):
        example = method if isinstance(method, str) else "2:4"  # YAML reads 2:4 as 124
        raise ValueError(
            f"method is {method!r}; a pattern N:M has an argument of its own: write "
            f'pattern="{example}" and leave method out'
        )
    if not _is_scores(method):
        known = {**DISTRIBUTIONS, "magnitude": None}
        others = "; or scores by name, such as itop_prune.saliency makes"
        lookup(method, known, "method", others + pointer(method))

    groups = patterns.parse(pattern)
    if groups is None:
        return None
    n, m = groups
    if method not in ("ERK", "uniform"):
        raise ValueError(
            f"method is {method!r}, and the pattern {pattern} gives every layer the same density; "
            "leave method out"
        )
    if abs(sparsity - (1.0 - n / m)) > 5e-5:  # 0.6667 is 1:3
        raise ValueError(
            f"sparsity is {sparsity!r}, and the pattern {pattern} keeps {n} of {m}; allowed is "
            f"{1.0 - n / m:.4g}: give that, or another pattern"
        )
    if densities:
        raise ValueError(
            f"densities is {densities!r}, and the pattern {pattern} gives every layer the same; "
            "leave densities out, and exclude what should stay dense"
        )
    return groups


def _is_scores(method: object) -> bool:
    return method == "magnitude" or isinstance(method, Mapping)


def _check_scores_name(scores: str | Scores) -> None:
    if not isinstance(scores, Mapping) and scores not in SCORES:
        raise ValueError(
            f"unknown scores {scores!r}; known are {', '.join(SCORES)}{nearest(scores, SCORES)}; "
            "or tensors by name, such as itop_prune.saliency makes"
        )


def _find_targets(
    model: nn.Module, include: Patterns, exclude: Patterns, groups: Pattern | None, strict: bool
) -> dict[str, Target]:
    """Find the weights to mask; leave out, or refuse, those that a pattern N:M does not divide."""
    selection = find_weights(model, include, exclude)
    if groups is not None:
        divided = _divided(selection.targets, *groups, strict)
        selection = selection._replace(targets=divided)
    if distributed.is_first():
        for message in _left_dense(model, selection):
            warnings.warn(message, stacklevel=3)
    return selection.targets


def _divided(targets: dict[str, Target], n: int, m: int, strict: bool) -> dict[str, Target]:
    """Find the weights that a pattern N:M divides."""
    reasons = {name: indivisible(*target, m) for name, target in targets.items()}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    lines = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
    if len(left_out) == len(targets):
        raise ValueError(
            f"the pattern {n}:{m} divides no weight, and nothing is left to mask; give "
            f"another\n{lines}"
        )
    if left_out and strict:
        raise ValueError(
            f"the pattern {n}:{m} does not divide\n{lines}\nTo leave them dense: "
            f"exclude={sorted(left_out)}"
        )
    if left_out and distributed.is_first():
        warnings.warn(
            f"the pattern {n}:{m} does not divide, so these stay dense, without a mask\n{lines}",
            stacklevel=4,
        )
    return {name: target for name, target in targets.items() if name not in left_out}


def _left_dense(model: nn.Module, selection: Selection) -> Iterator[str]:
    """Say what stays dense though the user did not exclude it."""
    tied, unknown = selection.tied, selection.unknown
    if tied:
        names = ", ".join(f"{name} (tied to {other})" for name, other in tied.items())
        yield (
            f"left dense, as embeddings are: {names}; exclude={sorted(tied)} says so without this "
            "warning; to mask it, untie it first (a copy of the parameter)"
        )

    masked, dense = _size(selection.targets), _size(unknown)
    if dense > UNKNOWN_SHARE * (masked + dense):
        share = masked / count_matrix_weights(model)
        yield (
            f"masks {share:.0%} of the matrix weights; left dense: {classes_of(unknown)}: "
            f"{ADD_A_ROW}, or name them in exclude"
        )


def _size(targets: Mapping[str, Target]) -> int:
    """Count the weights of some layers."""
    return sum(math.prod(layer.get_parameter(tensor).shape) for layer, tensor in targets.values())


def _refuse_meta(targets: Mapping[str, Target]) -> None:
    """Refuse weights without values."""
    meta = [
        name for name, (layer, tensor) in targets.items() if layer.get_parameter(tensor).is_meta
    ]
    if meta:
        raise ValueError(
            f"{meta[0]} is on the meta device, where weights have no values; call "
            "itop_prune.count_active for the counts (with another method than magnitude); call "
            "model.to_empty(device=...) and load or initialize the weights; or give apply "
            'storage="sparse" and device="cpu", which make the model sparse at once'
        )


def _count(
    targets: Mapping[str, Target],
    sparsity: float,
    method: str | Distribution | Scores,
    densities: Mapping[str, float] | None,
    groups: Pattern | None,
) -> dict[str, int]:
    """Count the active weights of each layer."""
    shapes = {}
    for name, (layer, tensor) in targets.items():
        shapes[name] = kernel_shape(layer, tensor, tuple(layer.get_parameter(tensor).shape))
    if groups is not None:
        n, m = groups
        return {name: math.prod(shape) * n // m for name, shape in shapes.items()}

    if isinstance(method, Mapping):
        method = ratios({name: _given_scores(method, name, targets[name]) for name in targets})
    elif method == "magnitude":
        method = ratios({name: _magnitudes(name, target) for name, target in targets.items()})
    fixed = {} if densities is None else _by_name(densities, targets)
    return active_counts(shapes, 1.0 - float(sparsity), method, fixed)


def _by_name(densities: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Look up the layers that the patterns match; the first pattern that matches decides."""
    if not isinstance(densities, Mapping):
        raise ValueError(
            f"densities is {densities!r}; allowed are shares by pattern, such as {{'head': 1.0}}"
        )
    fixed: dict[str, float] = {}
    for pattern, density in densities.items():
        if not is_number(density) or not 0.0 <= density <= 1.0:
            raise ValueError(
                f"densities[{pattern!r}] is {density!r}; allowed is a number in [0, 1], the share "
                "kept"
            )
        for name in matching([pattern], names, "densities"):
            fixed.setdefault(name, float(density))
    return fixed


def _nonzero_masks(targets: Mapping[str, Target], groups: Pattern | None) -> dict[str, Tensor]:
    """Read the mask of each weight from its zeros.

    Raises:
        ValueError: The zeros do not hold the pattern.
    """
    masks = {name: layer.get_parameter(its).detach() != 0 for name, (layer, its) in targets.items()}
    if groups is not None:
        broken = [
            name
            for name, mask in masks.items()
            if not patterns.holds(mask, *groups, input_dim(*targets[name]))
        ]
        if broken:
            n, m = groups
            raise ValueError(
                f"the zeros of {listed(broken)} do not hold the pattern {n}:{m}, {n} nonzero of "
                f"every {m} inputs; leave the pattern out, or exclude={broken}"
            )

    if all(bool(mask.all()) for mask in masks.values()) and distributed.is_first():
        warnings.warn(
            "scores='nonzero' found no zero, so every weight stays active: load the pruned weights "
            "before apply",
            stacklevel=3,
        )
    return masks


def _draw_masks(
    targets: Mapping[str, Target],
    counts: Mapping[str, int],
    scores: str | Scores,
    groups: Pattern | None,
    seed: int,
) -> dict[str, Tensor]:
    """Draw the mask of each weight: positions at random, or those with the largest scores."""
    masks = {}
    for name, target in targets.items():
        generator = topology.seeded(torch.device("cpu"), seed, name)
        if scores == "random" and groups is None:
            layer, tensor = target
            nowhere = torch.zeros(layer.get_parameter(tensor).shape, dtype=torch.bool)
            masks[name] = topology.draw(nowhere, counts[name], generator)
            continue

        values = _initial_scores(scores, name, target, generator)
        if groups is None:
            everywhere = torch.ones_like(values, dtype=torch.bool)
            masks[name] = topology.select(values, everywhere, counts[name], generator)
        else:
            masks[name] = patterns.best_of_groups(values, *groups, generator, input_dim(*target))
    return masks


def _initial_scores(
    scores: str | Scores, name: str, target: Target, generator: torch.Generator
) -> Tensor:
    """Score every position of a weight, on the CPU."""
    if isinstance(scores, Mapping):
        return _given_scores(scores, name, target)
    if scores == "magnitude":
        return _magnitudes(name, target)
    layer, tensor = target
    return torch.rand(layer.get_parameter(tensor).shape, generator=generator)


def _given_scores(scores: Scores, name: str, target: Target) -> Tensor:
    """Look up the user's scores of a weight."""
    layer, tensor = target
    shape = layer.get_parameter(tensor).shape
    given = scores.get(name)
    if not isinstance(given, Tensor) or given.shape != shape:
        seen = f"{type(given).__name__} of shape {tuple(getattr(given, 'shape', ()))}"
        if name not in scores:
            seen = f"only {sorted(scores)}"
        raise ValueError(
            f"scores for {name} must be a tensor of shape {tuple(shape)}; given: {seen}"
        )
    return _without_nan(given.detach().float().cpu(), f"scores for {name} hold NaN")


@torch.no_grad()
def _rescale(target: Target, mask: Tensor) -> None:
    """Multiply the active weights by their fan-in factors, before the mask is placed."""
    layer, tensor = target
    weight = layer.get_parameter(tensor)
    positions = topology.true_positions(mask.flatten())
    factors = fan_in_factors(positions, *inputs_of_outputs(layer, tensor, tuple(weight.shape)))
    active = mask.to(weight.device)
    weight[active] = (weight[active] * factors.to(weight.device)).to(weight.dtype)


def _magnitudes(name: str, target: Target) -> Tensor:
    """Compute the sizes of a weight's values as the layer uses them."""
    layer, tensor = target
    weight = layer.get_parameter(tensor).detach().float()
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    sizes = effective(weight, everywhere, is_standardized(type(layer))).abs().cpu()
    return _without_nan(sizes, f"magnitude gave NaN for {name}")


def _without_nan(scores: Tensor, problem: str) -> Tensor:
    if scores.isnan().any():
        raise ValueError(
            f"{problem}; scores must be numbers: look at the function that made them and at the "
            "weight"
        )
    return scores
