"""Several seeds of one recipe by one command: each the run that it would be alone, and their mean and spread."""

import itertools
import re
import statistics
from pathlib import Path

import pytest
from helpers.processes import assert_same_end, changed_runner, finished, gloo, metrics, on_ranks
from itop_prune_tools.training import command as train
from itop_prune_tools.training.stop import StopRequest

QUICKSTART = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")


def seeds(folder: Path, count: int, *arguments: str) -> int:
    return train.main(
        [QUICKSTART, "epochs=2", *arguments, "--seeds", str(count), "--out", str(folder)]
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_each_seed_is_the_run_that_it_is_alone(tmp_path):
    assert seeds(tmp_path / "all", 2, "seed=3") == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["seed3", "seed4"]
    for seed in (3, 4):
        assert (
            train.main([QUICKSTART, "epochs=2", f"seed={seed}", "--out", str(tmp_path / f"{seed}")])
            == 0
        )
        assert_same_end(tmp_path / "all" / f"seed{seed}", tmp_path / f"{seed}")
    assert metrics(tmp_path / "3") != metrics(tmp_path / "4")


def test_the_end_is_mean_and_deviation_of_accuracy_and_explored_share(tmp_path, capsys):
    assert seeds(tmp_path / "all", 3) == 0
    lines = [metrics(tmp_path / "all" / f"seed{seed}") for seed in range(3)]
    top1, explored = (
        [each[-1]["test_top1"] for each in lines],
        [each[-2]["exploration_rate"] for each in lines],
    )
    assert last_line(capsys.readouterr().out) == (
        f"3 seeds of all: test top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} %  "
        f"R_s {statistics.mean(explored):.4f} ± {statistics.stdev(explored):.4f}"
    )
    assert statistics.stdev(top1) > 0


def test_other_seeds_of_the_folder_are_not_counted(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1, "seed=7") == 0
    assert last_line(capsys.readouterr().out).startswith("1 seed of all: ")
    assert seeds(tmp_path / "all", 2) == 0
    assert last_line(capsys.readouterr().out).startswith("2 seeds of all: ")


def test_without_out_the_seeds_lie_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "epochs=1", "--seeds", "2"]) == 0
    assert [str(path.parent) for path in sorted(Path().glob("runs/*/*/model.safetensors"))] == [
        "runs/quickstart-epochs=1/seed0",
        "runs/quickstart-epochs=1/seed1",
    ]


@pytest.mark.parametrize("stop_at", [20, 76 + 20])
def test_a_stopped_row_of_seeds_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch, stop_at):
    """76 steps a seed, and six questions whether to stop in the evaluations: in the first or the second."""
    assert seeds(tmp_path / "whole", 3) == 0
    expected = last_line(capsys.readouterr().out).replace("whole", "stopped")
    with monkeypatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(StopRequest, "wanted", lambda self: next(asked) == stop_at)
        assert seeds(tmp_path / "stopped", 3) == 130
    assert "seeds of" not in capsys.readouterr().out
    second = stop_at > 76
    assert (tmp_path / "stopped" / "seed0" / "model.safetensors").exists() == second
    assert not (tmp_path / "stopped" / "seed2").exists()
    assert seeds(tmp_path / "stopped", 3, "--resume") == 0
    out = capsys.readouterr().out
    assert (f"{tmp_path / 'stopped' / 'seed0'} is finished" in out) == second
    assert last_line(out) == expected
    for seed in range(3):
        assert_same_end(tmp_path / "stopped" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")


def test_a_run_that_was_tested_and_did_not_write_its_weights_is_not_finished(tmp_path):
    assert seeds(tmp_path / "all", 1) == 0
    weights = tmp_path / "all" / "seed0" / "model.safetensors"
    weights.unlink()
    assert seeds(tmp_path / "all", 1, "--resume") == 0
    assert weights.exists()


def test_more_seeds_can_be_asked_for_later(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1) == 0
    before = (tmp_path / "all" / "seed0" / "metrics.jsonl").read_text()
    assert seeds(tmp_path / "all", 2, "--resume") == 0
    assert (tmp_path / "all" / "seed0" / "metrics.jsonl").read_text() == before
    assert re.match(
        r"2 seeds of all: test top-1 [\d.]+ ± [\d.]+ %  R_s ", last_line(capsys.readouterr().out)
    )


@gloo
def test_two_ranks_train_several_seeds(tmp_path):
    """With everything on, as processes.py has it: growth by gradient, an average, checkpoints.

    No thread of gloo's is left when the interpreter ends, which it would abort now and then.
    """
    look = "import atexit, torch; atexit.register(lambda: print(f'group left: {torch.distributed.is_initialized()}'))"
    runner = changed_runner(tmp_path / "changed.py", look)
    out = finished(
        on_ranks("epochs=1", "--seeds", "2", "--out", str(tmp_path / "all"), runner=runner)
    )
    assert re.findall("group left: (True|False)", out) == ["False", "False"]
    assert len(re.findall("2 seeds of all: ", out)) == 1
    finished(on_ranks("epochs=1", "seed=1", "--out", str(tmp_path / "one")))
    assert_same_end(tmp_path / "all" / "seed1", tmp_path / "one")
    again = finished(
        on_ranks("epochs=1", "--seeds", "3", "--resume", "--out", str(tmp_path / "all"))
    )
    assert again.count("is finished") == 2
    assert "3 seeds of all: " in last_line(again)


# Bad input


def test_a_run_that_is_there_is_an_error_before_any_training(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1, "seed=1") == 0
    assert seeds(tmp_path / "all", 2) == 1
    assert (
        f"{tmp_path / 'all' / 'seed1'} exists; continue that run with --resume"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "all" / "seed0").exists()


def test_a_run_is_no_folder_of_runs(tmp_path, capsys):
    assert train.main([QUICKSTART, "epochs=1", "--out", str(tmp_path / "one")]) == 0
    assert seeds(tmp_path / "one", 1) == 1
    assert (
        f"{tmp_path / 'one'} is a run itself; several seeds go into a folder that"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "one" / "seed0").exists()


def test_a_finished_run_of_another_recipe_is_not_counted(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1) == 0
    assert seeds(tmp_path / "all", 2, "masks.sparsity=0.9", "--resume") == 1
    assert "seed0 began with another recipe" in capsys.readouterr().err
    assert not (tmp_path / "all" / "seed1").exists()


@pytest.mark.parametrize(
    "arguments", [("--seeds", "0"), ("--seeds", "-1"), ("--seeds", "2", "--evaluate", "x")]
)
def test_a_number_of_seeds_that_makes_no_sense_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit):
        train.main([QUICKSTART, *arguments])
    assert (
        "--seeds is a number from 1, and trains; leave it out with --evaluate"
        in capsys.readouterr().err
    )


def test_a_dry_run_of_several_seeds_is_that_of_the_first(capsys):
    assert train.main([QUICKSTART, "--seeds", "3", "--dry-run"]) == 0
    assert "3800 in all" in capsys.readouterr().out
