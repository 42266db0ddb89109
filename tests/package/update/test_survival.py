"""Survival by hand: of what grew at an update, the share that is there after the next one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler
from itop_prune.update.exploration import Exploration


def mask(positions: str) -> Tensor:
    return torch.tensor([letter == "x" for letter in positions])


def exploration(names: str) -> Exploration:
    layers = {name: nn.Linear(6 if name == "a" else 4, 1) for name in names}
    return Exploration(
        {name: itop_prune.apply(layer, 0.5)["weight"] for name, layer in layers.items()},
        survival=True,
    )


def update(noted: Exploration, **moved: tuple[str, str]) -> None:
    noted.begin()
    for name, masks in moved.items():
        noted.note(name, *(mask(positions)[None] for positions in masks))


def test_two_layers_over_three_updates() -> None:
    survival = exploration("ab")
    update(survival, a=("xx....", "x.xx.."), b=("x...", ".x.."))  # two grow, one grows
    assert math.isnan(survival.survival_rate())
    update(
        survival, a=("x.xx..", "x.x.x."), b=(".x..", ".x..")
    )  # one of the two is left; its one is left
    assert survival.survival_rates() == {"a": 0.5, "b": 1.0}
    assert survival.survival_rate() == 2 / 3
    update(
        survival, a=("x.x.x.", "x.xx.."), b=(".x..", "..x.")
    )  # it left; what left had grown long before
    assert survival.survival_rates() == {"a": 0.0}
    assert survival.survival_rate() == 0.0


def test_a_copy_of_the_state_goes_on_alike() -> None:
    one, other = exploration("a"), exploration("a")
    update(one, a=("x.....", ".x...."))
    other.load_state_dict(one.state_dict())
    for survival in (one, other):
        update(survival, a=(".x....", ".xx..."))
    assert one.survival_rates() == other.survival_rates() == {"a": 1.0}


def test_a_layer_that_an_update_leaves_alone_is_counted_too() -> None:
    """Over all layers together the second, whose weights are large, prunes nothing after the first update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {
        "scope": "global",
        "survival": True,
        "rate": 0.2,
        "schedule": "constant",
    }
    regrow = MaskScheduler(masks, optimizer, total_steps=9, every=1, **options)
    seen = []
    for step in range(3):
        before = {name: itop.mask.clone() for name, itop in masks.items()}
        model(torch.randn(4, 30)).sum().backward()
        if step:
            with torch.no_grad():
                masks["1.weight"].parameter.add_(masks["1.weight"].mask.float(), alpha=100.0)
        regrow.step()
        grown = {name: itop.mask & ~before[name] for name, itop in masks.items()}
        seen.append((grown, {name: itop.mask.clone() for name, itop in masks.items()}))
    (first, _), (second, after), (_, last) = seen
    assert first["1.weight"].any()
    assert not second["1.weight"].any()
    assert torch.equal(after["1.weight"], last["1.weight"])
    there, grown = (
        int((second["0.weight"] & last["0.weight"]).sum()),
        int(second["0.weight"].sum()),
    )
    assert regrow.survival_rates() == {"0.weight": there / grown}
    assert regrow.survival_rate() == there / grown


@pytest.mark.filterwarnings("ignore:0.weight got no gradient since the last update")
def test_a_layer_that_is_frozen_between_two_updates_is_left_out() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    masks, optimizer = (
        itop_prune.apply(model, 0.5, "uniform"),
        torch.optim.SGD(model.parameters(), lr=0.0),
    )
    regrow = MaskScheduler(masks, optimizer, total_steps=9, every=1, survival=True)

    def step() -> None:
        torch.stack([layer(torch.ones(1, 8)).sum() for layer in model]).sum().backward()
        regrow.step()
        optimizer.zero_grad()

    step()
    step()
    assert list(regrow.survival_rates()) == list(masks)
    assert all(regrow.entered().values())
    model[0].weight_orig.requires_grad_(False)
    step()
    assert list(regrow.survival_rates()) == ["1.weight"]
    assert (regrow.entered()["0.weight"], regrow.entered()["1.weight"] > 0) == (0, True)
    model[0].weight_orig.requires_grad_(True)
    step()
    assert list(regrow.survival_rates()) == [
        "1.weight"
    ]  # what grew in the other one had time for two updates
    step()
    assert list(regrow.survival_rates()) == list(masks)
