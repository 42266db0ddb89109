"""Several seeds by one command: each is the run that it is alone; then mean and spread."""

import re
import statistics
from pathlib import Path

import pytest
from helpers.processes import (
    QUICKSTART,
    assert_same_end,
    changed_runner,
    finished,
    gloo,
    metrics,
    on_ranks,
    stopped_at,
)
from itop_prune_tools.training import command as train


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
        alone = tmp_path / f"{seed}"
        assert train.main([QUICKSTART, "epochs=2", f"seed={seed}", "--out", str(alone)]) == 0
        assert_same_end(tmp_path / "all" / f"seed{seed}", alone)
    assert metrics(tmp_path / "3") != metrics(tmp_path / "4")


@pytest.mark.slow
def test_the_last_line_is_mean_and_deviation_of_the_seeds_that_were_asked_for(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1, "seed=7") == 0
    assert last_line(capsys.readouterr().out).startswith("1 seed of all: ")
    assert seeds(tmp_path / "all", 3) == 0
    runs = [metrics(tmp_path / "all" / f"seed{seed}") for seed in range(3)]
    top1 = [lines[-1]["test_top1"] for lines in runs]
    explored = [lines[-2]["exploration_rate"] for lines in runs]
    assert last_line(capsys.readouterr().out) == (
        f"3 seeds of all: test top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} %  "
        f"R_s {statistics.mean(explored):.4f} ± {statistics.stdev(explored):.4f}"
    )
    assert statistics.stdev(top1) > 0


@pytest.mark.slow
def test_without_out_the_seeds_lie_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "epochs=1", "--seeds", "2"]) == 0
    assert [str(path.parent) for path in sorted(Path().glob("runs/*/*/model.safetensors"))] == [
        "runs/quickstart-epochs=1/seed0",
        "runs/quickstart-epochs=1/seed1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("question", [20, 76 + 20], ids=["in the first", "in the second"])
def test_seeds_stopped_in_between_go_on_where_they_stopped(tmp_path, capsys, question):
    """A run asks 82 times whether to stop: after each of 76 steps, and in its evaluations."""
    assert seeds(tmp_path / "whole", 3) == 0
    expected = last_line(capsys.readouterr().out).replace("whole", "stopped")
    with stopped_at(question):
        assert seeds(tmp_path / "stopped", 3) == 130
    assert "seeds of" not in capsys.readouterr().out
    second = question > 76
    assert (tmp_path / "stopped" / "seed0" / "model.safetensors").exists() == second
    assert not (tmp_path / "stopped" / "seed2").exists()

    assert seeds(tmp_path / "stopped", 3, "--resume") == 0
    out = capsys.readouterr().out
    assert (f"{tmp_path / 'stopped' / 'seed0'} is finished" in out) == second
    assert last_line(out) == expected
    for seed in range(3):
        assert_same_end(tmp_path / "stopped" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")


@pytest.mark.slow
def test_resume_keeps_finished_seeds_ends_unfinished_ones_and_adds_new_ones(tmp_path, capsys):
    assert seeds(tmp_path / "all", 2) == 0
    before = (tmp_path / "all" / "seed0" / "metrics.jsonl").read_text()
    weights = tmp_path / "all" / "seed1" / "model.safetensors"
    weights.unlink()  # tested, but killed before it wrote its weights
    assert seeds(tmp_path / "all", 3, "--resume") == 0
    assert (tmp_path / "all" / "seed0" / "metrics.jsonl").read_text() == before
    assert weights.exists()
    assert last_line(capsys.readouterr().out).startswith("3 seeds of all: ")


@pytest.mark.slow
@gloo
def test_two_ranks_train_several_seeds(tmp_path):
    """No process group is left at the end, or a thread of gloo's could abort the interpreter."""
    look = (
        "import atexit, torch\n"
        "left = lambda: print(f'group left: {torch.distributed.is_initialized()}')\n"
        "atexit.register(left)"
    )
    runner = changed_runner(tmp_path / "changed.py", look)
    arguments = ("epochs=1", "--out", str(tmp_path / "all"))
    out = finished(on_ranks(*arguments, "--seeds", "2", runner=runner))
    assert re.findall("group left: (True|False)", out) == ["False", "False"]
    assert len(re.findall("2 seeds of all: ", out)) == 1
    finished(on_ranks("epochs=1", "seed=1", "--out", str(tmp_path / "one")))
    assert_same_end(tmp_path / "all" / "seed1", tmp_path / "one")
    again = finished(on_ranks(*arguments, "--seeds", "3", "--resume"))
    assert again.count("is finished") == 2
    assert "3 seeds of all: " in last_line(again)


# Bad input


def test_a_run_that_exists_is_an_error_before_any_training(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1, "seed=1") == 0
    assert seeds(tmp_path / "all", 2) == 1
    problem = f"{tmp_path / 'all' / 'seed1'} exists; continue that run with --resume"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "all" / "seed0").exists()


def test_a_run_is_no_folder_of_runs(tmp_path, capsys):
    assert train.main([QUICKSTART, "epochs=1", "--out", str(tmp_path / "one")]) == 0
    assert seeds(tmp_path / "one", 1) == 1
    problem = f"{tmp_path / 'one'} is a run itself; several seeds go into a folder that"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "one" / "seed0").exists()


def test_a_finished_run_of_another_recipe_is_refused(tmp_path, capsys):
    assert seeds(tmp_path / "all", 1) == 0
    assert seeds(tmp_path / "all", 2, "masks.sparsity=0.9", "--resume") == 1
    assert "seed0 began with another recipe" in capsys.readouterr().err
    assert not (tmp_path / "all" / "seed1").exists()


@pytest.mark.parametrize("arguments", [("--seeds", "0"), ("--seeds", "2", "--evaluate", "x")])
def test_a_number_of_seeds_that_makes_no_sense_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit):
        train.main([QUICKSTART, *arguments])
    problem = "--seeds is a number from 1, and trains; leave it out with --evaluate"
    assert problem in capsys.readouterr().err


def test_a_dry_run_of_several_seeds_is_that_of_the_first(capsys):
    assert train.main([QUICKSTART, "--seeds", "3", "--dry-run"]) == 0
    assert "3800 in all" in capsys.readouterr().out
