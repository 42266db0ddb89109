"""A pruned model goes on as it is: its zeros are the masks, and a layer of zeros is no obstacle."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sparse_run import adam, apply, momentum
from helpers.storages import both_storages
from helpers.toys import batch, mlp, train
from torch import nn

import itop_prune
from itop_prune.layers.handle import active_weights


def pruned() -> nn.Sequential:
    """An `mlp` with zeros. Its middle layer is all zeros, and the bias lets the next one learn."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight.zero_()
        model[2].bias.fill_(0.5)
        model[4].weight[0] = 0
    return model


COUNTS = {"0.weight": 160, "2.weight": 0, "4.weight": 36}


def trained(**arguments: Any) -> dict[str, int]:
    model = pruned()
    masks = apply(model, scores="nonzero")
    assert active_weights(masks) == COUNTS
    for optimizer in (momentum(model), adam(model)):
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=6, every=2, **arguments)
        with warnings.catch_warnings():  # an empty layer is named, and nothing passes it
            warnings.filterwarnings("ignore", "2.weight has fewer active weights than outputs")
            warnings.filterwarnings("ignore", "the dense gradient of 0.weight is 0 everywhere")
            train(model, optimizer, regrow, steps=range(6))
        assert regrow.updates == 3
    assert all(not itop.parameter[~itop.used].any() for itop in masks.values())
    return active_weights(masks)


@both_storages
@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_an_empty_layer_stays_empty_as_long_as_each_layer_keeps_its_count(grow: str) -> None:
    assert trained(grow=grow) == COUNTS


@both_storages
@pytest.mark.parametrize("arguments", [{"redistribute": "magnitude"}, {"scope": "global"}], ids=str)
def test_an_empty_layer_gets_weights_where_layers_share_them(arguments: dict[str, Any]) -> None:
    counts = trained(**arguments)
    assert counts["2.weight"] >= 1
    assert sum(counts.values()) == 196


@both_storages
def test_an_empty_layer_gets_weights_on_the_way_to_a_final_sparsity() -> None:
    counts = trained(density="cubic", final_sparsity=0.8)
    assert counts["2.weight"] >= 1
    assert sum(counts.values()) == 112


@both_storages
def test_a_model_with_an_empty_layer_is_counted_saved_and_deployed(tmp_path: Path) -> None:
    model, (x, _) = pruned().eval(), batch(0, 20)
    expected = model(x)
    masks = apply(model, scores="nonzero")
    summary = itop_prune.summarize(model)
    assert summary.sparsity == pytest.approx(1 - 196 / 560)
    assert "0.0000" in str(summary)

    itop_prune.save(model, tmp_path / "model.safetensors")
    again = mlp(seed=1).eval()
    loaded = itop_prune.load(again, tmp_path / "model.safetensors")
    assert active_weights(loaded) == active_weights(masks)
    for copied in (again, copy.deepcopy(model), itop_prune.deploy(model, x)):
        assert torch.allclose(copied(x), expected, atol=1e-5)
