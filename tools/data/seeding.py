"""Seed the global random generators from a name, so that a draw depends on nothing else."""

import functools
import random

import numpy as np
import torch

from itop_prune.topology import seeded

from .source import CPU


def seed_everything(*stream: object) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        stream: The name of the stream of random numbers, such as (seed, epoch, image).
    """
    seed = seeded(CPU, *stream).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)

    # torch.manual_seed asks every kind of device, which takes as long as a small step.
    torch.default_generator.manual_seed(seed)
    if has_accelerator():
        torch.get_device_module().manual_seed_all(seed)


@functools.cache
def has_accelerator() -> bool:
    """Tell whether there is more than the CPU; asked once."""
    return torch.accelerator.is_available()
