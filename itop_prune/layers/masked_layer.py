"""A masked layer: its weight is a property, and so always current.

With the storage "mask" the weight is mask times parameter. With the storage "sparse" it is made of
the active values and their positions (see `itop_prune.layers.sparse_storage`).

Torch's own pruning hook writes `layer.weight` as a plain attribute before the layer's forward. Code
that reads the weight without calling the layer (a parent, an export, a copy, `.to(dtype)`) then
sees an old tensor or none. A property has no such moment. It has to live on a class, so `attach`
gives the layer a subclass of its own class with the same name, and `detach` gives the class back.

Some layers compute another weight from theirs. Weight standardization subtracts the mean of each
filter, which would turn every zero of a masked filter into another number. Such a layer gets
filters centred over their active weights. Their mean is 0 already, so the zeros stay.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from itop_prune.layers import sparse_products, sparse_storage
from itop_prune.layers.lost_writes import refuse_peft_write, refused_resets
from itop_prune.layers.matrices import input_dim
from itop_prune.layers.names import (
    dense_backward_name,
    layout_name,
    mask_name,
    parameter_name,
    pattern_name,
    positions_name,
    probe_name,
    shape_name,
    values_name,
)
from itop_prune.layers.sparse_storage import dense_weight, layout_of
from itop_prune.patterns import Pattern, holds
from itop_prune.sharding import like, zero_off_mask

STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}
"""Class names of convolutions that standardize each filter (Qiao et al., 2019, arXiv 1903.10520).

Add the name of your own class before `apply`."""

BROKEN_PATTERN = (
    "the mask in the source does not hold the N:M pattern of the model's; load masks of that "
    "pattern, or load into a model whose masks have none"
)

OTHER_STORAGE = (
    "the source is of the other storage (mask or sparse); itop_prune.load(model, source) takes both"
)


def attach(layer: nn.Module, name: str, mask: Tensor) -> None:
    """Turn parameter `name` into `name`_orig and a mask, read through a property `name`."""
    _rename(layer._parameters, name, parameter_name(name))
    layer.register_buffer(mask_name(name), mask)
    _give_class(layer, (*masked_names(layer), name), sparse_names(layer))


@torch.no_grad()
def attach_sparse(layer: nn.Module, name: str, mask: Tensor) -> None:
    """Turn parameter `name` into the values of its active weights and their positions."""
    weight = layer.get_parameter(name)
    size = sparse_storage.position_type(weight.numel())
    positions = mask.flatten().nonzero().squeeze(1).to(size)
    attach_values(layer, name, sparse_storage.gather(weight, positions), positions)


def attach_values(layer: nn.Module, name: str, values: Tensor, positions: Tensor) -> None:
    """Do the same with given values, (1, active), and their positions, (active,)."""
    weight = layer.get_parameter(name)
    _rename(layer._parameters, name, values_name(name))
    layer._parameters[values_name(name)] = nn.Parameter(values, weight.requires_grad)
    layer.register_buffer(positions_name(name), positions)
    setattr(layer, layout_name(name), layout_of(weight))
    _give_class(layer, (*masked_names(layer), name), (*sparse_names(layer), name))


def _give_class(layer: nn.Module, names: tuple[str, ...], sparse: tuple[str, ...]) -> None:
    """Give a layer the class on which these names are properties, or its own class for none."""
    base: Any = layer.masked_class if isinstance(layer, MaskedLayer) else type(layer)
    layer.__class__ = _subclass(base, names, sparse) if names else base
    if isinstance(layer, nn.RNNBase):
        layer.__dict__.pop("_flat_weights", None)


@torch.no_grad()
def detach(layer: Any, name: str) -> None:
    """Undo `attach`: a plain parameter again, with the values of the effective weight."""
    parameter, mask = layer._parameters[parameter_name(name)], layer._buffers[mask_name(name)]
    if is_standardized(type(layer)):
        parameter.copy_(getattr(layer, name))
    zero_off_mask(parameter, mask)

    _rename(layer._parameters, parameter_name(name), name)
    del layer._buffers[mask_name(name)]
    layer.__dict__.pop(dense_backward_name(name), None)
    _take_class(layer, name)


def detach_sparse(layer: Any, name: str) -> None:
    """Undo `attach_sparse`: a new dense parameter, with the values of the effective weight."""
    values = layer._parameters[values_name(name)]
    dense = getattr(layer, name).detach().clone()  # of its own memory: it was part of a longer one
    weight = nn.Parameter(dense, values.requires_grad)

    _rename(layer._parameters, values_name(name), name)
    layer._parameters[name] = weight
    del layer._buffers[positions_name(name)]
    for attribute in (layout_name(name), probe_name(name)):
        layer.__dict__.pop(attribute, None)
    _take_class(layer, name)


def _take_class(layer: Any, name: str) -> None:
    """Give a layer back the class without one of its properties."""
    names = tuple(other for other in layer.masked_names if other != name)
    _give_class(layer, names, tuple(other for other in layer.sparse_names if other != name))
    layer.__dict__.pop(pattern_name(name), None)
    if isinstance(layer, nn.RNNBase) and not names:
        layer._init_flat_weights()


def _rename(parameters: dict[str, Any], old: str, new: str) -> None:
    """Rename a key in place: the order of parameters is that of the optimizer's state."""
    items = [(new if key == old else key, value) for key, value in parameters.items()]
    parameters.clear()
    parameters.update(items)


