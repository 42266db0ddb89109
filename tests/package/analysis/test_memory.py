"""The table of what training keeps: by hand, and as many bytes as are alive."""

import functools
from collections.abc import Callable

import pytest
import timm.optim
import torch
from helpers.toys import mlp
from itop_prune_tools.benchmarks.memory import live_bytes
from torch import nn

import itop_prune
from itop_prune.analysis.memory import memory, statistics_per_weight

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {
    "SGD": (functools.partial(torch.optim.SGD, lr=0.1), 0),
    "momentum": (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
    "AdamW": (torch.optim.AdamW, 2),
    "amsgrad": (functools.partial(torch.optim.Adam, amsgrad=True), 3),
    "Lion": (timm.optim.Lion, 1),
}


def test_the_table_of_a_small_model_by_hand() -> None:
    """560 weights, of which 56 are active, and 32 biases."""
    model = mlp()
    itop_prune.apply(model, 0.9, storage="sparse")
    optimizer = torch.optim.AdamW(model.parameters())
    found = itop_prune.summarize(model, optimizer=optimizer).memory
    assert found is not None
    assert found.rows == {
        "weights": (2240, 2240, 224),
        "gradients": (2240, 2240, 224),
        "optimizer state": (4480, 4480, 448),
        "masks, positions": (0, 560, 224),
        "explored weights": (0, 70, 70),
        "all of other parameters": (512, 512, 512),
    }
    assert found.totals == (9472, 10102, 1702)
    assert str(found).splitlines()[-1].split() == ["total", "9.47", "kB", "10.1", "kB", "1.7", "kB"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_of_an_optimizer_are_known_before_and_after_its_first_step(name: str) -> None:
    build, expected = OPTIMIZERS[name]
    model = mlp()
    masks = itop_prune.apply(model, 0.9)
    optimizer = build(model.parameters())
    assert statistics_per_weight(optimizer, masks) == expected
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
    assert statistics_per_weight(optimizer, masks) == expected


def test_an_optimizer_that_can_not_be_tried_gives_no_table() -> None:
    class Wants(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise RuntimeError("give me a closure")

    model = mlp()
    masks = itop_prune.apply(model, 0.9)
    assert memory(masks, Wants(model.parameters(), lr=0.1)) is None
    summary = itop_prune.summarize(model, optimizer=Wants(model.parameters(), lr=0.1))
    assert "memory" not in str(summary)


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_so_many_bytes_are_alive_after_a_step(storage: str) -> None:
    """But for 64 bytes a tensor, such as the counts of steps."""
    before = live_bytes(CPU)
    model = nn.Sequential(nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 1000))
    masks = itop_prune.apply(model, 0.9, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters())
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=9, every=3)
    model(torch.randn(2, 1000)).square().mean().backward()
    optimizer.step()
    regrow.step()
    alive = live_bytes(CPU) - before
    found = itop_prune.summarize(model, optimizer=optimizer).memory
    assert found is not None
    expected = found.totals[("dense", "mask", "sparse").index(storage)]
    assert alive == pytest.approx(expected, rel=0.01)
