"""What every kind of data has in common: batches by index, one error, and seeds made of words."""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from itop_prune.topology import seeded

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


class DataError(Exception):
    """Data that are missing or damaged or do not fit; the message names the file and says what to do."""


class MissingData(DataError):
    """Data that are not there, such as those of another machine: a dry run does without."""


class Source(Protocol):
    """Labelled images that can be had by index."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> "Source":
        """Return a part of the images."""

    def load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield images [B, C, H, W] and labels [B] for each tensor of indices; plain where epoch is None."""


def seed_everything(*words: object) -> None:
    """Seed Python's, numpy's and torch's global generators by words alone, such as (seed, epoch, image)."""
    seed = seeded(CPU, *words).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if (
        has_accelerator()
    ):  # torch.manual_seed asks every kind of device, which takes as long as a small step
        torch.get_device_module().manual_seed_all(seed)


@functools.cache
def has_accelerator() -> bool:
    """Return whether there is more than the CPU; asked once."""
    return torch.accelerator.is_available()
