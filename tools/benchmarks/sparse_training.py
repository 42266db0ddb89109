"""How fast sparse training is on a CPU: whole steps, dense, with masks, and in sparse storage.

A dense step empties the caches, which no real training does to a sparse one. So each turn of a
round takes several steps in a row, after one that does not count.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import itop_prune
from itop_prune.inference.measurement import interleave
from itop_prune.layers.sparse_handle import Storage

from .measure import CPU, Measured, Settings, seconds
from .memory import NETWORKS, mlp
from .steps import SGD, Training

Step = Callable[[], float]
"""Takes a step and returns its seconds."""
MLP = "MLP 3072-1024-512-10, batch 128"
VIT = "ViT-small, 224 px, batch 8, AdamW"
AT_LEAST = 0.05
"""Seconds that a turn measures; two steps if they take longer."""


@dataclass(frozen=True)
class Network:
    """Builds networks of one kind, dense or sparse, and their training steps."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of a batch."""
    optimizer: Callable[..., torch.optim.Optimizer] = SGD

    def step(self, sparsity: float | None, storage: Storage, settings: Settings) -> Step:
        """Build a network and its training step; a sparsity of None is dense."""
        training = Training(
            self.build(),
            self.shape,
            sparsity,
            settings,
            storage=storage,
            optimizer=self.optimizer,
        )
        return functools.partial(training.take, 1)


@dataclass(frozen=True)
class Layer:
    """Builds linear layers of one shape, dense or sparse; a step is forward and backward."""

    inputs: int
    outputs: int
    rows: int

    def step(self, sparsity: float | None, storage: Storage, settings: Settings) -> Step:
        """Build a layer and its step, which computes the gradients of input, weight and bias."""
        layer = nn.Linear(self.inputs, self.outputs)
        if sparsity:
            itop_prune.apply(layer, sparsity, storage=storage)
        x = torch.randn(self.rows, self.inputs)
        return layer_step(layer, x, torch.randn(self.rows, self.outputs))


def layer_step(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Step:
    """Make a step of one layer: a forward, and the gradients of input, weight and bias."""
    x.requires_grad_()

    def forward_and_backward() -> None:
        layer(x).backward(gradient)
        layer.zero_grad()
        x.grad = None

    return functools.partial(seconds, forward_and_backward)


@dataclass(frozen=True)
class Case:
    """What is measured, and how many times as fast as dense it must be."""

    built: Network | Layer
    targets: Mapping[int, Mapping[float, float]]
    """By number of cores and by sparsity."""
    rounds: int = 7


WIDE_TARGETS = {0.9: 4.5, 0.95: 8.0, 0.98: 16.0, 0.99: 22.0}
LENET_TARGETS = {0.9: 2.2, 0.95: 3.0, 0.98: 3.5}
VIT_TARGETS = {0.9: 1.7, 0.95: 2.3, 0.98: 2.8}
CASES = {
    MLP: Case(
        Network(functools.partial(mlp, 3072, 1024, 512, 10), (128, 3072)),
        {1: {0.9: 5.0, 0.95: 9.0, 0.98: 18.0}, 2: {0.9: 4.5, 0.95: 8.0, 0.98: 13.0}},
    ),
    "MLP 784-1568-1568-1568-10, batch 32": Case(
        Network(NETWORKS["mlp"][0], (32, 784)), {1: WIDE_TARGETS, 2: WIDE_TARGETS}
    ),
    "LeNet-300-100, batch 100": Case(
        Network(functools.partial(mlp, 784, 300, 100, 10), (100, 784)),
        {1: LENET_TARGETS, 2: LENET_TARGETS},
    ),
    "linear 384→1536, 3152 rows": Case(
        Layer(384, 1536, 3152), {1: {0.9: 3.5, 0.95: 6.0, 0.98: 9.0}}
    ),
    VIT: Case(
        Network(NETWORKS["vit-small"][0], (8, 3, 224, 224), torch.optim.AdamW),
        {1: VIT_TARGETS, 2: VIT_TARGETS},
        rounds=3,
    ),
}
"""By name in the table."""


def title(case: str, sparsity: float, cores: int) -> str:
    """Name a row of the table.

    >>> title("LeNet-300-100", 0.98, 1)
    'LeNet-300-100, 98 %, cores: 1'
    """
    return f"{case}, {100 * sparsity:g} %, cores: {cores}"


def sparse(settings: Settings) -> Iterator[Measured]:
    """Measure steps of sparse storage, with masks, and dense, on one core and on two.

    Kernels are for CPUs, so the device of the settings does not count. `OMP_NUM_THREADS=1` leaves
    two cores out, and --quick the largest network.
    """
    settings = dataclasses.replace(settings, device=CPU)
    threads = torch.get_num_threads()
    try:
        for name, case in CASES.items():
            if settings.quick and name == VIT:
                continue
            for cores in case.targets:
                if cores <= threads:
                    torch.set_num_threads(cores)
                    yield from compare(name, case, cores, settings)
    finally:
        torch.set_num_threads(threads)


def compare(name: str, case: Case, cores: int, settings: Settings) -> Iterator[Measured]:
    """Measure one network at all sparsities; the dense one is shared."""
    torch.manual_seed(0)
    storages: tuple[Storage, ...] = ("mask", "sparse")
    turns = {"dense": turn(case.built.step(None, "mask", settings))}
    for sparsity in case.targets[cores]:
        for storage in storages:
            step = case.built.step(sparsity, storage, settings)
            turns[f"{storage} {sparsity}"] = turn(step)

    found = interleave(turns, settings.rounds(case.rounds))
    milliseconds = {key: [1e3 * value for value in values] for key, values in found.items()}
    for sparsity, target in case.targets[cores].items():
        yield Measured(
            title(name, sparsity, cores),
            target,
            faster=True,
            unit="ms",
            ours=milliseconds[f"sparse {sparsity}"],
            other=milliseconds["dense"],
            masked=milliseconds[f"mask {sparsity}"],
        )


def turn(step: Step) -> Step:
    """Build a function that returns the mean of several steps in a row, after one to warm up."""

    def several() -> float:
        step()
        taken = [step(), step()]
        while sum(taken) < AT_LEAST:
            taken.append(step())
        return statistics.mean(taken)

    return several
