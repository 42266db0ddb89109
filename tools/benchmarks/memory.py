"""What masks cost in memory, between updates and during one."""

import gc
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

import itop_prune

from .measure import Measured, Settings, gpu_bytes, peak_bytes
from .steps import Training
from .updates import Updates


def live_bytes(device: torch.device) -> int:
    """Count the bytes of all tensors that are alive."""
    gc.collect()
    if device.type == "cuda":
        return gpu_bytes("current")

    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
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
    yield Measured("memory between updates, resnet18", 2.0, unit="B per weight", ours=between)
    del training

    layers, size = 12, 1000
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    ours = Updates(model, 0.9, settings.device)
    ours.update()  # after the first one the optimizer and the scheduler hold all their state
    ours.prepare()
    during = [peak_bytes(ours.regrow.step, settings.device) / (4 * size * size)]
    yield Measured(f"memory of an update, {layers} equal layers", 3.0, unit="layers", ours=during)


def train(sparsity: float | None, settings: Settings) -> Training:
    """Train a ResNet-18 for three steps."""
    training = Training(timm.create_model("resnet18"), (2, 3, 64, 64), sparsity, settings)
    training.take(3)
    return training
