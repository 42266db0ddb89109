"""The callback in the real Trainer of Lightning, on a small ResNet."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import itop_prune
from itop_prune.integrations.lightning import SparseTrainingCallback

ARGUMENTS = {"sparsity": 0.8, "exclude": "net.fc", "every": 2, "grow": "gradient"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        sizes = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
        self.net = timm.create_model("resnet18", num_classes=classes, **sizes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader:
    """Eight batches of four images of noise."""
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(32) % 4), batch_size=4)


def trainer(folder: Path, *callbacks: lightning.Callback, **settings: Any) -> lightning.Trainer:
    """A Trainer of 2 epochs of 4 optimizer steps, which keeps a checkpoint of each."""
    defaults = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "precision": "bf16-mixed",
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    return lightning.Trainer(
        default_root_dir=folder, callbacks=[*callbacks, keep], **{**defaults, **settings}
    )


def same(one: Any, other: Any) -> bool:
    """Whether two nested dicts hold the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_an_accumulation_that_begins_in_the_training_moves_masks(tmp_path: Path) -> None:
    callback = SparseTrainingCallback(**ARGUMENTS, storage="sparse")
    later = GradientAccumulationScheduler({0: 1, 1: 2})
    run = trainer(tmp_path, callback, later, accumulate_grad_batches=1)
    run.fit(Classifier(), loader())
    assert callback.scheduler.updates == run.global_step // 2 == 6


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_a_resnet_trains_sparse_and_leaves_a_dense_copy(storage: str, tmp_path: Path) -> None:
    module, callback = Classifier(), SparseTrainingCallback(**ARGUMENTS, storage=storage)
    run = trainer(tmp_path, callback)
    run.fit(module, loader())

    assert run.global_step == callback.scheduler.state_dict()["step"] == 8
    assert callback.scheduler.updates == 4
    assert "net.fc.weight" not in callback.masks
    assert itop_prune.summarize(module).sparsity == pytest.approx(0.8, abs=1e-4)
    logged = {name: run.callback_metrics[name].item() for name in ("sparsity", "R_s")}
    assert logged["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert logged["R_s"] == pytest.approx(callback.scheduler.exploration_rate())
    assert logged["R_s"] > 0.2

    dense = Classifier.load_from_checkpoint(tmp_path / "dense.ckpt", weights_only=True)
    assert same(dict(dense.state_dict()), dict(itop_prune.dense_state_dict(module)))
    assert itop_prune.find_masks(dense) == {}


@pytest.mark.parametrize(("storage", "micro_batches"), [("mask", 2), ("sparse", 1)])
def test_the_trainer_moves_masks_as_the_loop_of_the_readme_does(
    storage: str, micro_batches: int, tmp_path: Path
) -> None:
    """Once in an optimizer step, by the gradient of all its micro-batches."""
    callback = SparseTrainingCallback(**ARGUMENTS, storage=storage)
    settings = {"accumulate_grad_batches": micro_batches, "max_epochs": micro_batches}
    trainer(tmp_path, callback, precision="32-true", **settings).fit(Classifier(), loader())

    twin = Classifier()
    masks = itop_prune.apply(twin, 0.8, exclude="net.fc", storage=storage)
    optimizer = twin.configure_optimizers()
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=8, every=2, grow="gradient")
    twin.train()
    batches = list(loader()) * micro_batches
    for number, batch in enumerate(batches, 1):
        (twin.training_step(batch, number) / micro_batches).backward()
        if number % micro_batches == 0:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            regrow.step()
            optimizer.zero_grad()

    assert all(itop.mask.equal(callback.masks[name].mask) for name, itop in masks.items())


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_a_run_resumed_at_an_epochs_end_has_the_bits_of_one_that_never_stopped(
    storage: str, tmp_path: Path
) -> None:
    # The sixth step is an update, and collects from the fourth on.
    arguments = {**ARGUMENTS, "storage": storage, "every": 3, "gradient_steps": 3}
    module, callback = Classifier(), SparseTrainingCallback(**arguments)
    whole = trainer(tmp_path, callback)
    whole.fit(module, loader())

    again, fresh = Classifier(), SparseTrainingCallback(**arguments)
    resumed = trainer(tmp_path, fresh)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")

    assert resumed.global_step == 8
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert same(fresh.scheduler.state_dict(), callback.scheduler.state_dict())
    assert fresh.scheduler.updates == 2


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    module, callback = Classifier(), SparseTrainingCallback(**ARGUMENTS)
    run = trainer(tmp_path, callback)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    assert callback.scheduler.state_dict()["step"] == 12
    assert callback.scheduler.updates == 6


def test_a_step_that_the_scaler_skipped_is_not_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    callback = SparseTrainingCallback(**ARGUMENTS)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    run = trainer(tmp_path, callback, precision=None, plugins=[half])
    run.fit(Classifier(), loader())
    assert run.global_step == 8
    assert callback.scheduler.state_dict()["step"] == 7


def test_a_module_that_has_masks_keeps_them(tmp_path: Path) -> None:
    module, callback = Classifier(), SparseTrainingCallback(every=2)
    masks = itop_prune.apply(module.net, 0.9)
    trainer(tmp_path, callback).fit(module, loader())
    assert list(callback.masks.values()) == list(masks.values())


# --- bad input -----------------------------------------------------------------------------------


def test_a_module_without_masks_and_without_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no masks, and the callback no arguments"):
        trainer(tmp_path, SparseTrainingCallback(every=2)).fit(Classifier(), loader())


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    two = [SparseTrainingCallback(**ARGUMENTS), SparseTrainingCallback(every=2)]
    with pytest.raises(RuntimeError, match=r"more than one stateful callback .*SparseTraining"):
        trainer(tmp_path, *two)


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy])
def test_what_flattens_parameters_is_refused_before_masks_are_placed(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module = trainer(tmp_path), Classifier()
    strategy = kind.__new__(kind)  # deepspeed need not be there
    monkeypatch.setattr(lightning.Trainer, "strategy", strategy)
    with pytest.raises(ValueError, match=f"uses {kind.__name__}, which flattens.*use DDP"):
        SparseTrainingCallback(**ARGUMENTS).setup(run, module, "fit")
    assert itop_prune.find_masks(module) == {}


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Classifier()
    module.automatic_optimization = False
    run = trainer(
        tmp_path,
        SparseTrainingCallback(**ARGUMENTS),
        accumulate_grad_batches=1,
        gradient_clip_val=None,
    )
    with pytest.raises(ValueError, match="Classifier sets automatic_optimization=False"):
        run.fit(module, loader())
    assert itop_prune.find_masks(module) == {}


def test_a_trainer_without_a_last_step_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS), max_epochs=-1)
    with pytest.raises(ValueError, match="no last step; set max_epochs or max_steps"):
        run.fit(Classifier(), loader())


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    module = Classifier()
    itop_prune.apply(module, 0.8, exclude="net.fc")
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    run = trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS))
    with pytest.raises(ValueError, match="holds no state of SparseTrainingCallback"):
        run.fit(Classifier(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
