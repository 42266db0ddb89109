"""Which weights can have a mask: found by name, selected by patterns, obstacles explained."""

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from itop_prune.layers.masked_layer import masked_names, shape_of
from itop_prune.layers.matrices import matrices_of, misread
from itop_prune.layers.names import mask_name, parameter_name
from itop_prune.messages import listed, nearest_names
from itop_prune.sharding import is_sharded

ADD_A_ROW = "to mask them, add a row for the class to itop_prune.MASKABLE"

NO_MATRIX = ("bias", "embed", "pos", "token")
"""Parts of the names of parameters that are added or looked up: no matrices."""

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""The attributes in which torch keeps parameters, buffers, modules and hooks."""

Target = tuple[nn.Module, str]
"""A layer and the name of a tensor in it."""


def walk(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every weight that is or could be masked: its name, its layer and its name in the layer.

    Weights come in model order. With `remove_duplicate=False` a module under two names comes twice.
    Adapters are left out.
    """
    adapters = find_adapters(model)
    for prefix, layer in unwrap(model).named_modules(remove_duplicate=remove_duplicate):
        names = () if layer in adapters else matrices_of(layer) or ()
        for tensor in dict.fromkeys((*names, *masked_names(layer))):
            if layer._parameters.get(tensor, ...) is not None:  # None: declared and not used
                yield plain_name(prefix, tensor), layer, tensor


def find_adapters(model: nn.Module) -> set[nn.Module]:
    """Find PEFT's own modules: its layers, and what these list as adapters; no base layer.

    An adapter is small and trained beside a base layer, which can have a mask. Of layers that PEFT
    trains as a whole (`modules_to_save`) the originals are listed, which are not used.
    """
    found: set[nn.Module] = set()
    for layer in model.modules():
        names = getattr(layer, "adapter_layer_names", ())
        if "modules_to_save" in names:  # a copy is trained in place of the original
            found.update(layer.get_submodule("original_module").modules())
            continue
        if names:
            found.add(layer)
        for name in names:
            if layer._modules.get(name) is not None:
                found.update(layer.get_submodule(name).modules())
    return found


class Selection(NamedTuple):
    """What the patterns of `apply` select, by name in model order."""

    targets: dict[str, Target]
    """Weights to mask."""
    tied: dict[str, str]
    """Weights that stay dense because an embedding holds them too: the name of that one."""
    unknown: dict[str, Target]
    """Weights that look like matrices, of classes that are not in `MASKABLE`."""


def find_weights(
    model: nn.Module, include: str | Iterable[str], exclude: str | Iterable[str]
) -> Selection:
    """Find the weights to mask by the patterns of `apply`.

    Weights that are tied to an embedding are left out, unless `include` names them.

    Raises:
        ValueError: There is nothing to mask, a pattern matches nothing, or a selected weight can't
            be masked.
    """
    found = {name: (layer, tensor) for name, layer, tensor in walk(model)}
    unknown = unknown_matrices(model)
    if not found:
        others = ""
        if unknown:
            others = f"; dense are {classes_of(unknown)}: {ADD_A_ROW}"
        raise ValueError(
            f"{type(model).__name__} has nothing to mask: no weight matrix of a convolution or "
            f"linear map{others}"
        )

    included, excluded = _as_list(include, "include"), _as_list(exclude, "exclude")
    unwanted = matching(excluded, found, "exclude", unknown)
    for pattern in included:
        strangers = {name: unknown[name] for name in unknown if _matches(name, [pattern])}
        if strangers and not any(_matches(name, [pattern]) for name in found):
            raise ValueError(
                f"include pattern {pattern!r} matches {classes_of(strangers)} alone: {ADD_A_ROW}"
            )
    wanted = matching(included, found, "include") - unwanted
    if not wanted:
        raise ValueError(
            f"include={include!r} without exclude={exclude!r} leaves nothing of: {_shorten(found)}"
        )

    by_name = matching([pattern for pattern in included if pattern != "*"], found, "include")
    tied = tied_to_embedding(model, {name: found[name] for name in found if name in wanted})
    tied = {name: embedding for name, embedding in tied.items() if name not in by_name}
    if wanted - tied.keys():
        wanted -= tied.keys()

    targets = {name: target for name, target in found.items() if name in wanted}
    reasons = obstacles(model, targets)
    if reasons:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        advice = f"To leave them dense: exclude={sorted({*excluded, *reasons})}"
        if len(reasons) == len(targets):
            others = "There is no other weight"
            if len(found) > len(targets):
                others = "include and exclude select no other weight"
            advice = f"{others}: without these nothing is left to mask"
        raise ValueError(f"can't mask\n{lines}\n{advice}")

    for name in list(unknown):
        if _matches(name, excluded) or not _matches(name, included):
            del unknown[name]
    return Selection(targets, tied, unknown)


