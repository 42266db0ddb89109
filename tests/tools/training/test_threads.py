"""A small model takes one thread on a CPU, a large one all that torch has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import QUICKSTART
from itop_prune_tools.training import command as train
from itop_prune_tools.training.evaluation import evaluate
from itop_prune_tools.training.threads import limited_threads


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("operations", "threads"), [(0, 1), (9.9e7, 1), (2.9e8, 2), (1e12, 4)])
def test_threads_follow_the_work_are_never_more_than_before_and_come_back(
    operations: float, threads: int
) -> None:
    with limited_threads(operations):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


def test_the_quickstart_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(*arguments: object) -> object:
        seen.append(torch.get_num_threads())
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("itop_prune_tools.training.loop.evaluate", note)
    assert train.main([QUICKSTART, "epochs=1", "--out", str(tmp_path / "run")]) == 0
    assert set(seen) == {1}
    assert torch.get_num_threads() == 4
