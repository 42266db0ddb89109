"""Random products with active weights, in memory that ends beside pages nobody may touch.

Inputs, orders of weights, results and gradients lie directly before or after such a page, so that a
kernel that reads or writes beside them crashes. What kernels pack for themselves is not guarded,
nor are the offsets of a plan. Each result is compared with torch's product of the dense weight in
float64.
"""

import ctypes
import functools
import mmap
import random
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from itop_prune.kernels import convolution_plan, convolution_products, linear_products, runtime
from itop_prune.kernels.orders import Direction, Order, make_order
from itop_prune.layers.sparse_storage import Layout, dense

from .fuzz_runner import require

NOT_WRITTEN = (torch.empty, torch.empty_like, Tensor.new_empty)
"""Functions whose results hold anything."""
ALLOCATING = (*NOT_WRITTEN, Tensor.new_zeros, Tensor.contiguous, Tensor.index_select)
"""Functions of which the kernels' results and inputs are made."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
ALL = (True, True, True)


def case(seed: int) -> None:
    """Compute a random product and its gradients by kernels, and compare them with torch's."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float64])
    numbers = functools.partial(torch.randn, generator=generator, dtype=dtype)
    torch.set_num_threads(draw.choice([1, 1, 2]))
    with mock.patch.object(runtime, "ALONE", draw.choice([0, runtime.ALONE])):
        check = check_linear if draw.random() < 0.5 else check_convolution
        check(draw, generator, numbers)


def check_linear(draw: random.Random, generator: torch.Generator, numbers: Any) -> None:
    """Compare a linear layer."""
    rows, inputs, outputs = (size(draw) for _ in range(3))
    positions = draw_positions(draw, generator, (outputs, inputs))
    values = draw_values(positions, numbers)
    x, bias, gradient = numbers(rows, inputs), numbers(outputs), numbers(rows, outputs)
    if draw.random() < 0.2:
        x, gradient = (part.t().contiguous().t() for part in (x, gradient))

    end = draw.random() < 0.7
    order = guarded_order(make_order(positions.numpy(), outputs, inputs), end)
    ours = [guarded(part, end) for part in (x, values, bias, gradient)]
    with GuardedMemory(end):
        found = [
            linear_products.forward(ours[0], ours[1], order, ours[2]),
            *linear_products.backward(ours[3], ours[0], ours[1], order, ALL),
        ]

    leaves = [part.double().requires_grad_() for part in (x, values.nan_to_num(), bias)]
    weight = dense(leaves[1], positions, Layout((outputs, inputs)))
    output = F.linear(leaves[0], weight, leaves[2])
    expected = [output, *torch.autograd.grad(output, leaves, gradient.double())]
    compare(found, expected, f"linear {rows} x {inputs} -> {outputs}")


def check_convolution(draw: random.Random, generator: torch.Generator, numbers: Any) -> None:
    """Compare a convolution, of tiles of images or of single ones, in bands of any height."""
    images = draw.choice([1, 1, 2, 3, 5, 7, 8, 9, 16, 17, draw.randint(1, 80)])
    outputs, channels = draw.randint(1, 20), draw.randint(1, 20)
    kernel = draw.choice([1, 1, 2, 3, 3, 4, 5, 7]), draw.choice([1, 1, 2, 3, 3, 4, 5, 7])
    image = draw.randint(1, 16), draw.choice([draw.randint(1, 16), draw.randint(1, 80)])
    stride = draw.choice([1, 1, 1, 2, 2, 3, 4])
    padding = draw.randint(0, 4), draw.randint(0, 4)
    dilation = draw.choice([1, 1, 1, 2, 3]), draw.choice([1, 1, 1, 2, 3])
    shape = (outputs, channels, *kernel)
    band = draw.random() < 0.5, 1 << draw.randint(0, 16)
    geometry: tuple[Any, ...] = (shape, image, stride, padding, dilation)
    plan = convolution_plan.make_plan(*geometry, *band)
    if plan is None:
        return

    positions = draw_positions(draw, generator, shape)
    values = draw_values(positions, numbers)
    x, bias = numbers(images, channels, *image), numbers(outputs)
    gradient = numbers(images, outputs, plan.rows, plan.columns)
    if draw.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    if draw.random() < 0.5:
        gradient = gradient.contiguous(memory_format=torch.channels_last)

    end, last = draw.random() < 0.7, draw.random() < 0.5
    inputs = channels * kernel[0] * kernel[1]
    order = guarded_order(make_order(positions.numpy(), outputs, inputs, plan.ranks), end)
    ours = [guarded(part, end) for part in (x, values, bias, gradient)]
    with GuardedMemory(end):
        found = [
            convolution_products.forward(ours[0], ours[1], plan, order, ours[2], last),
            *convolution_products.backward(ours[3], ours[0], ours[1], plan, order, ALL),
        ]

    leaves = [part.double().requires_grad_() for part in (x, values.nan_to_num(), bias)]
    weight = dense(leaves[1], positions, Layout(shape))
    output = F.conv2d(leaves[0], weight, leaves[2], stride, padding, dilation)
    expected = [output, *torch.autograd.grad(output, leaves, gradient.double())]
    compare(found, expected, f"convolution of {images} images, {geometry}, band {band}")


