"""What masks cost in time, at an update and at any step. Timed are the calls alone, not what prepares them."""

import contextlib
import functools
import gc
import math
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import topology

from ..models import registration as models  # noqa: F401  (registers LeNet-300-100 with timm)
from .measure import Measured, Settings, clock, waits_for_gpu


class Updating:
    """A masked model whose gradients are drawn once: everything is ready for an update by magnitude and gradient."""

    def __init__(self, model: nn.Module, sparsity: float, device: torch.device) -> None:
        self.device, self.model = device, model.to(device)
        self.masks = itop_prune.apply(self.model, sparsity)
        self.gradients = {
            name: torch.randn_like(itop.parameter) for name, itop in self.masks.items()
        }
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9)
        options: dict[str, Any] = {"schedule": "constant", "grow": "gradient"}
        self.regrow = itop_prune.MaskScheduler(
            self.masks, self.optimizer, total_steps=10**6, every=1, **options
        )

    def take_step(self) -> None:
        """Give every weight its gradient, the dense one to who listens, and step."""
        for name, gradient in self.gradients.items():
            owner, _, tensor = name.rpartition(".")
            (getattr(self.model.get_submodule(owner), tensor) * gradient).sum().backward()
        self.optimizer.step()

    def update(self) -> float:
        """Return the seconds of one update."""
        self.take_step()
        began = clock(self.device)
        self.regrow.step()
        taken = clock(self.device) - began
        self.optimizer.zero_grad()
        return taken


