"""What all kinds of data share: batches by index, and errors."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


class DataError(Exception):
    """Data that are missing, damaged, or do not fit; the message says what to do."""


class MissingData(DataError):
    """Data that are not on this machine; a dry run works without."""


class Source(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> "Source":
        """Select some of the images."""

    def load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield images [B, C, H, W] and labels [B] for each tensor of indices.

        Images are augmented for training; unchanged if `epoch` is None.
        """
