"""Time training steps of other libraries' sparse layers beside ours, on one core of a CPU.

  pip install sparseprop==0.1.14 sparselab==0.2.2
  python tools/bench_peers.py

The network is an MLP 3072-1024-512-10 with a batch of 128, trained by SGD with momentum. Then come
single 3 by 3 convolutions with a batch of 64, forward and backward, which SparseProp has too. Each
of its layouts is measured, and so are both memory formats of the dense layer.

All take turns in one process. SparseProp gets our masks; SparseLab draws its own of the same
densities. Both come from PyPI, and SparseProp compiles itself there, with a compiler for C++. A
library that is not there is left out. Let nothing else run meanwhile.
"""

import argparse
import contextlib
import functools
import importlib
import os
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from torch import nn

import itop_prune
from itop_prune.inference.measurement import interleave

from .command import describe
from .convolutions import CASES, FORMATS, Single
from .measure import CPU, Settings
from .memory import mlp
from .sparse_training import layer_step, turn
from .steps import Training

Replace = Callable[[nn.Linear], nn.Module]
"""Makes another library's layer of a dense one with zeros."""
SIZES = (3072, 1024, 512, 10)
BATCH = 128
SPARSITIES = (0.9, 0.98)
OF_CONVOLUTIONS = (0.9, 0.95, 0.98)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine and a table of all libraries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="take fewer rounds, for a first look")
    settings = Settings(quick=parser.parse_args(argv).quick, device=CPU)

    os.environ["OMP_NUM_THREADS"] = "1"  # of libraries that bring their own OpenMP
    torch.set_num_threads(1)
    print(describe(CPU))
    libraries = {}
    for name, find in PEERS.items():
        try:
            libraries[f"{name} {version(name)}"] = find()
        except ImportError as error:  # PackageNotFoundError is one
            print(f"{name} is left out: {error}")

    for row in (("what", "library", "sparsity", "ms a step", "× dense"), ("---",) * 5):
        print(f"| {' | '.join(row)} |")
    for sparsity in SPARSITIES:
        print_rows("MLP", sparsity, compare(sparsity, libraries, settings))
    for name, case in CASES.items():
        if isinstance(case.built, Single):
            for sparsity in OF_CONVOLUTIONS:
                print_rows(name, sparsity, compare_single(case.built, sparsity, settings))
    return 0


def print_rows(what: str, sparsity: float, found: dict[str, list[float]]) -> None:
    """Print a row for each library; dense is the faster of those called so."""
    dense = min(statistics.median(found[name]) for name in found if name.startswith("dense"))
    for name, taken in found.items():
        middle = statistics.median(taken)
        cells = (
            what,
            name,
            f"{100 * sparsity:g} %",
            f"{1e3 * middle:.3g}",
            f"{dense / middle:.3g}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def compare(
    sparsity: float, libraries: dict[str, Replace], settings: Settings
) -> dict[str, list[float]]:
    """Measure the seconds of a step, round by round: dense, ours, and each library's."""
    shape = (BATCH, SIZES[0])
    torch.manual_seed(0)
    trainings = {
        "dense": Training(mlp(*SIZES), shape, None, settings),
        "itop_prune": Training(mlp(*SIZES), shape, sparsity, settings, storage="sparse"),
    }
    for name, replace in libraries.items():
        model = mlp(*SIZES)
        itop_prune.apply(model, sparsity)
        replaced = [replace(layer) if isinstance(layer, nn.Linear) else layer for layer in model]
        trainings[name] = Training(nn.Sequential(*replaced), shape, None, settings)

    turns = {
        name: turn(functools.partial(training.take, 1)) for name, training in trainings.items()
    }
    return interleave(turns, settings.rounds(15))


def compare_single(single: Single, sparsity: float, settings: Settings) -> dict[str, list[float]]:
    """Measure the seconds of a convolution's step: dense, ours, and SparseProp's if it is there."""
    torch.manual_seed(0)
    steps = {f"dense, {name}": single.step(None, "ERK", kind) for name, kind in FORMATS.items()}
    steps["itop_prune"] = single.step(sparsity, "ERK", torch.channels_last)
    with contextlib.suppress(ImportError):
        layers = importlib.import_module("sparseprop.modules.conv2d")
        for layout in (False, True):
            dense = nn.Conv2d(single.channels, single.channels, 3, padding=1)
            itop_prune.apply(dense, sparsity)
            itop_prune.remove(dense)
            layer = layers.SparseConv2d.from_dense(dense, vectorizing_over_on=layout)
            x, gradient = torch.randn(single.shape), torch.randn(single.shape)
            name = f"sparseprop, over {'images' if layout else 'pixels'}"
            steps[name] = layer_step(layer, x, gradient)
    turns = {name: turn(step) for name, step in steps.items()}
    return interleave(turns, settings.rounds(5))


def sparseprop() -> Replace:
    """Find SparseProp's layer; it computes the input's gradient in the first layer too."""
    layers = importlib.import_module("sparseprop.modules.linear")
    return layers.SparseLinear.from_dense


def sparselab() -> Replace:
    """Find SparseLab's layer, which draws values and positions itself."""
    layers = importlib.import_module("sparselab")

    def replace(layer: nn.Linear) -> nn.Module:
        sparsity = float((layer.weight == 0).float().mean())
        return layers.SparseLinear(layer.in_features, layer.out_features, sparsity=sparsity)

    return replace


PEERS: dict[str, Callable[[], Replace]] = {"sparseprop": sparseprop, "sparselab": sparselab}
"""By their names on PyPI."""
