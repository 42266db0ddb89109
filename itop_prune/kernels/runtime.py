"""What all kernels share: when they compute, in what type, on how many threads.

Layers compute with kernels or with their dense weight by shapes and density alone, and nothing is
timed. So ranks with batches of one shape decide the same, a resumed run does too, and both round
the same.
"""

import functools
import importlib.util
import math
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DENSEST = 0.25
"""With a larger share of active weights the dense weight is as fast."""
FEW = 16384
"""With so many active weights or fewer a dense matrix is not faster, at up to 128 rows or so."""
ALONE = 1 << 19
"""Products of two numbers that one thread computes as fast as several."""
WIDTHS = (256, 128, 64)
"""Bytes of vectors: 64 to 16 numbers in float32."""
PER_WEIGHT = 32
"""Reading a weight takes as long as computing with so many bytes."""


def uses_kernels(shape: Sequence[int], active: int) -> bool:
    """Tell whether a layer computes with its active weights, on a CPU with Numba.

    Args:
        shape: (outputs, inputs) of a linear layer, or (outputs, inputs, height, width) of a
            convolution.
        active: Number of active weights.
    """
    outputs, inputs = shape[0], math.prod(shape[1:])
    most = DENSEST * outputs * inputs
    if not outputs or not inputs or max(outputs, inputs, active) >= 2**31:  # orders are of int32
        return False
    return active <= (max(most, FEW) if len(shape) == 2 else most)


def can_compute(*tensors: Tensor) -> bool:
    """Tell whether kernels can take tensors together.

    All must be of one type that kernels have, and their numbers in memory on the CPU. Operations on
    them must not be recorded, mapped or faked.
    """
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype is not dtype:
            return False
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        if torch._C._functorch.is_legacy_batchedtensor(tensor):  # of is_grads_batched
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
    )


def is_installed() -> bool:
    """Look for Numba."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def has_numba() -> bool:
    """Look for Numba, and warn once if it is missing."""
    if is_installed():
        return True
    warnings.warn(
        "layers in sparse storage compute with their dense weight, since Numba is not "
        "installed; for faster ones: pip install 'itop_prune[sparse]'",
        stacklevel=2,
    )
    return False


def stored(tensor: Tensor) -> Tensor:
    """Make a tensor whose numbers lie in memory one after the other, as they are."""
    # A view of the imaginary part of conjugate numbers has a flag: its numbers are to be negated.
    return tensor.resolve_neg().contiguous()


def width_for(size: int, threads: int = 1) -> int:
    """Choose the bytes of vectors that go over so many bytes; the last one may go over the end.

    Threads share the vectors, and all wait for the one with the most.

    >>> [width_for(4 * rows) for rows in (10, 32, 100, 197)]
    [64, 128, 256, 128]
    >>> width_for(4 * 197, threads=2)  # two of 256 bytes each, not four and three of 128
    256
    """
    return min(WIDTHS, key=lambda width: -(-size // (width * threads)) * (width + PER_WEIGHT))


def threads_for(work: int) -> int:
    """Choose the number of threads for so many products of two numbers."""
    return 1 if work < ALONE else min(torch.get_num_threads(), _most_threads())


_parallel = threading.Lock()
"""Numba's threads "workqueue" end the process if two threads of Python call them at once."""


def run(kernel: Any, threads: int, *arguments: Any) -> None:
    """Call a kernel on so many threads."""
    numba = _numba()
    with _parallel:
        before = numba.get_num_threads()
        if threads == before:
            kernel(*arguments)
            return
        numba.set_num_threads(threads)
        try:
            kernel(*arguments)
        finally:
            numba.set_num_threads(before)


@functools.cache
def _numba() -> Any:
    """Import Numba and start its threads."""
    import numba

    # With OpenMP this sets how many threads torch uses, so set them back.
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)
    return numba


@functools.cache
def kind_of(dtype: torch.dtype, size: int) -> Any:
    """Make a kernel's kind: a type of numbers, and the bytes of its vectors."""
    from itop_prune.kernels.vectors import Kind

    return Kind("float32" if dtype is torch.float32 else "float64", size)


@functools.cache
def _most_threads() -> int:
    return int(_numba().config.NUMBA_NUM_THREADS)
