"""What can be masked: the weights of a model by name, patterns that select among them, and what stands in the way."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from itop_prune.layers.masked_layer import derives, masked_names
from itop_prune.layers.sharding import is_sharded

WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
"""The weight matrices of convolutions and linear maps, by the class of the layer."""

NOTHING_LEFT = "There is no other weight: without these nothing is left to mask"
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""The attributes that torch keeps parameters, buffers, modules and hooks in."""
MIXED_KERNELS = frozenset({"CondConv2d"})
"""Convolutions that mix kernels of several experts, a kernel a row of their weight; by the name of their class."""

Place = tuple[nn.Module, str]


def walk(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, layer and the tensor's name in it for every weight that is or could be masked, in model order."""
    for prefix, layer in unwrap(model).named_modules(remove_duplicate=remove_duplicate):
        for tensor in dict.fromkeys((*_weights(layer), *masked_names(layer))):
            if layer._parameters.get(tensor, ...) is not None:  # None: declared and not used
                yield plain_name(prefix, tensor), layer, tensor


def _weights(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.RNNBase):
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight_"))
    if _mixes_kernels(layer):
        return ("weight",)
    for kind, names in WEIGHTS.items():
        if isinstance(layer, kind):
            return names
    return ()


def select(
    model: nn.Module, include: str | Iterable[str], exclude: str | Iterable[str]
) -> dict[str, Place]:
    """Return the layer and the tensor's name of every weight to mask, by the weight's name.

    Raises: ValueError: Nothing is there to mask, a pattern matches nothing, or a selected weight
        can't be masked.
    """
    found = {name: (layer, tensor) for name, layer, tensor in walk(model)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to mask: no weight matrix of a convolution or linear map"
        )
    unwanted = matching(_patterns(exclude, "exclude"), found, "exclude")
    wanted = matching(_patterns(include, "include"), found, "include") - unwanted
    if not wanted:
        raise ValueError(
            f"include={include!r} without exclude={exclude!r} leaves nothing of: {_shorten(found)}"
        )
    selected = {name: place for name, place in found.items() if name in wanted}
    if reasons := obstacles(model, selected):
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        leave_out = f"To leave them dense: exclude={sorted(reasons)}"
        raise ValueError(
            f"can't mask\n{lines}\n{leave_out if reasons.keys() < found.keys() else NOTHING_LEFT}"
        )
    return selected


def kernel_shape(layer: nn.Module, tensor: str) -> tuple[int, ...]:
    """Return the shape of a weight as torch keeps it; of several experts' kernels it is (experts * out, in, ...)."""
    shape = tuple(layer.get_parameter(tensor).shape)
    if not _mixes_kernels(layer):
        return shape
    out, *rest = layer.weight_shape  # type: ignore[misc]
    return (shape[0] * out, *rest)


def indivisible(layer: nn.Module, tensor: str, m: int) -> str:
    """Return why groups of `m` inputs can't be formed in a weight, or ""; they lie along its dimension 1."""
    shape = tuple(layer.get_parameter(tensor).shape)
    if getattr(layer, "transposed", False) or _mixes_kernels(layer) or len(shape) < 2:
        return f"dimension 1 of {shape} is not its inputs"
    return f"dimension 1 of {shape} is no multiple of {m}" if shape[1] % m else ""


def _mixes_kernels(layer: nn.Module) -> bool:
    return "weight_shape" in vars(layer) and derives(type(layer), MIXED_KERNELS)


def obstacles(model: nn.Module, places: Mapping[str, Place]) -> dict[str, str]:
    """Return, by name, why weights of a model can't be masked; those that can are left out."""
    owners = _owners(model)
    found = {}
    for name, (layer, tensor) in places.items():
        held = owners.get(id(layer._parameters.get(tensor)), ())
        others = [
            plain_name(prefix, its)
            for prefix, module, its in held
            if (module, its) != (layer, tensor)
        ]
        tied = f"it is tied to {', '.join(others)}, which would not see the mask: untie them (a copy of the parameter)"
        if reason := obstacle(layer, tensor) or (tied if others else ""):
            found[name] = reason
    return found


def obstacle(layer: nn.Module, tensor: str) -> str:
    """Return why a tensor of a layer can't be masked and what to do about it, or ""."""
    if tensor in masked_names(layer):
        return "it has a mask already; masks move, they are not applied twice: call itop_prune.remove first"
    if tensor in layer._parameters:
        parameter = layer._parameters[tensor]
        if parameter is None:
            return f"this {type(layer).__name__} has none"
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return "its shape is not known yet: run the model once first"
        if is_sharded(parameter):
            return "each rank holds a part of it: call itop_prune.apply before fully_shard or accelerator.prepare"
        if not parameter.numel():
            return f"it is empty, of shape {tuple(parameter.shape)}"
        if torch.is_inference_mode_enabled() or parameter.is_inference():
            return "tensors made in inference mode can't be trained: build and mask outside of torch.inference_mode"
        if where := _held_again(layer, tensor):
            return f"{type(layer).__name__} reads it {where} as well, where no mask is seen"
        return ""
    if f"{tensor}_mask" in layer._buffers:
        return "torch's own pruning masks it: call torch.nn.utils.prune.remove first"
    if parametrize.is_parametrized(layer, tensor):
        return "it is parametrized (weight_norm, ...): call torch.nn.utils.parametrize.remove_parametrizations first"
    return f"it is not a parameter of {type(layer).__name__} but computed: call torch.nn.utils.remove_weight_norm first"


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile."""
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        model = model.get_submodule("module" if isinstance(model, wrappers) else "_orig_mod")
    return model


def refuse_deployed(model: nn.Module) -> None:
    """Refuse a model for inference, whose weights are in kernels.

    Raises:
        ValueError: `itop_prune.deploy` made it, and some of its layers sparse.
    """
    if any("weight_values" in layer._buffers for layer in model.modules()):
        raise ValueError(
            f"this {type(unwrap(model)).__name__} is for inference alone: itop_prune.deploy made it; ask the one "
            "that was deployed, which has its masks still"
        )


def plain_name(*parts: str) -> str:
    """Return the parts of a name joined, without what torch.compile puts in.

    >>> plain_name("blocks.0._orig_mod.fc", "weight")
    'blocks.0.fc.weight'
    """
    name = ".".join(filter(None, parts))
    return (
        name
        if "_orig_mod" not in name
        else ".".join(part for part in name.split(".") if part != "_orig_mod")
    )


def _patterns(given: object, what: str) -> list[str]:
    """Return patterns as a list: whoever checks an iterator has used it up."""
    patterns: list[Any] = (
        [given]
        if isinstance(given, str)
        else list(given)
        if isinstance(given, Iterable)
        else [given]
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{what} is {given!r}; allowed are patterns: text, or a list of text")
    return patterns


def matching(patterns: Iterable[str], names: Iterable[str], what: str) -> set[str]:
    """Return the names that one of the patterns matches, as they are or without the tensor's.

    Raises:
        ValueError: A pattern matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = {
            name
            for name in names
            if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
        }
        if not hits:
            raise ValueError(
                f"{what} pattern {pattern!r} matches no weight; the weights are: {_shorten(names)}"
            )
        matched |= hits
    return matched


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Return where each parameter is held, by its identity: the module's name, the module, the tensor's name in it."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in unwrap(model).named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((prefix, module, tensor))
    return owners


def _held_again(layer: nn.Module, tensor: str) -> str:
    """Return which attribute of a layer holds its parameter besides its name, or ""."""
    parameter = layer._parameters[tensor]
    for attribute, value in vars(layer).items():
        lists_it = attribute == "_flat_weights" and isinstance(
            layer, nn.RNNBase
        )  # which the masked layer replaces
        if attribute not in OF_EVERY_MODULE and not lists_it and _contains(value, parameter):
            return f"from its {attribute}"
    return ""


def _contains(value: object, parameter: object) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_contains(item, parameter) for item in value)
    return (
        _contains(list(value.values()), parameter)
        if isinstance(value, dict)
        else value is parameter
    )


def _shorten(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (
        f", ... ({len(listed)} in all)" if len(listed) > most else ""
    )
