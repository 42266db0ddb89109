"""Linear layers and convolutions in sparse storage.

A linear layer or 2-d convolution that is sparse enough computes with its active weights, on a CPU
with Numba (`itop_prune.kernels`). For all others the dense weight lives for one product. Autograd
would keep the weight of every layer from the forward to the backward. Here the backward makes the
weight again, so at any time one layer's is there.

Under torch.compile both directions are operators of their own. Otherwise the compiler could keep
the weights after all, and it can't look into kernels. torch.export gets the dense weight.

NaN and infinities pass through active weights alone in kernels. A dense weight makes NaN of a whole
row, since 0 times NaN is NaN.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from itop_prune.kernels import convolution_products, linear_products
from itop_prune.kernels.convolution_plan import Plan, plan_of
from itop_prune.kernels.memo import Memo
from itop_prune.kernels.runtime import can_compute
from itop_prune.layers.names import layout_name, positions_name, probe_name, values_name
from itop_prune.layers.sparse_storage import Layout, dense, gather

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order

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


class Needs(NamedTuple):
    """Which gradients to compute."""

    x: bool
    values: bool
    weight: bool
    """The dense weight's."""
    bias: bool


class Kernel(NamedTuple):
    """How kernels compute a layer."""

    order: "Order"
    """Of its weights."""
    plan: Plan | None
    """Of a convolution."""


_kernels: Memo[tuple[Kernel | None]] = Memo()
"""By positions."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of input, values, dense weight and bias. One that is not needed may be None or empty."""


def kernel_for(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    layout: Layout,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Kernel | None:
    """Find how kernels compute a layer; None if its dense weight computes this input."""
    # First: sizes of traced and faked images may be symbols, which a plan would fix.
    if not can_compute(*((x, values) if bias is None else (x, values, bias))):
        return None
    key = x.shape, x.dtype, values.shape, None if bias is None else bias.shape, layout, geometry
    known = _kernels.get(positions, key)
    if known is None:
        made = _make_kernel(x, values, positions, layout, geometry, bias)
        known = _kernels.put(positions, key, (made,))
    return known[0]


def _make_kernel(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    layout: Layout,
    geometry: Geometry,
    bias: Tensor | None,
) -> Kernel | None:
    plan = None
    if not geometry.stride:
        order = linear_products.order_of(x, values, positions, layout.shape, bias)
    else:
        plan = plan_of(x, layout.shape, *geometry)
        if plan is None or (bias is not None and bias.shape != layout.shape[:1]):
            return None
        order = convolution_products.order_of(values, positions, plan)
    return None if order is None else Kernel(order, plan)


def forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    kernel: Kernel | None,
) -> Tensor:
    """Compute the output of a layer: by a kernel if there is one, else by the dense weight."""
    if kernel is not None and kernel.plan is not None:
        last = _is_channels_last(x, layout)
        return convolution_products.forward(x, values, kernel.plan, kernel.order, bias, last)
    if kernel is not None:
        return linear_products.forward(x, values, kernel.order, bias)

    weight = dense(values, positions, layout)
    if not geometry.stride:
        return F.linear(x, weight, bias)
    stride, padding, dilation, groups = geometry
    nothing = [0] * len(stride)
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, nothing, groups
    )


def backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    layout: Layout,
    geometry: Geometry,
    kernel: Kernel | None,
    needs: Needs,
) -> Gradients:
    """Compute the gradients of a layer, likewise."""
    if kernel is None:
        weight = dense(values, positions, layout) if needs.x else None
        wanted = (needs.x, needs.weight or needs.values, needs.bias)
        for_x, for_weight, for_bias = _dense_backward(gradient, x, weight, layout, geometry, wanted)
        for_values = gather(for_weight, positions) if needs.values else None
        return for_x, for_values, for_weight if needs.weight else None, for_bias

    # The dense weight's gradient holds that of the values.
    wanted = (needs.x, needs.values and not needs.weight, needs.bias)
    order, plan = kernel
    if plan is not None:
        # The input's gradient takes the memory format of x.
        last = _is_channels_last(x, layout)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        found = convolution_products.backward(gradient, x, values, plan, order, wanted)
    else:
        found = linear_products.backward(gradient, x, values, order, wanted)
    for_x, for_values, for_bias = found
    if not needs.weight:
        return for_x, for_values, None, for_bias

    alone = (False, True, False)
    _, for_weight, _ = _dense_backward(gradient, x, None, layout, geometry, alone)
    return for_x, gather(for_weight, positions) if needs.values else None, for_weight, for_bias


