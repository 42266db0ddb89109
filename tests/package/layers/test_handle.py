"""The handle ITOP: torch's own pruning format, a mask as given, found again and removed."""

import pytest
import torch
from helpers.toys import convnet, mlp, train
from torch import nn
from torch.nn.utils import prune

import itop_prune
from itop_prune import ITOP

# --- as torch's pruning --------------------------------------------------------------------------


def test_torch_finds_the_pruning_and_removes_it() -> None:
    layer = nn.Linear(6, 4)
    parameter, itop = layer.weight, itop_prune.apply(layer, 0.5)["weight"]
    assert isinstance(itop, prune.BasePruningMethod)
    assert prune.is_pruned(layer)
    assert layer.state_dict()["weight_mask"].dtype is torch.bool
    mask = layer.weight_mask
    with torch.no_grad():
        layer.weight_orig.fill_(2.0)
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)
    assert layer.weight is parameter
    assert torch.equal(layer.weight, 2.0 * mask)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_compute_mask_is_the_mask_within_the_default() -> None:
    layer, default = nn.Linear(6, 4), torch.zeros(4, 6)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    default[:2] = 1.0
    expected = itop.mask.clone()
    expected[2:] = False
    assert torch.equal(itop.compute_mask(layer.weight, default), expected)


# --- a mask that is given ------------------------------------------------------------------------


def test_a_given_mask_is_copied() -> None:
    layer, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    given = mask.clone()
    assert torch.equal(ITOP.apply(layer, "weight", given).mask, mask)
    given.fill_(False)
    assert torch.equal(layer.weight_mask, mask)


def test_a_given_mask_may_be_of_numbers() -> None:
    itop = ITOP.apply(nn.Linear(3, 1), "weight", torch.tensor([[1.0, 0.0, 2.0]]))
    assert itop.mask.tolist() == [[True, False, True]]


def test_a_given_mask_that_does_not_fit_is_refused_and_the_layer_stays() -> None:
    layer = nn.Linear(6, 4, bias=False)
    shapes = r"mask of weight has shape \(6, 4\), the parameter shape \(4, 6\)"
    with pytest.raises(ValueError, match=shapes):
        ITOP.apply(layer, "weight", torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"bias of Linear can't be masked: this Linear has none"):
        ITOP.apply(layer, "bias", torch.ones(4))
    with pytest.raises(NotImplementedError):
        ITOP.apply(layer, "weight", torch.ones(4, 6, device="meta"))
    assert type(layer) is nn.Linear
    assert itop_prune.find_masks(layer) == {}

    ITOP.apply(layer, "weight", torch.ones(4, 6))
    again = r"weight of Linear can't be masked: it has a mask already"
    with pytest.raises(ValueError, match=again):
        ITOP.apply(layer, "weight", torch.ones(4, 6))


def test_a_placed_mask_leaves_the_parameter_and_its_own_values_to_what_is_loaded() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameter, before = layer.weight, layer.weight.detach().clone()
    itop = ITOP.place(layer, "weight")
    assert itop_prune.find_masks(layer) == {"weight": itop}
    assert itop.parameter is parameter
    assert torch.equal(itop.parameter, before)
    assert (itop.mask.dtype, itop.mask.shape) == (torch.bool, before.shape)
    assert itop.mask.stride() == before.stride()


# --- found and removed ---------------------------------------------------------------------------


def test_find_masks_gives_what_apply_gave_and_of_a_copy_those_of_the_copy() -> None:
    model = convnet()
    masks = itop_prune.apply(model, 0.7)
    assert itop_prune.find_masks(model) == masks
    found = itop_prune.find_masks(torch.optim.swa_utils.AveragedModel(model))
    assert list(found) == list(masks)
    assert not any(found[name].mask is itop.mask for name, itop in masks.items())


def test_the_repr_counts_until_the_mask_is_removed() -> None:
    layer = nn.Linear(100, 40)
    itop = itop_prune.apply(layer, 0.7)["weight"]
    assert repr(itop) == "ITOP(Linear.weight, 1,200 of 4,000 active)"
    itop_prune.remove(layer)
    assert repr(itop) == "ITOP(Linear.weight, removed)"


def test_remove_leaves_no_mask_and_of_a_dense_model_takes_nothing() -> None:
    model = mlp()
    for _ in range(2):
        itop_prune.remove(model)
        assert itop_prune.find_masks(model) == {}
        assert list(model.state_dict()) == list(mlp().state_dict())
        itop_prune.apply(model, 0.5)
    itop_prune.remove(model)
    assert sum(itop.active for itop in itop_prune.apply(model, 0.75).values()) == 140


def test_an_optimizer_goes_on_after_remove() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    itop_prune.apply(model, 0.5)
    train(model, optimizer, steps=range(2))
    itop_prune.remove(model)
    before = model[0].weight.detach().clone()
    train(model, optimizer, steps=range(1))
    assert not torch.equal(model[0].weight, before)


# --- what DistributedDataParallel leaves out -----------------------------------------------------

IGNORED = "_ddp_params_and_buffers_to_ignore"


def test_ddp_keeps_what_the_user_told_it_to_ignore() -> None:
    model = mlp()
    model.register_buffer("attn_mask", torch.ones(2))
    setattr(model, IGNORED, ["attn_mask"])
    itop_prune.apply(model, 0.5, include="0")
    assert getattr(model, IGNORED) == ["0.weight_mask", "attn_mask"]
    itop_prune.remove(model)
    assert getattr(model, IGNORED) == ["attn_mask"]


def test_ddp_ignores_masks_in_parts_compiled_one_by_one_by_the_names_that_it_sees() -> None:
    model = mlp()
    model[0] = torch.compile(model[0])
    itop_prune.apply(model, 0.5, include="0")
    assert getattr(model, IGNORED) == ["0._orig_mod.weight_mask"]
    buffers = [name for name, _ in model.named_buffers() if name.endswith("_mask")]
    assert buffers == getattr(model, IGNORED)


class Forwarding(nn.Module):
    """A wrapper that has the attributes of its model, as PEFT's PeftModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


@pytest.mark.parametrize("applied_to", ["model", "wrapper"])
def test_masks_are_removed_from_a_wrapper_that_forwards_attributes(applied_to: str) -> None:
    model = mlp()
    wrapper = Forwarding(model)
    itop_prune.apply(model if applied_to == "model" else wrapper, 0.5)
    itop_prune.remove(wrapper)
    assert itop_prune.find_masks(wrapper) == {}
    assert list(model.state_dict()) == list(mlp().state_dict())
    itop_prune.apply(wrapper, 0.5)
    assert vars(wrapper)[IGNORED] == [f"base_model.{index}.weight_mask" for index in (0, 2, 4)]