def by_sorting(mask: Tensor, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Return a float mask after an update as published code makes it: sort all, ask the device for every count."""
    count = math.ceil(rate * mask.sum().item())
    _, order = torch.sort(torch.where(mask == 0, torch.inf, weight.abs()).flatten())
    new = mask.clone()
    new.view(-1)[order[:count]] = 0.0
    _, order = torch.sort(torch.where(new == 0, gradient.abs(), -1.0).flatten(), descending=True)
    new.view(-1)[order[: int(mask.sum().item() - new.sum().item())]] = 1.0
    return new


class Sorting:
    """The same update over the same layers, the straightforward way: float masks, a layer at a time."""

    def __init__(self, ready: Updating) -> None:
        self.device, self.gradients = ready.device, ready.gradients
        self.weights = {name: itop.weight.clone() for name, itop in ready.masks.items()}
        self.masks = {name: itop.mask.float() for name, itop in ready.masks.items()}
        self.momenta = {name: torch.randn_like(weight) for name, weight in self.weights.items()}

    def update(self) -> float:
        """Return the seconds of one update."""
        began = clock(self.device)
        for name, weight in self.weights.items():
            mask = self.masks[name] = by_sorting(
                self.masks[name], weight, self.gradients[name], 0.5
            )
            weight *= mask
            self.momenta[name] *= mask
        return clock(self.device) - began


def update(settings: Settings) -> Iterator[Measured]:
    """An update of a ResNet-50 at 90 %, as a whole, and its selection alone."""
    name = "resnet18" if settings.quick else "resnet50"
    ready = Updating(timm.create_model(name), 0.9, settings.device)
    simple, rounds = Sorting(ready), settings.rounds(5)
    least = (
        (10.0, 15.0) if settings.device.type == "cpu" else (1.0, 1.0)
    )  # a GPU sorts faster than it is told to
    yield Measured(f"update, {name}, 90 %", least[0], faster=True).take(
        rounds, ready.update, simple.update
    )
    layers = [
        (itop.mask, itop.weight.abs(), ready.gradients[n].abs()) for n, itop in ready.masks.items()
    ]
    counts = [math.ceil(0.5 * itop.active) for itop in ready.masks.values()]

    def ours() -> float:
        began = clock(settings.device)
        for (mask, weight, gradient), count in zip(layers, counts, strict=True):
            topology.prune_and_regrow(mask, weight, gradient, count, count)
        return clock(settings.device) - began

    def sorting() -> float:
        began = clock(settings.device)
        for mask, weight, gradient in floats:
            by_sorting(mask, weight, gradient, 0.5)
        return clock(settings.device) - began

    floats = [(mask.float(), weight, gradient) for mask, weight, gradient in layers]
    yield Measured(f"prune_and_regrow, {name}, 90 %", least[1], faster=True).take(
        rounds, ours, sorting
    )


def scaling(settings: Settings) -> Iterator[Measured]:
    """Updates of more and more weights, in layers of up to 100 million: no more than in proportion to their number."""
    sizes = (1, 10) if settings.quick else (1, 10, 100, 500)
    for millions in sizes:
        layers = [
            nn.Linear(10_000, 100 * min(millions, 100), bias=False)
            for _ in range(max(1, millions // 100))
        ]
        ready = Updating(nn.Sequential(*layers), 0.9, settings.device)
        measured = Measured(
            f"update of {millions} M weights, layers: {len(layers)}", 0.03 * millions
        )
        yield measured.take(2, ready.update)
        del ready, layers
        gc.collect()


class Training:
    """Steps of one model on one batch; on a GPU in bf16 with channels last."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        sparsity: float | None,
        settings: Settings,
        compiled: bool = False,
    ) -> None:
        self.device, self.regrow, gpu = settings.device, None, settings.device.type == "cuda"
        layout = torch.channels_last if gpu else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=layout).train()
        in_bf16 = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        self.precision: Any = in_bf16 if gpu else contextlib.nullcontext
        masks = itop_prune.apply(self.model, sparsity) if sparsity else {}
        self.called: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9)
        if masks:
            self.regrow = itop_prune.MaskScheduler(
                masks, self.optimizer, total_steps=10**6, every=10**5
            )
        self.x = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.y = torch.randint(10, shape[:1], device=self.device)

    def take(self, steps: int) -> float:
        """Return the seconds of one step, on average."""
        began = clock(self.device)
        for _ in range(steps):
            with self.precision():
                loss = F.cross_entropy(self.called(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            if self.regrow:
                self.regrow.step()
            self.optimizer.zero_grad()
        return (clock(self.device) - began) / steps


STEPS: dict[str, tuple[tuple[int, ...], float, int]] = {
    "lenet300": ((128, 1, 28, 28), 1.15, 200),
    "vit_tiny_patch16_224": ((16, 3, 224, 224), 1.02, 1),
    "resnet50": ((32, 3, 128, 128), 1.03, 1),
}
"""By model: shape of a batch, how many times as long a masked step may take, steps in a round."""
GPU_STEPS: dict[str, tuple[tuple[int, ...], float, int]] = {
    "resnet50": ((256, 3, 224, 224), 1.02, 10)
}
"""The same of a GPU."""


def steps_on(device: torch.device) -> dict[str, tuple[tuple[int, ...], float, int]]:
    """Return what is trained on a device."""
    return GPU_STEPS if device.type == "cuda" else STEPS


def step(settings: Settings) -> Iterator[Measured]:
    """A training step without an update, masked against dense; on a GPU also compiled, and an update against a step."""
    gpu = settings.device.type == "cuda"
    for name, (shape, target, steps) in list(steps_on(settings.device).items())[
        : 1 if settings.quick else None
    ]:
        for compiled in (False, True) if gpu and not settings.quick else (False,):
            title = f"{name}, batch {shape[0]}, {shape[-1]} px{', compiled' if compiled else ''}"
            training = (
                Training(
                    timm.create_model(name, num_classes=10), shape, sparsity, settings, compiled
                )
                for sparsity in (0.9, None)
            )
            masked, dense = (functools.partial(one.take, steps) for one in training)
            yield Measured(f"training step, {title}", target).take(
                settings.rounds(15), masked, dense
            )
            if gpu:
                ready = Updating(timm.create_model(name), 0.9, settings.device)
                yield Measured(f"update against a step, {title}", 1.0).take(
                    settings.rounds(15), ready.update, masked
                )


def profile(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """Yield for each model the ten operations that take most of a masked training step, and the product with masks."""
    on = "device" if settings.device.type == "cuda" else "cpu"
    for name, (shape, _, steps) in list(steps_on(settings.device).items())[
        : 1 if settings.quick else None
    ]:
        training = Training(timm.create_model(name, num_classes=10), shape, 0.9, settings)
        training.take(2)
        with torch.profiler.profile(record_shapes=True) as found:
            training.take(steps)
        by_shape = found.key_averages(group_by_input_shape=True)
        entries = [
            entry for entry in by_shape if entry.device_type.name == "CPU"
        ]  # without kernels
        own = {
            f"{entry.key} {entry.input_shapes}": getattr(entry, f"self_{on}_time_total")
            for entry in entries
        }
        total, of_masks = sum(own.values()), 0.0
        for entry in entries:
            one, *others = entry.input_shapes or [None]
            if entry.key == "aten::mul" and others == [one]:  # its mask is converted within
                of_masks += getattr(entry, f"{on}_time_total")
        costly = [
            f"{own[key] / total:6.1%}  {key}"
            for key in sorted(own, key=own.__getitem__, reverse=True)[:10]
        ]
        yield name, [*costly, f"{of_masks / total:6.1%}  all products with a mask"]


def waits(settings: Settings) -> Iterator[Measured]:
    """How often the host waits for the GPU in an update: of few layers as of many."""
    for name in ("resnet18", "resnet50"):
        ready = Updating(timm.create_model(name), 0.9, settings.device)
        ready.update()
        ready.take_step()
        count = waits_for_gpu(ready.regrow.step)
        yield Measured(
            f"waits of an update, {name}, layers: {len(ready.masks)}",
            2.0,
            unit="waits",
            ours=[count],
        )