def size(draw: random.Random) -> int:
    """Draw a side of a matrix; those around vectors' lengths come often."""
    return draw.choice([draw.randint(1, 150), draw.choice([1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 65])])


def draw_positions(draw: random.Random, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Draw places of active weights in any order, with free slots between them."""
    share = draw.choice([0.0, 0.02, 0.1, 0.3, 1.0])
    mask = torch.rand(tuple(shape), generator=generator) < share
    if draw.random() < 0.5:
        mask[draw.randrange(len(mask))] = False
    positions = F.pad(mask.flatten().nonzero().flatten(), (0, draw.choice([0, 1, 5])), value=-1)
    return positions[torch.randperm(len(positions), generator=generator)].int()


def draw_values(positions: Tensor, numbers: Any) -> Tensor:
    """Draw the values of slots; free slots hold NaN, which spreads if it is read."""
    return numbers(1, len(positions)).masked_fill(positions < 0, torch.nan)


def compare(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Refuse results that differ from torch's by more than rounding."""
    names = ("output", "gradient of x", "gradient of values", "gradient of bias")
    for name, one, other in zip(names, found, expected, strict=True):
        largest = other.abs().max().item() if other.numel() else 0.0
        tolerance = TOLERANCE[one.dtype] * max(1.0, largest)
        close = torch.allclose(one.double(), other, rtol=0.0, atol=tolerance)
        require(one.shape == other.shape and close, f"{name} of {what} ({one.dtype}) differs")


class GuardedMemory(TorchFunctionMode):
    """Lets new tensors lie beside pages that nobody may touch; unwritten numbers are NaN."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and copy what it allocates."""
        result = func(*args, **(kwargs or {}))
        if func not in ALLOCATING or not result.is_floating_point():
            return result
        return guarded(result.fill_(torch.nan) if func in NOT_WRITTEN else result, self.at_end)


def guarded_order(order: Order, at_end: bool) -> Order:
    """Copy an order beside pages that nobody may touch."""

    def copied(direction: Direction) -> Direction:
        return Direction(*(guarded(torch.from_numpy(part), at_end).numpy() for part in direction))

    return Order(copied(order.by_output), copied(order.by_input))


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """Copy a tensor so that its end, or its beginning, is beside a page that nobody may touch.

    A tensor that leaves gaps in memory is copied without them.
    """
    if not tensor.numel():
        return tensor
    copy = torch.empty_like(tensor)
    memory = guarded_memory(copy.nbytes, at_end)
    flat = torch.frombuffer(memory, dtype=copy.dtype)
    return flat.as_strided(copy.shape, copy.stride()).copy_(tensor)


def guarded_memory(length: int, at_end: bool) -> memoryview:
    """Allocate bytes between two pages that end the process if they are touched."""
    pages = -(-length // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if ctypes.CDLL(None).mprotect(
            ctypes.c_void_p(start + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0
        ):
            raise MemoryError("a page can't be protected")
    end = (pages + 1) * mmap.PAGESIZE
    first = end - length if at_end else mmap.PAGESIZE
    return memoryview(memory)[first : first + length]
