"""Count the FLOPs of a forward and of training, by the masked weight that each operation reads.

The count is taken where torch executes the operations, with torch's own formulas. So a layer whose
weight is read by its parent counts, and a layer that is called twice counts twice.
"""

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from itop_prune.layers.handle import active_weights, find_masks, refuse_deployed
from itop_prune.layers.maskable import unwrap
from itop_prune.memory import total_memory


@dataclass(frozen=True)
class FLOPs:
    """The cost of one forward with sparse kernels that skip every zero; a multiply-add is 2."""

    by_weight: Mapping[str, int]
    """Dense cost of the operations that read a masked weight, by its name."""
    others: int
    """Cost of all other operations: attention between tokens, layers without a mask."""
    densities: Mapping[str, float]
    """Densities of the masks at the time of counting."""

    @property
    def dense_forward(self) -> int:
        """The cost without masks."""
        return sum(self.by_weight.values()) + self.others

    @property
    def sparse_forward(self) -> float:
        """The cost with the masks at the time of counting."""
        return self.forward(self.densities)

    def forward(self, densities: Mapping[str, float]) -> float:
        """Compute the cost at other densities, of masks that moved since."""
        sparse = sum(flops * densities[name] for name, flops in self.by_weight.items())
        return sparse + self.others

    def training_step(
        self, every: int | None = None, densities: Mapping[str, float] | None = None
    ) -> float:
        """Compute the cost of a forward and a backward, which is twice a forward.

        Args:
            every: For growth by gradient: one step of so many computes the dense gradient of the
                weights. It costs as much as a dense forward, in place of a sparse one. With 1 each
                step does, as for momentum; with None no step does.
            densities: Densities of the masks; None takes those at the time of counting.

        Reference: RigL, Evci et al., 2020, arXiv 1911.11134. The paper counts the update as a step
        of its own: (3 f_S every + 2 f_S + f_D) / (every + 1). Here an update uses the backward of a
        step that is made anyway.

        >>> cost = FLOPs({"fc.weight": 100}, 0, {"fc.weight": 0.1})
        >>> cost.training_step(), cost.training_step(every=10)
        (30.0, 39.0)
        """
        sparse = self.forward(self.densities if densities is None else densities)
        extra = 0.0 if every is None else (self.dense_forward - sparse) / every
        return 3.0 * sparse + extra


def flops(model: nn.Module, example_inputs: Any) -> FLOPs:
    """Count the FLOPs of one forward of a model, at its present masks.

    Args:
        model: Masked or not, on any device; wrapped or not. It is run once in evaluation mode and
            left as it was.
        example_inputs: What its forward takes: a tensor, or a tuple of arguments. The cost is that
            of the whole batch.

    Raises:
        ValueError: The model can't be run with these inputs, or was made by `deploy`.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 5))
    >>> masks = itop_prune.apply(model, sparsity=0.5, method="uniform")
    >>> cost = flops(model, torch.zeros(1, 1, 4, 4))

    The convolution uses its 18 weights at 4 places, the linear layer its 40 weights once:

    >>> cost.dense_forward, cost.sparse_forward
    (224, 112.0)
    """
    refuse_deployed(model)
    model, masks = unwrap(model), find_masks(model)
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if any(4 * itop.size > total_memory(itop.buffer.device) for itop in masks.values()):
        counted = _count(*_without_numbers(model, arguments))
    else:
        counted = _count(model, arguments)

    densities = {}
    for name, active in active_weights(masks).items():
        densities[name] = active / masks[name].size
    return FLOPs({name: counted[name] for name in masks}, counted[""], densities)


def _count(model: nn.Module, arguments: tuple[Any, ...]) -> Mapping[str, int]:
    """Run a model once, and count the FLOPs by the weight that an operation reads; "" for none."""
    masks = find_masks(model)
    modes = [(module, module.training) for module in model.modules()]
    counter = _Counter({itop.parameter: name for name, itop in masks.items()})
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    try:
        with torch.no_grad(), attention, _no_fused_layers(), counter:
            run(model.eval(), arguments)
    finally:
        for module, training in modes:
            module.training = training
    return counter.flops


def _without_numbers(
    model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Copy a model and its inputs to the meta device, where dense weights take no memory."""

    def on_meta(tensor: Tensor) -> Tensor:
        meta = tensor.detach().to("meta")
        return nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta

    tensors = (*model.parameters(), *model.buffers())
    copied = {id(tensor): on_meta(tensor) for tensor in tensors}
    return copy.deepcopy(model, copied), tree_map_only(Tensor, on_meta, arguments)


def run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Run a model on an example.

    Raises:
        ValueError: The model can't be run with it.
    """
    try:
        return model(*arguments)
    except Exception as error:  # of any kind, as the model raises it
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        raise ValueError(
            f"{type(model).__name__} can't be run with inputs of shape {shapes}: {error}; give "
            "what its forward takes, a tensor or a tuple of arguments"
        ) from error


@contextlib.contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Keep torch from running an RNN or attention as one operation without a formula."""
    mkldnn = torch.backends.mkldnn.set_flags(False)[0]
    attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(mkldnn)
        torch.backends.mha.set_fastpath_enabled(attention)


GROUPED_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Operations that give each row to one of several matrices: torch has no formula for them."""


def _grouped_product(x: Tensor, weight: Tensor, *others: Any, **more: Any) -> int:
    """Count what rows (rows, in) times one of the matrices (experts, in, out) each cost."""
    return 2 * x.shape[-2] * math.prod(weight.shape[-2:])


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of every operation by the weight whose values it reads; "" for none."""

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__()
        # Imported late: it imports triton if that is installed.
        from torch.utils.flop_counter import flop_registry

        self._formulas: Mapping[Any, Callable[..., int]] = flop_registry
        self.flops: Counter[str] = Counter()
        self._names = WeakIdKeyDictionary(names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if func._schema.name in GROUPED_PRODUCTS:
            formula = _grouped_product
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts

        out = func(*args, **kwargs)
        read = self._weight_in((args, kwargs))
        if formula is not None:
            self.flops[read] += formula(*args, **kwargs, out_val=out)
        elif read:  # a product with the mask, a transpose, a cast, a slice: still that weight
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._names[leaf] = read
        return out

    def _weight_in(self, arguments: Any) -> str:
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf in self._names:
                return self._names[leaf]
        return ""
