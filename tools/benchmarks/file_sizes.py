"""Files of sparse models against the dense one: how large they are, how long they take to load."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import itop_prune

from .measure import Measured, Settings, seconds

SIZES: list[tuple[float, torch.dtype | None, float]] = [
    (0.98, None, 3.1),
    (0.98, torch.float16, 2.0),
    (0.9, None, 13.0),
]
"""Sparsity, dtype of the values, and the target: percent of the dense fp32 file."""


def files(settings: Settings, name: str = "resnet50") -> Iterator[Measured]:
    """Measure size and loading time of sparse files (random masks by ERK) against the dense one."""
    torch.manual_seed(0)
    dense, sparse = (timm.create_model(name, zero_init_last=False) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        dense_file = Path(folder) / "dense.safetensors"
        sparse_file = Path(folder) / "sparse.safetensors"
        save_file(dense.state_dict(), dense_file)

        def load_dense() -> float:
            return seconds(lambda: dense.load_state_dict(load_file(dense_file)))

        def load_sparse() -> float:
            taken = seconds(lambda: itop_prune.load(sparse, sparse_file))
            itop_prune.remove(sparse)
            return taken

        for sparsity, dtype, target in SIZES:
            sparse.load_state_dict(dense.state_dict())
            itop_prune.apply(sparse, sparsity)
            itop_prune.save(sparse, sparse_file, dtype)
            itop_prune.remove(sparse)

            kind = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
            title = f"{name}, {100 * sparsity:g} %, {kind}"
            percent = 100 * sparse_file.stat().st_size / dense_file.stat().st_size
            yield Measured(f"{title}: file, of the dense one", target, unit="%", ours=[percent])
            yield Measured(f"{title}: loading it", 2.0).take(
                settings.rounds(15), load_sparse, load_dense
            )
