"""What random growth is expected to explore, beside what a run has explored."""

import re
from pathlib import Path

import pytest
from helpers.processes import QUICKSTART
from itop_prune_tools.reports import expected_exploration as expected
from itop_prune_tools.training import command as train


def run(folder: Path, *overrides: str) -> Path:
    assert (
        train.main([QUICKSTART, "epochs=2", "regrow.every=5", *overrides, "--out", str(folder)])
        == 0
    )
    return folder


@pytest.mark.parametrize("rates", [[], [0.3], [0.5, 0.25, 0.1]])
def test_no_layer_is_explored_beyond_what_has_grown_and_a_dense_one_is_whole(
    rates: list[float],
) -> None:
    assert 0.1 <= expected.explored(0.1, rates) + 1e-12 <= 0.1 * (1 + sum(rates)) + 2e-12
    assert expected.explored(1.0, [*rates, 0.0]) == 1.0


def test_an_update_finds_its_share_of_what_was_never_active() -> None:
    """90 of 100 never active; one of ten leaves, so that 91 are inactive, and the one that grows is one of the 90."""
    assert expected.explored(0.1, [0.1]) == pytest.approx((10 + 90 / 91) / 100)


def test_a_run_has_explored_what_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        run(tmp_path / "all" / f"seed{seed}", f"seed={seed}")
    capsys.readouterr()
    assert expected.main([str(tmp_path / "all")]) == 0
    lines = capsys.readouterr().out.splitlines()
    form = r"(.*): R_s (0\.\d{4}) after 15 updates, 76 steps; expected (0\.\d{4}) \([+-]\d\.\d\d%\)"
    found = [match.groups() for line in lines if (match := re.fullmatch(form, line))]
    assert [folder for folder, _, _ in found] == [
        str(tmp_path / "all" / f"seed{seed}") for seed in (0, 1)
    ]
    assert found[0][2] == found[1][2]
    for _, measured, foretold in found:
        assert float(measured) == pytest.approx(float(foretold), rel=0.02)  # 50,200 weights


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["regrow.grow=gradient"], "does not grow at random"),
        (
            ["masks.sparsity=0.5", "regrow={every: 5, density: cubic, final_sparsity: 0.9}"],
            "at constant density",
        ),
        (["regrow=null"], "has made no update"),
        (["masks=null", "regrow=null"], "has made no update"),
    ],
)
def test_what_the_formula_is_not_for_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], why: str
) -> None:
    assert expected.main([str(run(tmp_path / "run", *overrides))]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"left out: {tmp_path / 'run'} ")
    assert why in error


def test_a_folder_without_a_run_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"left out: {tmp_path} holds no run: no recipe.yaml")