@functools.cache
def _subclass(base: Any, names: tuple[str, ...], sparse: tuple[str, ...]) -> type[nn.Module]:
    """Make the class of a masked layer; equal arguments give the same class."""
    body: dict[str, Any] = {
        "masked_class": base,
        "masked_names": names,
        "sparse_names": sparse,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        **refused_resets(base),
    }
    if issubclass(base, nn.RNNBase):  # it reads its tensors from a list of its own
        body["_flat_weights"] = property(_rnn_weights, lambda layer, tensors: None)
        body["_weights_have_changed"] = lambda layer: False
        body["flatten_parameters"] = lambda layer: None
    for name in names:
        body[pattern_name(name)] = None
        if name in sparse:
            body[name] = _sparse_weight_property(name, is_standardized(base))
            body[probe_name(name)] = None
        else:
            body[name] = _weight_property(name, is_standardized(base))
            body[dense_backward_name(name)] = False

    if not hasattr(base, "base_layer"):
        body["base_layer"] = property(_no_base_layer)
    forward = sparse_products.forward_of(base) if sparse_products.NAME in sparse else None
    if forward is not None:
        body["forward"] = forward
    return type(base.__name__, (MaskedLayer, base), body)


def _no_base_layer(layer: nn.Module) -> NoReturn:
    """Have none: PEFT's layers look for one. Refuse if they do so in order to merge."""
    refuse_peft_write(layer)
    raise AttributeError(f"{type(layer).__name__!r} object has no attribute 'base_layer'")


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
            f"assigned or deleted; write into {parameter_key}, or call itop_prune.remove first"
        )

    return property(read, write, lambda layer: write(layer, None))


def _sparse_weight_property(name: str, centred: bool) -> property:
    """Make the property that is the dense weight of a layer in sparse storage."""
    values_key, positions_key = values_name(name), positions_name(name)
    layout_key, probe_key = layout_name(name), probe_name(name)

    def read(layer: nn.Module) -> Tensor:
        values = getattr(layer, values_key)
        probe = getattr(layer, probe_key) if isinstance(values, nn.Parameter) else None
        positions, layout = getattr(layer, positions_key), getattr(layer, layout_key)
        weight = dense_weight(values, positions, layout, probe)
        if not centred:
            return weight
        # Passes on the gradient of every position, of which those with a slot are gathered.
        return _DenseBackward.apply(weight, sparse_storage.mask_of(positions, layout.shape), True)

    def write(layer: nn.Module, value: object) -> None:
        raise RuntimeError(
            f"{name} of a {type(layer).__name__} in sparse storage is made of {values_key} and "
            f"can't be assigned or deleted; write into {values_key}, or call "
            "itop_prune.remove first"
        )

    return property(read, write, lambda layer: write(layer, None))


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


def sparse_names(layer: nn.Module) -> tuple[str, ...]:
    """List those of the layer's masked parameters that are in sparse storage."""
    return layer.sparse_names if isinstance(layer, MaskedLayer) else ()


def pattern_of(layer: nn.Module, name: str) -> Pattern | None:
    """Look up the N:M pattern that the mask of a masked parameter keeps, or None."""
    return getattr(layer, pattern_name(name))


def breaks_pattern(layer: nn.Module, name: str, mask: object) -> bool:
    """Tell whether a mask to be loaded breaks the pattern that the present mask keeps."""
    pattern = pattern_of(layer, name)
    if pattern is None or not isinstance(mask, Tensor) or mask.shape != shape_of(layer, name):
        return False
    return not mask.is_meta and not holds(mask.bool(), *pattern, input_dim(layer, name))


def shape_of(layer: nn.Module, name: str) -> tuple[int, ...]:
    """Look up the dense shape of a masked parameter."""
    if name in sparse_names(layer):
        return getattr(layer, layout_name(name)).shape
    return tuple(getattr(layer, mask_name(name)).shape)


