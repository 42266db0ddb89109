"""Linear layers and convolutions in sparse storage.

A linear layer that is sparse enough computes with its active weights, on a CPU with Numba
(`itop_prune.kernels`). For all others the dense weight lives for one product. Autograd would keep
the weight of every layer from the forward to the backward. Here the backward makes the weight
again, so at any time one layer's is there.

Under torch.compile both directions are operators of their own. Otherwise the compiler could keep
the weights after all, and it can't look into kernels.

NaN and infinities pass through active weights alone in kernels. A dense weight makes NaN of a whole
row, since 0 times NaN is NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itop_prune.kernels import products
from itop_prune.kernels.products import order_of
from itop_prune.layers.names import layout_name, positions_name, probe_name, values_name
from itop_prune.layers.sparse_storage import Layout, dense, gather

NAME = "weight"
"""The weight that a linear layer or a convolution multiplies with."""
VALUES, POSITIONS = values_name(NAME), positions_name(NAME)
LAYOUT, PROBE = layout_name(NAME), probe_name(NAME)


class Geometry(NamedTuple):
    """Of a convolution; a linear layer has none."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 0


LINEAR = Geometry()


def forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute the output of a layer."""
    if not stride and (order := order_of(x, values, positions, shape, bias)):
        return products.forward(x, values, order, bias)

    weight = dense(values, positions, Layout(tuple(shape), channels_last))
    if not stride:
        return F.linear(x, weight, bias)
    nothing = [0] * len(stride)
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, nothing, groups
    )


def backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs_x: bool,
    needs_values: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of input, values, dense weight and bias; empty where not needed."""
    # A gradient that is to be differentiated again needs operations that torch knows.
    once = not torch.is_grad_enabled()
    if not stride and once and (order := order_of(x, values, positions, shape)):
        needs = (needs_x, needs_values and not needs_weight, needs_bias)
        for_x, for_values, for_bias = products.backward(gradient, x, values, order, needs)
        if not needs_weight:
            return for_x, for_values, gradient.new_empty(0), for_bias
        for_weight = gradient.t().mm(x)
        if needs_values:
            for_values = gather(for_weight, positions)
        return for_x, for_values, for_weight, for_bias

    layout = Layout(tuple(shape), channels_last)
    needs = (needs_x, needs_weight or needs_values, needs_bias)
    if not stride:
        nothing = gradient.new_empty(0)
        found = (
            gradient.mm(dense(values, positions, layout)) if needs_x else nothing,
            gradient.t().mm(x) if needs[1] else nothing,
            gradient.sum(0) if needs_bias else nothing,
        )
    else:
        # Without the input's gradient the weight's numbers are not read, only its shape.
        weight = dense(values, positions, layout) if needs_x else values.new_empty(()).expand(shape)
        zeros = [0] * len(stride)
        found = torch.ops.aten.convolution_backward(
            gradient, x, weight, [shape[0]], stride, padding, dilation, False, zeros, groups, needs
        )
    for_x, for_weight, for_bias = (
        tensor if need else gradient.new_empty(0) for tensor, need in zip(found, needs, strict=True)
    )
    for_values = gather(for_weight, positions) if needs_values else gradient.new_empty(0)
    if not needs_weight:
        for_weight = gradient.new_empty(0)
    return for_x, for_values, for_weight, for_bias


_forward_op = torch.library.custom_op("itop_prune::product", forward, mutates_args=())
_backward_op = torch.library.custom_op("itop_prune::product_backward", backward, mutates_args=())
_forward_op.register_fake(forward)
_backward_op.register_fake(backward)


class _Product(torch.autograd.Function):
    """The output of a layer, whose gradients can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        layout: Layout,
        geometry: Geometry,
    ) -> Tensor:
        compute: Any = _forward_op if torch.compiler.is_compiling() else forward
        return compute(x, values, positions, bias, *layout, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, positions, _, _, ctx.layout, ctx.geometry = inputs
        ctx.save_for_backward(x, values, positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        needs_x, needs_values, _, needs_bias, needs_probe, _, _ = ctx.needs_input_grad
        compute: Any = _backward_op if torch.compiler.is_compiling() else backward
        for_x, for_values, for_weight, for_bias = compute(
            gradient,
            x,
            values,
            positions,
            *ctx.layout,
            *ctx.geometry,
            needs_x,
            needs_values,
            needs_probe,
            needs_bias,
        )
        return (
            for_x if needs_x else None,
            for_values if needs_values else None,
            None,
            for_bias if needs_bias else None,
            for_weight if needs_probe else None,
            None,
            None,
        )


class _EagerProduct(torch.autograd.Function):
    """The same in torch's older form, which costs less at a call and knows no `torch.func`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _Product.forward(*inputs)
        _Product.setup_context(ctx, inputs, output)
        return output

    backward = _Product.backward


def _takes_kernels(x: Tensor, values: Tensor, positions: Tensor, layout: Layout) -> bool:
    """Tell whether kernels compute an input, converted to the type of the values."""
    if not x.is_cpu:
        return False
    return order_of(x.to(values.dtype), values, positions, layout.shape) is not None


def product(
    layer: nn.Module, x: Tensor, bias: Tensor | None, geometry: Geometry = LINEAR
) -> Tensor:
    """Compute the output of a layer, in the type of autocast where that is on.

    Under autocast kernels compute in the type of the values, and their output is converted.
    """
    values: Tensor = getattr(layer, VALUES)
    probe = getattr(layer, PROBE) if isinstance(values, nn.Parameter) else None
    positions, layout = getattr(layer, POSITIONS), getattr(layer, LAYOUT)
    eager = not torch.compiler.is_compiling()

    narrow = None
    # Of the type "meta" autocast knows nothing.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        narrow = torch.get_autocast_dtype(x.device.type)
        if eager and not geometry.stride and _takes_kernels(x, values, positions, layout):
            x = x.to(values.dtype)
        else:
            x, values = x.to(narrow), values.to(narrow)
            bias = None if bias is None else bias.to(narrow)

    function: Any = _Product
    if eager and not torch._C._are_functorch_transforms_active():
        function = _EagerProduct
    output = function.apply(x, values, positions, bias, probe, layout, geometry)
    return output if narrow is None else output.to(narrow)


def linear_forward(layer: Any, x: Tensor) -> Tensor:
    """Stand in for `nn.Linear.forward`; any leading dimensions are rows."""
    if x.ndim == 2 or not x.ndim:
        return product(layer, x, layer.bias)

    rows = x.reshape(-1, x.shape[-1])
    fused = x.is_contiguous()
    output = product(layer, rows, layer.bias if fused else None)
    output = output.view(*x.shape[:-1], output.shape[-1])
    # As torch does, so that both round alike.
    return output if fused or layer.bias is None else output + layer.bias.to(output.dtype)


def convolution_forward(layer: Any, x: Tensor) -> Tensor:
    """Stand in for the forward of a convolution that is not transposed.

    Padding by another number than 0, "same" padding, and inputs without a batch take the weight as
    a whole tensor.
    """
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or x.ndim != len(getattr(layer, LAYOUT).shape):
        return layer._conv_forward(x, layer.weight, layer.bias)
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    return product(layer, x, layer.bias, geometry)


def forward_of(base: type[nn.Module]) -> Any:
    """Find the forward that stands in for that of a class, or None if the class has its own."""
    if base.forward is nn.Linear.forward:
        return linear_forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if base.forward is kind.forward and base._conv_forward is kind._conv_forward:  # type: ignore[attr-defined]
            return convolution_forward
    return None
