"""Linear layers that compute with their active weights: tensors in, tensors out.

`order_of` decides whether a layer does, by its shape and density alone. So all ranks decide the
same, a resumed run does too, and both round the same.
"""

import functools
import importlib.util
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order

DENSEST = 0.25
"""A layer with a larger share of active weights is about as fast with its dense weight."""
FEW = 16384
"""With so many active weights or fewer a dense weight is not faster, at up to 128 rows or so."""
ALONE = 1 << 20
"""Products of two numbers that one thread computes as fast as several."""
WIDTHS = (64, 128, 256)
"""Bytes that a row of a tile may have: 16 to 64 numbers in float32."""


def uses_kernels(shape: Sequence[int], active: int) -> bool:
    """Tell whether a linear layer computes with its active weights, on a CPU with Numba.

    Args:
        shape: (outputs, inputs).
        active: Number of active weights.
    """
    size = shape[0] * shape[1]
    return 0 < size < 2**31 and active <= max(DENSEST * size, FEW)


def forward(x: Tensor, values: Tensor, order: "Order", bias: Tensor | None) -> Tensor:
    """Compute the output of a layer.

    Args:
        x: (rows, inputs).
        values: (1, slots), of the type of x.
        order: Of the layer's positions.
        bias: (outputs,), of the type of x.

    Returns:
        (rows, outputs).
    """
    rows, outputs = x.shape[0], order.outputs
    x, values = _stored(x), _stored(values)
    bias = None if bias is None else _stored(bias)
    result = x.new_empty(rows, outputs)
    pointers = (
        x.data_ptr(),
        *order.output_addresses,
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
    )
    threads = _threads(rows * order.active)
    if rows == 1:
        kind = _kind(x.dtype, WIDTHS[0])
        _run(_kernels().vector_forward, threads, kind, *pointers, outputs)
    elif rows:
        kind, blocks = _parts(x, threads)
        sizes = (rows, order.inputs, outputs, order.active)
        _run(_kernels().forward, threads, kind, *pointers, *sizes, blocks)
    return result


def backward(
    gradient: Tensor, x: Tensor, values: Tensor, order: "Order", needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, values and bias.

    Args:
        gradient: (rows, outputs).
        x: (rows, inputs), of the same type.
        values: (1, slots), of the same type.
        order: Of the layer's positions.
        needs: Which of the three to compute; the others are empty.
    """
    rows, outputs = gradient.shape
    gradient, x, values = _stored(gradient), _stored(x), _stored(values)
    for_x = x.new_empty(x.shape if needs[0] else 0)
    for_values = values.new_zeros(values.shape if needs[1] else 0)
    for_bias = x.new_zeros(outputs if needs[2] else 0)
    if rows:
        threads = _threads(rows * order.active)
        kind, blocks = _parts(x, threads)
        _run(
            _kernels().backward,
            threads,
            kind,
            gradient.data_ptr(),
            x.data_ptr(),
            *order.output_addresses,
            *order.input_addresses,
            values.data_ptr(),
            for_x.data_ptr(),  # 0 if it is empty
            for_values.data_ptr(),
            for_bias.data_ptr(),
            rows,
            order.inputs,
            outputs,
            order.active,
            blocks,
        )
    return for_x, for_values, for_bias


def _stored(tensor: Tensor) -> Tensor:
    """Make a tensor whose numbers lie in memory one after the other, as they are."""
    # A view of the imaginary part of conjugate numbers has a flag: its numbers are to be negated.
    return tensor.resolve_neg().contiguous()


def _parts(x: Tensor, threads: int) -> tuple[Any, int]:
    """Choose the rows of a tile, and in how many parts it is computed."""
    size = x.shape[0] * x.element_size()
    width = next((width for width in WIDTHS if width >= size), WIDTHS[-1])
    return _kind(x.dtype, width), -(-threads // -(-size // width))


def _threads(work: int) -> int:
    return 1 if work < ALONE else min(torch.get_num_threads(), _most_threads())


_parallel = threading.Lock()
"""Numba's threads "workqueue" end the process if two threads of Python call them at once."""


def _run(kernel: Any, threads: int, *arguments: Any) -> None:
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
def _kernels() -> Any:
    """Import the kernels; they are compiled at their first call, once in an environment."""
    from itop_prune.kernels import linear

    return linear


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
def _kind(dtype: torch.dtype, size: int) -> Any:
    from itop_prune.kernels.vectors import Kind

    return Kind("float32" if dtype is torch.float32 else "float64", size)


@functools.cache
def _most_threads() -> int:
    return int(_numba().config.NUMBA_NUM_THREADS)


class _Known(NamedTuple):
    positions: Any
    """A weak reference to them."""
    version: int
    sizes: tuple[int, ...]
    """Number of values, outputs, inputs."""
    order: "Order | None"
    """None: the layer computes with its dense weight."""


_known: dict[int, _Known] = {}


def order_of(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: Sequence[int],
    bias: Tensor | None = None,
) -> "Order | None":
    """Find the order of a layer's weights; None if its dense weight computes this input.

    Inputs and biases that do not fit are left to the dense weight, for torch's own errors.

    Args:
        x: (rows, inputs).
        values: (1, slots).
        positions: (slots,).
        shape: (outputs, inputs).
        bias: (outputs,).

    Raises:
        ValueError: If positions are outside of the weight, or one has two slots.
    """
    fits = x.shape[1:] == (shape[1],) and (bias is None or bias.shape == (shape[0],))
    if not fits or not can_compute(*((x, values) if bias is None else (x, values, bias))):
        return None

    sizes = (values.numel(), *shape)
    known = _known.get(id(positions))
    same = known is not None and known.positions() is positions and known.sizes == sizes
    if known and same and known.version == positions._version:
        return known.order
    return _remember(positions, sizes)


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


def _remember(positions: Tensor, sizes: tuple[int, ...]) -> "Order | None":
    """Make the order of positions that are new or have changed; it is forgotten with them."""
    order, (slots, *shape) = None, sizes
    if positions.shape != (slots,) or not positions.is_cpu:
        return None
    if uses_kernels(shape, int((positions >= 0).sum())) and has_numba():
        from itop_prune.kernels.orders import make_order

        order = make_order(positions.numpy(), *shape)

    if not positions.is_inference():  # changes of such tensors can't be seen
        key = id(positions)
        reference = weakref.ref(positions, lambda _: _known.pop(key, None))
        _known[key] = _Known(reference, positions._version, sizes, order)
    return order


def is_installed() -> bool:
    """Look for Numba."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def has_numba() -> bool:
    """Look for Numba, and warn once if it is missing."""
    if is_installed():
        return True
    warnings.warn(
        "linear layers in sparse storage compute with their dense weight, since Numba is not "
        "installed; for faster ones: pip install 'itop_prune[sparse]'",
        stacklevel=2,
    )
    return False
