"""What masks cost in memory, between updates and during one."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import itop_prune
from itop_prune.kernels import runtime
from itop_prune.layers.sparse_handle import Storage

from ..models import registration  # noqa: F401  (registers ResNet-34 with timm)
from .measure import CPU, Measured, Settings, gpu_bytes, peak_bytes
from .steps import Training
from .updates import Updates


def mlp(*sizes: int) -> nn.Sequential:
    """Build linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (functools.partial(mlp, 784, 1568, 1568, 1568, 10), (8, 784)),
    "vit-small": (lambda: timm.create_model("vit_small_patch16_224"), (1, 3, 224, 224)),
}


def live_bytes(device: torch.device) -> int:
    """Count the bytes of all tensors of a device that are alive."""
    gc.collect()
    if device.type == "cuda":
        return gpu_bytes("current")

    storages = {}
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, nn.Parameter) or thing.device != device:
            continue
        with contextlib.suppress(RuntimeError):  # sparse, or of a compiler
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(settings: Settings) -> Iterator[Measured]:
    """Measure the bytes that masks take beside those of dense training, and those of an update."""
    train(None, settings)  # the caches of the libraries then belong to neither
    before = live_bytes(settings.device)
    training = train(None, settings)
    dense = live_bytes(settings.device) - before
    del training

    before = live_bytes(settings.device)
    training = train(0.9, settings)
    masked = live_bytes(settings.device) - before
    weights = itop_prune.summarize(training.model).weights
    between = [(masked - dense) / weights]
    yield Measured("memory between updates, resnet18", 1.13, unit="B per weight", ours=between)
    del training

    yield from storages(settings)
    yield from blocks(settings)
    yield convolutions(settings)

    layers, size = 12, 1000
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    ours = Updates(model, 0.9, settings.device)
    ours.update()  # after the first one the optimizer and the scheduler hold all their state
    ours.prepare()
    during = [peak_bytes(ours.regrow.step, settings.device) / (4 * size * size)]
    yield Measured(f"memory of an update, {layers} equal layers", 3.0, unit="layers", ours=during)


def storages(settings: Settings) -> Iterator[Measured]:
    """Measure all that sparse training keeps of the weights, beside dense training.

    It counts weights, gradients, optimizer statistics, positions and the bits of R_s, after an
    update. The targets allow 1.3 times the density, 0.4 % for biases and norms, and a bit a weight
    for R_s.
    """
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        "AdamW": torch.optim.AdamW,
    }
    for network, (build, shape) in NETWORKS.items():
        for name, optimizer in optimizers.items():
            dense = kept_bytes(build, shape, optimizer, None, settings)
            dense_bytes = 4 * (3 if name == "SGD" else 4)  # weight, gradient, statistics
            for sparsity in (0.9, 0.98):
                target = round(1.3 * (1.0 - sparsity) + 0.004 + 0.125 / dense_bytes, 4)
                ours = kept_bytes(build, shape, optimizer, sparsity, settings)
                title = f"kept in training, {network}, {name}, {sparsity:.0%}, sparse storage"
                yield Measured(title, target, unit="B", ours=[ours], other=[dense])


BLOCKS = 24
ALL_DENSE, ALL_MASKED = 16.5, 18.5
"""Bytes a weight that AdamW takes, a little more than its four numbers; a byte of a mask, R_s."""


