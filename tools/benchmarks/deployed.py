"""How fast deployed models are: `itop_prune.deploy` against dense models, eager and compiled, one example at a time.

Beside each time stands its floor: the operations and the bytes of weights that a sparse forward
can't do without, and what a forward takes whose masked layers take no time at all.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.inference.measurement import interleaved_times, relative_error

from ..models import registration as models  # noqa: F401  (registers the MLP and LeNet-300-100 with timm)
from .measure import Settings

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "MLP 3072-1024-512-10": ("cifar_mlp", {}, (1, 3, 32, 32)),
    "LeNet-300-100": ("lenet300", {}, (1, 1, 28, 28)),
    "ViT-small, 224 px": ("vit_small_patch16_224", {}, (1, 3, 224, 224)),
    "ResNet-50, 224 px": ("resnet50", {"zero_init_last": False}, (1, 3, 224, 224)),
}
"""Name in the table: of timm, keyword arguments, shape of the example."""
TARGETS = {
    0.98: {"MLP 3072-1024-512-10": 5.0, "ViT-small, 224 px": 3.0, "ResNet-50, 224 px": 1.5},
    0.95: {"MLP 3072-1024-512-10": 2.5, "ViT-small, 224 px": 2.0},
    0.90: {"ViT-small, 224 px": 1.3},
}
NO_SLOWER = 1 / 1.02
"""The target everywhere else."""


@dataclass(frozen=True)
class Line:
    """One model at one sparsity; seconds are medians of rounds in turns, per forward."""

    model: str
    sparsity: float
    dense: float
    compiled: float | None
    """The dense model by torch.compile; None where no compiler is at hand."""
    deployed: float
    rest: float
    """The dense model with masked layers that return at once what they returned before."""
    difference: float
    """Of the outputs, as a share of their norm."""
    target: float
    dense_operations: int
    operations: float
    dense_bytes: int
    bytes: int
    """Of the masked weights; sparse ones with an index of four bytes each."""

    @property
    def met(self) -> bool:
        """Whether the deployed model is fast enough against both."""
        return (
            min(self.dense, math.inf if self.compiled is None else self.compiled)
            >= self.target * self.deployed
        )

    def cells(self) -> list[str]:
        """Return the line as text."""
        ratios = [
            f"{self.dense / self.deployed:.2f}",
            f"{self.compiled / self.deployed:.2f}" if self.compiled else "–",
        ]
        return [
            self.model,
            f"{100 * self.sparsity:g} %",
            *(f"{1e3 * s:.3g}" if s else "–" for s in (self.dense, self.compiled, self.deployed)),
            *ratios,
            f"≥ {self.target:.2g}{'' if self.met else ', missed'}",
            f"{1e3 * self.rest:.3g}",
            f"{1e-6 * self.dense_operations:.4g} → {1e-6 * self.operations:.4g}",
            f"{1e-6 * self.dense_bytes:.3g} → {1e-6 * self.bytes:.3g}",
            f"{self.difference:.0e}",
        ]


HEADINGS = (
    *(
        "model",
        "sparsity",
        "dense, ms",
        "compiled, ms",
        "deployed, ms",
        "× dense",
        "× compiled",
        "target",
    ),
    *("the rest, ms", "operations, M", "weights, MB", "difference"),
)


def lines(settings: Settings, sparsities: Sequence[float] = (0.9, 0.95, 0.98)) -> Iterator[Line]:
    """Measure every model at every sparsity, with random masks (ERK)."""
    for name in list(MODELS)[: 2 if settings.quick else None]:
        entry, keywords, shape = MODELS[name]
        for sparsity in sparsities:
            torch.manual_seed(0)
            model = timm.create_model(entry, **keywords)
            itop_prune.apply(model, sparsity)
            yield measure(name, model, torch.randn(shape), sparsity, settings)


def measure(name: str, model: nn.Module, x: Tensor, sparsity: float, settings: Settings) -> Line:
    """Deploy a masked model and time it beside its dense copy."""
    cost = itop_prune.flops(model, x)
    masks = itop_prune.find_masks(model)
    deployed = itop_prune.deploy(model, x)
    dense = copy.deepcopy(model).eval()
    itop_prune.remove(dense)
    with torch.inference_mode():
        apart = relative_error(deployed(x), dense(x))
        functions: dict[str, Callable[[Tensor], object]] = {
            "dense": dense,
            "deployed": deployed,
            "rest": without_layers(dense, masks, x),
        }
        if (compiled := compile_or_none(dense, x)) is not None:
            functions["compiled"] = compiled
        seconds = time_in_turns(functions, x, settings.rounds(30))
    return Line(
        name,
        sparsity,
        seconds["dense"],
        seconds.get("compiled"),
        seconds["deployed"],
        seconds["rest"],
        apart,
        TARGETS.get(sparsity, {}).get(name, NO_SLOWER),
        cost.dense_forward,
        cost.sparse_forward,
        sum(4 * itop.mask.numel() for itop in masks.values()),
        sum(8 * itop.active + 4 * itop.outputs for itop in masks.values()),
    )


def time_in_turns(
    functions: Mapping[str, Callable[[Tensor], object]], x: Tensor, rounds: int
) -> dict[str, float]:
    """Return the seconds of a call of each, the median of rounds of 20 milliseconds or one call."""
    repeats = {}
    for name, function in functions.items():
        function(x)
        began = time.perf_counter()
        function(x)
        repeats[name] = max(1, round(0.02 / (time.perf_counter() - began)))

    def several(name: str) -> None:
        for _ in range(repeats[name]):
            functions[name](x)

    taken = interleaved_times(
        {name: functools.partial(several, name) for name in functions},
        rounds,
        within=0.0,
        reduce=median,
    )
    return {name: seconds / repeats[name] for name, seconds in taken.items()}


def without_layers(model: nn.Module, masks: Mapping[str, object], x: Tensor) -> nn.Module:
    """Return a copy in which masked layers return what they returned before: what remains when they take no time."""

    def remember(layer: nn.Module, inputs: object, output: Tensor) -> None:
        layer.forward = lambda *_: output

    rest = copy.deepcopy(model)
    layers = [rest.get_submodule(name.rpartition(".")[0]) for name in masks]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    rest(x)
    for hook in hooks:
        hook.remove()
    return rest


def compile_or_none(model: nn.Module, x: Tensor) -> Any:
    """Return the model by torch.compile, after its first call, or None where that is not possible here."""
    compiled = torch.compile(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about itself
            compiled(x)
    except RuntimeError as error:  # no compiler for C++
        print(f"no compiled model to compare with: {type(error).__name__}")
        return None
    return compiled


def table(found: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(line.cells() for line in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
