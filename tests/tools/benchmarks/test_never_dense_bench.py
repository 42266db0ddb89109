"""The benchmark of layers that never were dense, on a small layer; and its picture."""

from pathlib import Path

from itop_prune_tools.benchmarks.command import row_of
from itop_prune_tools.benchmarks.measure import Measured
from itop_prune_tools.benchmarks.never_dense import EXPONENTS, Cost, cost, name_of
from itop_prune_tools.benchmarks.sparse_figure import draw_scale


def test_steps_and_updates_of_a_layer_are_timed() -> None:
    found = cost(20_000, rounds=2)
    assert len(found.step) == len(found.update) == 2
    assert all(0 < seconds < 60 for seconds in (*found.step, *found.update))


def test_the_picture_has_a_point_for_each_number_of_weights(tmp_path: Path) -> None:
    rows = [
        row_of(Measured(name_of(what, exponent), 3.0, unit="ns", ours=[2.0], other=[1.0]))
        for exponent in EXPONENTS
        for what in Cost._fields
    ]
    draw_scale(rows, tmp_path / "scale.svg")
    text = (tmp_path / "scale.svg").read_text()
    assert "One step" in text
    assert "One update" in text