def blocks(settings: Settings) -> Iterator[Measured]:
    """Measure the most bytes that a step holds, of 24 equal blocks of a transformer with AdamW.

    All layers compute with their dense weights, one after the other, as on a GPU. The input is one
    token, so activations take next to nothing. The step with an update by gradient has one
    backward; it may take 16 bytes more for an active weight, and four tensors of the largest layer.
    """
    wanted: list[tuple[str, float | None, Storage, str, float]] = [
        ("dense", None, "mask", "", ALL_DENSE),
        ("90 %, masks", 0.9, "mask", "random", ALL_MASKED),
        ("90 %, sparse storage", 0.9, "sparse", "random", 2.4),
        ("90 %, sparse storage, update by gradient", 0.9, "sparse", "gradient", 4.1),
        ("98 %, masks", 0.98, "mask", "random", ALL_MASKED),
        ("98 %, sparse storage", 0.98, "sparse", "random", 0.7),
        ("98 %, sparse storage, update by gradient", 0.98, "sparse", "gradient", 1.2),
    ]
    width = 128 if settings.quick else 256
    for name, sparsity, storage, grow, target in wanted:
        with mock.patch.object(runtime, "uses_kernels", return_value=False):
            found = bytes_of_a_step(width, sparsity, storage, grow, settings)
        ours = [found / (BLOCKS * 12 * width**2)]
        title = f"most held in a step, {BLOCKS} blocks, AdamW, {name}"
        yield Measured(title, target, unit="B per weight", ours=ours)


def convolutions(settings: Settings) -> Measured:
    """Measure the most bytes that a step of ResNet-34 holds on a CPU, beside the dense step.

    What kernels need is not among them. That is 24 bytes an active weight for its order, and 3 MB
    a thread for what they pack.
    """
    ours, dense = (bytes_of_a_convolution_step(sparsity, settings) for sparsity in (0.95, None))
    title = "most held in a step, ResNet-34 for CIFAR, 95 %, sparse storage"
    return Measured(title, 1.1, unit="B", ours=[ours], other=[dense])


def bytes_of_a_convolution_step(sparsity: float | None, settings: Settings) -> int:
    """Measure what is alive between two steps, and the most that a step holds beside it."""
    before = live_bytes(CPU)
    model = timm.create_model("cifar_resnet34", num_classes=100)
    model.to(memory_format=torch.channels_last)
    if sparsity:
        itop_prune.apply(model, sparsity, storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(16 if settings.quick else 64, 3, 32, 32)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return live_bytes(CPU) - before + peak_bytes(step)


def bytes_of_a_step(
    width: int, sparsity: float | None, storage: Storage, grow: str, settings: Settings
) -> int:
    """Measure what is alive between two steps, and the most that a step holds beside it.

    With growth by gradient the step has an update.
    """
    before = live_bytes(settings.device)
    model = nn.Sequential(*(Block(width, 4) for _ in range(BLOCKS))).to(settings.device)
    masks = itop_prune.apply(model, sparsity, storage=storage) if sparsity else {}
    optimizer = torch.optim.AdamW(model.parameters())
    rules: dict[str, Any] = {
        "grow": grow,
        "every": 1 if grow == "gradient" else 33,
        "one_backward": True,
    }
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=99, **rules) if masks else None
    token = torch.randn(1, 1, width, device=settings.device)

    def step() -> None:
        model(token).square().mean().backward()
        optimizer.step()
        if regrow:
            regrow.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return live_bytes(settings.device) - before + peak_bytes(step, settings.device)


def kept_bytes(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    optimizer: Callable[..., torch.optim.Optimizer],
    sparsity: float | None,
    settings: Settings,
) -> int:
    """Train for a step with an update, and count the bytes that are kept for the next one."""
    before = live_bytes(settings.device)
    model = build().to(settings.device)
    masks = itop_prune.apply(model, sparsity, storage="sparse") if sparsity else {}
    built = optimizer(model.parameters())
    regrow = itop_prune.MaskScheduler(masks, built, total_steps=10, every=1) if masks else None
    model(torch.randn(shape, device=settings.device)).square().mean().backward()
    built.step()
    if regrow:
        regrow.step()
    return live_bytes(settings.device) - before


def train(sparsity: float | None, settings: Settings) -> Training:
    """Train a ResNet-18 for three steps."""
    training = Training(timm.create_model("resnet18"), (2, 3, 64, 64), sparsity, settings)
    training.take(3)
    return training
