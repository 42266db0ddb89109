"""Runs of models that never were dense: they train, stop, resume, and are evaluated."""

from pathlib import Path

import pytest
from helpers.processes import ROOT, assert_same_end, metrics, stopped_at
from itop_prune_tools.training import command as train

RECIPE = str(ROOT / "recipes/digits_mlp-million_erk99.9986_set-itop.yaml")
SMALL = (
    "model.widths=[3000, 3000]",
    "masks.sparsity=0.98",
    "regrow.explored_bytes=100000",
    "epochs=2",
)


def run(folder: Path, *arguments: str) -> int:
    return train.main([RECIPE, *SMALL, *arguments, "--out", str(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never") / "run"
    assert run(folder) == 0
    return folder


def test_it_learns_and_names_its_estimate(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = metrics(whole)
    assert lines[-1]["test_top1"] > 60
    epochs = [line for line in lines if "val_top1" in line]
    assert 0 < epochs[-1]["exploration_error"] < 0.01 < epochs[-1]["exploration_rate"]
    assert epochs[0]["exploration_rate"] < epochs[-1]["exploration_rate"]


@pytest.mark.parametrize("question", [25, 50])
def test_stopped_and_resumed_it_is_the_run_that_never_stopped(
    tmp_path: Path, whole: Path, question: int
) -> None:
    with stopped_at(question):
        assert run(tmp_path) == 130
    assert run(tmp_path, "--resume") == 0
    assert_same_end(tmp_path, whole)


def test_its_weights_are_evaluated_from_both_files(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = metrics(whole)[-1]["test_top1"]
    for file in ("model.safetensors", "sparse.safetensors"):
        capsys.readouterr()
        assert run(whole.parent / "none", "--evaluate", str(whole / file)) == 0
        assert f"test_top1 {expected:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.pretrained=true"],
            "model.checkpoint_path read dense weights",
        ),
        (["masks.storage=mask"], "storage is 'mask', whose weights are dense"),
        (["masks.scores=magnitude", "masks.init=keep"], "scores and patterns look at every weight"),
        (["masks.method=snip"], "snip looks at every weight"),
        (["masks.device=abacus"], "device is 'abacus'"),
        (["model.widths=[200000, 200000]", "masks.sparsity=0.3"], "active weights take"),
    ],
)
def test_recipes_that_need_dense_weights_are_refused(
    tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", *overrides) == 1
    output = capsys.readouterr()
    assert message in output.err + output.out
    assert "Traceback" not in output.err + output.out
