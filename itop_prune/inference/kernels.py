"""Products of a sparse with a dense matrix that torch has; `deploy` measures which is fastest."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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
"""(x, bias) -> matrix @ x + bias; x is [inputs, columns] or [inputs], bias [outputs] or None."""


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


KERNELS: dict[str, Callable[[Active], Product]] = {"csr": csr, "embedding_bag": embedding_bag}
