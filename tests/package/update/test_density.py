"""The density on its way: exact at the last update whatever the path, else refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sparse_run import sparse
from helpers.toys import mlp
from timm.layers import CondConv2d
from torch import nn

import itop_prune
from itop_prune import MaskScheduler
from itop_prune.layers.handle import active_weights
from itop_prune.methods import schedules
from itop_prune.update.density import DensityTargets

FINAL = {"total_steps": 12, "every": 3, "final_sparsity": 0.9}


def hardly(progress: float) -> float:
    return 1.0 - 0.1 * progress


@pytest.mark.parametrize("path", ["linear", "cubic", "exponential", "alternating", hardly])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_end_is_exact_whatever_the_path(path: str | Callable, scope: str) -> None:
    run = sparse(sparsity=0.0, density=path, scope=scope, grow="gradient", **FINAL)
    run.train(range(11))
    before = sum(run.counts().values())
    run.train(range(11, 12))
    assert sum(run.counts().values()) == 56  # of 560
    assert path == "alternating" or before > 56


@pytest.mark.parametrize("value", [1.5, -1.0, float("nan"), None, "half"])
def test_a_path_or_schedule_outside_its_range_is_refused_by_name(value: Any) -> None:
    def mine(progress: float) -> Any:
        return value

    message = r"schedule mine gave .* at progress 0; it must give a number in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        sparse(density=mine, **FINAL)
    with pytest.raises(ValueError, match=message):
        sparse(schedule=mine)


def test_a_function_that_is_constant_needs_no_end() -> None:
    assert sparse(density=schedules.constant).regrow.update_steps()


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "0.9", True])
def test_a_final_sparsity_out_of_range_is_refused(sparsity: Any) -> None:
    message = r"final_sparsity is .*; allowed is a number in \[0, 1\), or None"
    with pytest.raises(ValueError, match=message):
        sparse(**{**FINAL, "density": "cubic", "final_sparsity": sparsity})


def test_frozen_layers_are_refused_since_they_never_get_there() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    message = r"0\.weight can't move .* leave what is frozen out of masks"
    with pytest.raises(ValueError, match=message):
        sparse(lambda: model, density="cubic", **FINAL)


def test_the_end_is_shared_out_as_apply_does_over_several_kernels_too() -> None:
    def model() -> nn.Module:
        return nn.ModuleList([CondConv2d(8, 16, 3, num_experts=2), nn.Linear(40, 20)])

    masks = itop_prune.apply(model(), 0.0)
    targets = DensityTargets(masks, "cubic", 0.9, "ERK", sum_only=False)
    assert targets.targets(active_weights(masks), 1.0) == itop_prune.count_active(model(), 0.9)


def test_the_way_starts_at_the_present_counts_also_after_a_state_without_density() -> None:
    masks = itop_prune.apply(mlp(), 0.2)
    targets = DensityTargets(masks, "linear", 0.9, "ERK", sum_only=False)
    assert targets.first == active_weights(masks)
    assert targets.smallest == 56
    targets.first = {}  # as a loaded state of a run at one density has it
    targets.begin(masks)
    assert targets.targets(active_weights(masks), 0.0) == active_weights(masks)


def test_a_density_that_stays_asks_for_the_present_counts() -> None:
    masks = itop_prune.apply(mlp(), 0.2)
    targets = DensityTargets(masks, "constant", None, "ERK", sum_only=False)
    assert (targets.moves, targets.first, targets.smallest) == (False, {}, 448)
    assert targets.targets({"0.weight": 3}, 0.5) == {"0.weight": 3}


def test_a_run_at_one_density_goes_on_to_another() -> None:
    run = sparse(sparsity=0.8, total_steps=12, every=3)
    other = sparse(sparsity=0.2, density="linear", **FINAL)
    run.train(range(3))
    other.restore(run.saved())
    active: list[int] = []
    other.train(range(3, 12), after=lambda step: active.append(sum(other.counts().values())))
    assert max(active) <= 112  # of 560: where the other run stood
    assert active == sorted(active, reverse=True)
    assert active[-1] == 56


@pytest.mark.filterwarnings("ignore:4.weight got no gradient since the last update")
def test_a_layer_that_is_frozen_at_the_first_update_on_the_way_takes_part_later() -> None:
    run = sparse(sparsity=0.8, total_steps=12, every=3)
    other = sparse(sparsity=0.2, density="linear", **FINAL)
    run.train(range(3))
    other.restore(run.saved())
    other.masks["4.weight"].parameter.requires_grad_(False)
    other.train(range(3, 4))
    other.masks["4.weight"].parameter.requires_grad_(True)
    other.train(range(4, 12))
    assert sum(other.counts().values()) == 56  # of 560


def test_if_only_the_sum_counts_the_final_method_need_not_fit() -> None:
    """uniform+ keeps the first layer dense, which alone is above the final budget."""
    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.0), torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"density": "cubic", "final_sparsity": 0.95, "final_method": "uniform+"}
    options["grow"] = "gradient"
    with pytest.raises(ValueError, match="the fixed densities keep 320 weights"):
        MaskScheduler(masks, optimizer, total_steps=12, every=3, **options)
    MaskScheduler(masks, optimizer, total_steps=12, every=3, scope="global", **options)


STARVING: dict[str, Any] = {"scope": "global", "density": "cubic", "final_sparsity": 0.9}


def scheduler(sparsity: float, **options: Any) -> MaskScheduler:
    model = mlp()
    masks, optimizer = itop_prune.apply(model, sparsity), torch.optim.SGD(model.parameters())
    return MaskScheduler(masks, optimizer, total_steps=12, every=3, **options)


@pytest.mark.parametrize("grow", ["random", "unexplored", lambda weight: -weight.abs()])
def test_growth_by_chance_under_a_cut_over_all_layers_is_warned_of(grow: Any) -> None:
    message = "weights that grow by chance are small: .* some layers starve.* or a floor, such"
    with pytest.warns(UserWarning, match=message) as caught:
        scheduler(0.5, grow=grow, **STARVING)
    assert [Path(warning.filename).name for warning in caught] == ["test_density.py"]


@pytest.mark.parametrize(
    "options",
    [
        {"grow": "gradient"},
        {"grow": "momentum"},
        {"grow": "gradient+random"},
        {"scope": "layer"},
        {"floor": 0.05},
        {"redistribute": "magnitude"},
        {"rate": 0.0, "min_rate": 0.0},
        {"final_sparsity": 0.2},
        {"density": "constant", "final_sparsity": None},
    ],
    ids=str,
)
def test_other_rules_do_not_starve_layers_and_are_not_warned_of(options: dict[str, Any]) -> None:
    assert scheduler(0.5, **{**STARVING, **options}).update_steps()
