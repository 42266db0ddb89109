"""What a run costs: its data, its steps with all their bookkeeping, its import."""

import contextlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torchvision
from torch.nn import functional as F

from ..data.arrays import Arrays
from ..data.datasets import Data, open_data
from ..training import command as train
from .measure import Measured, Settings, clock

RECIPES = Path(__file__).parents[2] / "recipes"
NUMBERS = itertools.count()


def images(settings: Settings) -> Iterator[Measured]:
    """Images a second: crops, flips and normalisation in batches of arrays, against torchvision's on PIL images."""
    count, draw = 2_000 if settings.quick else 20_000, np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file, labels = f"{folder}/images.npz", np.arange(count) % 10
        np.savez(file, x_train=pixels, y_train=labels, x_test=pixels[:100], y_test=labels[:100])
        augment = {"padding": 4, "hflip": 0.5}
        data = open_data("npz", root=file, batch_size=128, device=settings.device, augment=augment)
    transforms = torchvision.transforms
    chain = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    augmented = transforms.Compose([*chain, transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
    fake = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)
    fake.data, fake.targets, fake.transform, fake.target_transform = (
        pixels,
        labels.tolist(),
        augmented,
        None,
    )
    loader = torch.utils.data.DataLoader(
        fake, 128, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )

    def seconds(batches: Any) -> float:
        began = clock(settings.device)
        for _ in batches:
            pass
        return clock(settings.device) - began

    yield Measured("images of 32 px, crop and flip, an epoch", 5.0, faster=True).take(
        settings.rounds(5), lambda: seconds(data.epoch(0)), lambda: seconds(loader)
    )


def run(settings: Settings) -> Iterator[Measured]:
    """Seconds of the steps of an epoch, as the runner counts them, against a plain dense loop on the same data.

    All that is done at every step is in it, and not what an epoch ends with: metrics, a checkpoint,
    an evaluation.
    """
    count = 6_000 if settings.quick else 30_000
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count) % 10
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/images.npz"
        np.savez(file, x_train=pixels, y_train=labels, x_test=pixels[:500], y_test=labels[:500])
        large = open_data("npz", root=file, batch_size=100, device=settings.device)
        small = open_data("digits", batch_size=32, device=settings.device)
        lenet = [str(RECIPES / "fashion_mnist_lenet300_erk98_set-itop.yaml")]
        lenet += [f"data={{name: npz, root: {file}, batch_size: 100}}", "epochs=2"]
        digits = [str(RECIPES / "quickstart.yaml"), "data.validation=0", "epochs=20"]
        for name, recipe, data in (
            ("LeNet-300-100, 98 %", lenet, large),
            ("quickstart", digits, small),
        ):
            taken = Measured(f"steps of the runner, {name}", 1 / 0.85)
            recipe.append("lr_schedule=null")
            yield taken.take(settings.rounds(5), runner(recipe, folder), plain(data, settings))


def runner(recipe: list[str], folder: str) -> Callable[[], float]:
    """Return what trains a recipe in this process, and returns the seconds of its last epoch."""

    def epoch() -> float:
        out = Path(folder) / f"run{next(NUMBERS)}"
        with contextlib.redirect_stdout(io.StringIO()):
            if train.main([*recipe, "--out", str(out)]):
                raise RuntimeError(f"{recipe[0]} did not train; its message is above")
        first, *_, last, _ = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        return (last["seconds"] - first["seconds"]) / (last["epoch"] - first["epoch"])

    return epoch


def plain(data: Data, settings: Settings) -> Callable[[], float]:
    """Return what trains the dense model for an epoch in the plainest loop, and returns its seconds."""
    size = data.shape[-1]
    model = timm.create_model("lenet300", img_size=size, num_classes=10).to(settings.device)
    arguments: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0005,
    }
    optimizer = torch.optim.SGD(model.parameters(), **arguments)
    arrays = cast(Arrays, data.train)
    images, labels, mean, std = arrays.images, arrays.labels, arrays.mean, arrays.std

    def epoch() -> float:
        began = clock(settings.device)
        order = torch.randperm(len(images), device=settings.device)
        for batch in order[: len(order) // data.batch_size * data.batch_size].split(
            data.batch_size
        ):
            x = (images.index_select(0, batch).float() - mean) / std
            F.cross_entropy(model(x), labels.index_select(0, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return clock(settings.device) - began

    return epoch


def imports(settings: Settings) -> Iterator[Measured]:
    """Milliseconds of `import itop_prune` after `import torch`, in fresh interpreters."""
    code = "import torch, time; t = time.perf_counter(); import itop_prune; print(1e3 * (time.perf_counter() - t))"

    def once() -> float:
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    yield Measured("import itop_prune, after torch", 30.0, unit="ms").take(
        settings.rounds(10), once
    )
