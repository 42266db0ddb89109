"""How fast deployed models are: `itop_prune.deploy` against dense models, one example at a time.

The dense model runs eager, compiled, and with its batch norms folded, as the deployed one has them.
Beside each time stands its floor: the operations and bytes that a sparse forward needs, and a
forward whose masked layers take no time.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.inference.measurement import interleave, relative_error

from ..models import registration as models  # noqa: F401  (registers the MLP and LeNet-300-100 with timm)
from .measure import Settings, seconds

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "MLP 3072-1024-512-10": ("cifar_mlp", {}, (1, 3, 32, 32)),
    "LeNet-300-100": ("lenet300", {}, (1, 1, 28, 28)),
    "ViT-small, 224 px": ("vit_small_patch16_224", {}, (1, 3, 224, 224)),
    "ResNet-50, 224 px": ("resnet50", {"zero_init_last": False}, (1, 3, 224, 224)),
}
"""By name in the table: timm's name, its keyword arguments, the shape of the example."""
TARGETS = {
    0.90: {"MLP 3072-1024-512-10": 3.1, "ViT-small, 224 px": 2.9, "ResNet-50, 224 px": 1.6},
    0.95: {"MLP 3072-1024-512-10": 6.4, "ViT-small, 224 px": 3.5, "ResNet-50, 224 px": 2.3},
    0.98: {"MLP 3072-1024-512-10": 8.0, "ViT-small, 224 px": 3.5, "ResNet-50, 224 px": 3.5},
}
"""By sparsity and model: how many times as fast as both dense models the deployed one must be."""
NO_SLOWER = 1 / 1.02
"""The target everywhere else."""
HEADINGS = (
    "model",
    "sparsity",
    "dense, ms",
    "compiled, ms",
    "deployed, ms",
    "× dense",
    "× compiled",
    "× folded",
    "target",
    "the rest, ms",
    "operations, M",
    "weights, MB",
    "difference",
)


@dataclass(frozen=True)
class Line:
    """One model at one sparsity; seconds are medians per forward."""

    model: str
    sparsity: float
    dense: float
    compiled: float | None
    """The dense model by torch.compile; None without a compiler."""
    folded: float
    """The dense model, deployed: its batch norms are part of convolutions."""
    deployed: float
    rest: float
    """The deployed model whose masked layers return a stored output at once."""
    difference: float
    """Of the outputs, relative to their norm."""
    target: float
    dense_operations: int
    operations: float
    dense_bytes: int
    bytes: int
    """Of the masked weights: the active values, with four bytes each for their index."""

    @property
    def met(self) -> bool:
        """Whether the deployed model is fast enough against both dense ones."""
        fastest = self.dense if self.compiled is None else min(self.dense, self.compiled)
        return fastest >= self.target * self.deployed

    def cells(self) -> list[str]:
        """Format the line as the cells below `HEADINGS`."""
        compiled, speedup = "–", "–"
        if self.compiled is not None:
            compiled = f"{1e3 * self.compiled:.3g}"
            speedup = f"{self.compiled / self.deployed:.2f}"
        return [
            self.model,
            f"{100 * self.sparsity:g} %",
            f"{1e3 * self.dense:.3g}",
            compiled,
            f"{1e3 * self.deployed:.3g}",
            f"{self.dense / self.deployed:.2f}",
            speedup,
            f"{self.folded / self.deployed:.2f}",
            f"≥ {self.target:.2g}{'' if self.met else ', missed'}",
            f"{1e3 * self.rest:.3g}",
            f"{1e-6 * self.dense_operations:.4g} → {1e-6 * self.operations:.4g}",
            f"{1e-6 * self.dense_bytes:.3g} → {1e-6 * self.bytes:.3g}",
            f"{self.difference:.0e}",
        ]


def lines(settings: Settings, sparsities: Sequence[float] = (0.9, 0.95, 0.98)) -> Iterator[Line]:
    """Measure every model at every sparsity, with random masks by ERK; under --quick two models."""
    for name in list(MODELS)[: 2 if settings.quick else None]:
        entry, keywords, shape = MODELS[name]
        for sparsity in sparsities:
            torch.manual_seed(0)
            model = timm.create_model(entry, **keywords).to(memory_format=torch.channels_last)
            itop_prune.apply(model, sparsity)
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            yield measure(name, model, x, sparsity, settings)


def measure(name: str, model: nn.Module, x: Tensor, sparsity: float, settings: Settings) -> Line:
    """Deploy a masked model and time it beside its dense copy."""
    cost = itop_prune.flops(model, x)
    masks = itop_prune.find_masks(model)
    deployed = itop_prune.deploy(model, x)
    folded = itop_prune.deploy(model, x, choices=("dense",))
    dense = copy.deepcopy(model).eval()
    itop_prune.remove(dense)

    with torch.inference_mode():
        error = relative_error(deployed(x), dense(x))
        functions: dict[str, Callable[[Tensor], object]] = {
            "dense": dense,
            "folded": folded,
            "deployed": deployed,
            "rest": without_layers(deployed, masks, x),
        }
        compiled = compile_or_none(dense, x)
        if compiled is not None:
            functions["compiled"] = compiled
        taken = seconds_per_call(functions, x, settings.rounds(30))

    return Line(
        model=name,
        sparsity=sparsity,
        dense=taken["dense"],
        compiled=taken.get("compiled"),
        folded=taken["folded"],
        deployed=taken["deployed"],
        rest=taken["rest"],
        difference=error,
        target=TARGETS.get(sparsity, {}).get(name, NO_SLOWER),
        dense_operations=cost.dense_forward,
        operations=cost.sparse_forward,
        dense_bytes=sum(4 * itop.size for itop in masks.values()),
        bytes=sum(8 * itop.active + 4 * itop.outputs for itop in masks.values()),
    )


def seconds_per_call(
    functions: Mapping[str, Callable[[Tensor], object]], x: Tensor, rounds: int
) -> dict[str, float]:
    """Measure the median seconds of a call, over rounds of 20 milliseconds or one call."""

    def timer(function: Callable[[Tensor], object]) -> Callable[[], float]:
        function(x)
        once = seconds(functools.partial(function, x))
        calls = max(1, round(0.02 / once))

        def call_several() -> None:
            for _ in range(calls):
                function(x)

        return lambda: seconds(call_several) / calls

    timers = {name: timer(function) for name, function in functions.items()}
    return {name: median(taken) for name, taken in interleave(timers, rounds).items()}


def without_layers(model: nn.Module, masks: Mapping[str, object], x: Tensor) -> nn.Module:
    """Copy a model and let its masked layers return a stored output, so that they take no time."""

    def store(layer: nn.Module, inputs: object, output: Tensor) -> None:
        layer.forward = lambda *_: output

    rest = copy.deepcopy(model)
    layers = [rest.get_submodule(name.rpartition(".")[0]) for name in masks]
    hooks = [layer.register_forward_hook(store) for layer in layers]
    rest(x)
    for hook in hooks:
        hook.remove()
    return rest


def compile_or_none(model: nn.Module, x: Tensor) -> Any:
    """Compile a model and call it once; return None without a compiler for C++."""
    compiled = torch.compile(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals
            compiled(x)
    except RuntimeError as error:
        print(f"no compiled model to compare with: {type(error).__name__}")
        return None
    return compiled


def table(found: Sequence[Line]) -> str:
    """Format the lines as a table in Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(line.cells() for line in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
