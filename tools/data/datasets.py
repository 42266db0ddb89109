"""Open data sets by name: small ones as arrays on the device, folders of images through timm.

Every random draw depends only on (seed, epoch, image): the order, the crop, the flip, and for a
folder all of timm's transform. So a run can stop after any step and go on, with any number of
workers, and see the same images. Batches of a folder come from torch's DataLoader, which takes a
list of indices; timm's `create_loader` takes no order from outside.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm.data
import torch

from itop_prune.topology import seeded

from .arrays import Augmentation, read_arrays
from .image_folder import read_folder, read_splits
from .source import CPU, Batch, DataError, Source


@dataclass(frozen=True)
class Data:
    """The splits of a data set, as batches on the device."""

    train: Source
    validation: Source | None
    """Evaluated after every epoch."""
    test: Source
    """Evaluated once, at the end; the same as `validation` where a folder has no others."""
    classes: int
    shape: tuple[int, int, int]
    """Channels, height and width of the images that the model gets."""
    batch_size: int
    eval_batch_size: int
    seed: int

    def batches_per_epoch(self, ranks: int = 1) -> int:
        """Count the whole batches of an epoch on each rank; left-over images are dropped."""
        return len(self.train) // (self.batch_size * ranks)

    def epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield this rank's training batches of an epoch, from batch `start` on."""
        order = torch.randperm(len(self.train), generator=seeded(CPU, self.seed, "order", epoch))
        used = order[: self.batches_per_epoch(ranks) * self.batch_size * ranks]
        batches = used.view(-1, ranks, self.batch_size)[start:, rank].unbind()
        return self.train.load(batches, epoch)

    def evaluation(self, source: Source, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield this rank's share of a split, each image once over all ranks."""
        share = torch.arange(len(source))[rank::ranks]
        batches = share.split(self.eval_batch_size) if len(share) else ()
        return source.load(batches, None)


@dataclass(frozen=True)
class Kind:
    """A kind of data set, for the reference of recipe keys."""

    names: tuple[str, ...]
    about: str
    keys: tuple[str, ...]
    """Arguments of `open_data` that it uses beside those of every kind."""


COMMON_KEYS = ("name", "batch_size", "eval_batch_size", "validation")
"""Arguments of `open_data` that every kind uses."""
KINDS = (
    Kind(("digits",), "1,797 handwritten digits of 8×8 pixels; they come with the runner.", ()),
    Kind(
        ("fashion_mnist", "cifar10", "cifar100"),
        "The data sets of torchvision, in its files.",
        ("root", "download"),
    ),
    Kind(
        ("npz",),
        "A NumPy file of your own with x_train, y_train, x_test and y_test: uint8 images of the "
        "shape [N, H, W] or [N, H, W, C], and a whole number from 0 for each image.",
        ("root",),
    ),
    Kind(
        ("folder",),
        "Image files of your own in root/train/CLASS/, root/val/CLASS/ and root/test/CLASS/. "
        "Without a folder test, val is the test set.",
        ("root", "train", "val", "test", "image_size", "workers"),
    ),
)


def augmentation_of(section: Mapping[str, Any]) -> Callable[..., Any]:
    """Choose the call of a recipe's section `augment` by its section `data`."""
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
    val: str | None = None,
    test: str | None = None,
    workers: int = 2,
    device: torch.device = CPU,
    seed: int = 0,
    augment: dict[str, Any] | None = None,
) -> Data:
    """Open a data set.

    Args:
        name: One of these sets, "npz" for a file of arrays, or "folder" for images in files.
        batch_size: Images of a batch, per process.
        root: The folder of the data; for "npz" the file.
        eval_batch_size: Images of a batch of validation and test, per process.
        validation: Number of training images to hold out and to evaluate after every epoch; the
            same ones for every seed. 0 takes the images of `val`, if there are any.
        download: Whether torchvision may fetch missing data; existing ones are used as they are.
        image_size: Height and width of a folder's images after the transform.
        train: Subfolder of `root` with the training images of a "folder".
        val: Subfolder of a "folder" that is evaluated after every epoch; "val" if there is one.
        test: Subfolder that is evaluated once, at the end; "test" if there is one, else that of
            `val`.
        workers: Processes that load the images of a "folder".
        device: Device of the batches.
        seed: Seed of order and augmentation.
        augment: The recipe's section: arguments of `Augmentation`, or of
            `timm.data.create_transform` for a "folder".

    Raises:
        DataError: Files are missing, damaged, too few, or do not fit together.
    """
    if validation and val:
        raise DataError(
            f"data.validation holds out {validation} training images, and data.val names others; "
            "leave one of them out"
        )
    options = augment or {}
    training: Any
    held_out: Any = None
    testing: Any
    shape: tuple[int, int, int]
    if name == "folder":
        read = functools.partial(
            read_folder,
            image_size=image_size,
            workers=workers,
            device=device,
            seed=seed,
            options=options,
        )
        training, held_out, testing = read_splits(Path(root), train, val, test, read)
        classes, shape = len(training.classes), (3, image_size, image_size)
    else:
        augmentation = Augmentation(**options)
        training, testing, classes = read_arrays(name, root, download, device, seed, augmentation)
        shape = tuple(training.images.shape[1:])

    if validation >= len(training):
        raise DataError(
            f"data.validation is {validation}, and there are {len(training)} training images"
        )
    if validation:
        order = torch.randperm(len(training), generator=seeded(CPU, "validation"))
        held_out = training.take(order[:validation])
        training = training.take(order[validation:].sort().values)

    if len(training) < batch_size:
        raise DataError(
            f"data.batch_size is {batch_size}, and there are {len(training)} training images"
        )
    return Data(training, held_out, testing, classes, shape, batch_size, eval_batch_size, seed)
