"""The commands for a GPU: their recipes are sound, their options are known."""

from pathlib import Path

import pytest
from helpers.processes import ROOT
from itop_prune_tools.benchmarks import command as bench
from itop_prune_tools.checks import gpu_study
from itop_prune_tools.config.recipe import read_recipe
from itop_prune_tools.reports import comparison


def study(*arguments: str) -> list[list[str]]:
    args = gpu_study.parse(["cifar100.npz", "study", *arguments])
    return [command for command, _ in gpu_study.commands(args)]


@pytest.mark.parametrize("dry", [True, False])
def test_its_recipes_are_read_without_a_mistake(dry: bool) -> None:
    trainings = [c for c in study(*(["--dry-run"] if dry else [])) if "tools/train.py" in c]
    assert len(trainings) == 3
    for _, _, recipe, *overrides in trainings:
        last = overrides.index("--dry-run" if dry else "--out")
        read = read_recipe(ROOT / recipe, overrides[:last])
        assert read.compile != dry
        assert read.masks is None or read.masks["storage"] == "sparse"


def test_its_benchmarks_and_its_comparison_know_their_options() -> None:
    (benchmark,) = (c for c in study() if "tools/bench.py" in c)
    benchmark.remove("--device")
    benchmark.remove("cuda")  # refused where there is none
    assert bench.parse(benchmark[2:]).only == ["step", "update", "memory"]
    (compared,) = (c for c in study() if "tools/compare.py" in c)
    options = comparison.parse(compared[2:])
    assert [run.name for run in options.runs] == list(gpu_study.RUNS)
    assert options.picture == Path("study/study.svg").resolve()


def test_a_command_that_fails_does_not_keep_the_others_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    class Done:
        def __init__(self, command: list[str], **_: object) -> None:
            ran.append(command)
            self.returncode = int("resnet34_dense" in " ".join(command))

    monkeypatch.setattr(gpu_study.subprocess, "run", Done)
    assert gpu_study.main(["cifar100.npz", str(tmp_path / "study"), "--dry-run"]) == 1
    assert len(ran) == 3