class MaskedLayer:
    """What masked layers do differently from their class. Mixed in before that class."""

    masked_class: Any
    masked_names: tuple[str, ...]
    sparse_names: tuple[str, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a dense layer from `type(layer)(...)`, as PEFT does.

        Without arguments make an empty one, as copy and pickle do.
        """
        return cls.masked_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse `layer.weight = nn.Parameter(...)` with the error of the property."""
        if name in self.masked_names:
            object.__setattr__(self, name, param)  # nn.Module's own setter would come back here
        super().register_parameter(name, param)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to(memory_format=...)`, which does not see the shape of a stored weight."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name in self.sparse_names:
            layout = getattr(self, layout_name(name))
            if len(layout.shape) in (4, 5):
                example = torch.empty([2] * len(layout.shape))
                moved = layout_of(fn(example.to(memory_format=layout.memory_format)))
                setattr(self, layout_name(name), layout._replace(channels_last=moved.channels_last))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the dense shape beside values and positions, which do not tell it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self.sparse_names:
            shape = getattr(self, layout_name(name)).shape
            destination[prefix + shape_name(name)] = torch.tensor(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as the layer's class does, also dense weights and torch pruning's float masks."""
        layer: Any = self
        messages = args[-1]  # that load_state_dict raises with
        problems = []
        for name in self.masked_names:
            check = _sparse_problem if name in self.sparse_names else _mask_problem
            problem = check(layer, name, state_dict, prefix)
            if problem:
                problems.append(f"{prefix}{name}: {problem}")
        if problems:
            messages += problems
            return

        changed = []
        for name in self.masked_names:
            prepare = _prepare_sparse if name in self.sparse_names else _prepare_masked
            if prepare(layer, name, state_dict, prefix):
                changed.append(name)

        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        for name in changed:
            if name in self.sparse_names:
                used = getattr(layer, positions_name(name)) >= 0
                zero_off_mask(getattr(layer, values_name(name)), used.unsqueeze(0))
            else:
                zero_off_mask(getattr(layer, parameter_name(name)), getattr(layer, mask_name(name)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        switches = {dense_backward_name(name) for name in self.masked_names}
        switches |= {probe_name(name) for name in self.masked_names}
        state = {key: value for key, value in state.items() if key not in switches}
        return _rebuild, (self.masked_class, self.masked_names, self.sparse_names), state, *rest


def _mask_problem(layer: nn.Module, name: str, state: Mapping[str, Any], prefix: str) -> str:
    """Explain why a state dict can't be loaded into a masked parameter, or return ""."""
    if prefix + values_name(name) in state:
        return OTHER_STORAGE
    if breaks_pattern(layer, name, state.get(prefix + mask_name(name))):
        return BROKEN_PATTERN
    return ""


def _prepare_masked(layer: nn.Module, name: str, state: dict[str, Any], prefix: str) -> bool:
    """Make the entries of a masked parameter; tell whether they are others than the present."""
    dense, parameter, mask = (prefix + key for key in (name, parameter_name(name), mask_name(name)))
    present = getattr(layer, mask_name(name))
    changed = state.get(mask) is not present  # else weight and mask were written in place
    if mask in state:
        state[mask] = state[mask].bool()
    if dense in state:  # of a dense model: the present mask stays
        state[parameter] = state.pop(dense)
        state.setdefault(mask, present)
    return changed


def _sparse_problem(layer: nn.Module, name: str, state: Mapping[str, Any], prefix: str) -> str:
    """Explain why a state dict can't be loaded into sparse storage, or return ""."""
    if prefix + parameter_name(name) in state:
        return OTHER_STORAGE
    shape = shape_of(layer, name)
    dense, values, positions, saved_shape = (
        state.get(prefix + key)
        for key in (name, values_name(name), positions_name(name), shape_name(name))
    )
    if dense is not None and dense.shape != shape:
        return f"the source has the shape {tuple(dense.shape)}, the model {shape}"
    if saved_shape is not None and tuple(saved_shape.tolist()) != shape:
        return f"the source has the shape {tuple(saved_shape.tolist())}, the model {shape}"
    if values is None or positions is None:
        return ""

    problem = sparse_storage.problem(values, positions, shape)
    if not problem and not positions.is_meta and pattern_of(layer, name) is not None:
        pattern_broken = breaks_pattern(layer, name, sparse_storage.mask_of(positions, shape))
        problem = BROKEN_PATTERN if pattern_broken else ""
    return problem


def _prepare_sparse(layer: nn.Module, name: str, state: dict[str, Any], prefix: str) -> bool:
    """Make the entries of a parameter in sparse storage, with as many slots as they have."""
    dense, values, positions = (
        prefix + key for key in (name, values_name(name), positions_name(name))
    )
    state.pop(prefix + shape_name(name), None)
    present = getattr(layer, positions_name(name))
    changed = state.get(positions) is not present
    if dense in state:  # of a dense model: the present positions stay
        weight = state.pop(dense)
        state[values] = sparse_storage.gather(weight, present.to(weight.device))
        state.setdefault(positions, present)

    if values in state and positions in state:
        sparse_storage.resize_layer(layer, name, len(state[positions]))
    return changed


def _rebuild(base: Any, names: tuple[str, ...], sparse: tuple[str, ...]) -> nn.Module:
    cls = _subclass(base, names, sparse)
    return cls.__new__(cls)
