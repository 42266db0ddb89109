"""Files of sparse models beside the dense one's: how large they are, and how long they take to load."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import itop_prune

from .measure import Measured, Settings, clock

SIZES: list[tuple[float, torch.dtype | None, float]] = [
    (0.98, None, 3.1),
    (0.98, torch.float16, 2.0),
    (0.9, None, 13.0),
]
"""Sparsity, dtype of the values, and the most percent of the dense fp32 file."""


def files(settings: Settings, name: str = "resnet50") -> Iterator[Measured]:
    """Percent of a dense file that sparse ones take, random masks by ERK; and loading one against loading the dense."""
    torch.manual_seed(0)
    dense, sparse = (timm.create_model(name, zero_init_last=False) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "dense.safetensors", Path(folder) / "sparse.safetensors"
        save_file(dense.state_dict(), whole)

        def load_dense() -> float:
            began = clock(torch.device("cpu"))
            dense.load_state_dict(load_file(whole))
            return clock(torch.device("cpu")) - began

        def load_sparse() -> float:
            began = clock(torch.device("cpu"))
            itop_prune.load(sparse, small)
            taken = clock(torch.device("cpu")) - began
            itop_prune.remove(sparse)
            return taken

        for sparsity, dtype, most in SIZES:
            sparse.load_state_dict(dense.state_dict())
            itop_prune.apply(sparse, sparsity)
            itop_prune.save(sparse, small, dtype)
            itop_prune.remove(sparse)
            kind = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
            title = f"{name}, {100 * sparsity:g} %, {kind}"
            share = 100 * small.stat().st_size / whole.stat().st_size
            yield Measured(f"{title}: file, of the dense one", most, unit="%", ours=[share])
            yield Measured(f"{title}: loading it", 2.0).take(
                settings.rounds(15), load_sparse, load_dense
            )
