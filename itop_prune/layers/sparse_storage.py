"""Sparse storage: a weight as its active values and where they are. Functions of tensors.

`values` has the shape (1, slots), `positions` the shape (slots,). A slot holds one weight: its
value, and its place in the flattened dense weight. The place -1 marks a free slot. Its value is 0
and gets no gradient, so it stays 0. A weight keeps its slot as long as it is active, and so its
optimizer statistics stay where they are.

The dense weight is made for the moment of a product, in the forward and again in the backward.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itop_prune.layers.names import positions_name, values_name
from itop_prune.topology import count_true, true_positions

LINE = 64
"""Numbers that take a cache line or more, in any type."""


class Layout(NamedTuple):
    """The dense weight's shape, and whether its channels are stored last."""

    shape: tuple[int, ...]
    channels_last: bool = False

    @property
    def size(self) -> int:
        """How many weights the dense tensor has."""
        return math.prod(self.shape)

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the dense weight."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d


def layout_of(weight: Tensor) -> Layout:
    """Read the layout of a dense weight."""
    for dims, memory_format in {4: torch.channels_last, 5: torch.channels_last_3d}.items():
        if weight.ndim == dims and not weight.is_contiguous():
            return Layout(tuple(weight.shape), weight.is_contiguous(memory_format=memory_format))
    return Layout(tuple(weight.shape))


def position_type(size: int) -> torch.dtype:
    """Choose the type of positions in a weight of `size` numbers."""
    return torch.int32 if size < 2**31 else torch.int64


