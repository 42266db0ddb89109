"""Presets: a method by name, with an interval that suits the length of the training."""

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers.toys import mlp, train

import itop_prune
from itop_prune.integrations.sparse_training import split
from itop_prune.methods.presets import PRESETS

each = pytest.mark.parametrize("name", PRESETS)


@each
@pytest.mark.parametrize("storage", ["mask", "sparse"])
@pytest.mark.filterwarnings("ignore:.*so some have none")  # rankings over all layers of so few
def test_a_preset_trains_to_its_sparsity(name: str, storage: str) -> None:
    first, second = itop_prune.preset(name, sparsity=0.8, total_steps=24, updates=6)
    model = mlp()
    masks = itop_prune.apply(model, **first, storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=24, **second)
    train(model, optimizer, regrow, steps=range(24))
    assert regrow.updates >= 6
    assert sum(itop.active for itop in masks.values()) == 112  # of 560
    assert regrow.exploration_rate() > 0.2


@each
@pytest.mark.parametrize("total_steps", [137, 1000, 12_000, 97_656])
def test_the_number_of_updates_hardly_depends_on_the_length(name: str, total_steps: int) -> None:
    first, second = itop_prune.preset(name, sparsity=0.9, total_steps=total_steps)
    masks = itop_prune.apply(model := mlp(), **first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=total_steps, **second)
    wanted = PRESETS[name].updates
    most = (2.0 if total_steps < 1000 else 1.1) * wanted
    assert wanted <= len(regrow.update_steps()) <= most


def test_updates_can_be_chosen() -> None:
    _, second = itop_prune.preset("RigL", 0.9, 1000, updates=10)
    assert second["every"] == 75  # ten in three quarters


@pytest.mark.parametrize(
    ("name", "sparsity", "start"),
    [
        ("GraNet", 0.98, 0.5),
        ("GraNet", 0.3, 0.3),
        ("GMP", 0.98, 0.0),
        ("Sparse-to-sparser", 0.99, 0.95),
        ("Sparse-to-sparser", 0.5, 0.0),
    ],
)
def test_a_falling_density_starts_above_the_final_one(
    name: str, sparsity: float, start: float
) -> None:
    first, second = itop_prune.preset(name, sparsity, 12_000)
    assert (first, second["final_sparsity"]) == ({"sparsity": start}, sparsity)


def test_few_steps_between_updates_sum_up_fewer_gradients() -> None:
    _, second = itop_prune.preset("Sparse-to-sparser", 0.9, 120)
    assert (second["every"], second["gradient_steps"]) == (2, 2)


def test_what_is_returned_may_be_changed() -> None:
    first, second = itop_prune.preset("Sparse-to-sparser", 0.98, 1000)
    expected = copy.deepcopy((first, second))
    first["sparsity"] = second["rate"] = second["density"]["power"] = 0.1
    assert itop_prune.preset("Sparse-to-sparser", 0.98, 1000) == expected


@each
def test_the_callbacks_take_both(name: str) -> None:
    first, second = itop_prune.preset(name, 0.9, 1000)
    assert split({**first, **second}) == (first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "RigL ITOP"}, "unknown preset 'RigL ITOP'; known are SET-ITOP.*nearest: 'RigL-I"),
        ({"name": len}, "unknown preset <built-in"),
        ({"sparsity": 98}, r"sparsity is 98; allowed is a number in \(0, 1\)"),
        ({"sparsity": 0}, r"sparsity is 0; allowed is a number in \(0, 1\)"),
        ({"total_steps": 0}, "total_steps is 0; allowed are whole numbers from 1"),
        ({"total_steps": 1e4}, "total_steps is 10000.0; allowed are whole numbers from 1"),
        ({"updates": 0}, "updates is 0; allowed are whole numbers from 1"),
        (
            {"total_steps": 89},
            "total_steps is 89, and RigL makes 90 updates in the first 75% of them: train for 120",
        ),
        ({"total_steps": 10, "updates": 8}, "train for 11 steps or more, or give fewer updates"),
    ],
)
def test_bad_values_are_answered_with_what_is_allowed(
    arguments: dict[str, Any], message: str
) -> None:
    given = {"name": "RigL", "sparsity": 0.9, "total_steps": 12_000, **arguments}
    with pytest.raises(ValueError, match=message):
        itop_prune.preset(**given)


def test_as_many_steps_as_the_error_asks_for_are_enough() -> None:
    assert itop_prune.preset("RigL", 0.9, 120)[1]["every"] == 1
    assert itop_prune.preset("RigL", 0.9, 11, updates=8)[1]["every"] == 1


@pytest.mark.parametrize("method", ["RigL", "rigl", "GraNet", "AC/DC"])
def test_apply_points_a_name_of_a_preset_to_preset(method: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"unknown method .*moves masks: itop_prune\.preset\('"):
        itop_prune.apply(model, 0.9, method)
    assert itop_prune.find_masks(model) == {}


def test_other_unknown_names_are_not_pointed_to_it() -> None:
    with pytest.raises(ValueError, match="unknown method 'ERKK'") as caught:
        itop_prune.apply(mlp(), 0.9, "ERKK")
    assert "preset" not in str(caught.value)
