"""Lines of metrics are appended whole, read up to the first damaged one, and cut on a resume."""

import json
from pathlib import Path

import pytest
from itop_prune_tools.run_folder.metrics import Metrics


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    """Three epochs of ten steps and the line of the test set."""
    found = Metrics(tmp_path)
    for epoch in (1, 2, 3):
        found.append({"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "rate": None})
    found.append({"epoch": 3, "step": 30, "test_loss": 0.1, "test_top1": 99.0})
    return found


def test_metrics_are_one_json_object_a_line(metrics: Metrics) -> None:
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert metrics.path.name == "metrics.jsonl"
    assert [line["step"] for line in lines] == [10, 20, 30, 30]
    assert lines[0] == {"epoch": 1, "step": 10, "train_loss": 1.0, "rate": None}


def test_the_line_of_the_test_set_ends_a_run_and_is_no_epoch(metrics: Metrics) -> None:
    assert metrics.test == {"epoch": 3, "step": 30, "test_loss": 0.1, "test_top1": 99.0}
    assert [line["epoch"] for line in metrics.epochs] == [1, 2, 3]
    assert [line["step"] for line in metrics.cut(2)] == [10, 20]
    assert metrics.test is None
    assert [line["epoch"] for line in metrics.epochs] == [1, 2]


def test_a_run_that_wrote_nothing_has_no_metrics(tmp_path: Path) -> None:
    assert Metrics(tmp_path).read() == Metrics(tmp_path).epochs == []
    assert Metrics(tmp_path).test is None
    assert Metrics(tmp_path).cut(1) == []


def test_the_line_of_the_test_set_is_cut_even_at_the_last_step(metrics: Metrics) -> None:
    assert [line["step"] for line in metrics.cut(3)] == [10, 20, 30]
    assert not any("test_top1" in line for line in metrics.read())


def test_a_half_written_line_is_gone_after_a_cut_and_the_next_stands_alone(
    metrics: Metrics,
) -> None:
    with metrics.path.open("a") as file:
        file.write('{"epoch": 4, "st')
    assert len(metrics.read()) == 4
    metrics.cut(2)
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.jsonl"]
    metrics.append({"epoch": 3, "step": 30})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [
        10,
        20,
        30,
    ]
