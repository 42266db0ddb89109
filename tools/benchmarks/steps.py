"""What masks cost in a training step without an update, and what such a step spends its time on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

import itop_prune
from itop_prune.layers.sparse_handle import Storage

from ..models import registration as models  # noqa: F401  (registers LeNet-300-100 with timm)
from .measure import Measured, Settings, seconds
from .updates import Updates

# By model: the shape of a batch, how many times as long a masked step may take, steps in a round.
Steps = dict[str, tuple[tuple[int, ...], float, int]]
CPU_STEPS: Steps = {
    "lenet300": ((128, 1, 28, 28), 1.15, 200),
    "vit_tiny_patch16_224": ((16, 3, 224, 224), 1.02, 1),
    "resnet50": ((32, 3, 128, 128), 1.03, 1),
}
GPU_STEPS: Steps = {"resnet50": ((256, 3, 224, 224), 1.02, 10)}
SGD = functools.partial(torch.optim.SGD, lr=0.001, momentum=0.9)


class Training:
    """Training steps of one model on one batch; on a GPU in bf16 with channels last."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        sparsity: float | None,
        settings: Settings,
        compiled: bool = False,
        storage: Storage = "mask",
        optimizer: Callable[..., torch.optim.Optimizer] = SGD,
        method: str = "ERK",
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = settings.device
        self.precision: Any = contextlib.nullcontext
        if self.device.type == "cuda":
            layout = torch.channels_last
            self.precision = functools.partial(torch.autocast, "cuda", torch.bfloat16)

        self.model = model.to(self.device).to(memory_format=layout).train()
        masks = {}
        if sparsity:
            masks = itop_prune.apply(self.model, sparsity, method=method, storage=storage)
        self.called: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = optimizer(self.model.parameters())
        self.regrow = None
        if masks:
            self.regrow = itop_prune.MaskScheduler(
                masks, self.optimizer, total_steps=10**6, every=10**5
            )
        self.x = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.y = torch.randint(10, shape[:1], device=self.device)

    def take(self, steps: int) -> float:
        """Measure the mean seconds of a step, over so many steps."""

        def train() -> None:
            for _ in range(steps):
                self._step()

        return seconds(train, self.device) / steps

    def _step(self) -> None:
        with self.precision():
            loss = F.cross_entropy(self.called(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        if self.regrow:
            self.regrow.step()
        self.optimizer.zero_grad()


def steps_of(settings: Settings) -> Steps:
    """Choose which models to train on the device; under --quick the first alone."""
    steps = GPU_STEPS if settings.device.type == "cuda" else CPU_STEPS
    if settings.quick:
        first = next(iter(steps))
        return {first: steps[first]}
    return steps


def step(settings: Settings) -> Iterator[Measured]:
    """Measure a masked step without an update against a dense one.

    On a GPU it is measured compiled too, and an update against a step.
    """
    on_gpu = settings.device.type == "cuda"
    for name, (shape, target, steps) in steps_of(settings).items():
        for compiled in (False, True) if on_gpu and not settings.quick else (False,):
            title = f"{name}, batch {shape[0]}, {shape[-1]} px{', compiled' if compiled else ''}"
            model = timm.create_model(name, num_classes=10)
            masked = Training(model, shape, 0.9, settings, compiled)
            model = timm.create_model(name, num_classes=10)
            dense = Training(model, shape, None, settings, compiled)
            masked_step = functools.partial(masked.take, steps)
            dense_step = functools.partial(dense.take, steps)
            yield Measured(f"training step, {title}", target).take(
                settings.rounds(15), masked_step, dense_step
            )

            model = timm.create_model(name, num_classes=10)
            stored = Training(model, shape, 0.9, settings, compiled, "sparse")
            yield Measured(f"training step, {title}, sparse storage", 1.1).take(
                settings.rounds(15), functools.partial(stored.take, steps), dense_step
            )

            if on_gpu:
                ours = Updates(timm.create_model(name), 0.9, settings.device)
                yield Measured(f"update against a step, {title}", 1.0).take(
                    settings.rounds(15), ours.update, masked_step
                )


def profile(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """Find for each model the ten operations that take most of a masked step."""
    device = "device" if settings.device.type == "cuda" else "cpu"
    for name, (shape, _, steps) in steps_of(settings).items():
        training = Training(timm.create_model(name, num_classes=10), shape, 0.9, settings)
        training.take(2)
        with torch.profiler.profile(record_shapes=True) as found:
            training.take(steps)

        own: dict[str, float] = {}
        of_masks = 0.0
        for entry in found.key_averages(group_by_input_shape=True):
            if entry.device_type.name != "CPU":  # a kernel, which its operation has counted
                continue
            own[f"{entry.key} {entry.input_shapes}"] = getattr(entry, f"self_{device}_time_total")
            # A product of equal shapes is one with a mask, whose conversion from bool is within.
            shapes = entry.input_shapes
            if entry.key == "aten::mul" and len(shapes) == 2 and shapes[0] == shapes[1]:
                of_masks += getattr(entry, f"{device}_time_total")

        total = sum(own.values())
        largest = sorted(own, key=own.__getitem__, reverse=True)[:10]
        lines = [f"{own[key] / total:6.1%}  {key}" for key in largest]
        yield name, [*lines, f"{of_masks / total:6.1%}  all products with a mask"]
