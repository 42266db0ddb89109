"""Numbers of a sparse model, and their table as text. Nothing is drawn here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from itop_prune.analysis.flops import FLOPs, flops
from itop_prune.layers.handle import active_weights, find_masks
from itop_prune.layers.maskable import refuse_deployed, unwrap, walk
from itop_prune.topology import count_true


@dataclass(frozen=True)
class Row:
    """One weight that is masked, or that has zeros without a mask."""

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    explored: int | None
    """How many were active at least once; None where nobody kept count."""
    masked: bool = True

    @property
    def density(self) -> float:
        """Active over all, in (0, 1]."""
        return self.active / self.weights

    @property
    def exploration_rate(self) -> float | None:
        """R_s of this weight, in [density, 1]."""
        return None if self.explored is None else self.explored / self.weights


@dataclass(frozen=True)
class Summary:
    """What `summarize` found; `str(summary)` is a table."""

    rows: tuple[Row, ...]
    parameters: int
    """All parameters of the model, the unmasked ones (biases, norms, embeddings) too."""
    flops: FLOPs | None = None
    """Of a forward, where example inputs were given."""

    @property
    def weights(self) -> int:
        """Weights in all rows."""
        return sum(row.weights for row in self.rows)

    @property
    def active(self) -> int:
        """Active among them."""
        return sum(row.active for row in self.rows)

    @property
    def density(self) -> float:
        """Active over all weights of the rows; 1 where there are none."""
        return self.active / self.weights if self.rows else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the rows."""
        return (self.weights - self.active) / max(1, self.weights)

    @property
    def exploration_rate(self) -> float | None:
        """R_s: the share of masked weights active at least once; None where nobody kept count."""
        masked = [row for row in self.rows if row.masked]
        counts = [row.explored for row in masked if row.explored is not None]
        return (
            sum(counts) / sum(row.weights for row in masked)
            if masked and len(counts) == len(masked)
            else None
        )

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a line per row, the total; for whoever draws it."""
        lines: list[tuple[str, ...]] = [("weight", "shape", "weights", "active", "density")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            name = row.name if row.masked else f"{row.name} (no mask)"
            lines.append((name, shape, f"{row.weights:,}", f"{row.active:,}", f"{row.density:.4f}"))
        lines.append(("total", "", f"{self.weights:,}", f"{self.active:,}", f"{self.density:.4f}"))
        if self.exploration_rate is None:
            return lines
        rates = [*(row.exploration_rate for row in self.rows), self.exploration_rate]
        column = ["R_s", *("" if rate is None else f"{rate:.4f}" for rate in rates)]
        return [(*line, rate) for line, rate in zip(lines, column, strict=True)]

    def __str__(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        others = self.parameters - self.weights
        return "\n".join(
            [
                *text,
                f"sparsity {self.sparsity:.4f}; {others:,} other parameters are dense",
                *self.cost(),
            ]
        )

    def cost(self) -> list[str]:
        """Return what a forward costs as a line of text, none where nobody counted."""
        if self.flops is None:
            return []
        dense, sparse = self.flops.dense_forward, self.flops.sparse_forward
        return [
            f"forward {sparse:.4g} FLOPs, {sparse / max(1, dense):.4f} of the {dense:.4g} of the dense model"
        ]


def summarize(
    model: nn.Module, explored: Mapping[str, Tensor] | None = None, example_inputs: Any = None
) -> Summary:
    """Return how many weights of every masked layer are active, and how many were explored.

    Weights without a mask are counted by their zeros: all of them where nothing is masked,
    otherwise those with 1 % of zeros or more, which is what fusing masked branches leaves (timm's
    `reparameterize_model`). One that is 0 everywhere is one that has not been trained yet, and is
    left out.

    Args:
        model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not.
        explored: `MaskScheduler.explored`, for R_s.
        example_inputs: As `itop_prune.flops` takes them, for the cost of a forward.

    Raises:
        ValueError: It was made by `deploy`.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> masks = itop_prune.apply(model, sparsity=0.75, method="uniform")
    >>> print(summarize(model))
    weight    shape  weights  active  density
    0.weight    4×8       32       8   0.2500
    2.weight    2×4        8       2   0.2500
    total                 40      10   0.2500
    sparsity 0.7500; 6 other parameters are dense
    """
    refuse_deployed(model)
    rows, masks = [], find_masks(model)
    active, seen = (
        active_weights(masks),
        {name: count_true(tensor) for name, tensor in (explored or {}).items()},
    )
    for name, layer, tensor in walk(model):
        if itop := masks.get(name):
            rows.append(
                Row(name, tuple(itop.mask.shape), itop.mask.numel(), active[name], seen.get(name))
            )
        elif (weight := layer._parameters.get(tensor)) is not None and not weight.is_meta:
            count = int(weight.count_nonzero())
            if 0 < count <= (0.99 if masks else 1.0) * weight.numel():
                rows.append(
                    Row(name, tuple(weight.shape), weight.numel(), count, None, masked=False)
                )
    parameters = sum(math.prod(p.shape) for p in unwrap(model).parameters())
    return Summary(
        tuple(rows), parameters, None if example_inputs is None else flops(model, example_inputs)
    )
