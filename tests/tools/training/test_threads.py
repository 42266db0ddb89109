"""A small model takes one thread on a CPU, a large one all that torch has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import QUICKSTART
from itop_prune_tools.training import command as train
from itop_prune_tools.training.threads import limit_threads


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("operations", "threads"), [(0, 1), (9.9e7, 1), (2.9e8, 2), (1e12, 4)])
def test_threads_follow_the_work_and_are_never_more_than_before(
    operations: float, threads: int
) -> None:
    limit_threads(operations)
    assert torch.get_num_threads() == threads


def test_the_quickstart_takes_one_thread(tmp_path: Path) -> None:
    assert train.main([QUICKSTART, "epochs=1", "--out", str(tmp_path / "run")]) == 0
    assert torch.get_num_threads() == 1
