"""Linear layers that GPUs compute in half the operations: of every four weights two are 0, the pattern 2:4."""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SemiStructuredLinear(nn.Linear):
    """nn.Linear whose weight torch holds in its semi-structured form."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., outputs] of [..., inputs]; torch's kernel reads an input as if it lay without gaps."""
        return F.linear(input.contiguous(), self.weight, self.bias)


def semi_structured(layer: nn.Linear) -> nn.Linear:
    """Return a layer that computes the same with a semi-structured weight; bias and hooks are the layer's.

    Raises:
        RuntimeError: More than 2 of 4 consecutive weights are not 0, or torch has no kernel for it: it wants a CUDA
            device, a half type, and sizes that are multiples of 32 and 64.

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.
    """
    weight = layer.weight.detach()
    if weight.shape[1] % 4 or weight.unflatten(1, (-1, 4)).count_nonzero(2).amax() > 2:
        raise RuntimeError(f"the weight of {tuple(weight.shape)} does not hold the pattern 2:4")
    with warnings.catch_warnings():  # torch says so at the first of a process
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        halved = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    new = copy.copy(layer)
    new.__class__ = SemiStructuredLinear
    new.__dict__ |= {"_parameters": {**layer._parameters, "weight": nn.Parameter(halved, requires_grad=False)}}
    return new