def _as_list(given: object, argument: str) -> list[str]:
    """List patterns once, since an iterator can be read only once."""
    patterns: list[Any] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str):
        patterns = list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{argument} is {given!r}; allowed are patterns: text, or a list of text")
    return patterns


def matching(
    patterns: Iterable[str], names: Iterable[str], argument: str, others: Iterable[str] = ()
) -> set[str]:
    """Find the names that any of the patterns matches, with or without the tensor's own name.

    Raises:
        ValueError: A pattern matches nothing, of `others` neither.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if _matches(name, [pattern])}
        if not hits and not any(_matches(name, [pattern]) for name in others):
            near = nearest_names(pattern, names)
            known = f"the nearest are: {', '.join(near)}"
            if not near:
                known = f"the weights are: {_shorten(names)}"
            raise ValueError(f"{argument} pattern {pattern!r} matches no weight; {known}")
        matched |= hits
    return matched


def _matches(name: str, patterns: Iterable[str]) -> bool:
    layer = name.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(layer, pattern) for pattern in patterns)


def _shorten(names: Iterable[str], most: int = 12) -> str:
    known = list(names)
    more = f", ... ({len(known)} in all)" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def unknown_matrices(model: nn.Module) -> dict[str, Target]:
    """Find weights that look like matrices and whose class is not in `MASKABLE`.

    They have two or more dimensions above 1, the first among them, and are not tied to a layer of a
    class that is. Adapters are left out, and tables for positions and biases by their names
    (`NO_MATRIX`).
    """
    adapters = find_adapters(model)
    found: dict[str, Target] = {}
    known: set[int] = set()
    for prefix, layer in unwrap(model).named_modules():
        if layer in adapters:
            continue
        if matrices_of(layer) is not None:
            known.update(map(id, layer._parameters.values()))
            continue

        masked = {parameter_name(name) for name in masked_names(layer)}
        for tensor, parameter in layer._parameters.items():
            name = plain_name(prefix, tensor)
            if tensor not in masked and _looks_like_matrix(name, parameter):
                found[name] = (layer, tensor)

    return {
        name: (layer, tensor)
        for name, (layer, tensor) in found.items()
        if id(layer._parameters[tensor]) not in known
    }


def _looks_like_matrix(name: str, parameter: nn.Parameter | None) -> bool:
    if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
        return False
    ending = ".".join(name.lower().split(".")[-2:])
    if not parameter.is_floating_point() or any(part in ending for part in NO_MATRIX):
        return False
    return parameter.shape[:1] > (1,) and sum(size > 1 for size in parameter.shape) > 1


def classes_of(targets: Mapping[str, Target]) -> str:
    """List the classes of some weights with their counts and first names, for a message."""
    names: dict[str, list[str]] = {}
    for name, (layer, _) in targets.items():
        names.setdefault(type(layer).__name__, []).append(name)
    parts = [f"{kind} × {len(held)} ({listed(held, most=2)})" for kind, held in names.items()]
    return listed(parts)


def count_matrix_weights(model: nn.Module) -> int:
    """Count the weights of all matrices, masked or not. Those tied to an embedding are its own."""
    found = {name: (layer, tensor) for name, layer, tensor in walk(model)}
    found |= unknown_matrices(model)
    total = 0
    counted: set[int] = set()
    for name in found.keys() - tied_to_embedding(model, found).keys():
        layer, tensor = found[name]
        if tensor in masked_names(layer):
            total += math.prod(shape_of(layer, tensor))
            continue
        weight = layer._parameters.get(tensor)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            continue
        if weight is not None and id(weight) not in counted:
            counted.add(id(weight))
            total += math.prod(weight.shape)
    return total


def obstacles(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, str]:
    """Explain, by name, why some weights of a model can't be masked; the others are left out."""
    owners = _owners(model)
    found = {}
    for name, (layer, tensor) in targets.items():
        reason = obstacle(layer, tensor)
        if not reason:
            reason = _tie(owners, layer, tensor)
        if reason:
            found[name] = reason
    return found


