"""Products of a sparse matrix with dense ones that torch has for a CPU: which one is fastest, the machine must say."""

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
    """Where the weights of each row begin, and where the last ones end; int32, which MKL takes as it is."""
    inputs: Tensor
    """The column of each weight, int32."""
    values: Tensor
    shape: tuple[int, int]
    """(outputs, inputs)."""


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x, bias) -> matrix times x plus bias; x is [inputs, columns] or [inputs], the bias [outputs] or None."""


def csr(active: Active) -> Product:
    """The product of torch.sparse, which is MKL's where torch has it; a single column is taken as a vector."""
    with warnings.catch_warnings():  # torch says so at the first CSR tensor of a process
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        warnings.filterwarnings(
            "ignore", "Sparse invariant checks are implicitly disabled", UserWarning
        )
        matrix = torch.sparse_csr_tensor(*active, check_invariants=False)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim == 1:
            return torch.mv(matrix, x) if bias is None else torch.addmv(bias, matrix, x)
        if x.shape[1] == 1:
            return product(x[:, 0], bias)[:, None]
        try:
            return _add(torch.mm(matrix, x), bias)
        except (
            NotImplementedError
        ) as error:  # what autocast casts to; to ask for it beforehand costs small layers time
            raise RuntimeError(
                f"torch has no such product ({error}); leave out autocast"
            ) from error

    return product


def embedding_bag(active: Active) -> Product:
    """Sums of embeddings with weights, as torch.nn.EmbeddingBag makes them: a row of x is an embedding."""
    bag = functools.partial(F.embedding_bag, mode="sum", include_last_offset=True)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim == 1:
            return product(x[:, None], bias)[:, 0]
        if (
            len(x) != active.shape[1]
        ):  # more embeddings than there are inputs would do no harm, to nobody's notice
            raise RuntimeError(
                f"x has {len(x)} rows; allowed are {active.shape[1]}, the inputs of the layer"
            )
        return _add(bag(active.inputs, x, active.starts, per_sample_weights=active.values), bias)

    return product


def _add(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias[:, None])


KERNELS: dict[str, Callable[[Active], Product]] = {"csr": csr, "embedding_bag": embedding_bag}
