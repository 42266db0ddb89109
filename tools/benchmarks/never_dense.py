"""Layers that never were dense: seconds of a step and of an update for an active weight."""

import gc
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

import itop_prune

from .measure import Measured, Settings, seconds

INPUTS = 10
"""Active weights of an output, and of an input."""
ROWS = 16
EXPONENTS = (5, 6, 7, 8)


class Cost(NamedTuple):
    """Seconds of one layer."""

    step: list[float]
    update: list[float]


def scale(settings: Settings) -> Iterator[Measured]:
    """Measure square layers of 10^5 to 10^8 active weights, at ten for an output.

    A weight of the largest may take three times as long as one of the smallest. A step is forward,
    backward and SGD with momentum for 16 rows. An update exchanges three weights of ten by
    magnitude and at random, and the next step sorts them for the kernels; it counts both.
    """
    first: Cost | None = None
    for exponent in EXPONENTS[:3] if settings.quick else EXPONENTS:
        active = 10**exponent
        found = cost(active, 2 if exponent > 7 else 5)
        gc.collect()
        first = first or found
        for what in Cost._fields:
            ours = [1e9 * t / active for t in getattr(found, what)]
            smallest = 1e9 * statistics.median(getattr(first, what)) / 10 ** EXPONENTS[0]
            yield Measured(
                name_of(what, exponent), 3.0, unit="ns", ours=ours, other=[smallest] * len(ours)
            )


def name_of(what: str, exponent: int) -> str:
    """Name a row."""
    return f"{what} for an active weight, 10^{exponent}"


def cost(active: int, rounds: int) -> Cost:
    """Train one layer that never was dense, and time its steps and updates."""
    width = active // INPUTS
    with torch.device("meta"):
        layer = nn.Linear(width, width, bias=False)
    masks = itop_prune.apply(
        layer, 1.0 - active / width**2, storage="sparse", device="cpu", init="fan_in"
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    every = 3
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=10**6, every=every, rate=0.3, explored_bytes=1 << 26
    )
    x = torch.randn(ROWS, width, requires_grad=True)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    found, moving = Cost([], []), 0.0
    for _ in range(rounds + 1):
        sorting = seconds(step)
        regrow.step()
        plain = seconds(step)
        regrow.step()
        step()
        found.step.append(plain)
        found.update.append(moving + max(0.0, sorting - plain))
        moving = seconds(regrow.step)
    return Cost(found.step[1:], found.update[1:])  # the first compiles
