"""Files beside the dense one's: shares that no machine changes, and both kinds loaded in turns."""

import pytest
import torch
from itop_prune_tools.benchmarks import file_sizes as bench_files
from itop_prune_tools.benchmarks.measure import Measured, Settings

import itop_prune

QUICK = Settings(quick=True, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def found() -> dict[str, Measured]:
    return {measured.name: measured for measured in bench_files.files(QUICK, "resnet18")}


def test_every_file_has_its_size_and_its_time(found: dict[str, Measured]) -> None:
    kinds = ["98 %, fp32", "98 %, float16", "90 %, fp32"]
    endings = ["file, of the dense one", "loading it"]
    assert [*found] == [f"resnet18, {kind}: {ending}" for kind in kinds for ending in endings]


def test_shares_are_a_little_more_than_the_values(found: dict[str, Measured]) -> None:
    (fp32,), (fp16,), (dense,) = (row.ours for name, row in found.items() if "file" in name)
    assert 2.0 < fp32 < 3.0
    assert 10.0 < dense < 13.0
    assert 1.0 < fp16 < fp32 - 0.9


def test_loading_takes_turns(found: dict[str, Measured]) -> None:
    rows = [row for name, row in found.items() if "loading" in name]
    assert all(len(row.ours) == len(row.other) == QUICK.rounds(15) for row in rows)


def test_each_round_makes_a_dense_model_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    before = []

    def load(model: torch.nn.Module, path: object) -> None:
        before.append(len(itop_prune.find_masks(model)))
        real(model, path)

    real = itop_prune.load
    monkeypatch.setattr(itop_prune, "load", load)
    next(rows := bench_files.files(QUICK, "resnet18"))
    next(rows)
    assert before == [0] * (QUICK.rounds(15) + 1)
