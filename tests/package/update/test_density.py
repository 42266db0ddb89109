"""The density on its way: exact at the last update, whatever the path, and honest about what can't get there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.toys import mlp, train
from timm.layers import CondConv2d
from torch import nn

import itop_prune
from itop_prune import MaskScheduler
from itop_prune.methods import schedules


def scheduler(model: nn.Module, sparsity: float = 0.0, **options: Any) -> MaskScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 12, "every": 3, "final_sparsity": 0.9, **options}
    return MaskScheduler(itop_prune.apply(model, sparsity), optimizer, **options)


def hardly(progress: float) -> float:
    return 1.0 - 0.1 * progress


@pytest.mark.parametrize("path", ["linear", "cubic", "exponential", "alternating", hardly])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_end_is_exact_whatever_the_path(path: str | Callable, scope: str) -> None:
    model = mlp()
    regrow = scheduler(model, density=path, scope=scope)
    train(model, regrow._optimizer, regrow, steps=range(11))  # noqa: SLF001
    total = itop_prune.summarize(model).weights
    before = itop_prune.summarize(model).active
    train(model, regrow._optimizer, regrow, steps=range(11, 12))  # noqa: SLF001
    assert itop_prune.summarize(model).active == round(0.1 * total)
    assert path in ("alternating",) or before > round(0.1 * total)


@pytest.mark.parametrize("value", [1.5, -1.0, float("nan"), None, "half"])
def test_a_path_or_schedule_outside_its_range_is_refused_by_name(value: Any) -> None:
    def mine(progress: float) -> Any:
        return value

    with pytest.raises(
        ValueError, match=r"schedule mine gave .* at progress 0; it must give a number in \[0, 1\]"
    ):
        scheduler(mlp(), density=mine)
    with pytest.raises(ValueError, match="schedule mine gave"):
        scheduler(mlp(), 0.5, schedule=mine, final_sparsity=None)


def test_a_function_that_is_constant_needs_no_end() -> None:
    assert scheduler(mlp(), 0.5, density=schedules.constant, final_sparsity=None).update_steps()


def test_frozen_layers_are_refused_for_they_would_never_get_there() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"0\.weight can't move .* leave what is frozen out of masks"
    ):
        scheduler(model, density="cubic")


def test_the_end_is_shared_out_as_apply_does_also_over_several_kernels() -> None:
    def model() -> nn.Module:
        return nn.ModuleList([CondConv2d(8, 16, 3, num_experts=2), nn.Linear(40, 20)])

    expected = {name: itop.active for name, itop in itop_prune.apply(model(), 0.9).items()}
    one = model()
    regrow = scheduler(one, density="cubic")
    assert (
        regrow._density.targets({n: i.active for n, i in itop_prune.find_masks(one).items()}, 1.0)
        == expected
    )


def test_where_layers_share_the_final_method_need_not_fit() -> None:
    scheduler(mlp(), density="cubic", scope="global", final_sparsity=0.95, final_method="uniform+")
