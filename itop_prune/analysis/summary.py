"""Count the active weights of a sparse model, and lay them out as a table of text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from itop_prune.analysis.flops import FLOPs, flops
from itop_prune.analysis.memory import Memory, memory
from itop_prune.kernels import runtime
from itop_prune.layers.handle import ITOP, active_weights, find_masks, refuse_deployed
from itop_prune.layers.maskable import (
    count_matrix_weights,
    tied_to_embedding,
    unwrap,
    walk,
)
from itop_prune.layers.sparse_products import NAME, can_take_kernels
from itop_prune.messages import aligned, in_digits
from itop_prune.topology import count_true
from itop_prune.update.exploration import Explored


@dataclass(frozen=True)
class Row:
    """One weight that is masked, or that has zeros without a mask."""

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    explored: int | None
    """How many were active at least once; None if it was not recorded."""
    masked: bool = True
    computes: str = ""
    """How a weight in sparse storage is computed with: "kernel" or "dense". With masks: ""."""

    @property
    def density(self) -> float:
        """Active over all weights, in (0, 1]."""
        return self.active / self.weights

    @property
    def exploration_rate(self) -> float | None:
        """R_s of this weight, in [density, 1]."""
        return None if self.explored is None else self.explored / self.weights


@dataclass(frozen=True)
class Summary:
    """The counts of a model; `str(summary)` is a table."""

    rows: tuple[Row, ...]
    parameters: int
    """All parameters of the model, also biases, norms and embeddings."""
    bytes: int = 0
    """What masked weights take as they are stored: parameters, and masks or positions."""
    dense_bytes: int = 0
    """What they would take without masks."""
    flops: FLOPs | None = None
    """Cost of a forward, if example inputs were given."""
    matrix_weights: int = 0
    """Weights of all matrices, masked or not, embeddings aside; see `itop_prune.MASKABLE`."""
    sampled: bool = False
    """Whether R_s is an estimate from a sample of the weights."""
    memory: Memory | None = None
    """What training keeps in memory, if an optimizer was given."""

    @property
    def weights(self) -> int:
        """Weights in all rows."""
        return sum(row.weights for row in self.rows)

    @property
    def active(self) -> int:
        """Active weights in all rows."""
        return sum(row.active for row in self.rows)

    @property
    def density(self) -> float:
        """Active over all weights of the rows; 1 without rows."""
        return self.active / self.weights if self.rows else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the rows."""
        return (self.weights - self.active) / max(1, self.weights)

    @property
    def masked_share(self) -> float:
        """Share of the weights of all matrices that is masked."""
        masked = sum(row.weights for row in self.rows if row.masked)
        return masked / max(1, masked, self.matrix_weights)

    @property
    def overall_sparsity(self) -> float:
        """Share of zeros among the weights of all matrices, masked or not."""
        return (self.weights - self.active) / max(1, self.weights, self.matrix_weights)

    @property
    def exploration_rate(self) -> float | None:
        """R_s: the share of masked weights active at least once; None if it was not recorded."""
        masked = [row for row in self.rows if row.masked]
        counts = [row.explored for row in masked if row.explored is not None]
        if not masked or len(counts) < len(masked):
            return None
        return sum(counts) / sum(row.weights for row in masked)

    def cells(self) -> list[tuple[str, ...]]:
        """Make the cells of the table: a header, a line per row, the total."""
        lines: list[tuple[str, ...]] = [("weight", "shape", "weights", "active", "density")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            name = row.name if row.masked else f"{row.name} (no mask)"
            counts = f"{row.weights:,}", f"{row.active:,}"
            lines.append((name, shape, *counts, in_digits(row.density)))
        total = f"{self.weights:,}", f"{self.active:,}"
        lines.append(("total", "", *total, in_digits(self.density)))

        columns = []
        if self.exploration_rate is not None:
            rates = [*(row.exploration_rate for row in self.rows), self.exploration_rate]
            title = "R_s, estimate" if self.sampled else "R_s"
            columns.append([title, *("" if rate is None else in_digits(rate) for rate in rates)])
        if any(row.computes for row in self.rows):
            columns.append(["computes", *(row.computes for row in self.rows), ""])
        return [(*line, *more) for line, *more in zip(lines, *columns, strict=True)]

    def __str__(self) -> str:
        text = aligned(self.cells())
        others = self.parameters - self.weights
        sparsity = in_digits(self.sparsity)
        text.append(f"sparsity {sparsity}; {others:,} other parameters are dense")
        kept = [str(self.memory)] if self.memory else []
        return "\n".join([*text, *self.share(), *self.stored(), *self.cost(), *kept])

    def share(self) -> list[str]:
        """Describe in a line how much of all matrices is masked; if all of it is, there is none."""
        if not 0 < self.masked_share < 1:
            return []
        return [
            f"masked {self.masked_share:.4f} of the {self.matrix_weights:,} weights of matrices, "
            f"whose sparsity is {in_digits(self.overall_sparsity)}"
        ]

    def stored(self) -> list[str]:
        """Describe in a line what masked weights take in memory; without masks there is none."""
        if not self.dense_bytes:
            return []
        share = in_digits(self.bytes / self.dense_bytes)
        return [f"stored in {self.bytes:,} bytes, {share} of the {self.dense_bytes:,} dense"]

    def cost(self) -> list[str]:
        """Describe the cost of a forward in a line; without example inputs there is none."""
        if self.flops is None:
            return []
        dense, sparse = self.flops.dense_forward, self.flops.sparse_forward
        share = in_digits(sparse / max(1, dense))
        return [f"forward {sparse:.4g} FLOPs, {share} of the {dense:.4g} of the dense model"]


def _computes(itop: ITOP, active: int) -> str:
    """Tell how a layer computes with a masked weight: "kernel", "dense", or "" with a mask."""
    if itop.storage == "mask":
        return ""
    can = itop._tensor_name == NAME and can_take_kernels(itop._layer)
    if not can or not runtime.can_compute(itop.parameter) or not runtime.is_installed():
        return "dense"
    return "kernel" if runtime.uses_kernels(itop.shape, active) else "dense"


def summarize(
    model: nn.Module,
    explored: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
) -> Summary:
    """Count the active weights of every masked layer, and those that were explored.

    Weights without a mask are counted by their zeros. In a model with masks only those with 1 % of
    zeros or more are listed, as fusing masked branches leaves them (timm's
    `reparameterize_model`). A weight of zeros alone is left out: it was not trained yet.

    If some matrices have no mask, a line says which share is masked, and the sparsity over all of
    them. Embeddings are no matrices, nor are heads that are tied to one.

    In sparse storage a column says how each layer computes: with a "kernel", which takes the active
    weights alone, or with its "dense" weight. It is what holds on this machine, for inputs of the
    weight's type.

    Args:
        model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not.
        explored: `MaskScheduler.explored`, for R_s.
        example_inputs: As `itop_prune.flops` takes them, for the cost of a forward.
        optimizer: For a table of what training keeps in memory: dense, with masks, in sparse
            storage.

    Raises:
        ValueError: The model was made by `deploy`.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> masks = itop_prune.apply(model, sparsity=0.75, method="uniform")
    >>> print(summarize(model))
    weight    shape  weights  active  density
    0.weight    4×8       32       8   0.2500
    2.weight    2×4        8       2   0.2500
    total                 40      10   0.2500
    sparsity 0.7500; 6 other parameters are dense
    stored in 200 bytes, 1.2500 of the 160 dense
    """
    refuse_deployed(model)
    masks = find_masks(model)
    active = active_weights(masks)
    sampled = isinstance(explored, Explored) and not explored.exact
    seen = _count_explored(explored or {})
    most_active = 0.99 if masks else 1.0

    found = {name: (layer, tensor) for name, layer, tensor in walk(model)}
    tied = tied_to_embedding(model, found)
    rows = []
    for name, (layer, tensor) in found.items():
        if name in masks:
            shape = masks[name].shape
            computes = _computes(masks[name], active[name])
            weights = math.prod(shape)
            rows.append(Row(name, shape, weights, active[name], seen.get(name), computes=computes))
            continue

        weight = layer._parameters.get(tensor)
        if weight is None or weight.is_meta or name in tied:
            continue
        count = int(weight.count_nonzero())
        if 0 < count <= most_active * weight.numel():
            shape = tuple(weight.shape)
            rows.append(Row(name, shape, weight.numel(), count, None, masked=False))

    parameters = sum(math.prod(p.shape) for p in unwrap(model).parameters())
    stored = dense = 0
    for itop in masks.values():
        parameters += itop.size - math.prod(itop.parameter.shape)
        stored += itop.parameter.nbytes + itop.buffer.nbytes
        dense += itop.size * itop.parameter.element_size()
    cost = None if example_inputs is None else flops(model, example_inputs)
    matrices = count_matrix_weights(model)
    kept = None
    if optimizer is not None and masks:
        masked = {id(itop.parameter) for itop in masks.values()}
        others = [p.nbytes for p in unwrap(model).parameters() if id(p) not in masked]
        kept = memory(masks, optimizer, sum(others))
    return Summary(tuple(rows), parameters, stored, dense, cost, matrices, sampled, kept)


def _count_explored(explored: Mapping[str, Tensor]) -> dict[str, int]:
    if isinstance(explored, Explored):
        return {name: explored.count(name) for name in explored}
    return {name: count_true(tensor) for name, tensor in explored.items()}
