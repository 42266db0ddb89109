"""Which weights can have a mask: found by name, selected by patterns, obstacles explained."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from itop_prune.layers.masked_layer import has_base, masked_names
from itop_prune.layers.names import mask_name
from itop_prune.sharding import is_sharded

WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
"""The weight matrices of convolutions and linear maps, by the class of the layer."""

MIXED_KERNELS = frozenset({"CondConv2d"})
"""Class names of convolutions that mix kernels of experts; each row of the weight is a kernel."""

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
        names = () if layer in adapters else _weight_names(layer)
        for tensor in dict.fromkeys((*names, *masked_names(layer))):
            if layer._parameters.get(tensor, ...) is not None:  # None: declared and not used
                yield plain_name(prefix, tensor), layer, tensor


def find_adapters(model: nn.Module) -> set[nn.Module]:
    """Find PEFT's own modules: its layers, and what these list as adapters; no base layer.

    An adapter is small and trained beside a base layer, which can have a mask.
    """
    found: set[nn.Module] = set()
    for layer in model.modules():
        names = getattr(layer, "adapter_layer_names", ())
        if names:
            found.add(layer)
        for name in names:
            if layer._modules.get(name) is not None:
                found.update(layer.get_submodule(name).modules())
    return found


def _weight_names(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.RNNBase):
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight_"))
    if _mixes_kernels(layer):
        return ("weight",)
    for kind, names in WEIGHTS.items():
        if isinstance(layer, kind):
            return names
    return ()


def _mixes_kernels(layer: nn.Module) -> bool:
    return "weight_shape" in vars(layer) and has_base(type(layer), MIXED_KERNELS)


def find_weights(
    model: nn.Module, include: str | Iterable[str], exclude: str | Iterable[str]
) -> dict[str, Target]:
    """Find the weights to mask by the patterns of `apply`, by name in model order.

    Raises:
        ValueError: There is nothing to mask, a pattern matches nothing, or a selected weight can't
            be masked.
    """
    found = {name: (layer, tensor) for name, layer, tensor in walk(model)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to mask: no weight matrix of a convolution or "
            "linear map"
        )

    unwanted = matching(_as_list(exclude, "exclude"), found, "exclude")
    wanted = matching(_as_list(include, "include"), found, "include") - unwanted
    if not wanted:
        raise ValueError(
            f"include={include!r} without exclude={exclude!r} leaves nothing of: {_shorten(found)}"
        )

    targets = {name: target for name, target in found.items() if name in wanted}
    reasons = obstacles(model, targets)
    if reasons:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        advice = f"To leave them dense: exclude={sorted(reasons)}"
        if len(reasons) == len(found):
            advice = "There is no other weight: without these nothing is left to mask"
        raise ValueError(f"can't mask\n{lines}\n{advice}")
    return targets


def _as_list(given: object, argument: str) -> list[str]:
    """List patterns once, since an iterator can be read only once."""
    patterns: list[Any] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str):
        patterns = list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{argument} is {given!r}; allowed are patterns: text, or a list of text")
    return patterns


def matching(patterns: Iterable[str], names: Iterable[str], argument: str) -> set[str]:
    """Find the names that any of the patterns matches, with or without the tensor's own name.

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
                f"{argument} pattern {pattern!r} matches no weight; the weights are: "
                f"{_shorten(names)}"
            )
        matched |= hits
    return matched


def _shorten(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def kernel_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute a weight's shape as distributions count it; for experts (experts * out, in, ...)."""
    if not _mixes_kernels(layer):
        return shape
    out, *rest = layer.weight_shape  # type: ignore[misc]
    return (shape[0] * out, *rest)


def indivisible(layer: nn.Module, tensor: str, m: int) -> str:
    """Explain why groups of `m` inputs can't be formed along dimension 1, or return ""."""
    shape = tuple(layer.get_parameter(tensor).shape)
    if getattr(layer, "transposed", False) or _mixes_kernels(layer) or len(shape) < 2:
        return f"dimension 1 of {shape} is not its inputs"
    return f"dimension 1 of {shape} is no multiple of {m}" if shape[1] % m else ""


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


def refuse_deployed(model: nn.Module) -> None:
    """Refuse a model for inference, whose weights lie in kernels.

    Raises:
        ValueError: `itop_prune.deploy` made it, and some of its layers sparse.
    """
    if any("weight_values" in layer._buffers for layer in model.modules()):
        raise ValueError(
            f"this {type(unwrap(model)).__name__} is for inference alone: itop_prune.deploy made "
            "it; ask the one that was deployed, which has its masks still"
        )


def plain_name(*parts: str) -> str:
    """Join the parts of a name, without the parts that torch.compile inserts.

    >>> plain_name("blocks.0._orig_mod.fc", "weight")
    'blocks.0.fc.weight'
    """
    name = ".".join(filter(None, parts))
    if "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
