"""Writes into a masked weight: those known beforehand are refused, and one way works."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import itop_prune

LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), "reset_parameters"),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3), "reset_parameters"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "_reset_parameters"),
}
each_layer = pytest.mark.parametrize(("make", "method"), LAYERS.values(), ids=LAYERS)
each_storage = pytest.mark.parametrize("storage", ["mask", "sparse"])


@each_storage
@each_layer
def test_a_masked_layer_refuses_to_initialize_itself(
    make: Callable, method: str, storage: str
) -> None:
    layer = make()
    itop_prune.apply(layer, 0.5, storage=storage)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"can't initialize .*before itop_prune\.apply, or wr"):
        getattr(layer, method)()
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@each_storage
@each_layer
def test_once_the_mask_is_gone_a_layer_initializes_itself(
    make: Callable, method: str, storage: str
) -> None:
    layer = make()
    itop_prune.apply(layer, 0.5, storage=storage)
    itop_prune.remove(layer)
    getattr(layer, method)()
    assert next(layer.parameters()).all()  # no zeros of the mask


def test_a_layer_gets_no_method_that_its_class_lacks() -> None:
    layer = nn.MultiheadAttention(4, 2)
    itop_prune.apply(layer, 0.5)
    assert not hasattr(layer, "reset_parameters")
    assert not hasattr(layer, "base_layer")


@each_storage
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_values_are_written_under_the_mask_as_the_message_says(kind: str, storage: str) -> None:
    layer = LAYERS[kind][0]()
    itop = itop_prune.apply(layer, 0.5, storage=storage)["weight"]
    mask, bias = itop.mask.clone(), layer.bias.detach().clone()
    values = nn.init.kaiming_normal_(torch.empty(itop.shape))
    layer.load_state_dict({"weight": values}, strict=False)
    assert torch.equal(layer.weight, values * mask)
    assert torch.equal(itop.mask, mask)
    assert torch.equal(layer.bias, bias)


@each_storage
def test_writes_into_the_weight_that_no_one_sees_change_nothing(storage: str) -> None:
    """The README says that they are lost. If one becomes visible, let it raise, and say so there.

    A parent that changes a weight in place for its own use must go on working, so no error is due.
    """
    layer = nn.Linear(6, 4)
    itop_prune.apply(layer, 0.5, storage=storage)
    before = layer.weight.detach().clone()
    layer.weight.data += 1
    nn.init.ones_(layer.weight)
    assert torch.equal(layer.weight, before)