def _is_channels_last(x: Tensor, layout: Layout) -> bool:
    """Tell whether torch would give the output of a 2-d convolution channels last."""
    if layout.channels_last:
        return True
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last != x.is_contiguous():  # most often, and much faster to ask
        return last
    return suggest_memory_format(x) is torch.channels_last


def _dense_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Any, Any, Any]:
    """Compute the gradients of input, dense weight and bias; only the input's needs the weight."""
    needs_x, needs_weight, needs_bias = needs
    if not geometry.stride:
        for_x = gradient.mm(weight) if weight is not None else None
        for_weight = gradient.t().mm(x) if needs_weight else None
        return for_x, for_weight, gradient.sum(0) if needs_bias else None

    if weight is None:  # its numbers are not read, only its shape
        weight = gradient.new_empty(()).expand(layout.shape)
    stride, padding, dilation, groups = geometry
    nothing = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        [layout.shape[0]],
        stride,
        padding,
        dilation,
        False,
        nothing,
        groups,
        (needs_x, needs_weight, needs_bias),
    )


def _flat_forward(
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
    layout = Layout(tuple(shape), channels_last)
    geometry = Geometry(stride, padding, dilation, groups)
    kernel = kernel_for(x, values, positions, layout, geometry, bias)
    return forward(x, values, positions, bias, layout, geometry, kernel)


def _flat_backward(
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
    layout = Layout(tuple(shape), channels_last)
    geometry = Geometry(stride, padding, dilation, groups)
    kernel = kernel_for(x, values, positions, layout, geometry)
    needs = Needs(needs_x, needs_values, needs_weight, needs_bias)
    found = backward(gradient, x, values, positions, layout, geometry, kernel, needs)
    # An operator returns tensors, each of its own memory.
    for_x, for_values, for_weight, for_bias = (
        gradient.new_empty(0) if tensor is None else tensor for tensor in found
    )
    return for_x, for_values, for_weight, for_bias


_forward_op = torch.library.custom_op("itop_prune::product", _flat_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "itop_prune::product_backward", _flat_backward, mutates_args=()
)
# The functions compute shapes as well, of tensors without numbers.
_forward_op.register_fake(_flat_forward)
_backward_op.register_fake(_flat_backward)


class _Product(torch.autograd.Function):
    """The output of a layer under torch.compile and `torch.func`."""

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
        if torch.compiler.is_compiling():
            return _forward_op(x, values, positions, bias, *layout, *geometry)
        return forward(x, values, positions, bias, layout, geometry, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, positions, _, _, ctx.layout, ctx.geometry = inputs
        ctx.save_for_backward(x, values, positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout, geometry, needs = ctx.layout, ctx.geometry, _needs(ctx)
        x, values, positions = ctx.saved_tensors
        if torch.compiler.is_compiling():
            found = _backward_op(gradient, x, values, positions, *layout, *geometry, *needs)
        else:
            found = backward(gradient, x, values, positions, layout, geometry, None, needs)
        return _for_inputs(found, needs)


class _EagerProduct(torch.autograd.Function):
    """The same in torch's older form, which costs less at a call and knows no `torch.func`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        layout: Layout,
        geometry: Geometry,
        kernel: Kernel | None,
    ) -> Tensor:
        ctx.layout, ctx.geometry, ctx.kernel = layout, geometry, kernel
        ctx.save_for_backward(x, values, positions)
        return forward(x, values, positions, bias, layout, geometry, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout, geometry, kernel, needs = ctx.layout, ctx.geometry, ctx.kernel, _needs(ctx)
        x, values, positions = ctx.saved_tensors
        # A gradient that is to be differentiated again needs operations that torch knows.
        if torch.is_grad_enabled() or not can_compute(gradient):
            kernel = None
        found = backward(gradient, x, values, positions, layout, geometry, kernel, needs)
        return (*_for_inputs(found, needs), None)


def _needs(ctx: Any) -> Needs:
    x, values, _, bias, probe, *_ = ctx.needs_input_grad
    return Needs(x, values, probe, bias)


def _for_inputs(gradients: Gradients, needs: Needs) -> tuple[Tensor | None, ...]:
    """Put gradients in the order of the inputs; None where not needed."""
    x, values, weight, bias = gradients
    return (
        x if needs.x else None,
        values if needs.values else None,
        None,
        bias if needs.bias else None,
        weight if needs.weight else None,
        None,
        None,
    )


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

    kernel = None
    if eager and x.is_cpu:
        wide = x if narrow is None else x.to(values.dtype)
        kernel = kernel_for(wide, values, positions, layout, geometry, bias)
    if kernel is not None:
        x = wide
    elif narrow is not None:
        x, values = x.to(narrow), values.to(narrow)
        bias = None if bias is None else bias.to(narrow)

    inputs = (x, values, positions, bias, probe, layout, geometry)
    if torch.compiler.is_exporting():  # programs that run elsewhere have torch's operators alone
        output = forward(x, values, positions, bias, layout, geometry, None)
    elif eager and not torch.is_grad_enabled():
        output = forward(x, values, positions, bias, layout, geometry, kernel)
    elif eager and not torch._C._are_functorch_transforms_active():
        output = _EagerProduct.apply(*inputs, kernel)
    else:
        output = _Product.apply(*inputs)
    return output if narrow is None else output.to(narrow)


def linear_forward(layer: Any, input: Tensor) -> Tensor:
    """Stand in for `nn.Linear.forward`; any leading dimensions are rows."""
    x, bias = input, layer.bias
    if x.ndim == 2 or not x.ndim:
        return product(layer, x, bias)

    rows = x.reshape(-1, x.shape[-1])
    fused = x.is_contiguous()
    output = product(layer, rows, bias if fused else None)
    output = output.view(*x.shape[:-1], output.shape[-1])
    # As torch does, so that both round alike.
    return output if fused or bias is None else output + bias.to(output.dtype)


def convolution_forward(layer: Any, input: Tensor) -> Tensor:
    """Stand in for the forward of a convolution that is not transposed.

    Inputs without a batch take the weight as a whole tensor.
    """
    x = input
    if x.ndim != len(getattr(layer, LAYOUT).shape):
        return layer._conv_forward(x, layer.weight, layer.bias)

    padding, around = layer.padding, layer._reversed_padding_repeated_twice
    named = isinstance(padding, str)
    if named and around[::2] == around[1::2]:
        padding, named = tuple(reversed(around[::2])), False
    if named or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, around, mode=mode), (0,) * len(layer.stride)
    geometry = Geometry(layer.stride, padding, layer.dilation, layer.groups)
    return product(layer, x, layer.bias, geometry)


def forward_of(base: type[nn.Module]) -> Any:
    """Find the forward that stands in for that of a class, or None if the class has its own."""
    if base.forward is nn.Linear.forward:
        return linear_forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if base.forward is kind.forward and base._conv_forward is kind._conv_forward:  # type: ignore[attr-defined]
            return convolution_forward
    return None


def can_take_kernels(layer: nn.Module) -> bool:
    """Tell whether a layer, masked or not, takes kernels in sparse storage when it is sparse."""
    forward = forward_of(getattr(layer, "masked_class", type(layer)))
    if forward is not convolution_forward or not isinstance(layer, nn.Conv2d):
        return forward is linear_forward
    return layer.groups == 1 and layer.stride[0] == layer.stride[1]
