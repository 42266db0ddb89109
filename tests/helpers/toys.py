"""Small models and a small training loop, shared by the tests."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import itop_prune


def mlp(seed: int = 0) -> nn.Sequential:
    """20-16-12-4 with biases: 560 weights in three matrices named 0.weight, 2.weight, 4.weight."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def convnet(seed: int = 0) -> nn.Sequential:
    """Two convolutions, batch norm, a classifier, for images of 3×8×8 and 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def batch(
    step: int, *shape: int, classes: int = 4, size: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, *shape, generator=generator), torch.randint(
        classes, (size,), generator=generator
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regrow: itop_prune.MaskScheduler | None = None,
    *,
    steps: range = range(10),
    shape: tuple[int, ...] = (20,),
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train in the order of the README; `after` is called before the gradients are cleared."""
    losses = []
    for step in steps:
        x, y = batch(step, *shape)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if regrow is not None:
            regrow.step()
        after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
