"""The training loop: exact sparsity, equal runs for equal seeds, stopped runs that end as whole."""

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import (
    QUICKSTART,
    ROOT,
    assert_same_end,
    metrics,
    of_photos,
    photos,
    stopped_at,
)
from itop_prune_tools.config.recipe import read_recipe
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import command as train
from itop_prune_tools.training.build import build_model
from itop_prune_tools.training.loop import Training
from safetensors.torch import load_file

import itop_prune
from itop_prune.files.state_dicts import read_state

RIGL = "regrow={every: 7, grow: gradient}"
DENSE = ("masks=null", "regrow=null")
MUON = ("optimizer={opt: muon, lr: 0.02}", "lr_schedule=null")  # it moves weights off the mask
TRAINING_METRICS = {
    "epoch",
    "step",
    "train_loss",
    "lr",
    "rate",
    "sparsity",
    "exploration_rate",
    "forward_flops",
    "train_flops",
}


def run(folder: Path, *arguments: str) -> int:
    short = ("epochs=2", "checkpoint={every: 1}")
    return train.main([QUICKSTART, *short, *arguments, "--out", str(folder)])


def test_durations_do_not_follow_a_clock_that_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(2e9, -1000.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with stopped_at(50):
        assert run(tmp_path) == 130
    assert run(tmp_path, "--resume") == 0
    first, second, _ = Metrics(tmp_path).read()
    assert 0 < first["seconds"] < second["seconds"] < 60
    assert min(first["images_per_second"], second["images_per_second"]) > 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "sparsity", "explores"),
    [(DENSE, 0.0, False), (("regrow=null",), 0.95, False), ((), 0.95, True), ((RIGL,), 0.95, True)],
    ids=["dense", "static", "SET-ITOP", "RigL-ITOP"],
)
def test_every_kind_of_run_ends_at_exactly_its_sparsity(tmp_path, overrides, sparsity, explores):
    assert run(tmp_path, *overrides) == 0
    active = round((1 - sparsity) * 50_200)
    lines = metrics(tmp_path)[:-1]
    assert [line["sparsity"] for line in lines] == [(50_200 - active) / 50_200] * 2
    assert (lines[-1]["exploration_rate"] > active / 50_200) == explores

    saved = weights(tmp_path)
    masks = {name: tensor for name, tensor in saved.items() if name.endswith("_mask")}
    assert sum(int(mask.sum()) for mask in masks.values()) == (active if sparsity else 0)
    for name, mask in masks.items():
        assert not saved[name.replace("_mask", "_orig")][~mask].any()


def test_a_run_writes_its_recipe_its_metrics_and_weights_that_load(tmp_path):
    assert run(tmp_path) == 0
    first, second, test = metrics(tmp_path)
    assert first.keys() == second.keys() == TRAINING_METRICS | {"val_loss", "val_top1"}
    assert test.keys() == {"epoch", "step", "test_loss", "test_top1"}
    assert "seed: 0" in (tmp_path / "recipe.yaml").read_text()
    model = build_model(read_recipe(QUICKSTART), None, torch.device("cpu"))
    assert len(itop_prune.load(model, tmp_path)) == 3


@pytest.mark.parametrize("overrides", [(), ("ema={decay: 0.9}",)], ids=["weights", "average"])
def test_a_sparse_run_ends_with_a_small_file_that_holds_the_same(tmp_path, overrides):
    run(tmp_path, *overrides)
    saved, small = weights(tmp_path), read_state(tmp_path / "sparse.safetensors")
    assert small.keys() == saved.keys()
    assert all(torch.equal(small[name], tensor) for name, tensor in saved.items())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("sparse", "model")]
    assert sizes[0] < 0.1 * sizes[1]


@pytest.mark.parametrize("regrow", ["regrow.every=20", "regrow=null"])
def test_the_average_holds_nothing_off_the_mask_after_any_step(tmp_path, monkeypatch, regrow):
    drifted, averaged = [], []

    def after_step(self, moved, plain=Training.after_step):
        plain(self, moved)
        for found, model in ((drifted, self.run.unwrapped_model), (averaged, self.run.ema.module)):
            masks = itop_prune.find_masks(model).values()
            found.append(any(itop.parameter[~itop.mask].any() for itop in masks))

    monkeypatch.setattr(Training, "after_step", after_step)
    run(tmp_path, "epochs=1", "ema={decay: 0.9}", *MUON, regrow)
    assert any(drifted)
    assert averaged == [False] * 38


