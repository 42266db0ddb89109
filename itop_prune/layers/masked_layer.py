"""A masked layer: its weight is a property, mask times parameter, and so always current.

Torch's own pruning hook writes `layer.weight` as a plain attribute before the layer's forward. Code
that reads the weight without calling the layer (a parent, an export, a copy, `.to(dtype)`) then
sees an old tensor or none. A property has no such moment. It has to live on a class, so `attach`
gives the layer a subclass of its own class with the same name, and `detach` gives the class back.

Some layers compute another weight from theirs. Weight standardization subtracts the mean of each
filter, which would turn every zero of a masked filter into another number. Such a layer gets
filters centred over their active weights. Their mean is 0 already, so the zeros stay.
"""

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.layers.names import dense_backward_name, mask_name, parameter_name, pattern_name
from itop_prune.patterns import Pattern, holds
from itop_prune.sharding import like, zero_off_mask

STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}
"""Class names of convolutions that standardize each filter (Qiao et al., 2019, arXiv 1903.10520).

Add the name of your own class before `apply`."""

BROKEN_PATTERN = (
    "the mask in the source does not hold the N:M pattern of the model's; load masks of that "
    "pattern, or load into a model whose masks have none"
)


def attach(layer: nn.Module, name: str, mask: Tensor) -> None:
    """Turn parameter `name` into `name`_orig and a mask, read through a property `name`."""
    base: Any = layer.masked_class if isinstance(layer, MaskedLayer) else type(layer)
    _rename(layer._parameters, name, parameter_name(name))
    layer.register_buffer(mask_name(name), mask)

    layer.__class__ = _subclass(base, (*masked_names(layer), name))
    if isinstance(layer, nn.RNNBase):
        layer.__dict__.pop("_flat_weights", None)


@torch.no_grad()
def detach(layer: Any, name: str) -> None:
    """Undo `attach`: a plain parameter again, with the values of the effective weight."""
    parameter, mask = layer._parameters[parameter_name(name)], layer._buffers[mask_name(name)]
    if is_standardized(type(layer)):
        parameter.copy_(getattr(layer, name))
    zero_off_mask(parameter, mask)

    others = tuple(other for other in masked_names(layer) if other != name)
    layer.__class__ = _subclass(layer.masked_class, others) if others else layer.masked_class
    _rename(layer._parameters, parameter_name(name), name)
    del layer._buffers[mask_name(name)]
    layer.__dict__.pop(pattern_name(name), None)
    layer.__dict__.pop(dense_backward_name(name), None)
    if isinstance(layer, nn.RNNBase) and not others:
        layer._init_flat_weights()


def _rename(parameters: dict[str, Any], old: str, new: str) -> None:
    """Rename a key in place: the order of parameters is that of the optimizer's state."""
    items = [(new if key == old else key, value) for key, value in parameters.items()]
    parameters.clear()
    parameters.update(items)


