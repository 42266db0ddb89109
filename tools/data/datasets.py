"""Data by name. Small sets lie on the device as arrays, folders of images go through timm.

Every random draw is a function of (seed, epoch, image): the order, the crop, the flip, and for a
folder the whole of timm's transform. So a run can stop after any step and go on, with any number of
workers, and see the same images. (That is why batches come from torch's DataLoader with a list of
indices: timm's `create_loader` takes no order from outside.)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm.data
import torch

from itop_prune.topology import seeded

from .arrays import Augmentation, read_arrays
from .image_folder import read_folder
from .source import CPU, Batch, DataError, Source


@dataclass(frozen=True)
class Data:
    """The splits of a data set, as batches on the device."""

    train: Source
    validation: Source | None
    test: Source
    classes: int
    shape: tuple[int, int, int]
    """Channels, height and width of what the model gets."""
    batch_size: int
    eval_batch_size: int
    seed: int

    def batches_per_epoch(self, ranks: int = 1) -> int:
        """Return how many whole batches an epoch has on each rank; what is left over is dropped."""
        return len(self.train) // (self.batch_size * ranks)

    def epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield this rank's training batches of an epoch, from batch `start` on."""
        order = torch.randperm(len(self.train), generator=seeded(CPU, self.seed, "order", epoch))
        used = order[: self.batches_per_epoch(ranks) * self.batch_size * ranks]
        return self.train.load(used.view(-1, ranks, self.batch_size)[start:, rank].unbind(), epoch)

    def evaluation(self, source: Source, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield this rank's share of a split, each image once over all ranks."""
        share = torch.arange(len(source))[rank::ranks]
        return source.load(share.split(self.eval_batch_size) if len(share) else (), None)


def augmentation_of(section: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what a recipe's `augment` is the keyword arguments of, given its section `data`."""
    return timm.data.create_transform if section.get("name") == "folder" else Augmentation


def open_data(
    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "npz", "folder"],
    *,
    batch_size: int,
    root: str = "data",
    eval_batch_size: int = 500,
    validation: int = 0,
    download: bool = False,
    image_size: int = 224,
    train: str = "train",
    test: str = "val",
    workers: int = 2,
    device: torch.device = CPU,
    seed: int = 0,
    augment: dict[str, Any] | None = None,
) -> Data:
    """Open a data set.

    Args: name: "npz" is a file of arrays (see `arrays.read_npz`), "folder" a folder of images, one
        subfolder a class. batch_size: Per process. root: Where the data lie; for "npz" the file.
        eval_batch_size: Per process, for validation and test. validation: How many training images
        are held out; which ones is the same for every seed. download: Let torchvision fetch what is
        not there; a folder that is there is used as it is. image_size: Height and width of a
        folder's images after the transform. train: Subfolder of `root` with the training images of
        a "folder". test: The same for testing. workers: Processes that load the images of a
        "folder". device: Where the batches are wanted. seed: Of order and augmentation. augment:
        The recipe's section: arguments of `Augmentation`, or of `timm.data.create_transform` for a
        "folder".

    Raises:
        DataError: Files are missing or damaged, or do not fit together, or are too few.
    """
    training: Any
    testing: Any
    options = augment or {}
    if name == "folder":
        places = [Path(root) / part for part in (train, test)]
        training, testing = (
            read_folder(place, image_size, workers, device, seed, options) for place in places
        )
        if training.classes != testing.classes:
            raise DataError(
                f"{root}: {train} and {test} hold different classes; they must have the same subfolders"
            )
        classes, shape = len(training.classes), (3, image_size, image_size)
    else:
        training, testing, classes = read_arrays(
            name, root, download, device, seed, Augmentation(**options)
        )
        channels, height, width = training.images.shape[1:]
        shape = (channels, height, width)
    if validation >= len(training):
        raise DataError(
            f"data.validation is {validation}, and there are {len(training)} training images"
        )
    held_out = None
    if validation:
        order = torch.randperm(len(training), generator=seeded(CPU, "validation"))
        training, held_out = (
            training.take(order[validation:].sort().values),
            training.take(order[:validation]),
        )
    if len(training) < batch_size:
        raise DataError(
            f"data.batch_size is {batch_size}, and there are {len(training)} training images"
        )
    return Data(training, held_out, testing, classes, shape, batch_size, eval_batch_size, seed)
