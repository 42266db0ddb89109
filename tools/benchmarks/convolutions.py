"""How fast sparse training of convolutions is on a CPU: single layers, and steps of networks.

Dense layers are measured with contiguous images and with channels last, and the faster counts. In
sparse storage channels are last.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import timm
import torch
from torch import nn

import itop_prune
from itop_prune.inference.measurement import interleave

from ..models import registration as models  # noqa: F401  (registers VGG-C and ResNet-34 with timm)
from .measure import CPU, Measured, Settings
from .sparse_training import Step, layer_step, turn
from .steps import Training

Method = Literal["ERK", "uniform"]
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class Single:
    """A convolution of 3 by 3 between as many channels; a step is forward and backward."""

    channels: int
    pixels: int
    batch: int = 64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images, and of the output."""
        return self.batch, self.channels, self.pixels, self.pixels

    def step(self, sparsity: float | None, method: Method, layout: torch.memory_format) -> Step:
        """Build the layer and its step, which computes all gradients."""
        layer = nn.Conv2d(self.channels, self.channels, 3, padding=1).to(memory_format=layout)
        if sparsity:
            itop_prune.apply(layer, sparsity, method=method, storage="sparse")
        x, gradient = (torch.randn(self.shape).contiguous(memory_format=layout) for _ in range(2))
        return layer_step(layer, x, gradient)


@dataclass(frozen=True)
class Network:
    """A network of timm, and its training steps."""

    name: str
    pixels: int
    batch: int

    def step(self, sparsity: float | None, method: Method, layout: torch.memory_format) -> Step:
        """Build the network and its training step."""
        training = Training(
            timm.create_model(self.name, num_classes=10),
            (self.batch, 3, self.pixels, self.pixels),
            sparsity,
            Settings(quick=False, device=CPU),
            storage="sparse",
            method=method,
            layout=layout,
        )
        return functools.partial(training.take, 1)


@dataclass(frozen=True)
class Case:
    """What is measured, and how many times as fast as dense it must be."""

    built: Single | Network
    targets: Mapping[Method, Mapping[float, float]]
    """By method and sparsity."""
    rounds: int


SINGLE: Mapping[Method, Mapping[float, float]] = {"ERK": {0.9: 1.4, 0.95: 2.6, 0.98: 5.0}}
CASES: dict[str, Case] = {
    f"conv 3x3, {channels} channels, {pixels} px, batch 64": Case(
        Single(channels, pixels), SINGLE, rounds=5
    )
    for channels, pixels in ((64, 32), (128, 16), (256, 8), (512, 4))
}
CASES |= {
    "VGG-C, 32 px, batch 128": Case(
        Network("cifar_vgg_c", 32, 128),
        {"ERK": {0.9: 1.1, 0.95: 1.7, 0.98: 2.7}, "uniform": {0.9: 1.3, 0.95: 2.1, 0.98: 3.3}},
        rounds=2,
    ),
    "ResNet-34, 32 px, batch 128": Case(
        Network("cifar_resnet34", 32, 128),
        {"ERK": {0.9: 1.05, 0.95: 1.5, 0.98: 2.4}, "uniform": {0.9: 1.2, 0.95: 1.8, 0.98: 2.8}},
        rounds=1,
    ),
    "ResNet-50, 128 px, batch 32": Case(
        Network("resnet50", 128, 32),
        {"ERK": {0.9: 0.98, 0.95: 1.2, 0.98: 1.6}, "uniform": {0.9: 1.0, 0.95: 1.3, 0.98: 1.8}},
        rounds=1,
    ),
}
"""By name in the table."""


def convolutions(settings: Settings) -> Iterator[Measured]:
    """Measure steps in sparse storage against the faster dense ones, on one core and on two.

    `OMP_NUM_THREADS=1` leaves two cores out, and --quick the networks.
    """
    threads = torch.get_num_threads()
    try:
        for cores in (1, 2):
            if cores > threads:
                continue
            torch.set_num_threads(cores)
            for name, case in CASES.items():
                if not settings.quick or isinstance(case.built, Single):
                    yield from compare(name, case, cores)
    finally:
        torch.set_num_threads(threads)


def compare(name: str, case: Case, cores: int) -> Iterator[Measured]:
    """Measure one case at all sparsities; the dense ones are shared."""
    torch.manual_seed(0)
    turns: dict[str, Callable[[], float]] = {
        kind: turn(case.built.step(None, "ERK", layout)) for kind, layout in FORMATS.items()
    }
    for method, targets in case.targets.items():
        for sparsity in targets:
            step = case.built.step(sparsity, method, torch.channels_last)
            turns[f"{method} {sparsity}"] = turn(step)

    found = interleave(turns, case.rounds)
    milliseconds = {key: [1e3 * value for value in values] for key, values in found.items()}
    faster = min(FORMATS, key=lambda kind: statistics.median(milliseconds[kind]))
    for method, targets in case.targets.items():
        for sparsity, target in targets.items():
            title = f"{name}, {method} {100 * sparsity:g} %, cores: {cores}"
            yield dataclasses.replace(
                Measured(title, target, faster=True, unit="ms"),
                ours=milliseconds[f"{method} {sparsity}"],
                other=milliseconds[faster],
            )
