"""A masked layer: its weight is a property, mask times parameter, current whoever reads it and whenever.

Torch's own pruning hook writes `layer.weight` as a plain attribute before the layer's forward. What
reads the weight without calling the layer (a parent, an export, a copy, `.to(dtype)`) then sees an
old tensor or none. A property has no such moment. It has to live on a class, so the layer gets a
subclass of its own class, with the same name, and gives it back when the mask is removed: `attach`
and `detach`.

Some layers compute another weight from theirs. Weight standardisation subtracts the mean of each
filter, which would make every zero of a masked filter something else. Such a layer is given filters
that are centred over their active weights: their mean is 0 already, and the zeros stay.
"""

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.layers.sharding import like, zero_off_mask
from itop_prune.methods.patterns import Pattern, holds

STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}
"""Convolutions that standardise each filter (Qiao et al., 2019, arXiv 1903.10520), by the name of their class.

Add the name of your own before `apply`."""


def standardizes(kind: type) -> bool:
    """Return whether layers of this class subtract from each filter its mean."""
    return derives(kind, STANDARDIZED)


def derives(kind: type, names: Collection[str]) -> bool:
    """Return whether a class has one of these names, or a base that has: for classes that are not torch's own."""
    return any(base.__name__ in names for base in kind.__mro__)


def effective(weight: Tensor, mask: Tensor, centred: bool) -> Tensor:
    """Return the weight that a layer computes with; `centred` for one that standardises it.

    >>> weight, mask = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[True, False, True]])
    >>> effective(weight, mask, centred=False), effective(weight, mask, centred=True)
    (tensor([[1., 0., 3.]]), tensor([[-1.,  0.,  1.]]))
    """
    return _product(_centre(weight, mask) if centred else weight, mask)


