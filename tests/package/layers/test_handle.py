"""A mask is on its parameter as given, found again, and baked in; everything else of the model stays what it was."""

import copy

import pytest
import torch
from helpers.toys import batch, convnet, mlp, train
from torch import nn
from torch.nn.utils import prune

import itop_prune
from itop_prune import ITOP


def test_a_mask_is_a_bool_buffer_of_the_state_dict() -> None:
    model = mlp()
    itop_prune.apply(model, 0.7)
    assert model.state_dict()["2.weight_mask"].dtype is torch.bool


def test_a_channels_last_convolution_keeps_its_memory_format() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    itop = itop_prune.apply(model, 0.7)["3.weight"]
    assert itop.parameter.is_contiguous(memory_format=torch.channels_last)
    assert itop.mask.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_computes_with_its_masked_weights(mode: str) -> None:
    attention, twin = (
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.MultiheadAttention(8, 2, batch_first=True),
    )
    masks = itop_prune.apply(attention, 0.6)
    assert list(masks) == ["in_proj_weight", "out_proj.weight"]
    twin.load_state_dict(itop_prune.dense_state_dict(attention))
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(mode == "train"):
        outputs = [layer.train(mode == "train")(x, x, x)[0] for layer in (attention, twin)]
    assert torch.allclose(*outputs, atol=1e-6)


def test_attention_reacts_to_a_change_of_its_parameter() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    masks = itop_prune.apply(attention, 0.6)
    before = attention(x, x, x)[0]
    with torch.no_grad():
        masks["in_proj_weight"].parameter.mul_(2.0)
    assert not torch.allclose(attention(x, x, x)[0], before)


def test_torch_says_the_model_is_pruned() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    assert prune.is_pruned(model)


def test_the_method_is_the_forward_pre_hook_that_torch_prune_looks_for() -> None:
    """It can be found as torch finds it: `prune.remove` only works where a hook of that kind names the tensor."""
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    assert isinstance(itop, prune.BasePruningMethod)
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)


def test_prune_remove_bakes_the_mask_in() -> None:
    layer = nn.Linear(6, 4)
    itop_prune.apply(layer, 0.5)
    with torch.no_grad():
        layer.weight_orig.fill_(2.0)
    mask = layer.weight_mask
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight, 2.0 * mask)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_prune_remove_keeps_the_parameter_object() -> None:
    layer = nn.Linear(6, 4)
    parameter = layer.weight
    itop_prune.apply(layer, 0.5)
    prune.remove(layer, "weight")
    assert layer.weight is parameter


def test_remove_gives_names_classes_and_order_back() -> None:
    model, dense = convnet(), convnet()
    itop_prune.apply(model, 0.7)
    itop_prune.remove(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [type(module) for module in model] == [type(module) for module in dense]


def test_remove_keeps_the_outputs() -> None:
    model, x = convnet().eval(), batch(0, 3, 8, 8)[0]
    itop_prune.apply(model, 0.7)
    before = model(x)
    itop_prune.remove(model)
    assert torch.equal(model(x), before)


def test_remove_leaves_no_mask_to_be_found() -> None:
    model = convnet()
    itop_prune.apply(model, 0.7)
    itop_prune.remove(model)
    assert itop_prune.find_masks(model) == {}
    assert not prune.is_pruned(model)


def test_remove_of_a_dense_model_does_nothing() -> None:
    model = mlp()
    itop_prune.remove(model)
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_removed_model_can_be_masked_again() -> None:
    model = mlp()
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


def test_find_masks_gives_what_apply_gave() -> None:
    model = convnet()
    masks = itop_prune.apply(model, 0.7)
    assert itop_prune.find_masks(model) == masks


def test_find_masks_of_an_averaged_model_are_those_of_the_copy() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    found = itop_prune.find_masks(torch.optim.swa_utils.AveragedModel(model))
    assert list(found) == list(masks)
    assert not any(found[name].mask is itop.mask for name, itop in masks.items())


def test_a_weight_stays_sparse_while_it_trains() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    train(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        steps=range(5),
    )
    assert not any(itop.parameter[~itop.mask].any() for itop in masks.values())


def test_a_given_mask_is_applied_as_it_is() -> None:
    layer, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    assert torch.equal(ITOP.apply(layer, "weight", mask).mask, mask)


def test_a_given_mask_is_copied() -> None:
    layer, mask = nn.Linear(6, 4), torch.ones(4, 6, dtype=torch.bool)
    ITOP.apply(layer, "weight", mask)
    mask.fill_(False)
    assert layer.weight_mask.all()


def test_a_given_mask_may_be_of_numbers() -> None:
    layer = nn.Linear(3, 1)
    itop = ITOP.apply(layer, "weight", torch.tensor([[1.0, 0.0, 2.0]]))
    assert itop.mask.tolist() == [[True, False, True]]


def test_a_given_mask_of_another_shape_is_refused() -> None:
    layer = nn.Linear(6, 4)
    with pytest.raises(
        ValueError, match=r"mask of weight has shape \(6, 4\), the parameter shape \(4, 6\)"
    ):
        ITOP.apply(layer, "weight", torch.ones(6, 4))
    assert type(layer) is nn.Linear


def test_a_given_mask_of_a_bias_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias of Linear can't be masked: this Linear has none"):
        ITOP.apply(nn.Linear(6, 4, bias=False), "bias", torch.ones(4))


def test_a_placed_mask_leaves_the_parameter_and_its_own_values_to_what_is_loaded() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameter, before = layer.weight, layer.weight.detach().clone()
    itop = ITOP.place(layer, "weight")
    assert itop_prune.find_masks(layer) == {"weight": itop}
    assert itop.parameter is parameter
    assert torch.equal(itop.parameter, before)
    assert (itop.mask.dtype, itop.mask.shape, itop.mask.stride()) == (
        torch.bool,
        before.shape,
        before.stride(),
    )


def test_a_given_mask_on_a_masked_weight_is_refused() -> None:
    layer = nn.Linear(6, 4)
    ITOP.apply(layer, "weight", torch.ones(4, 6))
    with pytest.raises(
        ValueError, match=r"weight of Linear can't be masked: it has a mask already"
    ):
        ITOP.apply(layer, "weight", torch.ones(4, 6))


def test_the_repr_counts() -> None:
    masks = itop_prune.apply(nn.Linear(100, 40), 0.7)
    assert repr(masks["weight"]) == "ITOP(Linear.weight, 1,200 of 4,000 active)"


def test_what_was_planned_on_the_meta_device_goes_with_the_mask() -> None:
    model = mlp().to("meta")
    itop_prune.apply(model, 0.5)
    itop_prune.remove(model)
    model.to_empty(device="cpu")
    masks = itop_prune.apply(model, 0.75, "uniform")
    assert sum(itop.active for itop in masks.values()) == 140
    assert model(torch.zeros(3, 20)).shape == (3, 4)


def test_masks_of_the_meta_device_are_not_trained() -> None:
    model = mlp().to("meta")
    masks = itop_prune.apply(model, 0.7)
    assert model(torch.empty(3, 20, device="meta")).shape == (3, 4)  # a look ahead works
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"was made on the meta device.*build the model on a real device"
    ):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5)


