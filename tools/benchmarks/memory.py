"""What masks cost in memory, between updates and during one."""

import gc
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

import itop_prune

from .masks import Training, Updating
from .measure import Measured, Settings, highest, on_gpu


def held(device: torch.device) -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    if device.type == "cuda":
        return on_gpu("current")
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def memory(settings: Settings) -> Iterator[Measured]:
    """Bytes beside those of dense training: between updates, and during one."""
    device = settings.device
    Training(timm.create_model("resnet18"), (2, 3, 64, 64), None, settings).take(
        3
    )  # what libraries keep is in neither
    before = held(device)
    dense = Training(timm.create_model("resnet18"), (2, 3, 64, 64), None, settings)
    dense.take(3)
    between, dense_bytes = (
        Measured("memory between updates, resnet18", 2.0, unit="B per weight"),
        held(device) - before,
    )
    del dense
    before = held(device)
    masked = Training(timm.create_model("resnet18"), (2, 3, 64, 64), 0.9, settings)
    masked.take(3)
    weights = itop_prune.summarize(masked.model).weights
    between.ours.append((held(device) - before - dense_bytes) / weights)
    yield between
    del masked
    layers, size = 12, 1000
    ready = Updating(
        nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))), 0.9, device
    )
    ready.update()
    ready.take_step()
    peak = highest(ready.regrow.step, device)
    yield Measured(
        "memory of an update, 12 equal layers", 3.0, unit="layers", ours=[peak / (4 * size * size)]
    )
