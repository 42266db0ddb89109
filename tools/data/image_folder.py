"""Large data sets: folders of images, read by worker processes through timm's transforms."""

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .seeding import seed_everything
from .source import Batch, DataError, MissingData


@dataclass(frozen=True)
class Folder(Dataset[tuple[Tensor, int]]):
    """Images in files, with one transform for training and one for evaluation."""

    files: list[str]
    labels: list[int]
    classes: list[str]
    augmenting: Callable[[Image.Image], Tensor]
    plain: Callable[[Image.Image], Tensor]
    workers: int
    device: torch.device
    seed: int

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> "Folder":
        """Select some of the images."""
        files = [self.files[index] for index in indices.tolist()]
        labels = [self.labels[index] for index in indices.tolist()]
        return replace(self, files=files, labels=labels)

    def __getitem__(self, wanted: tuple[int, int | None]) -> tuple[Tensor, int]:
        index, epoch = wanted
        try:
            with Image.open(self.files[index]) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(f"{self.files[index]} can't be read as an image: {error}") from None

        if epoch is None:
            return self.plain(image), self.labels[index]

        seed_everything(self.seed, "augment", epoch, index)
        return self.augmenting(image), self.labels[index]

    def load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield transformed images and labels; augmented unless `epoch` is None."""
        wanted: Any = [[(index, epoch) for index in batch.tolist()] for batch in batches]
        loader = DataLoader(
            self,
            batch_sampler=wanted,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_interrupts,
        )
        try:
            for images, labels in loader:
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except DataError as error:
            # Release the loader that the traceback holds, and with it the workers. From a worker
            # the message begins with the worker's traceback.
            traceback.clear_frames(error.__traceback__)
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to workers too: the main process answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_splits(
    root: Path, train: str, val: str | None, test: str | None, read: Callable[[Path], Folder]
) -> tuple[Folder, Folder | None, Folder]:
    """Read the folders for training, for every epoch, and for the end.

    Unless they are named, these are "val", if there is one, and "test", or else that of `val`.

    Raises:
        DataError: As `read_folder`, or their classes differ.
    """
    val_root = root / (val or "val")
    default = root / "test" if (root / "test").is_dir() else val_root
    test_root = root / test if test else default

    training = read(root / train)
    validation = read(val_root) if val or val_root.is_dir() else None
    testing = validation if test_root == val_root else None
    if testing is None:
        testing = read(test_root)

    for path, split in ((val_root, validation), (test_root, testing)):
        if split is not None and split.classes != training.classes:
            raise DataError(
                f"{root / train} and {path} hold different classes; they must have the same "
                "subfolders"
            )
    return training, validation, testing


def read_folder(
    root: Path,
    image_size: int,
    workers: int,
    device: torch.device,
    seed: int,
    options: dict[str, Any],
) -> Folder:
    """List the images of a folder with one subfolder a class, by timm's reader.

    Raises:
        MissingData: There is no folder, or it holds no images.
        DataError: It holds images outside of subfolders.
    """
    if not root.is_dir():
        raise MissingData(
            f"{root} is not a folder; data.root, data.train, data.val and data.test say where the "
            "images are"
        )
    try:
        reader = timm.data.create_dataset("", root=str(root)).reader
    except RuntimeError as error:
        raise MissingData(
            f"{root} holds no images in subfolders, one subfolder a class: {error}"
        ) from None
    if "" in reader.class_to_idx:
        raise DataError(
            f"{root} holds no images in subfolders, one subfolder a class, but images of its own"
        )

    files = [reader.filename(index, absolute=True) for index in range(len(reader))]
    labels = [label for _, label in reader.samples]
    classes = sorted(reader.class_to_idx)
    augmenting, plain = (
        timm.data.create_transform(image_size, is_training=training, **options)
        for training in (True, False)
    )
    return Folder(files, labels, classes, augmenting, plain, workers, device, seed)
