"""The command line of the runner: folders, dry runs, evaluation, launchers, and one clear error."""

import signal
import sys
from pathlib import Path

import itop_prune_tools
import pytest
from helpers.processes import (
    QUICKSTART,
    ROOT,
    assert_same_end,
    finished,
    gloo,
    metrics,
    output_of,
    start,
    stopped_at,
    wait_for,
)
from itop_prune_tools.training import command as train

SHORT = ("epochs=2", "checkpoint={every: 1}")
RIGL = "regrow={every: 7, grow: gradient}"


def run(folder: Path, *arguments: str) -> int:
    return train.main([QUICKSTART, *SHORT, *arguments, "--out", str(folder)])


# The folder of a run


def test_without_out_the_run_lies_under_runs_by_recipe_override_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "epochs=1", "seed=3"]) == 0
    assert (tmp_path / "runs" / "quickstart-epochs=1" / "seed3" / "metrics.jsonl").exists()


def test_a_run_folder_that_exists_is_an_error_that_offers_resume_and_out(tmp_path, capsys):
    run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--out" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before

    assert run(tmp_path / "run", "masks.sparsity=0.9", "--resume") == 1
    assert "masks: was {'sparsity': 0.95" in capsys.readouterr().err


# Dry runs


def test_a_dry_run_prints_layers_and_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.weight" in out
    assert "100 epochs of 38 steps, 3800 in all" in out
    assert "76 updates of the masks, after steps 50, 100, 150, ..., 3800" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_when_the_masks_would_never_move(capsys):
    assert train.main([QUICKSTART, "regrow.every=4000", "--dry-run"]) == 0
    never = "no update of the masks: regrow.every is 4000, and the run has 3800 steps; lower"
    assert never in capsys.readouterr().out


def test_a_dry_run_of_data_that_do_not_fit_is_an_error(capsys):
    assert train.main([QUICKSTART, "data.validation=2000", "--dry-run"]) == 1
    problem = "error: data.validation is 2000, and there are 1438 training images"
    assert problem in capsys.readouterr().err


def test_a_dry_run_without_its_data_prints_layers_and_is_an_error(tmp_path, capsys):
    missing = tmp_path / "none"
    folder = f"data={{name: folder, root: {missing}, batch_size: 32}}"
    for data in (folder, f"data={{name: npz, root: {missing}, batch_size: 32, download: true}}"):
        assert train.main([QUICKSTART, data, "--dry-run"]) == 1
        out, err = capsys.readouterr()
        assert "layers.0.weight" in out
        assert err.startswith("error: ")
        assert str(missing) in err