def tied_to_embedding(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, str]:
    """Find, by name, the weights that an embedding holds too: the name of its own."""
    owners = _owners(model)
    tied = {}
    for name, (layer, tensor) in targets.items():
        for prefix, owner, other in owners.get(id(layer._parameters.get(tensor)), ()):
            if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
                tied[name] = plain_name(prefix, other)
    return tied


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Find, by identity, where each parameter is held: module name, module, its name there."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in unwrap(model).named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((prefix, module, tensor))
    return owners


def _tie(
    owners: Mapping[int, list[tuple[str, nn.Module, str]]], layer: nn.Module, tensor: str
) -> str:
    """Explain that a parameter has other owners, which would not see the mask, or return ""."""
    others = [
        plain_name(prefix, other)
        for prefix, module, other in owners.get(id(layer._parameters.get(tensor)), ())
        if (module, other) != (layer, tensor)
    ]
    if not others:
        return ""
    return (
        f"it is tied to {', '.join(others)}, which would not see the mask: untie them (a copy of "
        "the parameter)"
    )


def obstacle(layer: nn.Module, tensor: str) -> str:
    """Explain why a tensor of a layer can't be masked and what to do about it, or return ""."""
    if tensor in masked_names(layer):
        return (
            "it has a mask already; masks move, they are not applied twice: call itop_prune.remove "
            "first"
        )

    if tensor in layer._parameters:
        parameter = layer._parameters[tensor]
        if parameter is None:
            return f"this {type(layer).__name__} has none"
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return "its shape is not known yet: run the model once first"
        reason = misread(layer, tensor)
        if reason:
            return reason
        if is_sharded(parameter):
            return (
                "each rank holds a part of it: call itop_prune.apply before fully_shard or "
                "accelerator.prepare"
            )
        if not parameter.is_floating_point() or parameter.layout != torch.strided:
            return (
                f"it is of {parameter.dtype} and {parameter.layout}, and masks need dense, real, "
                "floating-point numbers: convert it"
            )
        if not parameter.numel():
            return f"it is empty, of shape {tuple(parameter.shape)}"
        if torch.is_inference_mode_enabled() or parameter.is_inference():
            return (
                "tensors made in inference mode can't be trained: build and mask outside of "
                "torch.inference_mode"
            )
        attribute = _second_attribute(layer, tensor)
        if attribute:
            kind = type(layer).__name__
            return f"{kind} reads it from its {attribute} as well, where no mask is seen"
        return ""

    if mask_name(tensor) in layer._buffers:
        return "torch's own pruning masks it: call torch.nn.utils.prune.remove first"
    if parametrize.is_parametrized(layer, tensor):
        return (
            "it is parametrized (weight_norm, ...): call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if not hasattr(layer, tensor):
        kind = type(layer).__name__
        return f"{kind} has no {tensor!r}: correct its row in itop_prune.MASKABLE"
    return (
        f"it is not a parameter of {type(layer).__name__} but computed: call "
        "torch.nn.utils.remove_weight_norm first"
    )


def _second_attribute(layer: nn.Module, tensor: str) -> str:
    """Find another attribute of the layer that holds its parameter, or return ""."""
    parameter = layer._parameters[tensor]
    for attribute, value in vars(layer).items():
        replaced = attribute == "_flat_weights" and isinstance(layer, nn.RNNBase)
        if attribute not in MODULE_ATTRIBUTES and not replaced and _contains(value, parameter):
            return attribute
    return ""


def _contains(value: object, parameter: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_contains(item, parameter) for item in value)
    return value is parameter


def unwrap(model: nn.Module) -> nn.Module:
    """Find the model inside DataParallel, DDP, AveragedModel or torch.compile."""
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        model = model.get_submodule("module" if isinstance(model, wrappers) else "_orig_mod")
    return model


def plain_name(*parts: str) -> str:
    """Join the parts of a name, without the parts that torch.compile inserts.

    >>> plain_name("blocks.0._orig_mod.fc", "weight")
    'blocks.0.fc.weight'
    """
    name = ".".join(filter(None, parts))
    if "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
