"""A masked layer stays what it was in every way but its weight; invariants are in promises/."""

import copy

import pytest
import torch
from helpers.toys import batch, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import itop_prune
from itop_prune.layers.masked_layer import masked_names
from itop_prune.sharding import zero_off_mask


def masked(layer: nn.Module, density: float = 0.5) -> nn.Module:
    itop_prune.apply(layer, 1.0 - density)
    return layer


# --- what stays ----------------------------------------------------------------------------------


def test_class_name_module_and_kind_stay() -> None:
    cls = type(masked(nn.Conv2d(3, 4, 3)))
    assert issubclass(cls, nn.Conv2d)
    assert (cls.__name__, cls.__qualname__) == ("Conv2d", "Conv2d")
    assert cls.__module__ == "torch.nn.modules.conv"


def test_masked_layers_of_one_class_share_a_class_and_leave_the_dense_ones_alone() -> None:
    assert type(masked(nn.Linear(6, 4))) is type(masked(nn.Linear(8, 2)))
    assert type(nn.Linear(6, 4)) is nn.Linear


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_the_class_of_a_masked_layer_makes_dense_layers(storage: str) -> None:
    layer = nn.Conv2d(3, 4, 3)
    itop_prune.apply(layer, 0.5, storage=storage)
    other = type(layer)(2, 5, kernel_size=1, bias=False)
    assert type(other) is nn.Conv2d
    assert [name for name, _ in other.named_parameters()] == ["weight"]


@pytest.mark.parametrize("value", [torch.zeros(4, 6), nn.Parameter(torch.zeros(4, 6)), None])
def test_assigning_the_weight_raises_and_changes_nothing(value: Tensor | None) -> None:
    layer = masked(nn.Linear(6, 4))
    before, keys = layer.weight.detach().clone(), list(layer.state_dict())
    message = r"weight of a masked Linear .*write into weight_orig, or call .*remove"
    with pytest.raises(RuntimeError, match=message):
        layer.weight = value
    assert torch.equal(layer.weight, before)
    assert list(layer.state_dict()) == keys


def test_other_parameters_can_be_assigned() -> None:
    layer, bias = masked(nn.Linear(6, 4)), nn.Parameter(torch.ones(4))
    layer.bias = bias
    assert layer.bias is bias


def test_several_masks_on_one_layer_come_and_go_one_by_one() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
    assert masked_names(layer) == ()
    itop_prune.apply(layer, 0.5, exclude="out_proj.weight")
    assert masked_names(layer) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    prune.remove(layer, "k_proj_weight")
    assert masked_names(layer) == ("q_proj_weight", "v_proj_weight")
    assert torch.equal(layer.q_proj_weight, layer.q_proj_weight_orig * layer.q_proj_weight_mask)


# --- copies --------------------------------------------------------------------------------------


def test_a_copy_can_have_its_masks_removed() -> None:
    other = copy.deepcopy(masked(mlp()))
    itop_prune.remove(other)
    assert list(other.state_dict()) == list(mlp().state_dict())


def test_a_copy_that_trains_does_not_drive_the_original() -> None:
    model, seen = mlp(), []
    masks = itop_prune.apply(model, 0.5)

    def spy(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=2, every=1, grow=spy)
    x, y = batch(0, 20)
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    F.cross_entropy(twin(x), y).backward()

    F.cross_entropy(copy.deepcopy(model)(10 * x), y).backward()
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(copy.deepcopy(model)(10 * x), y).backward()
    regrow.step()
    assert torch.allclose(seen[0], twin[0].weight.grad, atol=1e-6)


# --- loading -------------------------------------------------------------------------------------


def test_a_dense_state_dict_loads_strictly_under_the_masks_and_is_left_as_it_was() -> None:
    model, dense = masked(mlp()), mlp(seed=1).state_dict()
    masks = itop_prune.find_masks(model)
    before, given = {name: itop.mask.clone() for name, itop in masks.items()}, copy.deepcopy(dense)
    model.load_state_dict(dense, strict=True)
    for name, itop in masks.items():
        assert torch.equal(itop.mask, before[name])
        assert torch.equal(itop.parameter, given[name] * itop.mask)
    assert list(dense) == list(given)
    assert all(torch.equal(dense[name], given[name]) for name in given)


def test_a_sparse_state_dict_brings_its_masks() -> None:
    model, other = masked(mlp()), mlp(seed=1)
    itop_prune.apply(other, 0.7, seed=1)
    model.load_state_dict(other.state_dict())
    x, _ = batch(0, 20)
    assert torch.equal(model(x), other(x))


def test_float_masks_of_torch_pruning_load() -> None:
    stock, layer = nn.Linear(6, 4), masked(nn.Linear(6, 4), density=0.3)
    prune.random_unstructured(stock, "weight", 0.5)
    layer.load_state_dict(stock.state_dict())
    assert layer.weight_mask.dtype is torch.bool
    assert torch.equal(layer.weight, stock.weight_orig * stock.weight_mask)


def test_a_state_dict_that_does_not_fit_is_refused_as_torch_does() -> None:
    layer = masked(nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_orig: .*\[4, 7\].*\[4, 6\]"):
        layer.load_state_dict(nn.Linear(7, 4).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_orig"):
        layer.load_state_dict({"bias": torch.zeros(4)})


# --- casts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["half", "double", "bfloat16"])
def test_a_cast_reaches_the_weight_and_not_the_mask(method: str) -> None:
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    expected = getattr(layer.weight.detach().clone(), method)()
    getattr(layer, method)()
    assert torch.equal(layer.weight, expected)
    assert layer.weight_mask.dtype is torch.bool
    assert itop.parameter is layer.weight_orig
    assert itop.mask is layer.weight_mask


# --- zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_off_mask_writes_zero_over_anything_and_leaves_the_rest(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    tensor = torch.tensor([1.0, nan, inf, -2.0, -0.0, nan, -inf], dtype=dtype)
    zero_off_mask(tensor, torch.tensor([1, 0, 0, 0, 1, 1, 1]).bool())
    expected = ["1.0", "0.0", "0.0", "0.0", "-0.0", "nan", "-inf"]
    assert [str(value) for value in tensor.tolist()] == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_zero_off_mask_takes_whole_numbers_too(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, dtype=dtype)
    zero_off_mask(tensor, torch.tensor([True, False, True]))
    assert tensor.tolist() == [1, 0, 1]


def test_zero_off_mask_goes_by_position_in_whatever_memory_format() -> None:
    tensor, mask = torch.randn(4, 5, 3, 3), torch.rand(4, 5, 3, 3) < 0.5
    other = tensor.contiguous(memory_format=torch.channels_last)
    zero_off_mask(other, mask)
    assert torch.equal(other, torch.where(mask, tensor, 0.0))


# --- traces and transforms -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch deprecates tracing; some exporters still trace
def test_a_trace_follows_the_mask() -> None:
    layer, x = masked(nn.Linear(6, 4)), torch.randn(2, 6)
    traced = torch.jit.trace(layer, x)
    layer.weight_mask.zero_()
    assert torch.equal(traced(x), layer(x))


def test_torch_func_works_on_steps_that_collect_the_dense_gradient_too() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    sparse = torch.func.grad(loss)(parameters)["weight_orig"]
    itop.collect_dense_gradient()
    assert torch.equal(torch.func.grad(loss)(parameters)["weight_orig"], sparse)
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))
