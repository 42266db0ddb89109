"""Runs are built in the right order, with the learning rates of the recipe in every epoch."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.data.datasets import Data, open_data
from itop_prune_tools.data.source import CPU
from itop_prune_tools.run_folder.folder import RunError
from itop_prune_tools.training.build import (
    Run,
    build,
    build_loss,
    build_lr_schedule,
    build_model,
    check_fit,
    place_masks,
)
from torch import nn

import itop_prune

MODEL = {"model_name": "lenet300", "img_size": 8}
STEPS = 4


def recipe(**changes: Any) -> Recipe:
    sections = {
        "model": MODEL,
        "data": {"name": "digits", "batch_size": 8},
        "optimizer": {"opt": "sgd", "lr": 0.1, "momentum": 0.9},
        "epochs": 20,
    }
    return Recipe(**{**sections, **changes})


def digits() -> Data:
    return open_data("digits", batch_size=8)


def build_run(**changes: Any) -> Run:
    return build(recipe(**changes), Accelerator(cpu=True), None, STEPS)


def learning_rates(changes: dict[str, Any], steps_per_epoch: int = STEPS) -> list[list[float]]:
    """Drive the schedule as tools/train.py does; return the rate of every step of every epoch."""
    made = recipe(**changes)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = build_lr_schedule(made, optimizer, steps_per_epoch)
    rates, step = [], 0
    for epoch in range(made.epochs * made.multiplier):
        rates.append([])
        for _ in range(steps_per_epoch):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            step += 1
            schedule.step_update(step)
        schedule.step(epoch + 1)
    return rates


def multistep(milestones: list[int], multiplier: int = 1, **settings: Any) -> dict[str, Any]:
    schedule = {"sched": "multistep", "decay_milestones": milestones, "decay_rate": 0.1, **settings}
    return {"lr_schedule": schedule, "multiplier": multiplier}


def in_spans(*spans: tuple[int, float], steps: int = STEPS) -> list[list[float]]:
    """Return so many epochs at a rate, then so many at the next."""
    return [[pytest.approx(rate)] * steps for epochs, rate in spans for _ in range(epochs)]


# Learning rates


@pytest.mark.parametrize("on_epochs", [True, False])
def test_a_milestone_of_10_means_10_epochs_before_and_the_11th_after(on_epochs: bool) -> None:
    rates = learning_rates(multistep([10, 15], step_on_epochs=on_epochs))
    assert rates == in_spans((10, 0.1), (5, 0.01), (5, 0.001))


@pytest.mark.parametrize("on_epochs", [True, False])
def test_milestones_are_stretched_by_the_multiplier(on_epochs: bool) -> None:
    rates = learning_rates(multistep([10, 15], multiplier=2, step_on_epochs=on_epochs))
    assert rates == in_spans((20, 0.1), (10, 0.01), (10, 0.001))


def test_the_interval_of_a_step_schedule_is_stretched_by_the_multiplier() -> None:
    schedule = {"sched": "step", "decay_epochs": 5, "decay_rate": 0.1}
    rates = learning_rates({"lr_schedule": schedule, "epochs": 10, "multiplier": 2})
    assert rates == in_spans((10, 0.1), (10, 0.01))


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 10, 49])
def test_milestones_on_steps_fall_between_epochs_whatever_their_length(
    steps_per_epoch: int,
) -> None:
    rates = learning_rates(multistep([10, 15], multiplier=3, step_on_epochs=False), steps_per_epoch)
    assert rates == in_spans((30, 0.1), (15, 0.01), (15, 0.001), steps=steps_per_epoch)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_warm_up_is_not_stretched(multiplier: int) -> None:
    rates = learning_rates(multistep([10], multiplier, warmup_epochs=4, warmup_lr=0.0))
    warm = [epoch[0] for epoch in rates[:5]]
    assert warm == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert rates[5:] == in_spans((10 * multiplier - 5, 0.1), (10 * multiplier, 0.01))


def test_warm_up_does_not_move_the_milestones_on_steps() -> None:
    rates = learning_rates(multistep([10], 2, warmup_epochs=4, warmup_lr=0.0, step_on_epochs=False))
    assert rates[4:] == in_spans((16, 0.1), (20, 0.01))
    assert [epoch[0] for epoch in rates[:4]] == pytest.approx([0.0, 0.025, 0.05, 0.075])


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_cosine_falls_over_the_extended_run(multiplier: int) -> None:
    changes = {"lr_schedule": {"sched": "cosine", "min_lr": 0.0}, "multiplier": multiplier}
    rates = [epoch[0] for epoch in learning_rates(changes)]
    assert len(rates) == 20 * multiplier
    assert rates[0] == pytest.approx(0.1)
    assert rates[10 * multiplier] == pytest.approx(0.05)
    assert rates[-1] < 0.001
    assert rates == sorted(rates, reverse=True)


def test_the_recipe_is_not_changed_by_its_schedule() -> None:
    made = recipe(**multistep([10, 15], multiplier=2))
    for _ in range(2):
        build_lr_schedule(made, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), STEPS)
    assert made.lr_schedule is not None
    assert made.lr_schedule["decay_milestones"] == [10, 15]


def test_without_a_schedule_the_learning_rate_is_constant() -> None:
    assert build_run().lr_schedule is None


# Whether model and data fit


class Images(nn.Module):
    """A model with batch statistics, for images of one shape."""

    num_classes = 10

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 10), (1, 7)])
def test_the_trial_of_one_image_leaves_no_trace_in_the_model(
    channels: int, classes: int, training: bool
) -> None:
    model = Images(channels, classes).train(training)
    before = state_of(model)
    if (channels, classes) == (1, 10):
        check_fit(model, digits(), CPU)
    else:
        with pytest.raises(RunError):
            check_fit(model, digits(), CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_number_of_classes_names_both_and_the_key() -> None:
    with pytest.raises(
        RunError, match=r"the model gives 7 classes, the data have 10; set model\.num_classes"
    ):
        check_fit(Images(classes=7), digits(), CPU)


def test_another_shape_of_images_names_the_shape_and_the_keys() -> None:
    with pytest.raises(
        RunError, match=r"the model does not take images of shape \(1, 8, 8\): "
    ) as caught:
        check_fit(Images(channels=3), digits(), CPU)
    assert str(caught.value).endswith(
        "; look at model.img_size, model.in_chans and data.image_size"
    )


def test_a_recipe_whose_model_does_not_fit_its_data_is_not_built() -> None:
    with pytest.raises(RunError, match=r"set model\.num_classes"):
        build(recipe(model={**MODEL, "num_classes": 7}), Accelerator(cpu=True), digits(), STEPS)
    with pytest.raises(RunError, match=r"model\.img_size"):
        build(recipe(model={"model_name": "lenet300"}), Accelerator(cpu=True), digits(), STEPS)


# Losses

LOGITS = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 3, 9, 1, 2])


def test_the_loss_is_cross_entropy() -> None:
    torch.testing.assert_close(
        build_loss(recipe())(LOGITS, LABELS), nn.functional.cross_entropy(LOGITS, LABELS)
    )


def test_a_smoothed_loss_is_smoothed_as_asked() -> None:
    expected = nn.functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(
        build_loss(recipe(loss={"smoothing": 0.3}))(LOGITS, LABELS), expected
    )


def test_a_loss_under_mixup_takes_soft_labels() -> None:
    soft = 0.25 * nn.functional.one_hot(LABELS, 10) + 0.75 * nn.functional.one_hot(
        LABELS.flip(0), 10
    )
    loss = build_loss(recipe(mixup={"mixup_alpha": 0.2}))
    torch.testing.assert_close(loss(LOGITS, soft), nn.functional.cross_entropy(LOGITS, soft))


def test_mixup_knows_the_number_of_classes_of_the_model() -> None:
    run = build_run(model={**MODEL, "num_classes": 7}, mixup={"mixup_alpha": 1.0})
    assert run.mixup is not None
    _, soft = run.mixup(torch.zeros(2, 1, 8, 8), torch.tensor([6, 0]))
    assert soft.shape == (2, 7)


# What is built


def test_masks_left_out_is_a_dense_run() -> None:
    run = build_run()
    assert itop_prune.find_masks(run.unwrapped_model) == {}
    assert run.regrow is None
    assert run.ema is None
    assert run.mixup is None


def test_regrow_left_out_is_a_static_run() -> None:
    run = build_run(masks={"sparsity": 0.9})
    assert itop_prune.summarize(run.unwrapped_model).sparsity == pytest.approx(0.9, abs=1e-4)
    assert run.regrow is None


@pytest.mark.parametrize("multiplier", [1, 3])
def test_masks_move_over_the_whole_extended_run(multiplier: int) -> None:
    run = build_run(masks={"sparsity": 0.9}, regrow={"every": 7}, multiplier=multiplier)
    assert run.regrow is not None
    assert list(run.regrow.update_steps()) == list(range(7, 20 * multiplier * STEPS + 1, 7))
    assert run.epochs == 20 * multiplier


def test_the_optimizer_holds_every_parameter_of_the_model() -> None:
    run = build_run(masks={"sparsity": 0.9})
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.unwrapped_model.parameters()}


def test_weight_decay_is_on_everything_only_where_the_recipe_says_so() -> None:
    def decays(**settings: Any) -> set[float]:
        run = build_run(optimizer={"opt": "sgd", "lr": 0.1, "weight_decay": 0.5, **settings})
        return {group["weight_decay"] for group in run.optimizer.param_groups}

    assert decays(filter_bias_and_bn=False) == {0.5}
    assert decays() == {0.0, 0.5}


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_one_seed_gives_the_same_weights_and_masks_again() -> None:
    torch.manual_seed(1)
    first = build_run(masks={"sparsity": 0.9}, seed=3).unwrapped_model
    torch.manual_seed(2)
    assert same(first, build_run(masks={"sparsity": 0.9}, seed=3).unwrapped_model)


def test_another_seed_gives_other_weights_and_masks() -> None:
    runs = [build_run(masks={"sparsity": 0.9}, seed=seed) for seed in (0, 1)]
    first, second = (itop_prune.find_masks(run.unwrapped_model)["layers.0.weight"] for run in runs)
    assert not torch.equal(first.mask, second.mask)
    assert not torch.equal(
        first.parameter[first.mask & second.mask], second.parameter[first.mask & second.mask]
    )


def test_masks_and_regrow_may_have_seeds_of_their_own() -> None:
    changes: dict[str, Any] = {
        "masks": {"sparsity": 0.9, "seed": 5},
        "regrow": {"every": 1, "seed": 6},
    }
    first, second = (build_run(**changes, seed=seed) for seed in (0, 1))
    one, other = (
        itop_prune.find_masks(run.unwrapped_model)["layers.0.weight"] for run in (first, second)
    )
    assert torch.equal(one.mask, other.mask)
    assert not torch.equal(one.parameter, other.parameter)


def test_the_average_starts_as_a_copy_of_the_sparse_model() -> None:
    run = build_run(masks={"sparsity": 0.9}, ema={"decay": 0.5})
    assert run.ema is not None
    assert same(run.ema.module, run.unwrapped_model)
    assert run.averaged_model is run.ema.module
    assert run.averaged_model is not run.unwrapped_model
    assert run.models == {"model": run.unwrapped_model, "ema": run.ema.module}


def test_without_an_average_the_model_itself_is_evaluated() -> None:
    run = build_run()
    assert run.averaged_model is run.unwrapped_model
    assert run.models == {"model": run.unwrapped_model}


def test_channels_last_is_the_layout_of_the_weights() -> None:
    made = recipe(model={"model_name": "resnet18", "num_classes": 2}, channels_last=True)
    assert (
        build_model(made, None, CPU)
        .layer1[0]
        .conv1.weight.is_contiguous(memory_format=torch.channels_last)
    )


def test_a_dense_checkpoint_is_loaded_before_the_masks_are_placed(tmp_path: Path) -> None:
    torch.manual_seed(77)
    dense = timm.create_model(**MODEL)
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    run = build_run(init=str(tmp_path / "dense.pt"), masks={"sparsity": 0.9, "scores": "magnitude"})
    itop = itop_prune.find_masks(run.unwrapped_model)["layers.0.weight"]
    weight = dense.layers[0].weight.detach()
    assert torch.equal(itop.parameter.detach(), weight * itop.mask)
    assert weight[itop.mask].abs().min() >= weight[~itop.mask].abs().max()


def test_a_dry_run_builds_without_data() -> None:
    assert isinstance(build_model(recipe(), None, CPU), nn.Module)


def masks_of(name: str, model: nn.Module) -> dict[str, itop_prune.ITOP]:
    wanted = recipe(masks={"sparsity": 0.98, "method": name, "scores": name})
    return place_masks(wanted, Accelerator(cpu=True), model, digits())


def test_synflow_of_a_recipe_takes_a_hundred_rounds_to_its_density() -> None:
    model, same = (build_model(recipe(), None, CPU) for _ in range(2))
    scores = itop_prune.saliency.synflow(same, digits().shape, density=0.02, iterations=100)
    expected = itop_prune.apply(same, 0.98, method=scores, scores=scores)
    found = masks_of("synflow", model)
    assert all(torch.equal(found[key].mask, itop.mask) for key, itop in expected.items())


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_a_model_that_can_not_be_scored_ends_the_run_with_one_line(name: str) -> None:
    model = build_model(recipe(), None, CPU)
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    with pytest.raises(RunError, match=r"^masks: the gradient of .* is not finite; look at"):
        masks_of(name, model)
