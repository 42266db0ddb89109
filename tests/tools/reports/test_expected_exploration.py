"""The R_s that random growth should reach, against that of a run."""

import re
from pathlib import Path

import pytest
from helpers.reported_runs import train
from itop_prune_tools.reports import expected_exploration as expected


@pytest.mark.parametrize("rates", [[], [0.3], [0.5, 0.25, 0.1]])
def test_a_layer_is_explored_no_further_than_it_has_grown(rates: list[float]) -> None:
    assert 0.1 <= expected.explored(0.1, rates) + 1e-12 <= 0.1 * (1 + sum(rates)) + 2e-12
    assert expected.explored(1.0, [*rates, 0.0]) == 1.0


def test_an_update_finds_its_share_of_what_was_never_active() -> None:
    """Of 100 weights 90 were never active. One leaves: of the 91 inactive ones one grows."""
    assert expected.explored(0.1, [0.1]) == pytest.approx((10 + 90 / 91) / 100)


@pytest.mark.slow
def test_a_run_has_explored_what_is_expected(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = made["without validation"]  # it grows at random
    assert expected.main([str(run.parent)]) == 0
    form = r"(.*): R_s (0\.\d{4}) after 12 updates, 88 steps; expected (0\.\d{4}) \([+-]\d\.\d\d%\)"
    match = re.fullmatch(form, capsys.readouterr().out.strip())
    assert match
    assert match[1] == str(run)
    assert float(match[2]) == pytest.approx(float(match[3]), rel=0.02)  # of 50,200 weights


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("moving", "does not grow at random"),
        ("static", "has made no update"),
        ("dense", "has made no update"),
    ],
)
def test_runs_that_the_formula_is_not_for_are_left_out(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str], kind: str, why: str
) -> None:
    assert expected.main([str(made[kind])]) == 1
    assert capsys.readouterr().err.startswith(f"left out: {made[kind]} {why}")


def test_a_run_whose_density_changes_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    regrow = "regrow={every: 5, density: cubic, final_sparsity: 0.9}"
    assert train(tmp_path / "run", "epochs=1", "masks.sparsity=0.5", regrow) == 0
    assert expected.main([str(tmp_path / "run")]) == 1
    assert "does not grow at random at constant density" in capsys.readouterr().err


def test_a_folder_without_a_run_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"left out: {tmp_path} holds no run: no recipe.yaml")
