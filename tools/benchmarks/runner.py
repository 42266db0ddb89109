"""What a run costs: its data, its steps with all their bookkeeping, its import."""

import contextlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch.nn import functional as F

from ..data.arrays import Arrays
from ..data.datasets import Data, open_data
from ..training import command as train
from .measure import Measured, Settings, seconds

RECIPES = Path(__file__).parents[2] / "recipes"
RUN_NUMBERS = itertools.count()


def random_images(count: int, *shape: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images and labels of ten classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    return pixels, np.arange(count) % 10


def images(settings: Settings) -> Iterator[Measured]:
    """Measure an epoch of cropped and flipped images against torchvision's on PIL images."""
    pixels, labels = random_images(2_000 if settings.quick else 20_000, 32, 32, 3)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/images.npz"
        np.savez(file, x_train=pixels, y_train=labels, x_test=pixels[:100], y_test=labels[:100])
        augment = {"padding": 4, "hflip": 0.5}
        data = open_data("npz", root=file, batch_size=128, device=settings.device, augment=augment)
    loader = torchvision_loader(pixels, labels)

    def read(batches: Iterable[object]) -> None:
        for _ in batches:
            pass

    yield Measured("images of 32 px, crop and flip, an epoch", 5.0, faster=True).take(
        settings.rounds(5),
        lambda: seconds(lambda: read(data.epoch(0)), settings.device),
        lambda: seconds(lambda: read(loader), settings.device),
    )


def torchvision_loader(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64]
) -> torch.utils.data.DataLoader[object]:
    """Build the usual loader: torchvision's CIFAR-10 and its transforms, with two workers."""
    transforms = torchvision.transforms
    augmented = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    # Its constructor wants the files of CIFAR-10; these images take their place.
    dataset = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)
    dataset.data, dataset.targets = pixels, labels.tolist()
    dataset.transform, dataset.target_transform = augmented, None
    return torch.utils.data.DataLoader(
        dataset, 128, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )


def run(settings: Settings) -> Iterator[Measured]:
    """Measure the steps of an epoch in the runner against a plain dense loop on the same data.

    The bookkeeping of every step is in it. Metrics, checkpoint and evaluation at the end of an
    epoch are not.
    """
    pixels, labels = random_images(6_000 if settings.quick else 30_000, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/images.npz"
        np.savez(file, x_train=pixels, y_train=labels, x_test=pixels[:500], y_test=labels[:500])
        lenet = [
            str(RECIPES / "fashion_mnist_lenet300_erk98_set-itop.yaml"),
            f"data={{name: npz, root: {file}, batch_size: 100}}",
            "epochs=2",
        ]
        digits = [str(RECIPES / "quickstart.yaml"), "data.validation=0", "epochs=20"]
        large = open_data("npz", root=file, batch_size=100, device=settings.device)
        small = open_data("digits", batch_size=32, device=settings.device)

        for name, recipe, data in (
            ("LeNet-300-100, 98 %", lenet, large),
            ("quickstart", digits, small),
        ):
            ours = runner([*recipe, "lr_schedule=null"], folder)
            yield Measured(f"steps of the runner, {name}", 1 / 0.85).take(
                settings.rounds(5), ours, plain_loop(data, settings.device)
            )


def runner(recipe: list[str], folder: str) -> Callable[[], float]:
    """Build a function that trains a recipe and returns the seconds of an epoch but the first."""

    def epoch() -> float:
        out = Path(folder) / f"run{next(RUN_NUMBERS)}"
        with contextlib.redirect_stdout(io.StringIO()):
            status = train.main([*recipe, "--out", str(out)])
        if status != 0:
            raise RuntimeError(f"{recipe[0]} did not train; its message is above")

        metrics = (out / "metrics.jsonl").read_text().splitlines()
        first, *_, last, _ = [json.loads(line) for line in metrics]
        return (last["seconds"] - first["seconds"]) / (last["epoch"] - first["epoch"])

    return epoch


def plain_loop(data: Data, device: torch.device) -> Callable[[], float]:
    """Build a function that trains the dense model in the plainest loop and returns the seconds."""
    model = timm.create_model("lenet300", img_size=data.shape[-1], num_classes=10).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005
    )
    arrays = cast(Arrays, data.train)
    images, labels, mean, std = arrays.images, arrays.labels, arrays.mean, arrays.std

    def epoch() -> None:
        order = torch.randperm(len(images), device=device)
        whole_batches = len(order) // data.batch_size * data.batch_size
        for batch in order[:whole_batches].split(data.batch_size):
            x = (images.index_select(0, batch).float() - mean) / std
            F.cross_entropy(model(x), labels.index_select(0, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return lambda: seconds(epoch, device)


def imports(settings: Settings) -> Iterator[Measured]:
    """Measure the milliseconds of `import itop_prune` after torch's, in fresh interpreters."""
    code = """
import torch, time
began = time.perf_counter()
import itop_prune
print(1e3 * (time.perf_counter() - began))
"""

    def once() -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    yield Measured("import itop_prune, after torch", 150.0, unit="ms").take(
        settings.rounds(10), once
    )
