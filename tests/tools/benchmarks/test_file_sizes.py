"""Files of sparse models against the dense one: their sizes, and loading times in alternation."""

import pytest
import torch
from itop_prune_tools.benchmarks import file_sizes
from itop_prune_tools.benchmarks.measure import Measured, Settings

import itop_prune

QUICK = Settings(quick=True, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def found() -> dict[str, Measured]:
    return {measured.name: measured for measured in file_sizes.files(QUICK, "resnet18")}


def test_shares_are_a_little_more_than_the_values(found: dict[str, Measured]) -> None:
    (fp32,), (fp16,), (dense,) = (row.ours for name, row in found.items() if "file" in name)
    assert 2.0 < fp32 < 3.0
    assert 10.0 < dense < 13.0
    assert 1.0 < fp16 < fp32 - 0.9


def test_loading_is_timed_in_as_many_rounds_as_the_dense_file(found: dict[str, Measured]) -> None:
    rows = [row for name, row in found.items() if "loading" in name]
    assert len(rows) == 3
    assert all(len(row.ours) == len(row.other) == QUICK.rounds(15) for row in rows)


def test_each_round_makes_a_dense_model_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    before = []

    def load(model: torch.nn.Module, path: object) -> None:
        before.append(len(itop_prune.find_masks(model)))
        real(model, path)

    real = itop_prune.load
    monkeypatch.setattr(itop_prune, "load", load)
    next(rows := file_sizes.files(QUICK, "resnet18"))
    next(rows)
    assert before == [0] * (QUICK.rounds(15) + 1)