def dense(values: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Make the dense weight; 0 wherever no slot has its place.

    >>> values, positions = torch.tensor([[5.0, 0.0, 7.0]]), torch.tensor([3, -1, 0])
    >>> dense(values, positions, Layout((2, 2)))
    tensor([[7., 0.],
            [0., 5.]])
    """
    # Free slots write their 0 in front of the weight, which begins with a cache line.
    flat = values.new_zeros(LINE + layout.size)
    flat = torch.scatter(flat, 0, positions.long() + LINE, values.squeeze(0))
    weight = flat[LINE:].view(layout.shape)
    return weight.contiguous(memory_format=layout.memory_format)


def gather(tensor: Tensor, positions: Tensor) -> Tensor:
    """Take the numbers of a dense tensor that have a slot, and 0 for free slots; (1, slots).

    >>> gather(torch.tensor([[7.0, 1.0], [2.0, 5.0]]), torch.tensor([3, -1, 0]))
    tensor([[5., 0., 7.]])
    """
    taken = tensor.reshape(-1).index_select(0, positions.clamp(min=0))
    return taken.masked_fill(positions < 0, 0.0).unsqueeze(0)


def mask_of(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Make the dense mask: bool, True = active.

    >>> mask_of(torch.tensor([3, -1, 0]), (2, 2))
    tensor([[ True, False],
            [False,  True]])
    """
    size = math.prod(shape)
    # One place more than the mask has: free slots fill it, since -1 is the last one.
    flat = torch.zeros(size + 1, dtype=torch.bool, device=positions.device)
    return flat.index_fill_(0, positions.long(), True)[:size].view(shape)


def reassign(positions: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Give the slots of weights that leave a mask to those that enter it, in rising order.

    Args:
        positions: (slots,).
        before: The mask that they stand for.
        after: The new mask.

    Returns:
        As `hand_over`.

    >>> positions = torch.tensor([5, 0, 3])
    >>> after = torch.tensor([False, True, True, True, False, False])
    >>> reassign(positions, mask_of(positions, (6,)), after)
    (tensor([1, 2, 3]), tensor([False, False,  True]))
    """
    stayed = (positions >= 0) & after.flatten().index_select(0, positions.clamp(min=0))
    entered = true_positions((after & ~before).flatten())
    return hand_over(positions, stayed, entered, after.numel())


def hand_over(
    positions: Tensor, stayed: Tensor, entered: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Give the slots that keep no weight to those that enter, in their order.

    Slots that are left over are free. If there are too few, a quarter more than needed is made,
    so that the next updates find room.

    Args:
        positions: (slots,).
        stayed: Bool, (slots,): which slots keep their weight.
        entered: The positions of the weights that enter.
        size: How many weights the dense tensor has.

    Returns:
        The new positions; bool, of their length: which slots keep their weight.

    >>> stayed = torch.tensor([False, False, True])
    >>> hand_over(torch.tensor([5, 0, 3]), stayed, torch.tensor([1]), size=6)
    (tensor([ 1, -1,  3]), tensor([False, False,  True]))
    """
    needed = count_true(stayed) + len(entered)
    if needed > len(positions):
        more = min(needed + needed // 4, size) - len(positions)
        positions, stayed = F.pad(positions, (0, more), value=-1), F.pad(stayed, (0, more))

    # The k-th free slot gets the k-th weight that entered; the last ones may get none.
    owners = F.pad(entered.to(positions.dtype), (0, 1), value=-1)
    nth = (~stayed).cumsum(0, dtype=torch.int32).sub_(1).clamp_(0, len(entered))
    moved = torch.where(stayed, positions, owners.index_select(0, nth))
    return moved, stayed


@torch.no_grad()
def resize(parameter: nn.Parameter, slots: int) -> None:
    """Give a parameter another number of slots. It stays the same object; new slots are 0."""
    more = slots - parameter.shape[1]
    gradient, parameter.grad = parameter.grad, None
    longer = F.pad(parameter.data, (0, more))

    # A graph that is still alive, of the last loss, knows the parameter by its old length. Another
    # type in between makes autograd forget it.
    parameter.data = longer.to(torch.float64 if longer.dtype != torch.float64 else torch.float32)
    parameter.data = longer
    if gradient is not None:
        parameter.grad = F.pad(gradient, (0, more))


def resize_layer(layer: nn.Module, name: str, slots: int) -> None:
    """Give a weight in sparse storage another number of slots; new ones are free."""
    positions = layer.get_buffer(positions_name(name))
    more = slots - len(positions)
    if more:
        resize(layer.get_parameter(values_name(name)), slots)
        layer._buffers[positions_name(name)] = F.pad(positions, (0, more), value=-1)


def problem(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> str:
    """Explain why these can't be a weight of this shape, or return "".

    >>> problem(torch.zeros(1, 2), torch.tensor([3, 3]), (2, 2))
    'position 3 has two slots; save the model again'
    """
    if positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 1:
        return (
            f"positions are {positions.dtype} of shape {tuple(positions.shape)}; allowed are int32 "
            "or int64 in one dimension"
        )
    if values.shape != (1, len(positions)):
        return (
            f"values have the shape {tuple(values.shape)} and there are {len(positions)} "
            "positions; allowed is (1, positions): take both from one state dict"
        )
    if positions.is_meta or not len(positions):
        return ""

    size = math.prod(shape)
    lowest, highest = (int(bound) for bound in positions.aminmax())
    if lowest < -1 or highest >= size:
        wrong = lowest if lowest < -1 else highest
        return f"position {wrong} is outside of a weight of {size}; allowed are -1 to {size - 1}"
    used = positions[positions >= 0].sort().values
    twice = used[1:][used[1:] == used[:-1]]
    if len(twice):
        return f"position {int(twice[0])} has two slots; save the model again"
    return ""


class _DenseWeight(torch.autograd.Function):
    """The dense weight, for whoever reads it. Its backward gathers the gradients of the slots."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, positions: Tensor, layout: Layout, probe: Tensor | None) -> Tensor:
        return dense(values, positions, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, positions, _, _ = inputs
        ctx.save_for_backward(positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        values = gather(gradient, positions) if ctx.needs_input_grad[0] else None
        return values, None, None, gradient if ctx.needs_input_grad[3] else None


def dense_weight(
    values: Tensor, positions: Tensor, layout: Layout, probe: Tensor | None = None
) -> Tensor:
    """Make the dense weight for autograd.

    Args:
        values: (1, slots).
        positions: (slots,).
        layout: Of the dense weight.
        probe: Of the dense shape; it gets the dense gradient, and its values are not read.
    """
    return _DenseWeight.apply(values, positions, layout, probe)
