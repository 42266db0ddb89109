"""Small data sets: arrays on the device, augmented in batches.

`digits` is the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0): 1,797 images of 8×8 in 17
grey levels. Here every fifth is for testing.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from zipfile import BadZipFile

import numpy as np
import torch
import torchvision
from torch import Tensor

from itop_prune.topology import seeded

from .source import CPU, Batch, DataError, MissingData

Splits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]
"""Training images and labels, test images and labels, number of classes."""
Reader = Callable[[str, bool], Splits]
"""Reads the splits from a root; the flag allows to download them."""


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the training images after padding by zeros, and a horizontal flip."""

    padding: int = 0
    """Pixels on every side."""
    hflip: float = 0.0
    """Probability of a flip."""

    def __post_init__(self) -> None:
        if self.padding < 0 or not 0.0 <= self.hflip <= 1.0:
            raise ValueError(
                f"padding is {self.padding}, hflip {self.hflip}; allowed are 0 and more, and 0 to 1"
            )


@dataclass
class Arrays:
    """Images as one tensor on the device."""

    images: Tensor
    """uint8 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]."""
    mean: Tensor
    """Mean of the training images, [C, 1, 1], in grey levels."""
    std: Tensor
    """Standard deviation of the training images, likewise."""
    augmentation: Augmentation
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> "Arrays":
        """Select some of the images."""
        indices = indices.to(self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield normalised images and labels; augmented unless `epoch` is None."""
        plain = epoch is None or self.augmentation == Augmentation()
        draws = () if plain else self._draw(epoch)
        for indices in batches:
            indices = indices.to(self.images.device)
            images, labels = self.images.index_select(0, indices), self.labels[indices]
            if plain:
                yield self._normalise(images), labels
            else:
                yield self._augment(images, *(d.index_select(0, indices) for d in draws)), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)

    def _draw(self, epoch: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw the crop and flip of every image.

        Returns:
            Whether each image is flipped, the position of the first pixel of its crop, and which
            rows and columns of the crop lie inside the image.
        """
        generator, device = seeded(CPU, self.seed, "augment", epoch), self.images.device
        count, padding = len(self), self.augmentation.padding
        down, right = torch.randint(2 * padding + 1, (2, count), generator=generator).to(device)
        flip = torch.rand(count, generator=generator).to(device) < self.augmentation.hflip

        # The mirror image of a crop is the opposite crop of the mirror image.
        right = torch.where(flip, 2 * padding - right, right)

        height, width = self.images.shape[2:]
        rows, columns = self._inside(height, down), self._inside(width, right)
        return flip, down * width + right, rows, columns

    def _inside(self, size: int, offset: Tensor) -> Tensor:
        """Mark with 1 the places of crops that lie inside the image, 0 in the padding."""
        padding = self.augmentation.padding
        padded = torch.nn.functional.pad(self.mean.new_ones(size), (padding, padding))
        return padded.unfold(0, size, 1)[offset]

    def _augment(
        self, images: Tensor, flip: Tensor, first: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Crop images or their mirror images, and normalise them; the padding is 0.

        The padding is never made. All images stand in one line of bytes. A crop is a window of
        this line, of the size of an image, and costs one copy. Places outside the image hold
        neighbours of that row or image, and are set to 0.
        """
        padding, count, width = self.augmentation.padding, len(images), images.shape[3]
        size = images[0].numel()
        margin = images.new_zeros(padding * (width + 1))
        line = torch.cat((margin, images.flatten(), images.flip(3).flatten(), margin))

        first = first + (torch.arange(count, device=first.device) + count * flip) * size
        crops = self._normalise(line.unfold(0, size, 1).index_select(0, first).view_as(images))
        return crops.mul_(rows[:, None, :, None] * columns[:, None, None, :]) if padding else crops


def read_arrays(
    name: str,
    root: str,
    download: bool,
    device: torch.device,
    seed: int,
    augmentation: Augmentation,
) -> tuple[Arrays, Arrays, int]:
    """Read a set of arrays: training images, test images, number of classes.

    Raises:
        MissingData: The set is not on this machine.
        DataError: It is damaged, or its arrays do not fit together.
    """
    images, labels, test_images, test_labels, classes = _read(name, root, download)
    for x, y, split in ((images, labels, "training"), (test_images, test_labels, "test")):
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y) or not len(x):
            raise DataError(
                f"{name} from {root}: {split} images are {x.dtype} {x.shape}, "
                f"labels {y.shape}; not N uint8 images"
            )
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name} from {root}: training images are {images.shape}, "
            f"test images {test_images.shape}"
        )

    mean, std = (value.float().view(-1, 1, 1).to(device) for value in mean_and_std(images))

    def on_device(x: np.ndarray, y: np.ndarray) -> Arrays:
        x = np.ascontiguousarray(x.reshape(*x.shape[:3], -1).transpose(0, 3, 1, 2))
        pixels = torch.from_numpy(x).to(device)
        classes = torch.from_numpy(np.asarray(y, dtype=np.int64)).to(device)
        return Arrays(pixels, classes, mean, std, augmentation, seed)

    return on_device(images, labels), on_device(test_images, test_labels), classes


def _read(name: str, root: str, download: bool) -> Splits:
    try:
        return ARRAYS[name](root, download)
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        TypeError,
        zlib.error,
        BadZipFile,
    ) as error:
        there = Path(root).exists()
        # Only the text of torchvision's error tells that nothing could be fetched.
        offline = isinstance(error, URLError) or "Error downloading" in str(error)

        advice = ""
        if name in DOWNLOADS and not offline:
            advice = "; data.download=true fetches it"
            if there:  # torchvision fetches nothing over an existing file
                advice = "; remove what is damaged there, and data.download=true fetches it"

        missing = offline or not there or "not found" in str(error)
        kind = MissingData if missing else DataError
        raise kind(f"{name} can't be read from {root}: {error}{advice}") from None


def mean_and_std(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel, float64 [C].

    They are exact: computed from counts of the 256 grey levels.
    """
    channels = images.reshape(*images.shape[:3], -1)
    levels = torch.arange(256, dtype=torch.float64)
    counts = np.stack(
        [np.bincount(channels[..., c].ravel(), minlength=256) for c in range(channels.shape[3])]
    )
    shares = torch.from_numpy(counts).double() / channels[..., 0].size
    mean = shares @ levels
    return mean, (shares @ levels**2 - mean**2).clamp(min=0).sqrt() + 1e-6


def read_digits(root: str, download: bool) -> Splits:
    """Read the digits that lie beside this file."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test], 10


def read_npz(root: str, download: bool) -> Splits:
    """Read a file with x_train, y_train, x_test and y_test; x_val and y_val serve as test too."""
    with open(root, "rb") as handle, np.load(handle) as file:
        test = "test" if "x_test" in file else "val"
        images, labels = file["x_train"], file["y_train"]
        test_images, test_labels = file[f"x_{test}"], file[f"y_{test}"]

    for y in (labels, test_labels):
        if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0:
            raise ValueError(
                f"labels are {y.dtype} {y.shape}; "
                "they must be one whole number from 0 for each image"
            )
    classes = int(max(labels.max(), test_labels.max())) + 1
    return images, labels, test_images, test_labels, classes


def torchvision_reader(cls: Callable[..., Any]) -> Reader:
    """Make the reader of one of torchvision's small sets."""

    def read(root: str, download: bool) -> Splits:
        train, test = (cls(root, train=training, download=download) for training in (True, False))
        images, labels, test_images, test_labels = (
            np.asarray(array) for array in (train.data, train.targets, test.data, test.targets)
        )
        return images, labels, test_images, test_labels, len(train.classes)

    return read


ARRAYS: dict[str, Reader] = {
    "digits": read_digits,
    "fashion_mnist": torchvision_reader(torchvision.datasets.FashionMNIST),
    "cifar10": torchvision_reader(torchvision.datasets.CIFAR10),
    "cifar100": torchvision_reader(torchvision.datasets.CIFAR100),
    "npz": read_npz,
}

DOWNLOADS = ("fashion_mnist", "cifar10", "cifar100")
"""Sets that `data.download` fetches."""
