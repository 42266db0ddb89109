"""Small data sets: arrays on the device, augmented in batches.

`digits` is the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0): 1,797 images of 8×8 in 17
grey levels. Every fifth is for testing here.
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

Read = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]
Reader = Callable[[str, bool], Read]


@dataclass(frozen=True)
class Augmentation:
    """Of training images in arrays: a random crop after padding by zeros, and a horizontal flip."""

    padding: int = 0
    """Pixels on every side."""
    hflip: float = 0.0
    """Probability."""

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
    """Of the training images, [C, 1, 1], in grey levels."""
    std: Tensor
    augmentation: Augmentation
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> "Arrays":
        """Return a part of the images."""
        indices = indices.to(self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def load(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Yield normalised images and labels."""
        draws = None if epoch is None or self.augmentation == Augmentation() else self._draw(epoch)
        for indices in batches:
            indices = indices.to(self.images.device)
            images = self.images.index_select(0, indices)
            if draws is None:
                yield self._normalise(images), self.labels[indices]
            else:
                yield (
                    self._augment(images, *(draw.index_select(0, indices) for draw in draws)),
                    self.labels[indices],
                )

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return of each image whether it is flipped, its crop's first byte, and the crop's rows and columns inside."""
        generator, count, padding = (
            seeded(CPU, self.seed, "augment", epoch),
            len(self),
            self.augmentation.padding,
        )
        down, right = torch.randint(2 * padding + 1, (2, count), generator=generator).to(
            self.images.device
        )
        flip = (
            torch.rand(count, generator=generator).to(self.images.device) < self.augmentation.hflip
        )
        right = torch.where(
            flip, 2 * padding - right, right
        )  # a crop's mirror image is the mirror image's other crop
        height, width = self.images.shape[2:]
        rows, columns = (
            torch.nn.functional.pad(self.mean.new_ones(size), (padding, padding)).unfold(
                0, size, 1
            )[offset]
            for size, offset in ((height, down), (width, right))
        )
        return flip, down * width + right, rows, columns

    def _augment(
        self, images: Tensor, flip: Tensor, first: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Return normalised crops of images or of their mirror images, 0 in the padding.

        The padding is never made: where all images stand in one line of bytes, a crop is a window
        of the size of an image, moved on by rows and columns, and costs one copy. Where it leaves
        its image it holds neighbours of that row or image, and these places are set to 0.
        """
        padding, count, width, size = (
            self.augmentation.padding,
            len(images),
            images.shape[3],
            images[0].numel(),
        )
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
    """Read a set of arrays: training images, test images, number of classes."""
    try:
        *arrays, classes = ARRAYS[name](root, download)
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
        # torchvision's sets like MNIST say by their words alone that nothing could be fetched
        offline = isinstance(error, URLError) or "Error downloading" in str(error)
        fetch = "" if name in ("digits", "npz") or offline else "; data.download=true fetches it"
        if fetch and Path(root).exists():  # torchvision fetches nothing over a file that is there
            fetch = "; remove what is damaged there, and data.download=true fetches it"
        kind = (
            MissingData
            if offline or not Path(root).exists() or "not found" in str(error)
            else DataError
        )
        raise kind(f"{name} can't be read from {root}: {error}{fetch}") from None
    images, labels, test_images, test_labels = arrays
    for x, y, split in ((images, labels, "training"), (test_images, test_labels, "test")):
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y) or not len(x):
            raise DataError(
                f"{name} from {root}: {split} images are {x.dtype} {x.shape}, labels {y.shape}; not N uint8 images"
            )
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name} from {root}: training images are {images.shape}, test images {test_images.shape}"
        )
    center, scale = (value.float().view(-1, 1, 1).to(device) for value in mean_and_std(images))

    def arrays_of(x: np.ndarray, y: np.ndarray) -> Arrays:
        x = np.ascontiguousarray(x.reshape(*x.shape[:3], -1).transpose(0, 3, 1, 2))
        tensors = (
            torch.from_numpy(x).to(device),
            torch.from_numpy(np.asarray(y, dtype=np.int64)).to(device),
        )
        return Arrays(*tensors, center, scale, augmentation, seed)

    return arrays_of(images, labels), arrays_of(test_images, test_labels), classes


def mean_and_std(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, float64 [C], exact: from counts of the 256 grey levels."""
    channels = images.reshape(*images.shape[:3], -1)
    levels = torch.arange(256, dtype=torch.float64)
    counts = np.stack(
        [np.bincount(channels[..., c].ravel(), minlength=256) for c in range(channels.shape[3])]
    )
    shares = torch.from_numpy(counts).double() / channels[..., 0].size
    mean = shares @ levels
    return mean, (shares @ levels**2 - mean**2).clamp(min=0).sqrt() + 1e-6


def read_digits(root: str, download: bool) -> Read:
    """Read the digits that lie beside this file."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(images)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test], 10


def read_npz(root: str, download: bool) -> Read:
    """Read a file of arrays."""
    with open(root, "rb") as handle, np.load(handle) as file:
        test = "test" if "x_test" in file else "val"
        images, labels, *rest = (
            file[name] for name in ("x_train", "y_train", f"x_{test}", f"y_{test}")
        )
    for y in (labels, rest[1]):
        if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0:
            raise ValueError(
                f"labels are {y.dtype} {y.shape}; they must be one whole number from 0 for each image"
            )
    return images, labels, rest[0], rest[1], int(max(labels.max(), rest[1].max())) + 1


def torchvision_reader(cls: Callable[..., Any]) -> Reader:
    """Return the reader of one of torchvision's small sets."""

    def read(root: str, download: bool) -> Read:
        train, test = (cls(root, train=training, download=download) for training in (True, False))
        images, labels, *rest = (
            np.asarray(a) for a in (train.data, train.targets, test.data, test.targets)
        )
        return images, labels, rest[0], rest[1], len(train.classes)

    return read


ARRAYS: dict[str, Reader] = {
    "digits": read_digits,
    "fashion_mnist": torchvision_reader(torchvision.datasets.FashionMNIST),
    "cifar10": torchvision_reader(torchvision.datasets.CIFAR10),
    "cifar100": torchvision_reader(torchvision.datasets.CIFAR100),
    "npz": read_npz,
}
