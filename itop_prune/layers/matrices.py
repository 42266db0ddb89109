"""The weight matrices of each class of layer, and which dimension of each holds the inputs.

Masks, N:M patterns and distributions read the table `MASKABLE`. A class that is in no row stays
dense.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

ORDERS = ("out in", "in out", "experts out in", "experts in out")
"""How the dimensions of a weight may read; further ones are those of a convolution's kernel."""

MIXED_KERNELS = "kernels"
"""Each row of the weight is a whole kernel, which the layer mixes with others."""

Matrices = Mapping[str, str]
"""The order of the dimensions, one of `ORDERS`, by the name of the tensor in its layer."""


def _of_rnn(layer: nn.RNNBase) -> Matrices:
    names = [name for name in layer._flat_weights_names if name.startswith("weight_")]
    return dict.fromkeys(names, "out in")


MASKABLE: dict[type[nn.Module] | str, Matrices | Callable[[Any], Matrices]] = {
    nn.Linear: {"weight": "out in"},
    nn.modules.conv._ConvNd: {"weight": "out in"},
    nn.modules.conv._ConvTransposeNd: {"weight": "in out"},
    nn.RNNBase: _of_rnn,
    nn.RNNCellBase: {"weight_ih": "out in", "weight_hh": "out in"},
    nn.MultiheadAttention: {
        "in_proj_weight": "out in",
        "q_proj_weight": "out in",
        "k_proj_weight": "out in",
        "v_proj_weight": "out in",
    },
    "timm.layers.cond_conv2d.CondConv2d": {"weight": MIXED_KERNELS},
    "transformers.pytorch_utils.Conv1D": {"weight": "in out"},
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": {
        "gate_up_proj": "experts in out",
        "down_proj": "experts in out",
    },
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": {
        "weight": "experts out in"
    },
    nn.Embedding: {},
    nn.EmbeddingBag: {},
    nn.LayerNorm: {},
    nn.RMSNorm: {},
    parametrize.ParametrizationList: {},
}
"""What can be masked: the weight matrices of a class, and how the dimensions of each read.

A row is `class: {name of the tensor: order}`. The order is one of `ORDERS`. nn.Linear has "out in",
and transformers' Conv1D "in out". "experts" stands before these where one tensor holds the matrices
of several experts. N:M patterns run along "in". Distributions count experts as
(experts * out, in). Where names depend on the layer, a function of the layer gives them.

Subclasses are masked as their nearest class in the table. The full name of a class also stands for
it, so that its library need not be imported. `{}` says that a class has no weight matrices. Classes
that transformers decorates with `use_experts_implementation` need no row: they tell their order.

Add a row for a class of your own before `apply`, best beside the class:
`itop_prune.MASKABLE[MyLayer] = {"kernel": "in out"}`.
"""


def matrices_of(layer: nn.Module) -> Matrices | None:
    """Look up the weight matrices of a layer, and the orders of their dimensions.

    None: the class is in no row of `MASKABLE`.

    Raises:
        ValueError: The row has an order that does not exist.
    """
    for kind in type(layer).__mro__:
        row = MASKABLE.get(kind, MASKABLE.get(f"{kind.__module__}.{kind.__qualname__}"))
        if row is not None:
            found = row(layer) if callable(row) else row
            for tensor, order in found.items():
                if order not in (*ORDERS, MIXED_KERNELS):
                    raise ValueError(
                        f"itop_prune.MASKABLE has {order!r} for {tensor!r} of {kind.__name__}; "
                        f"allowed are {', '.join(map(repr, ORDERS))}"
                    )
            return found
    return _experts(layer)


def _experts(layer: nn.Module) -> Matrices | None:
    """Look up what transformers' decorator `use_experts_implementation` has noted in a layer."""
    noted = vars(layer)
    if not {"is_transposed", "is_concatenated", "has_gate"} <= noted.keys():
        return None
    order = "experts in out" if noted["is_transposed"] else "experts out in"
    names = ("gate_up_proj" if noted["has_gate"] else "up_proj", "down_proj")
    present = (*layer._parameters, *getattr(layer, "masked_names", ()))
    return {name: order for name in names if name in present}


def _order(layer: nn.Module, tensor: str) -> list[str]:
    """List what the dimensions of a weight are; for others than matrices ["out", "in"]."""
    return (matrices_of(layer) or {}).get(tensor, "out in").split()


def _conv_groups(layer: nn.Module) -> int:
    """Count the groups of a transposed convolution, each of which has all inputs of its own."""
    return layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1


def input_dim(layer: nn.Module, tensor: str) -> int:
    """Look up which dimension of a weight holds its inputs, along which N:M patterns run."""
    order = _order(layer, tensor)
    return order.index("in") if "in" in order else 1


def kernel_shape(layer: Any, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute a weight's shape as distributions count it: (out, in, ...).

    With experts it is (experts * out, in, ...).
    """
    order = _order(layer, tensor)
    if order == [MIXED_KERNELS]:
        out, *rest = layer.weight_shape
        return (shape[0] * out, *rest)
    if len(shape) < len(order):
        return shape

    sizes = dict(zip(order, shape, strict=False))
    return (sizes.get("experts", 1) * sizes["out"], sizes["in"], *shape[len(order) :])


def count_outputs(layer: nn.Module, tensor: str, shape: tuple[int, ...]) -> int:
    """Count the outputs that a weight feeds, of all experts."""
    return kernel_shape(layer, tensor, shape)[0] * _conv_groups(layer)


def inputs_of_outputs(
    layer: Any, tensor: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find along which dimensions the inputs of one output lie.

    Returns:
        The shape to view the weight in, and those dimensions of it. The shape is the weight's own,
        unless a dimension holds groups or kernels of a mixture: these get dimensions of their own.
    """
    order = _order(layer, tensor)
    if order == [MIXED_KERNELS]:
        order, shape = ["kernels", "out", "in"], (shape[0], *layer.weight_shape)
    groups = _conv_groups(layer)
    if groups > 1:  # a transposed convolution, whose order is "in out"
        order, shape = ["groups", *order], (groups, shape[0] // groups, *shape[1:])
    return shape, (order.index("in"), *range(len(order), len(shape)))


def indivisible(layer: nn.Module, tensor: str, m: int) -> str:
    """Explain why groups of `m` inputs can't be formed, or return ""."""
    shape, dim = tuple(layer.get_parameter(tensor).shape), input_dim(layer, tensor)
    if _order(layer, tensor) == [MIXED_KERNELS] or len(shape) < 2:
        return f"dimension 1 of {shape} is not its inputs"
    if shape[dim] // _conv_groups(layer) % m:
        return f"dimension {dim} of {shape} is no multiple of {m}"
    return ""


def misread(layer: nn.Module, tensor: str) -> str:
    """Explain why a parameter can't be read as its row of `MASKABLE` says, or return ""."""
    order, shape = _order(layer, tensor), tuple(layer.get_parameter(tensor).shape)
    if tensor in (matrices_of(layer) or {}) and len(shape) < len(order):
        return (
            f"its shape {shape} can't be read as {' '.join(order)!r}: correct the row of "
            f"{type(layer).__name__} in itop_prune.MASKABLE"
        )
    return ""
