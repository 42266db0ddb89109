"""The recipe runner from the outside: runs, resumes, refuses, evaluates."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from itop_prune_tools.config.recipe import read_recipe
from itop_prune_tools.training import command as train
from itop_prune_tools.training.build import build_model
from itop_prune_tools.training.stop import StopRequest
from PIL import Image
from safetensors.torch import load_file

import itop_prune
from itop_prune.files.state_dicts import read_state

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
RIGL = "regrow={every: 7, grow: gradient}"
AFTER_TRAINING = {
    "epoch",
    "step",
    "train_loss",
    "lr",
    "rate",
    "sparsity",
    "exploration_rate",
    "forward_flops",
}
AFTER_TRAINING |= {"train_flops"}


def run(tmp_path: Path, *arguments: str, out: str = "run") -> int:
    return train.main(
        [QUICKSTART, "epochs=2", "checkpoint={every: 1}", *arguments, "--out", str(tmp_path / out)]
    )


def metrics(tmp_path: Path, out: str = "run", timeless: bool = False) -> list[dict[str, float]]:
    lines = [
        json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    ]
    timed = ("seconds", "images_per_second") if timeless else ()
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def weights(tmp_path: Path, out: str = "run") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / out / "model.safetensors")


def script(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("overrides", "sparsity", "explored_more"),
    [
        (("masks=null", "regrow=null"), 0.0, False),
        (("regrow=null",), 0.95, False),
        ((), 0.95, True),
        ((RIGL,), 0.95, True),
    ],
    ids=["dense", "static", "SET-ITOP", "RigL-ITOP"],
)
def test_every_kind_of_run_ends_at_exactly_its_sparsity(
    tmp_path, overrides, sparsity, explored_more
):
    assert run(tmp_path, *overrides) == 0
    active = round((1 - sparsity) * 50_200)
    lines = metrics(tmp_path)[:-1]
    assert [line["sparsity"] for line in lines] == [(50_200 - active) / 50_200] * 2
    assert (lines[-1]["exploration_rate"] > active / 50_200) == explored_more
    saved = weights(tmp_path)
    masks = [tensor for name, tensor in saved.items() if name.endswith("_mask")]
    assert sum(int(mask.sum()) for mask in masks) == (active if sparsity else 0)
    assert all(
        not saved[name.replace("_mask", "_orig")][~saved[name]].any()
        for name in saved
        if name.endswith("_mask")
    )


def test_a_run_writes_its_recipe_its_metrics_and_weights_that_load(tmp_path):
    assert run(tmp_path) == 0
    first, second, test = metrics(tmp_path)
    assert (
        first.keys()
        == second.keys()
        == AFTER_TRAINING | {"images_per_second", "seconds", "val_loss", "val_top1"}
    )
    assert test.keys() == {"epoch", "step", "test_loss", "test_top1"}
    assert "seed: 0" in (tmp_path / "run" / "recipe.yaml").read_text()
    model = build_model(read(), None, torch.device("cpu"))
    assert len(itop_prune.load(model, tmp_path / "run")) == 3


def read():
    return read_recipe(QUICKSTART)


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path, f"seed={seed}", out=out)
    assert metrics(tmp_path, "a", timeless=True) == metrics(tmp_path, "b", timeless=True)
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            weights(tmp_path, "a").values(), weights(tmp_path, "b").values(), strict=True
        )
    )
    assert metrics(tmp_path, "a", timeless=True) != metrics(tmp_path, "c", timeless=True)


@pytest.mark.parametrize("stop_at", [5, 14, 19, 38, 45])
@pytest.mark.parametrize(
    "overrides",
    [
        (RIGL,),
        ("ema={decay: 0.99}", "regrow.every=5"),
        (
            "ema={decay: 0.9}",
            "clip_grad_norm=1.0",
            "optimizer={opt: adamw, lr: 0.003}",
            "lr_schedule={sched: cosine}",
        ),
        (
            "mixup={mixup_alpha: 0.3}",
            "accelerator={gradient_accumulation_steps: 2}",
            "augment={padding: 1, hflip: 0.5}",
            RIGL,
        ),
    ],
    ids=["RigL", "ema", "ema-clip-adamw", "mixup-accumulation-augment"],
)
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_never_stopped(
    tmp_path, monkeypatch, overrides, stop_at
):
    run(tmp_path, *overrides, out="whole")
    with monkeypatch.context() as patch:
        steps = itertools.count(1)
        patch.setattr(StopRequest, "wanted", lambda self: next(steps) == stop_at)
        stopped = run(tmp_path, *overrides, out="stopped")
    finished_before = "accelerator={gradient_accumulation_steps: 2}" in overrides and stop_at > 38
    assert stopped == (0 if finished_before else 130)
    assert run(tmp_path, *overrides, "--resume", out="stopped") == 0
    assert metrics(tmp_path, "stopped", timeless=True) == metrics(tmp_path, "whole", timeless=True)
    resumed, whole = weights(tmp_path, "stopped"), weights(tmp_path, "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_leaves_a_checkpoint_that_resume_continues(tmp_path):
    arguments = (QUICKSTART, "epochs=400", "--out", str(tmp_path / "run"))
    process = script(*arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in out
    step = int(next((tmp_path / "run" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    resumed = script(*arguments, "--resume")
    while len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) <= step // 38 + 1:
        assert time.monotonic() < deadline
        assert resumed.poll() is None, resumed.communicate()
        time.sleep(0.1)
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=60)
    assert [line["epoch"] for line in metrics(tmp_path)][: step // 38 + 1] == list(
        range(1, step // 38 + 2)
    )


def test_in_a_pipe_there_is_one_plain_line_an_epoch_and_no_control_code(tmp_path):
    process = script(QUICKSTART, "epochs=2", "--out", str(tmp_path / "run"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 2
    assert "\x1b" not in out
    assert "\r" not in out
    assert "layers.0.weight" in out
    assert "R_s" in out


def test_a_run_folder_that_exists_is_an_error_that_offers_resume_and_out(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--out" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resuming_with_another_recipe_is_refused_with_the_difference(tmp_path, capsys):
    run(tmp_path)
    assert run(tmp_path, "masks.sparsity=0.9", "--resume") == 1
    assert "masks: was {'sparsity': 0.95" in capsys.readouterr().err


def test_without_out_the_run_lies_under_runs_by_recipe_override_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "epochs=1", "seed=3"]) == 0
    assert (tmp_path / "runs" / "quickstart-epochs=1" / "seed3" / "metrics.jsonl").exists()


def test_a_dry_run_prints_layers_and_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([QUICKSTART, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.weight" in out
    assert "100 epochs of 38 steps, 3800 in all" in out
    assert "76 updates of the masks, after steps 50, 100, 150, ..., 3800" in out
    assert not list(tmp_path.iterdir())


def test_evaluate_prints_what_the_run_found(tmp_path, capsys):
    run(tmp_path)
    expected = metrics(tmp_path)[-1]
    for path in (
        tmp_path / "run",
        tmp_path / "run" / "model.safetensors",
        tmp_path / "run" / "sparse.safetensors",
        max((tmp_path / "run").glob("checkpoints/step*")),
    ):
        capsys.readouterr()
        assert train.main([QUICKSTART, "--evaluate", str(path)]) == 0
        assert capsys.readouterr().out.split() == [
            *("test_loss", f"{expected['test_loss']:.4f}"),
            *("test_top1", f"{expected['test_top1']:.4f}"),
        ]


@pytest.mark.parametrize("overrides", [(), ("ema={decay: 0.9}",)], ids=["weights", "average"])
def test_a_sparse_run_ends_with_a_small_file_that_holds_the_same(tmp_path, overrides):
    run(tmp_path, *overrides)
    saved, small = weights(tmp_path), read_state(tmp_path / "run" / "sparse.safetensors")
    assert small.keys() == saved.keys()
    assert all(torch.equal(small[name], tensor) for name, tensor in saved.items())
    sizes = [
        (tmp_path / "run" / f"{name}.safetensors").stat().st_size for name in ("sparse", "model")
    ]
    assert sizes[0] < 0.1 * sizes[1]


def test_a_dense_run_has_no_small_file(tmp_path):
    run(tmp_path, "masks=null", "regrow=null")
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == ["model.safetensors"]


def test_evaluate_needs_no_first_weights(tmp_path, capsys):
    first, run = tmp_path / "dense" / "model.safetensors", tmp_path / "run"
    assert (
        train.main(
            [QUICKSTART, "epochs=1", "masks=null", "regrow=null", "--out", str(first.parent)]
        )
        == 0
    )
    assert train.main([QUICKSTART, "epochs=1", f"init={first}", "--out", str(run)]) == 0
    first.unlink()
    capsys.readouterr()
    assert train.main([str(run / "recipe.yaml"), "--evaluate", str(run)]) == 0
    assert f"test_loss {metrics(tmp_path)[-1]['test_loss']:.4f}" in capsys.readouterr().out


def test_evaluate_of_a_checkpoint_with_an_average_tests_the_average(tmp_path, capsys):
    run(tmp_path, "ema={decay: 0.99}")
    capsys.readouterr()
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step*"))
    assert train.main([QUICKSTART, "ema={decay: 0.99}", "--evaluate", str(checkpoint)]) == 0
    assert f"test_loss {metrics(tmp_path)[-1]['test_loss']:.4f}" in capsys.readouterr().out


def test_a_dry_run_of_data_that_do_not_fit_is_an_error(capsys):
    assert train.main([QUICKSTART, "data.validation=2000", "--dry-run"]) == 1
    assert (
        "error: data.validation is 2000, and there are 1438 training images"
        in capsys.readouterr().err
    )


def test_a_dry_run_says_when_the_masks_would_never_move(capsys):
    assert train.main([QUICKSTART, "regrow.every=4000", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "no update of the masks: regrow.every is 4000, and the run has 3800 steps; lower regrow.every"
        in out
    )


def test_a_run_whose_masks_never_move_says_so_and_trains(tmp_path, capsys):
    assert run(tmp_path, "regrow.every=50", "regrow.stop=0.5") == 0
    never = "no update of the masks: regrow.every is 50, and up to regrow.stop, 0.5, the run has 38 steps; lower"
    assert capsys.readouterr().out.count(never) == 1
    *_, last, _ = metrics(tmp_path)
    assert last["exploration_rate"] == round(0.05 * 50_200) / 50_200
    assert run(tmp_path, "regrow.every=38", "regrow.stop=0.5", out="moved") == 0
    assert "no update" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "schedule",
    ["null", "{sched: cosine}", "{sched: constant}", "{sched: multistep, decay_milestones: []}"],
)
def test_an_extended_run_may_have_no_milestones(tmp_path, schedule):
    assert run(tmp_path, "epochs=1", "multiplier=2", f"lr_schedule={schedule}") == 0
    first, second, _ = metrics(tmp_path)
    assert (first["step"], second["step"]) == (38, 76)
    assert (first["lr"] == second["lr"] == 0.1) == ("cosine" not in schedule)


def test_evaluate_takes_a_dense_run_too(tmp_path, capsys):
    dense = ("masks=null", "regrow=null")
    run(tmp_path, *dense)
    capsys.readouterr()
    assert train.main([QUICKSTART, *dense, "--evaluate", str(tmp_path / "run")]) == 0
    assert f"{metrics(tmp_path)[-1]['test_top1']:.4f}" in capsys.readouterr().out


def test_all_mistakes_of_a_command_come_in_one_message(tmp_path, capsys):
    assert run(tmp_path, "masks.sparsity=2", "optimizer.opt=sgdd", "lr=1") == 1
    message = capsys.readouterr().err
    assert "3 mistakes" in message
    assert not (tmp_path / "run").exists()


def test_missing_data_are_one_clear_line(tmp_path, capsys):
    assert (
        run(
            tmp_path,
            "data.name=fashion_mnist",
            f"data.root={tmp_path / 'none'}",
            "model.img_size=28",
        )
        == 1
    )
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert str(tmp_path / "none") in message
    assert "data.download=true" in message


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, capsys, monkeypatch):
    whole_save, saved = torch.save, []

    def save(*arguments, **options):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        whole_save(*arguments, **options)

    monkeypatch.setattr(torch, "save", save)
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert "No space left" in message
    assert "step-000000038 is whole" in message
    monkeypatch.undo()
    assert run(tmp_path, "--resume") == 0


def test_losses_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    tmp_path, capsys, monkeypatch
):
    class Broken(torch.nn.CrossEntropyLoss):
        calls = 0

        def forward(self, *arguments):
            Broken.calls += 1
            return super().forward(*arguments) * (float("nan") if Broken.calls > 50 else 1.0)

    monkeypatch.setattr(torch.nn, "CrossEntropyLoss", Broken)
    with pytest.warns(UserWarning, match="not finite"):
        assert run(tmp_path, "stop_after_bad_losses=6", "regrow.every=5") == 1
    message = capsys.readouterr().err
    assert "not finite for 6 steps" in message or "not finite for 10 steps" in message
    assert "step-000000038" in message


def test_a_model_that_does_not_fit_the_data_is_one_clear_line(tmp_path, capsys):
    assert run(tmp_path, "model.num_classes=7") == 1
    assert "7 classes, the data have 10" in capsys.readouterr().err


def test_init_starts_from_a_dense_checkpoint_and_magnitude_masks_it(tmp_path):
    run(tmp_path, "masks=null", "regrow=null", out="dense")
    checkpoint = tmp_path / "dense" / "model.safetensors"
    assert (
        run(
            tmp_path,
            f"init={checkpoint}",
            "masks.scores=magnitude",
            "optimizer.lr=0.0",
            "regrow=null",
        )
        == 0
    )
    dense, sparse = load_file(checkpoint), weights(tmp_path)
    mask = sparse["head.weight_mask"]
    assert torch.equal(sparse["head.weight_orig"][mask], dense["head.weight"][mask])
    assert dense["head.weight"].abs()[mask].min() >= dense["head.weight"].abs()[~mask].max()


def test_two_processes_train_like_one_and_write_one_run(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [
        str(ROOT / "tools" / "train.py"),
        QUICKSTART,
        "epochs=2",
        "data.batch_size=16",
        RIGL,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("epoch ") for line in done.stdout.splitlines()) == 2
    assert run(tmp_path, RIGL, out="one") == 0
    one, two = (metrics(tmp_path, out) for out in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["train_loss"] == pytest.approx(two[0]["train_loss"], rel=1e-4)
    assert one[0]["exploration_rate"] == pytest.approx(two[0]["exploration_rate"], rel=0.02)


def test_accelerate_launches_the_quickstart(tmp_path):
    arguments = [
        "launch",
        "tools/train.py",
        "recipes/quickstart.yaml",
        "epochs=1",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert run(tmp_path, "epochs=1", "checkpoint={every: 10}", out="direct") == 0
    assert metrics(tmp_path, timeless=True) == metrics(tmp_path, "direct", timeless=True)
    launched, direct = weights(tmp_path), weights(tmp_path, "direct")
    assert all(torch.equal(launched[name], direct[name]) for name in direct)


@pytest.mark.filterwarnings("ignore:the dense gradient of")  # timm's ResNets begin with scales of 0
@pytest.mark.skipif(
    "ITOP_DATA" not in os.environ, reason="needs real images: set ITOP_DATA to a folder of data"
)
def test_the_resnet50_recipe_runs_on_photos(tmp_path):
    photos = Path(os.environ["ITOP_DATA"]) / "imagenet-sample"
    for number, folder in enumerate(sorted(photos.iterdir())[:24]):
        (tmp_path / "photos" / f"{number:02d}").mkdir(parents=True)
        for photo in folder.iterdir():
            (tmp_path / "photos" / f"{number:02d}" / photo.name).symlink_to(photo)
    overrides = (
        f"data.root={tmp_path / 'photos'}",
        "data.train=.",
        "data.test=.",
        "data.batch_size=8",
        "data.workers=1",
    )
    overrides += (
        "data.image_size=64",
        "model.num_classes=24",
        "epochs=1",
        "regrow.every=2",
        "--out",
        str(tmp_path / "run"),
    )
    assert train.main([str(ROOT / "recipes" / "resnet50.yaml"), *overrides]) == 0
    first, test = metrics(tmp_path)
    weights_masked = 25_502_912 - 2048 * 976
    assert first["sparsity"] == (weights_masked - round(0.1 * weights_masked)) / weights_masked
    assert np.isfinite(test["test_loss"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("accelerator={mixed_precision: fp12}", "fp12"),
        ("model.pretrained=true", "no pretrained weights"),
        ("augment={padding: -1}", "padding is -1"),
        ("augment={hflip: 3}", "hflip 3"),
    ],
)
def test_what_a_factory_refuses_is_one_clear_error(tmp_path, capsys, override, reason):
    assert run(tmp_path, override) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_over_a_folder_with_workers_stopped_in_an_epoch_and_resumed_is_the_one_that_never_stopped(
    tmp_path, monkeypatch
):
    generator = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    overrides = (
        "data={name: folder, train: ., test: ., batch_size: 4, image_size: 8, workers: 2}",
        f"data.root={tmp_path / 'photos'}",
        "model={model_name: test_resnet, num_classes: 2}",
        "augment={scale: [0.5, 1.0], hflip: 0.5}",
        "regrow={every: 2, grow: gradient}",
        "epochs=2",
    )
    assert run(tmp_path, *overrides, out="whole") == 0
    with monkeypatch.context() as patch:
        steps = itertools.count(1)
        patch.setattr(StopRequest, "wanted", lambda self: next(steps) == 8)  # of 6 in an epoch
        assert run(tmp_path, *overrides, out="stopped") == 130
    assert run(tmp_path, *overrides, "--resume", out="stopped") == 0
    assert metrics(tmp_path, "stopped", timeless=True) == metrics(tmp_path, "whole", timeless=True)
    resumed, whole = weights(tmp_path, "stopped"), weights(tmp_path, "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