def test_a_dense_run_has_no_small_file(tmp_path):
    run(tmp_path, *DENSE)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, f"seed={seed}")
    assert_same_end(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_a_run_whose_masks_never_move_says_so_and_trains(tmp_path, capsys):
    assert run(tmp_path, "regrow.every=50", "regrow.stop=0.5") == 0
    never = (
        "no update of the masks: regrow.every is 50, and up to regrow.stop, 0.5, "
        "the run has 38 steps; lower"
    )
    assert capsys.readouterr().out.count(never) == 1
    *_, last, _ = metrics(tmp_path)
    assert last["exploration_rate"] == round(0.05 * 50_200) / 50_200


@pytest.mark.parametrize(
    "schedule", ["null", "{sched: cosine}", "{sched: multistep, decay_milestones: []}"]
)
def test_an_extended_run_may_have_no_milestones(tmp_path, schedule):
    assert run(tmp_path, "epochs=1", "multiplier=2", f"lr_schedule={schedule}") == 0
    first, second, _ = metrics(tmp_path)
    assert (first["step"], second["step"]) == (38, 76)
    assert (first["lr"] == second["lr"] == 0.1) == ("cosine" not in schedule)


# A stopped run, resumed, is the run that never stopped

VARIANTS = {
    "RigL, fan-in": (RIGL, "masks.init=fan_in"),
    "average, clipping, AdamW": (
        "ema={decay: 0.9}",
        "clip_grad_norm=1.0",
        "optimizer={opt: adamw, lr: 0.003}",
        "lr_schedule={sched: cosine}",
        "regrow.every=5",
    ),
    "mixup, accumulation, augmentation": (
        "mixup={mixup_alpha: 0.3}",
        "accelerator={gradient_accumulation_steps: 2}",
        "augment={padding: 1, hflip: 0.5}",
        RIGL,
    ),
}
# 38 steps an epoch, or 19 with accumulation. After each an evaluation of three batches.
STOPS = [5, 19, 38, 39, 45, 79]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, overrides in VARIANTS.items():
        folders[name] = tmp_path_factory.mktemp("whole") / "run"
        assert run(folders[name], *overrides) == 0
    return folders


@pytest.mark.parametrize("question", STOPS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_anywhere_and_resumed_is_the_run_that_never_stopped(
    tmp_path, whole, name, question
):
    with stopped_at(question):
        stopped = run(tmp_path, *VARIANTS[name])
    finished_before = "accumulation" in name and question > 44
    assert stopped == (0 if finished_before else 130)
    assert run(tmp_path, *VARIANTS[name], "--resume") == 0
    assert_same_end(tmp_path, whole[name])


def test_a_run_with_an_average_resumes_where_the_optimizer_moves_weights_off_the_mask(tmp_path):
    overrides = ("epochs=1", "ema={decay: 0.9}", "regrow.every=10", *MUON)
    assert run(tmp_path / "whole", *overrides) == 0
    with stopped_at(9):
        assert run(tmp_path / "stopped", *overrides) == 130
    assert run(tmp_path / "stopped", *overrides, "--resume") == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_over_a_folder_with_workers_resumes_within_an_epoch(tmp_path):
    overrides = (*of_photos(photos(tmp_path / "photos", 24)), "regrow={every: 2, grow: gradient}")
    assert run(tmp_path / "whole", *overrides) == 0
    with stopped_at(8):
        assert run(tmp_path / "stopped", *overrides) == 130
    assert run(tmp_path / "stopped", *overrides, "--resume") == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_folder_with_train_and_val_shows_the_accuracy_of_every_epoch(tmp_path, capsys):
    for part in ("train", "val"):
        photos(tmp_path / "photos" / part, 8)
    data = (
        f"{{name: folder, root: {tmp_path / 'photos'}, batch_size: 4, image_size: 8, workers: 0}}"
    )
    model = "model={model_name: lenet300, img_size: 8, in_chans: 3, num_classes: 2}"
    assert run(tmp_path / "run", f"data={data}", model, "regrow=null") == 0
    first, second, test = metrics(tmp_path / "run")
    assert 0 <= first["val_top1"] <= 100
    assert (second["val_loss"], second["val_top1"]) == (test["test_loss"], test["test_top1"])
    out = capsys.readouterr().out
    assert out.startswith("there is no test set: the final accuracy is that of the images of every")
    assert out.count("val top-1 ") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the dense gradient of")  # timm's ResNets begin with scales of 0
@pytest.mark.skipif(
    "ITOP_DATA" not in os.environ, reason="needs real images: set ITOP_DATA to a folder of data"
)
def test_the_resnet50_recipe_runs_on_photos(tmp_path):
    source = Path(os.environ["ITOP_DATA"]) / "imagenet-sample"
    for number, folder in enumerate(sorted(source.iterdir())[:24]):
        place = tmp_path / "photos" / f"{number:02d}"
        place.mkdir(parents=True)
        for photo in folder.iterdir():
            (place / photo.name).symlink_to(photo)
    overrides = (
        f"data.root={tmp_path / 'photos'}",
        "data.train=.",
        "data.test=.",
        "data.batch_size=8",
        "data.workers=1",
        "data.image_size=64",
        "model.num_classes=24",
        "epochs=1",
        "regrow.every=2",
    )
    recipe = str(ROOT / "recipes" / "resnet50.yaml")
    assert train.main([recipe, *overrides, "--out", str(tmp_path / "run")]) == 0
    first, test = metrics(tmp_path / "run")
    count = 25_502_912 - 2048 * 976
    assert first["sparsity"] == (count - round(0.1 * count)) / count
    assert np.isfinite(test["test_loss"])