def test_a_dry_run_of_data_that_the_run_will_download_says_so_and_downloads_nothing(
    tmp_path, capsys
):
    missing = tmp_path / "none"
    data = f"data={{name: fashion_mnist, root: {missing}, batch_size: 32, download: true}}"
    assert train.main([QUICKSTART, data, "model.img_size=28", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert f"fashion_mnist is not in {missing} and the run will download it" in out
    assert (err, missing.exists()) == ("", False)


# Evaluation


def evaluated(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert train.main([*arguments]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    "overrides", [(), ("ema={decay: 0.99}",), ("masks=null", "regrow=null")], ids=str
)
def test_evaluate_prints_the_test_numbers_of_the_run(tmp_path, capsys, overrides):
    run(tmp_path, *overrides)
    expected = metrics(tmp_path)[-1]
    for path in (tmp_path, *tmp_path.glob("*.safetensors"), *tmp_path.glob("checkpoints/step*76")):
        assert evaluated(capsys, QUICKSTART, *overrides, "--evaluate", str(path)) == [
            "test_loss",
            f"{expected['test_loss']:.4f}",
            "test_top1",
            f"{expected['test_top1']:.4f}",
        ]


def test_evaluate_does_not_need_the_weights_that_the_run_began_with(tmp_path, capsys):
    first = tmp_path / "dense" / "model.safetensors"
    run(tmp_path / "dense", "masks=null", "regrow=null")
    run(tmp_path / "run", f"init={first}")
    first.unlink()
    recipe = str(tmp_path / "run" / "recipe.yaml")
    found = evaluated(capsys, recipe, "--evaluate", str(tmp_path / "run"))
    assert found[1] == f"{metrics(tmp_path / 'run')[-1]['test_loss']:.4f}"


def test_evaluate_names_the_seeds_of_a_folder_and_the_checkpoint_of_an_unfinished_run(
    tmp_path, capsys
):
    seeds = [tmp_path / "run" / f"seed{seed}" for seed in (0, 1)]
    with stopped_at(50):
        assert run(seeds[0]) == 130
    run(seeds[1], "seed=1", "epochs=1")
    capsys.readouterr()

    assert train.main([QUICKSTART, "--evaluate", str(tmp_path / "run")]) == 1
    expected = "is a folder of seeds, each with weights of its own; take "
    assert f"run {expected}{seeds[0]}, {seeds[1]}" in capsys.readouterr().err

    assert train.main([QUICKSTART, "--evaluate", str(seeds[0])]) == 1
    checkpoint = seeds[0] / "checkpoints" / "step-000000049"
    expected = f"has not ended; take its last checkpoint, {checkpoint}, or go on with --resume"
    assert expected in capsys.readouterr().err

    assert train.main([QUICKSTART, "--evaluate", str(tmp_path)]) == 1
    assert "allowed are a file of weights, and a folder" in capsys.readouterr().err


# Ctrl-C


@pytest.mark.parametrize("while_it", ["is imported", "runs"])
def test_ctrl_c_ends_a_command_without_a_traceback(while_it, tmp_path, capsys, monkeypatch):
    lines = {
        "is imported": "raise KeyboardInterrupt",
        "runs": "def main():\n    raise KeyboardInterrupt",
    }
    (tmp_path / "slow_command.py").write_text(lines[while_it])
    monkeypatch.setattr(itop_prune_tools, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "itop_prune_tools.slow_command", raising=False)
    assert itop_prune_tools.run_command("slow_command") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


# One clear error


def test_all_mistakes_of_a_command_come_in_one_message(tmp_path, capsys):
    assert run(tmp_path / "run", "masks.sparsity=2", "optimizer.opt=sgdd", "lr=1") == 1
    assert "3 mistakes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("accelerator={mixed_precision: fp12}", "fp12"),
        ("model.pretrained=true", "no pretrained weights"),
        ("augment={padding: -1}", "padding is -1"),
        ("model.num_classes=7", "7 classes, the data have 10"),
    ],
)
def test_an_argument_that_a_call_refuses_is_one_clear_error(tmp_path, capsys, override, reason):
    assert run(tmp_path / "run", override) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_data_are_one_clear_line(tmp_path, capsys):
    data = ("data.name=fashion_mnist", f"data.root={tmp_path / 'none'}", "model.img_size=28")
    assert run(tmp_path / "run", *data) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "none") in line
    assert "data.download=true" in line


# In a process of its own


@pytest.mark.slow
def test_ctrl_c_in_a_pipe_leaves_plain_lines_and_a_checkpoint_that_resume_continues(tmp_path):
    arguments = [QUICKSTART, "epochs=400", "--out", str(tmp_path)]
    process = start([str(ROOT / "tools" / "train.py"), *arguments])
    wait_for(tmp_path / "metrics.jsonl", process, lines=1)
    process.send_signal(signal.SIGINT)
    out = output_of(process)

    assert process.returncode == 130
    assert out.splitlines()[0].startswith("epoch 1/400  loss ")
    assert "the same command with --resume goes on from" in out
    assert "\x1b" not in out
    assert "\r" not in out

    before = len(metrics(tmp_path))
    with stopped_at(60):
        assert train.main([*arguments, "--resume"]) == 130
    epochs = [line["epoch"] for line in metrics(tmp_path)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) > before


@pytest.mark.slow
@gloo
def test_two_processes_train_like_one_and_write_one_run(tmp_path):
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("tools/train.py", QUICKSTART, *SHORT, RIGL, "data.batch_size=16")
    out = finished(start([*ranks, *arguments, "--out", str(tmp_path / "two")]))
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 2
    assert run(tmp_path / "one", RIGL) == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["train_loss"] == pytest.approx(two[0]["train_loss"], rel=1e-4)
    assert one[0]["exploration_rate"] == pytest.approx(two[0]["exploration_rate"], rel=0.02)


@pytest.mark.slow
def test_accelerate_launches_the_runner(tmp_path):
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch")
    arguments = ("tools/train.py", QUICKSTART, *SHORT, "--out", str(tmp_path / "launched"))
    finished(start([*launch, *arguments]))
    assert run(tmp_path / "direct") == 0
    assert_same_end(tmp_path / "launched", tmp_path / "direct")
