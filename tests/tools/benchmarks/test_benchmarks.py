"""The benchmark command: its table says what was found and what is wanted."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from itop_prune_tools.benchmarks import command, steps
from itop_prune_tools.benchmarks.measure import Measured, Settings


def found(settings: Settings) -> Iterator[Measured]:
    yield Measured("twice as fast", 1.5, faster=True, ours=[1.0, 9.0, 1.0], other=[2.0, 2.0, 99.0])
    yield Measured("a tenth slower", 1.05, ours=[1.1], other=[1.0])
    yield Measured("small", 2.0, unit="B", ours=[1.5])


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "BENCHMARKS", {"found": found})


def test_median_ratios_are_written_with_their_targets_and_the_next_table_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    assert command.main(["--json", str(file)]) == 1  # a target is missed
    rows = json.loads(file.read_text())["rows"]
    assert [(row["ratio"], row["target"], row["met"]) for row in rows] == [
        (2.0, "≥ 1.5", True),
        (1.1, "≤ 1.05", False),
        (1.5, "≤ 2 B", True),
    ]
    assert "ratio before" not in capsys.readouterr().out
    command.main(["--against", str(file), "--only", "found"])
    assert "before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "found,lost"], "--only has lost; known are found"),
        (["--against", "nowhere.json"], "is not there; give a file that --json wrote"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here; leave it out"),
    ],
)
def test_unknown_names_missing_files_and_devices_are_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_a_profile_names_ten_operations_and_the_share_of_the_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "CPU_STEPS", {"lenet300": ((8, 1, 28, 28), 1.15, 3)})
    monkeypatch.setenv("COLUMNS", "200")  # the name of a processor may be long
    assert command.main(["--profile"]) == 0
    _, title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("lenet300: ")
    *shares, of_masks = [float(line.split("%")[0]) for line in lines]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0 < of_masks < 100
    assert lines[-1].endswith("all products with a mask")
