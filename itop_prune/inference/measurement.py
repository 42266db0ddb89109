"""Time functions, compare their outputs, and report what `deploy` measured as a table."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """How one masked weight is computed with."""

    name: str
    shape: tuple[int, ...]
    density: float
    storage: str
    """ "dense" or "sparse"."""
    dense_seconds: float
    """Time of the dense layer in one forward; 0 if it was not measured."""
    seconds: float
    """Time of the layer as it was chosen."""
    why: str = ""
    """Why only the dense layer was possible."""


@dataclass(frozen=True)
class Report:
    """What `deploy` chose and measured; `str(report)` is a table."""

    choices: tuple[Choice, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the tensors in the example."""
    threads: int
    dense_seconds: float
    """Time of a forward of the dense model."""
    seconds: float
    """Time of a forward of the deployed model."""
    difference: float
    """Relative error of the outputs against the dense model."""
    fallback: str = ""
    """Why all of the model stayed dense although single layers were faster."""
    norms: int = 0
    """Batch norms that became part of convolutions."""

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return self.dense_seconds / self.seconds

    def cells(self) -> list[tuple[str, ...]]:
        """Make the table as text: a header, a line per layer, the whole model."""
        lines: list[tuple[str, ...]] = [
            ("weight", "shape", "density", "choice", "dense", "deployed", "speed-up", "")
        ]
        for row in self.choices:
            shape = "×".join(map(str, row.shape))
            numbers = _numbers(row.dense_seconds, row.seconds)
            lines.append((row.name, shape, f"{row.density:.4f}", row.storage, *numbers, row.why))

        numbers = _numbers(self.dense_seconds, self.seconds)
        lines.append(("whole model", "", "", "", *numbers, self.fallback))
        return lines

    def __str__(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        text = []
        for name, *middle, why in lines:
            cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
            text.append("  ".join([name.ljust(widths[0]), *cells, why]).rstrip())

        where = f"inputs of {', '.join(map(str, self.shapes))}, threads: {self.threads}"
        text.append(
            f"measured with {where}; others give the same outputs. Difference of outputs: "
            f"{self.difference:.1e}"
        )
        if self.norms:
            text.append(f"batch norms that are part of convolutions: {self.norms}")
        return "\n".join(text)


def _numbers(dense: float, seconds: float) -> tuple[str, str, str]:
    if not seconds:
        return "", "", ""
    return f"{1e3 * dense:.3f} ms", f"{1e3 * seconds:.3f} ms", f"{dense / seconds:.2f}"


def interleave(
    functions: Mapping[str, Callable[[], T]], at_least: int, within: float = 0.0
) -> dict[str, list[T]]:
    """Call functions in rounds, each once a round, and collect what they return.

    A first round does not count: it may compile or allocate. A drift of the machine's speed reaches
    all functions in the same way.

    Args:
        functions: Functions by name.
        at_least: Number of rounds to take.
        within: Go on for so many seconds, up to 1000 rounds.
    """
    found: dict[str, list[T]] = {name: [] for name in functions}
    for function in functions.values():
        function()

    until = time.perf_counter() + within
    for turn in range(1000):
        if turn >= at_least and time.perf_counter() > until:
            break
        for name, function in functions.items():
            found[name].append(function())
    return found


def layer_seconds(
    models: Mapping[str, nn.Module], layers: Sequence[str], arguments: tuple[Any, ...]
) -> dict[str, dict[str, float]]:
    """Time layers within forwards of models that take turns.

    On its own, called again and again, a layer finds its weight and its code in the caches. Within
    a forward it finds there what other layers have left.

    Args:
        models: Models by name.
        layers: Names that layers have in all of them; "" is the whole model.
        arguments: Of their forward.

    Returns:
        By layer and model: the median seconds of all its calls in one forward. Layers that are not
        called are left out.
    """
    hooks = []

    def timer(model: nn.Module) -> Callable[[], dict[str, float]]:
        began: dict[nn.Module, float] = {}
        taken: dict[nn.Module, float] = {}

        def before(layer: nn.Module, inputs: object) -> None:
            began[layer] = time.perf_counter()

        def after(layer: nn.Module, inputs: object, output: object) -> None:
            taken[layer] = taken.get(layer, 0.0) + time.perf_counter() - began[layer]

        named = {model.get_submodule(name): name for name in layers}
        for layer in named:
            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_hook(after))

        def seconds() -> dict[str, float]:
            for _ in range(2):  # the second one counts: the first one has another model's caches
                taken.clear()
                model(*clone_tensors(arguments))
            return {named[layer]: seconds for layer, seconds in taken.items()}

        return seconds

    timers = {name: timer(model) for name, model in models.items()}
    found = interleave(timers, at_least=11, within=1.0)
    for hook in hooks:
        hook.remove()
    called = {layer for rounds in found.values() for one in rounds for layer in one}
    return {
        layer: {
            name: median(one.get(layer, 0.0) for one in rounds) for name, rounds in found.items()
        }
        for layer in layers
        if layer in called
    }


def clone_tensors(arguments: Any) -> Any:
    """Copy the tensors in arguments: a forward may write into its inputs."""
    return tree_map_only(Tensor, torch.clone, arguments)


def tensors_in(values: Any) -> list[Tensor]:
    """List all tensors of nested containers, dataclasses among them, in order.

    >>> found = tensors_in({"y": [torch.zeros(2), 3], "z": (torch.zeros(1, 4),)})
    >>> [tuple(tensor.shape) for tensor in found]
    [(2,), (1, 4)]
    """
    found = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def relative_error(found: Any, expected: Any) -> float:
    """Compute the norm of the difference of all tensors, as a share of the expected norm.

    An infinity that is expected makes no difference. Without tensors, or with NaN among them, there
    is nothing to compare: the error is NaN.

    >>> relative_error({"y": torch.tensor([3.0, 4.5])}, {"y": torch.tensor([3.0, 4.0])})
    0.1
    """
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    compared, apart, size = False, 0.0, 0.0
    for a, b in pairs:
        a, b = a.double(), b.double()
        compared = True
        apart += float((a - b)[a != b].square().sum())
        size += float(b[b.isfinite()].square().sum())

    if compared and apart == 0:
        return 0.0
    return math.sqrt(apart / size) if size else math.nan