def test_masks_moved_from_the_meta_device_without_positions_do_not_even_compute() -> None:
    model = mlp().to("meta")
    masks = itop_prune.apply(model, 0.7)
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())  # dense weights bring no positions
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for use in (
        lambda: itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5),
        lambda: model(torch.ones(3, 20)),
        lambda: copy.deepcopy(model)(torch.ones(3, 20)),
    ):
        with pytest.raises(RuntimeError, match="was made on the meta device"):
            use()


@pytest.mark.parametrize("how", ["assign", "to_empty", "load"])
def test_a_model_of_the_meta_device_that_got_its_positions_from_a_state_dict_is_trained(
    how: str,
) -> None:
    model, saved = mlp().to("meta"), mlp()
    itop_prune.apply(saved, 0.8)
    masks = itop_prune.apply(model, 0.7)
    if how != "assign":
        model.to_empty(device="cpu")
    if how == "load":
        itop_prune.load(model, saved.state_dict())
    else:
        model.load_state_dict(saved.state_dict(), assign=how == "assign")
    assert itop_prune.summarize(model).active == 112
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5)
    train(model, optimizer, regrow)
    assert regrow.updates == 2


def test_compute_mask_is_the_mask_within_the_default() -> None:
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    default = torch.zeros(4, 6)
    default[:2] = 1.0
    expected = itop.mask.clone()
    expected[2:] = False
    assert torch.equal(itop.compute_mask(layer.weight, default), expected)


def test_ddp_keeps_what_the_user_told_it_to_ignore() -> None:
    model = mlp()
    model.register_buffer("attn_mask", torch.ones(2))
    key = "_ddp_params_and_buffers_to_ignore"
    setattr(model, key, ["attn_mask"])
    itop_prune.apply(model, 0.5, include="0")
    assert getattr(model, key) == ["0.weight_mask", "attn_mask"]
    itop_prune.remove(model)
    assert getattr(model, key) == ["attn_mask"]


def test_ddp_is_told_of_masks_in_parts_compiled_one_by_one_by_the_names_that_it_sees() -> None:
    model, key = mlp(), "_ddp_params_and_buffers_to_ignore"
    model[0] = torch.compile(model[0])
    itop_prune.apply(model, 0.5, include="0")
    assert getattr(model, key) == ["0._orig_mod.weight_mask"]
    assert [name for name, _ in model.named_buffers() if name.endswith("_mask")] == getattr(
        model, key
    )


def test_a_mask_that_was_removed_says_so() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5, include="0")
    itop_prune.remove(model)
    assert repr(masks) == "{'0.weight': ITOP(Linear.weight, removed)}"


def test_a_given_mask_that_has_no_values_leaves_the_layer_as_it_was() -> None:
    layer = nn.Linear(6, 4)
    with pytest.raises(NotImplementedError):
        ITOP.apply(layer, "weight", torch.ones(4, 6, device="meta"))
    assert itop_prune.find_masks(layer) == {}
    assert isinstance(layer.weight, nn.Parameter)
