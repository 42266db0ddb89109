"""Products of a sparse with a dense matrix; `deploy` measures which is fastest.

torch's take x in columns, [inputs, columns]. Numba's takes rows, [rows, inputs], as a linear layer
has them.
"""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from itop_prune.kernels import linear_products, runtime

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order


class Active(NamedTuple):
    """The active weights of a matrix, row after row."""

    starts: Tensor
    """Where the weights of each row begin, and where the last row ends; int32, as MKL takes it."""
    inputs: Tensor
    """The column of each weight, int32."""
    values: Tensor
    shape: tuple[int, int]
    """(outputs, inputs)."""


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x, bias) -> y; bias is [outputs] or None.

By columns it computes matrix @ x + bias; x is [inputs, columns] or [inputs]. By rows it computes
x @ matrix.T + bias; x is [rows, inputs]."""


def csr(active: Active) -> Product:
    """Make the product of torch.sparse, which is MKL's if torch has it."""
    with warnings.catch_warnings():  # at the first CSR tensor of a process
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        warnings.filterwarnings(
            "ignore", "Sparse invariant checks are implicitly disabled", UserWarning
        )
        matrix = torch.sparse_csr_tensor(*active, check_invariants=False)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim == 1:
            return torch.mv(matrix, x) if bias is None else torch.addmv(bias, matrix, x)
        if x.shape[1] == 1:  # a vector is faster
            return product(x[:, 0], bias)[:, None]
        try:
            return _add(torch.mm(matrix, x), bias)
        except (
            NotImplementedError
        ) as error:  # autocast; checking for it first costs small layers time
            raise RuntimeError(
                f"torch has no such product ({error}); leave out autocast"
            ) from error

    return product


def embedding_bag(active: Active) -> Product:
    """Make a product of weighted sums: to torch.nn.EmbeddingBag a row of x is an embedding."""
    bag = functools.partial(F.embedding_bag, mode="sum", include_last_offset=True)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim == 1:
            return product(x[:, None], bias)[:, 0]
        if len(x) != active.shape[1]:  # embedding_bag does not notice surplus rows
            raise RuntimeError(
                f"x has {len(x)} rows; allowed are {active.shape[1]}, the inputs of the layer"
            )
        return _add(bag(active.inputs, x, active.starts, per_sample_weights=active.values), bias)

    return product


def _add(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias[:, None])


def numba(active: Active) -> Product:
    """Make the product of `itop_prune.kernels`, by rows.

    Tensors that these kernels can't take, such as those on a GPU, are computed by `embedding_bag`.

    Raises:
        RuntimeError: Numba is not installed.
    """
    if not runtime.is_installed():
        raise RuntimeError(
            "this layer was deployed with the kernel 'numba', and Numba is not installed here: "
            "pip install 'itop_prune[sparse]', or deploy the model again"
        )
    bag = embedding_bag(active)

    def by_columns(x: Tensor, bias: Tensor | None) -> Tensor:
        return bag(x.t().contiguous(), bias).t().contiguous()

    if not runtime.can_compute(active.values):
        return by_columns
    order, inside = _order(active), _is_inside(active)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if not inside:  # kernels do not look
            raise RuntimeError(
                "weights of this layer lie outside of its matrix; allowed are those of one state "
                "dict: load that of the same deployed model"
            )
        if torch.compiler.is_compiling():  # the compiler can't look into kernels
            return torch.compiler.disable(linear_products.forward)(x, active.values, order, bias)
        if not runtime.can_compute(x):
            return by_columns(x, bias)
        return linear_products.forward(x, active.values, order, bias)

    return product


def _is_inside(active: Active) -> bool:
    """Tell whether all weights lie in the matrix; half a state dict may have been loaded."""
    count = min(len(active.inputs), len(active.values))
    for places, end in ((active.starts, count + 1), (active.inputs, active.shape[1])):
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= end):
            return False
    return True


def _order(active: Active) -> "Order":
    """Make the order of the weights by output; a forward needs no other."""
    import numpy as np

    from itop_prune.kernels.orders import Direction, Order

    starts, inputs = (places.int().contiguous() for places in (active.starts, active.inputs))
    slots = np.arange(len(active.values), dtype=np.int32)
    by_input = Direction(np.zeros(active.shape[1] + 1, np.int32), slots[:0], slots[:0])
    return Order(Direction(starts.numpy(), inputs.numpy(), slots), by_input)


KERNELS: dict[str, Callable[[Active], Product]] = {"csr": csr, "embedding_bag": embedding_bag}
"""Products by columns, for linear layers and convolutions."""
ROW_KERNELS: dict[str, Callable[[Active], Product]] = {"numba": numba}
"""Products by rows, for linear layers on the CPU."""