def _product(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return tensor * mask; read as uint8, a mask takes eager kernels half the time that it takes as bool."""
    graph = (
        torch.compiler.is_compiling() or torch.jit.is_tracing()
    )  # no faster when compiled; a trace can't express it
    return tensor * (mask if graph else mask.view(torch.uint8))


def _weight(name: str, centred: bool) -> property:
    """Return the property that is the effective weight of a layer."""
    parameter_key, mask_key, listening_key = f"{name}_orig", f"{name}_mask", f"{name}_listening"

    def read(layer: nn.Module) -> Tensor:
        parameter = getattr(
            layer, parameter_key
        )  # whole in a forward; outside of it FSDP2 keeps a part
        mask = like(getattr(layer, mask_key), parameter)
        if getattr(layer, listening_key) and _is_own(layer, parameter):
            return _DenseBackward.apply(parameter, mask, centred)
        return effective(parameter, mask, centred)

    def write(layer: nn.Module, value: object) -> None:
        raise RuntimeError(
            f"{name} of a masked {type(layer).__name__} is mask times {parameter_key} and can't be assigned; "
            f"write into {parameter_key}, or call itop_prune.remove first"
        )

    return property(read, write)


def attach(layer: nn.Module, name: str, mask: Tensor) -> None:
    """Turn parameter `name` into `name`_orig and the buffer `name`_mask, seen through a property called `name`."""
    base: Any = layer.masked_class if isinstance(layer, MaskedLayer) else type(layer)
    _rename(layer._parameters, name, f"{name}_orig")
    layer.register_buffer(f"{name}_mask", mask)
    layer.__class__ = _subclass(base, (*masked_names(layer), name))
    if isinstance(layer, nn.RNNBase):
        layer.__dict__.pop("_flat_weights", None)


@functools.cache
def _subclass(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {"masked_class": base, "masked_names": names, "__doc__": base.__doc__}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    if issubclass(base, nn.RNNBase):  # it reads its tensors from a list of its own
        body["_flat_weights"] = property(_tensors_in_order, lambda layer, tensors: None)
        body |= {
            "_weights_have_changed": lambda layer: False,
            "flatten_parameters": lambda layer: None,
        }
    for name in names:
        body[name] = _weight(name, standardizes(base))
        body[f"{name}_listening"] = False  # whether the backward passes the dense gradient
        body[f"{name}_pattern"] = None  # N and M of an N:M pattern
        body[f"{name}_planned"] = None  # the count of a mask that was made on the meta device
    return type(base.__name__, (MaskedLayer, base), body)


@torch.no_grad()
def detach(layer: Any, name: str) -> None:
    """Undo `attach`: a plain parameter again, with the values of the effective weight."""
    names = tuple(other for other in masked_names(layer) if other != name)
    if standardizes(type(layer)):
        getattr(layer, f"{name}_orig").copy_(getattr(layer, name))
    zero_off_mask(getattr(layer, f"{name}_orig"), getattr(layer, f"{name}_mask"))
    layer.__class__ = _subclass(layer.masked_class, names) if names else layer.masked_class
    _rename(layer._parameters, f"{name}_orig", name)
    del layer._buffers[f"{name}_mask"]
    for what in ("listening", "planned", "pattern"):
        layer.__dict__.pop(f"{name}_{what}", None)
    if isinstance(layer, nn.RNNBase) and not names:
        layer._init_flat_weights()


def _rename(parameters: dict[str, Any], old: str, new: str) -> None:
    """Rename a key in place: the order of a model's parameters is the order of the optimizer's."""
    items = [(new if key == old else key, value) for key, value in parameters.items()]
    parameters.clear()
    parameters.update(items)


def masked_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the layer's masked parameters, () for any other module."""
    return layer.masked_names if isinstance(layer, MaskedLayer) else ()


class _DenseBackward(torch.autograd.Function):
    """The effective weight, whose backward passes the gradient of every position, active or not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, centred: bool) -> Tensor:
        return effective(weight, mask, centred)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        _, mask, ctx.centred = inputs
        if ctx.centred:
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        dense = _centre(gradient, *ctx.saved_tensors) if ctx.centred else gradient
        return dense, None, None


def _is_own(layer: nn.Module, parameter: Tensor) -> bool:
    """Return whether it is the layer's own parameter, or that of one of DataParallel's replicas, which leads there.

    Only its gradient is masked when it arrives (`itop_prune.layers.dense_gradient`), not that of a
    substitute (`functional_call`).
    """
    return isinstance(parameter, nn.Parameter) or hasattr(layer, "_is_replica")


def _centre(tensor: Tensor, mask: Tensor) -> Tensor:
    """Subtract from each filter its mean over active positions; the mean is never of less than float32."""
    inner = tuple(range(1, mask.ndim))
    total = _product(tensor, mask).sum(inner, keepdim=True, dtype=torch.float32)
    return (tensor - total / mask.sum(inner, keepdim=True).clamp(min=1)).type_as(tensor)


def pass_dense_gradient(layer: nn.Module, name: str, on: bool) -> None:
    """Let the backward through `name` pass the dense gradient, or the masked one again.

    The switch is an instance attribute over a class default, and is taken away again: torch.compile
    guards on it, and finds the state of before.
    """
    if on:
        setattr(layer, f"{name}_listening", True)
    else:
        layer.__dict__.pop(f"{name}_listening", None)


def _tensors_in_order(layer: Any) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


class MaskedLayer:
    """What a masked layer does otherwise than its class. Mixed in before that class, never instantiated."""

    masked_class: Any
    masked_names: tuple[str, ...]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Answer `layer.weight = nn.Parameter(...)` as the property does: it can't be assigned."""
        if name in self.masked_names:
            object.__setattr__(
                self, name, param
            )  # the property's setter, which raises; nn.Module would come back here
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as the layer's class does, and also a dense weight (the mask stays) and torch pruning's float masks."""
        broken = [
            name
            for name in self.masked_names
            if breaks_pattern(self, name, state_dict.get(f"{prefix}{name}_mask"))  # type: ignore[arg-type]
        ]
        if broken:
            messages = args[-1]  # that load_state_dict raises with
            messages.append(f"{prefix}({', '.join(broken)}): {BROKEN}")
            return
        filled = {
            n
            for n in self.masked_names
            if state_dict.get(f"{prefix}{n}_mask") is getattr(self, f"{n}_mask")
        }
        for name in self.masked_names:
            weight, parameter, mask = (prefix + name + ending for ending in ("", "_orig", "_mask"))
            if mask in state_dict:  # torch's own pruning keeps float masks
                state_dict[mask] = state_dict[mask].bool()
                self.__dict__.pop(f"{name}_planned", None)
            if weight in state_dict:  # of a dense model: the present mask stays
                state_dict[parameter] = state_dict.pop(weight)
                state_dict.setdefault(mask, getattr(self, name + "_mask"))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        for name in self.masked_names:
            if (
                name not in filled
            ):  # whoever gives the layer its own mask has written weight and mask in place
                zero_off_mask(getattr(self, name + "_orig"), getattr(self, name + "_mask"))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        switches = {f"{name}_listening" for name in self.masked_names}
        state = {key: value for key, value in state.items() if key not in switches}
        return _rebuild, (self.masked_class, self.masked_names), state, *rest


def _rebuild(base: Any, names: tuple[str, ...]) -> nn.Module:
    cls = _subclass(base, names)
    return cls.__new__(cls)


BROKEN = (
    "the mask in the source does not hold the N:M pattern of the model's; load masks of that pattern, or load into a "
    "model whose masks have none"
)


def pattern_of(layer: nn.Module, name: str) -> Pattern | None:
    """Return the pattern N:M that the mask of a masked parameter keeps, or None."""
    return getattr(layer, f"{name}_pattern")


def breaks_pattern(layer: nn.Module, name: str, mask: object) -> bool:
    """Return whether a mask that is to be loaded is none of the pattern that the present one keeps."""
    pattern, present = pattern_of(layer, name), getattr(layer, f"{name}_mask")
    if (
        pattern is None
        or not isinstance(mask, Tensor)
        or mask.is_meta
        or mask.shape != present.shape
    ):
        return False
    return not holds(mask.bool(), *pattern)
