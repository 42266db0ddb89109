"""What the benchmarks measure with: alternating rounds, and the bytes that a call holds at once."""

import pytest
import torch
from itop_prune_tools.benchmarks import memory, updates
from itop_prune_tools.benchmarks.measure import Measured, Settings, peak_bytes
from torch import Tensor

QUICK = Settings(quick=True, device=torch.device("cpu"))


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    measured = Measured("rounds", 1.0).take(2, lambda: call("ours"), lambda: call("other"))
    assert calls == ["ours", "other"] * 3
    assert (measured.ours, measured.other) == ([3.0, 5.0], [4.0, 6.0])


def nothing() -> None:
    """Allocates nothing."""


def one_after_the_other() -> None:
    """Frees each tensor of 4,000 bytes before the next."""
    for _ in range(5):
        torch.empty(1000)


def at_once() -> list[Tensor]:
    """Holds 5 tensors of 4,000 bytes."""
    return [torch.empty(1000) for _ in range(5)]


def freed_in_between() -> tuple[Tensor, Tensor]:
    """Holds 16,000 and 4,000 bytes at its peak; frees the larger before it takes 8,000 more."""
    large, small = torch.empty(4000), torch.empty(1000)
    del large
    return small, torch.empty(2000)


def within_an_operation() -> Tensor:
    """Holds two inputs, two terms and their sum, each of 4,000 bytes."""
    a, b = torch.ones(1000), torch.ones(1000)
    return (a * b) + (a - b)


def views() -> list[Tensor]:
    """Holds one storage of 4,000 bytes under five names."""
    whole = torch.empty(10, 100)
    return [whole, whole[0], whole.view(-1), whole.t(), whole[:, 3:]]


@pytest.mark.parametrize(
    ("call", "most"),
    [
        (nothing, 0),
        (one_after_the_other, 4_000),
        (at_once, 20_000),
        (freed_in_between, 20_000),
        (within_an_operation, 20_000),
        (views, 4_000),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_the_peak_of_tensors_of_known_size_is_exact(call: object, most: int) -> None:
    kept = torch.empty(10_000)  # what was there before does not count
    assert peak_bytes(call) == most  # type: ignore[arg-type]
    assert kept.numel() == 10_000


def test_the_scratch_memory_of_an_operation_counts() -> None:
    scores = torch.rand(100_000)
    results = 12 * 100_000  # values of four bytes, indices of eight
    assert peak_bytes(lambda: scores.sort()) >= results


def test_both_ways_of_an_update_choose_as_many() -> None:
    mask = (torch.arange(60) % 3 == 0).view(6, 10)
    new = updates.update_by_sorting(mask.float(), torch.randn(6, 10), torch.randn(6, 10), 0.5)
    assert new.sum() == mask.sum()


@pytest.mark.slow
def test_what_masks_sparse_storage_and_an_update_hold() -> None:
    between, *kept, convolutions, during = memory.memory(QUICK)
    kept, blocks = kept[:8], kept[8:]
    assert between.ours[0] <= between.target == 1.13
    assert 1.0 < during.ours[0] <= during.target == 3.0
    assert convolutions.ours[0] <= 1.1 * convolutions.other[0]
    assert len(kept) == 8
    assert len(blocks) == 7
    for line in blocks:
        assert line.ours[0] <= 1.1 * line.target, line.name
    for line in kept:
        share = line.ours[0] / line.other[0]
        assert share < 1.1 * line.target
