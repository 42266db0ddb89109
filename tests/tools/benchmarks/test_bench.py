"""The benchmarks: the table says what was found and what is wanted; memory, which no machine changes, is measured."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from itop_prune_tools.benchmarks import command as bench
from itop_prune_tools.benchmarks import masks as bench_masks
from itop_prune_tools.benchmarks import memory as bench_memory
from itop_prune_tools.benchmarks.measure import Measured, Settings

from itop_prune import topology

QUICK = Settings(quick=True, device=torch.device("cpu"))


def found(settings: Settings) -> Iterator[Measured]:
    yield Measured("twice as fast", 1.5, faster=True, ours=[1.0, 9.0, 1.0], other=[2.0, 2.0, 99.0])
    yield Measured("a tenth slower", 1.05, ours=[1.1], other=[1.0])
    yield Measured("small", 2.0, unit="B", ours=[1.5])


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"found": found})


def test_medians_become_ratios_and_are_held_against_their_targets() -> None:
    rows = [bench.row_of(measured) for measured in found(QUICK)]
    assert [(row.ratio, row.target, row.met) for row in rows] == [
        (2.0, "≥ 1.5", True),
        (1.1, "≤ 1.05", False),
        (1.5, "≤ 2 B", True),
    ]


def test_the_table_is_written_and_the_next_one_compared_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    assert bench.main(["--json", str(file)]) == 1  # a target is missed
    assert [row["ratio"] for row in json.loads(file.read_text())["rows"]] == [2.0, 1.1, 1.5]
    assert "ratio before" not in capsys.readouterr().out
    bench.main(["--against", str(file), "--only", "found"])
    assert "before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "found,lost"], "--only has lost; known are found"),
        (["--against", "nowhere.json"], "is not there"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--only", "waits"], "--only has waits; known are found"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_rounds_are_taken_in_turns_and_the_first_does_not_count() -> None:
    turns: list[str] = []

    def taker(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    measured = Measured("turns", 1.0).take(2, lambda: taker("ours"), lambda: taker("other"))
    assert turns == ["ours", "other"] * 3
    assert (measured.ours, measured.other) == ([3.0, 5.0], [4.0, 6.0])


def test_both_ways_of_an_update_choose_as_many() -> None:
    mask = (torch.arange(60) % 3 == 0).view(6, 10)
    new = bench_masks.by_sorting(mask.float(), torch.randn(6, 10), torch.randn(6, 10), 0.5)
    assert new.sum() == mask.sum()


@pytest.mark.parametrize(
    ("at_once", "most"), [({"cpu"}, 3.0), (set(), 3.5)], ids=["asks the device", "does not wait"]
)
def test_masks_hold_two_bytes_a_weight_and_an_update_three_of_its_largest_layer(
    at_once: set[str], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        topology, "ANSWERS_AT_ONCE", at_once
    )  # on a CPU `topk` takes more room than on a GPU
    between, during = bench_memory.memory(QUICK)
    assert between.ours[0] <= between.target == 2.0
    assert 1.0 < during.ours[0] <= most
    assert during.target == 3.0


def test_a_profile_names_ten_operations_and_the_share_of_the_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_masks, "STEPS", {"lenet300": ((8, 1, 28, 28), 1.15, 3)})
    assert bench.main(["--profile"]) == 0
    _, title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("lenet300: ")
    *shares, of_masks = [float(line.split("%")[0]) for line in lines]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0 < of_masks < 100
    assert lines[-1].endswith("all products with a mask")