@functools.cache
def _subclass(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Make the class of a masked layer; equal arguments give the same class."""
    body: dict[str, Any] = {
        "masked_class": base,
        "masked_names": names,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    if issubclass(base, nn.RNNBase):  # it reads its tensors from a list of its own
        body["_flat_weights"] = property(_rnn_weights, lambda layer, tensors: None)
        body["_weights_have_changed"] = lambda layer: False
        body["flatten_parameters"] = lambda layer: None
    for name in names:
        body[name] = _weight_property(name, is_standardized(base))
        body[pattern_name(name)] = None
        body[dense_backward_name(name)] = False
    return type(base.__name__, (MaskedLayer, base), body)


def _rnn_weights(layer: Any) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


def _weight_property(name: str, centred: bool) -> property:
    """Make the property that is the effective weight of a layer."""
    parameter_key, mask_key = parameter_name(name), mask_name(name)
    switch = dense_backward_name(name)

    def read(layer: nn.Module) -> Tensor:
        parameter = getattr(
            layer, parameter_key
        )  # whole in a forward; elsewhere FSDP2 keeps a part
        mask = like(getattr(layer, mask_key), parameter)
        if getattr(layer, switch) and _is_own(layer, parameter):
            return _DenseBackward.apply(parameter, mask, centred)
        return effective(parameter, mask, centred)

    def write(layer: nn.Module, value: object) -> None:
        raise RuntimeError(
            f"{name} of a masked {type(layer).__name__} is mask times {parameter_key} and can't be "
            f"assigned; write into {parameter_key}, or call itop_prune.remove first"
        )

    return property(read, write)


def _is_own(layer: nn.Module, parameter: Tensor) -> bool:
    """Tell the layer's own parameter (or that of a DataParallel replica) from a substitute.

    Hooks mask the dense gradient of the own parameter when it arrives
    (`itop_prune.layers.dense_gradient`). They don't see the gradient of a substitute, as
    `torch.func.functional_call` passes one.
    """
    return isinstance(parameter, nn.Parameter) or hasattr(layer, "_is_replica")


def effective(weight: Tensor, mask: Tensor, centred: bool) -> Tensor:
    """Compute the weight that a layer uses; `centred` is for layers that standardize it.

    >>> weight, mask = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[True, False, True]])
    >>> effective(weight, mask, centred=False), effective(weight, mask, centred=True)
    (tensor([[1., 0., 3.]]), tensor([[-1.,  0.,  1.]]))
    """
    return _product(_centre(weight, mask) if centred else weight, mask)


def _product(tensor: Tensor, mask: Tensor) -> Tensor:
    """Multiply a tensor by a mask, viewed as uint8 in eager mode: half the time of bool.

    In float16 Adam's eps is 0, so it writes 0 / 0 off the mask. A product would keep that NaN.
    """
    if tensor.dtype is torch.float16:  # by identity: in a trace the type is a proxy
        return torch.where(mask, tensor, 0.0)
    graph = (
        torch.compiler.is_compiling() or torch.jit.is_tracing()
    )  # a trace can't express the view
    return tensor * (mask if graph else mask.view(torch.uint8))


def _centre(tensor: Tensor, mask: Tensor) -> Tensor:
    """Subtract from each filter its mean over active positions, taken in float32 or finer."""
    inner = tuple(range(1, mask.ndim))
    total = _product(tensor, mask).sum(inner, keepdim=True, dtype=torch.float32)
    return (tensor - total / mask.sum(inner, keepdim=True).clamp(min=1)).type_as(tensor)


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


def pass_dense_gradient(layer: nn.Module, name: str, on: bool) -> None:
    """Let the backward through `name` pass the dense gradient, or the masked one again.

    The switch is an instance attribute over a class default. torch.compile guards on it, and finds
    its former graph again once the attribute is gone.
    """
    if on:
        setattr(layer, dense_backward_name(name), True)
    else:
        layer.__dict__.pop(dense_backward_name(name), None)


def is_standardized(kind: type) -> bool:
    """Tell whether layers of this class subtract from each filter its mean."""
    return has_base(kind, STANDARDIZED)


def has_base(kind: type, names: Collection[str]) -> bool:
    """Tell whether a class or one of its bases has one of these names."""
    return any(base.__name__ in names for base in kind.__mro__)


def masked_names(layer: nn.Module) -> tuple[str, ...]:
    """List the layer's masked parameters by their plain names; () for any other module."""
    return layer.masked_names if isinstance(layer, MaskedLayer) else ()


def pattern_of(layer: nn.Module, name: str) -> Pattern | None:
    """Look up the N:M pattern that the mask of a masked parameter keeps, or None."""
    return getattr(layer, pattern_name(name))


def breaks_pattern(layer: nn.Module, name: str, mask: object) -> bool:
    """Tell whether a mask to be loaded breaks the pattern that the present mask keeps."""
    pattern = pattern_of(layer, name)
    present: Tensor = getattr(layer, mask_name(name))
    if pattern is None or not isinstance(mask, Tensor) or mask.shape != present.shape:
        return False
    return not mask.is_meta and not holds(mask.bool(), *pattern)


class MaskedLayer:
    """What masked layers do differently from their class. Mixed in before that class."""

    masked_class: Any
    masked_names: tuple[str, ...]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse `layer.weight = nn.Parameter(...)` with the error of the property."""
        if name in self.masked_names:
            object.__setattr__(self, name, param)  # nn.Module's own setter would come back here
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as the layer's class does, also dense weights and torch pruning's float masks."""
        layer: Any = self
        messages = args[-1]  # that load_state_dict raises with
        broken = [
            name
            for name in self.masked_names
            if breaks_pattern(layer, name, state_dict.get(prefix + mask_name(name)))
        ]
        if broken:
            messages.append(f"{prefix}({', '.join(broken)}): {BROKEN_PATTERN}")
            return

        changed = []
        for name in self.masked_names:
            dense, parameter, mask = (
                prefix + key for key in (name, parameter_name(name), mask_name(name))
            )
            present = getattr(layer, mask_name(name))
            if state_dict.get(mask) is not present:  # else weight and mask were written in place
                changed.append(name)
            if mask in state_dict:
                state_dict[mask] = state_dict[mask].bool()
            if dense in state_dict:  # of a dense model: the present mask stays
                state_dict[parameter] = state_dict.pop(dense)
                state_dict.setdefault(mask, present)

        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        for name in changed:
            zero_off_mask(getattr(layer, parameter_name(name)), getattr(layer, mask_name(name)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        switches = {dense_backward_name(name) for name in self.masked_names}
        state = {key: value for key, value in state.items() if key not in switches}
        return _rebuild, (self.masked_class, self.masked_names), state, *rest


def _rebuild(base: Any, names: tuple[str, ...]) -> nn.Module:
    cls = _subclass(base, names)
    return cls.__new__(cls)
