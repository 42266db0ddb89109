"""A masked layer: its weight is current for every reader, and the layer stays what it was in every other way."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.toys import batch, convnet, mlp, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import itop_prune
from itop_prune.layers.masked_layer import masked_names, pass_dense_gradient
from itop_prune.sharding import zero_off_mask


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def masked(layer: nn.Module, density: float = 0.5) -> nn.Module:
    itop_prune.apply(layer, 1.0 - density)
    return layer


def test_the_weight_is_mask_times_parameter() -> None:
    layer = masked(nn.Linear(6, 4))
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_the_weight_follows_an_in_place_change_of_the_parameter() -> None:
    layer = masked(nn.Linear(6, 4))
    with torch.no_grad():
        layer.weight_orig.fill_(3.0)
    assert torch.equal(layer.weight, 3.0 * layer.weight_mask)


def test_the_weight_follows_an_in_place_change_of_the_mask() -> None:
    layer = masked(nn.Linear(6, 4))
    layer.weight_mask.fill_(False)
    assert not layer.weight.any()


def test_the_weight_carries_a_masked_gradient() -> None:
    layer = masked(nn.Linear(6, 4))
    layer.weight.sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask.float())


def test_a_parent_that_reads_the_weight_sees_the_current_one() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight)

    model = masked(Parent())
    with torch.no_grad():
        model.qkv.weight_orig.normal_()
    x = torch.randn(3, 6)
    assert torch.equal(model(x), x @ (model.qkv.weight_orig * model.qkv.weight_mask).T)


@pytest.mark.parametrize(
    "value", [torch.zeros(4, 6), nn.Parameter(torch.zeros(4, 6)), None], ids=["t", "p", "None"]
)
def test_assigning_the_weight_raises_and_says_what_to_do(value: object) -> None:
    layer = masked(nn.Linear(6, 4))
    with pytest.raises(
        RuntimeError, match=r"weight of a masked Linear .*write into weight_orig, or call .*remove"
    ):
        layer.weight = value


@pytest.mark.parametrize(
    "value", [torch.zeros(4, 6), nn.Parameter(torch.zeros(4, 6))], ids=["tensor", "Parameter"]
)
def test_a_failed_assignment_changes_nothing(value: Tensor) -> None:
    layer = masked(nn.Linear(6, 4))
    before, keys = layer.weight.detach().clone(), list(layer.state_dict())
    with pytest.raises(RuntimeError):
        layer.weight = value
    assert torch.equal(layer.weight, before)
    assert list(layer.state_dict()) == keys


def test_other_parameters_can_be_assigned() -> None:
    layer = masked(nn.Linear(6, 4))
    bias = nn.Parameter(torch.ones(4))
    layer.bias = bias
    assert layer.bias is bias


def test_class_name_module_and_kind_stay() -> None:
    layer = masked(nn.Conv2d(3, 4, 3))
    cls = type(layer)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (
        "Conv2d",
        "Conv2d",
        "torch.nn.modules.conv",
    )
    assert isinstance(layer, nn.Conv2d)


def test_the_repr_is_that_of_the_dense_layer() -> None:
    assert repr(masked(nn.Conv2d(3, 4, 3))) == repr(nn.Conv2d(3, 4, 3))


def test_layers_of_one_class_share_one_class_when_masked() -> None:
    assert type(masked(nn.Linear(6, 4))) is type(masked(nn.Linear(8, 2)))


def test_masking_a_layer_leaves_its_siblings_class_alone() -> None:
    masked(nn.Linear(6, 4))
    assert type(nn.Linear(6, 4)) is nn.Linear


def test_masked_names_of_a_dense_layer_are_none() -> None:
    assert masked_names(nn.Linear(6, 4)) == ()


def test_two_masks_on_one_layer() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
    itop_prune.apply(layer, 0.5, exclude="out_proj.weight")
    assert masked_names(layer) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def test_taking_one_of_two_masks_away_leaves_the_other() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
    itop_prune.apply(layer, 0.5)
    prune.remove(layer, "k_proj_weight")
    assert masked_names(layer) == ("q_proj_weight", "v_proj_weight")
    assert torch.equal(layer.q_proj_weight, layer.q_proj_weight_orig * layer.q_proj_weight_mask)


def test_taking_the_mask_away_gives_the_class_back() -> None:
    layer = masked(nn.Linear(6, 4))
    prune.remove(layer, "weight")
    assert type(layer) is nn.Linear


@copies
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
def test_a_copy_computes_the_same(copied: Callable[[nn.Module], nn.Module], steps: int) -> None:
    model = masked(mlp())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=range(steps))
    x, _ = batch(0, 20)
    assert torch.equal(copied(model)(x), model(x))


@copies
def test_a_copy_has_the_same_masks(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = masked(mlp())
    masks, others = itop_prune.find_masks(model), itop_prune.find_masks(copied(model))
    assert list(others) == list(masks)
    assert all(torch.equal(others[name].mask, itop.mask) for name, itop in masks.items())


@copies
def test_a_copy_is_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = masked(mlp())
    other = copied(model)
    before = copy.deepcopy(other.state_dict())
    with torch.no_grad():
        for itop in itop_prune.find_masks(model).values():
            itop.parameter.fill_(1.0)
            itop.mask.fill_(True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@copies
def test_masks_of_a_copy_are_masks_of_the_copy(copied: Callable[[nn.Module], nn.Module]) -> None:
    other = copied(masked(mlp()))
    for itop in itop_prune.find_masks(other).values():
        itop.mask.fill_(False)
    assert not any(layer.weight.any() for layer in other if isinstance(layer, nn.Linear))


@copies
def test_a_copy_is_of_the_same_class(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = masked(mlp())
    assert type(copied(model)[0]) is type(model[0])


@copies
def test_a_copy_can_have_its_masks_removed(copied: Callable[[nn.Module], nn.Module]) -> None:
    other = copied(masked(mlp()))
    itop_prune.remove(other)
    assert list(other.state_dict()) == list(mlp().state_dict())


@copies
def test_a_copy_taken_while_the_dense_gradient_is_listened_for_does_not_listen(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    layer = masked(nn.Linear(6, 4))
    pass_dense_gradient(layer, "weight", on=True)
    other = copied(layer)
    other.weight.sum().backward()
    assert torch.equal(other.weight_orig.grad, other.weight_mask.float())


@copies
def test_copying_does_not_stop_the_original_from_listening(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    layer = masked(nn.Linear(6, 4))
    pass_dense_gradient(layer, "weight", on=True)
    copied(layer)
    layer.weight.sum().backward()
    assert layer.weight_orig.grad.all()


@pytest.mark.parametrize("with_copy", [False, True], ids=["alone", "beside a copy"])
def test_a_copy_that_trains_does_not_drive_the_original(with_copy: bool) -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    seen: list[Tensor] = []

    def spy(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=2, every=1, grow=spy)
    x, y = batch(0, 20)
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    F.cross_entropy(twin(x), y).backward()
    if with_copy:
        F.cross_entropy(copy.deepcopy(model)(10 * x), y).backward()
    F.cross_entropy(model(x), y).backward()
    if with_copy:
        F.cross_entropy(copy.deepcopy(model)(10 * x), y).backward()
    regrow.step()
    assert torch.allclose(seen[0], twin[0].weight.grad, atol=1e-6)


def test_the_dense_gradient_passes_when_asked_for() -> None:
    layer = masked(nn.Linear(6, 4))
    pass_dense_gradient(layer, "weight", on=True)
    layer.weight.sum().backward()
    assert torch.equal(layer.weight_orig.grad, torch.ones(4, 6))


def test_the_masked_gradient_is_back_afterwards() -> None:
    layer = masked(nn.Linear(6, 4))
    pass_dense_gradient(layer, "weight", on=True)
    pass_dense_gradient(layer, "weight", on=False)
    layer.weight.sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask.float())


def test_listening_does_not_change_the_output() -> None:
    layer, x = masked(nn.Linear(6, 4)), torch.randn(3, 6)
    before = layer(x)
    pass_dense_gradient(layer, "weight", on=True)
    assert torch.equal(layer(x), before)


def test_a_dense_state_dict_loads_strictly() -> None:
    model, dense = masked(mlp()), mlp(seed=1)
    model.load_state_dict(dense.state_dict(), strict=True)
    for name, itop in itop_prune.find_masks(model).items():
        assert torch.equal(itop.parameter, dense.get_parameter(name) * itop.mask)


def test_a_dense_state_dict_leaves_the_masks() -> None:
    model = masked(mlp())
    before = {name: itop.mask.clone() for name, itop in itop_prune.find_masks(model).items()}
    model.load_state_dict(mlp(seed=1).state_dict())
    assert all(
        torch.equal(itop.mask, before[name]) for name, itop in itop_prune.find_masks(model).items()
    )


def test_a_dense_state_dict_is_not_changed_by_loading_it() -> None:
    dense = mlp(seed=1).state_dict()
    before = copy.deepcopy(dense)
    masked(mlp()).load_state_dict(dense)
    assert list(dense) == list(before)
    assert all(torch.equal(dense[name], before[name]) for name in before)


def test_a_dense_state_dict_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_orig: .*\[4, 7\].*\[4, 6\]"):
        masked(nn.Linear(6, 4)).load_state_dict(nn.Linear(7, 4).state_dict())


def test_a_sparse_state_dict_brings_its_masks() -> None:
    model, other = masked(mlp()), mlp(seed=1)
    itop_prune.apply(other, 0.7, seed=1)
    model.load_state_dict(other.state_dict())
    x, _ = batch(0, 20)
    assert torch.equal(model(x), other(x))


def test_weights_off_the_mask_are_zero_after_loading_a_state_dict_that_is_not_clean() -> None:
    layer = masked(nn.Linear(6, 4))
    state = {**layer.state_dict(), "weight_orig": torch.ones(4, 6)}
    layer.load_state_dict(state)
    assert torch.equal(layer.weight_orig, layer.weight_mask.float())


def test_float_masks_of_torch_pruning_load() -> None:
    stock, layer = nn.Linear(6, 4), masked(nn.Linear(6, 4), density=0.3)
    prune.random_unstructured(stock, "weight", 0.5)
    layer.load_state_dict(stock.state_dict())
    assert layer.weight_mask.dtype is torch.bool
    assert torch.equal(layer.weight, stock.weight_orig * stock.weight_mask)


def test_a_state_dict_without_the_weight_is_reported() -> None:
    layer = masked(nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_orig"):
        layer.load_state_dict({"bias": torch.zeros(4)})


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_loading_keeps_parameter_and_mask_objects(dense: bool) -> None:
    layer = masked(nn.Linear(6, 4))
    parameter, mask, place = layer.weight_orig, layer.weight_mask, layer.weight_mask.data_ptr()
    other = nn.Linear(6, 4)
    layer.load_state_dict((other if dense else masked(other)).state_dict())
    assert layer.weight_orig is parameter
    assert layer.weight_mask is mask
    assert mask.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_reaches_the_weight_and_not_the_mask(dtype: torch.dtype) -> None:
    layer = masked(nn.Linear(6, 4)).to(dtype)
    assert layer.weight.dtype is dtype
    assert layer.weight_mask.dtype is torch.bool


@pytest.mark.parametrize("method", ["half", "double", "bfloat16"])
def test_a_cast_by_name_keeps_the_values(method: str) -> None:
    layer = masked(nn.Linear(6, 4))
    expected = getattr(layer.weight.detach().clone(), method)()
    assert torch.equal(getattr(layer, method)().weight, expected)


def test_a_cast_model_still_runs() -> None:
    model = masked(mlp()).to(torch.bfloat16)
    assert model(torch.randn(3, 20, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_masks_found_before_a_cast_are_current_after_it() -> None:
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    layer.to(torch.float64)
    assert itop.parameter is layer.weight_orig
    assert itop.mask is layer.weight_mask


def test_a_channels_last_weight_stays_channels_last() -> None:
    model = masked(convnet().to(memory_format=torch.channels_last))
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_off_mask_writes_zero_over_anything_and_leaves_the_rest(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    tensor = torch.tensor([1.0, nan, inf, -2.0, -0.0, nan, -inf], dtype=dtype)
    zero_off_mask(tensor, torch.tensor([1, 0, 0, 0, 1, 1, 1]).bool())
    assert [str(value) for value in tensor.tolist()] == [
        "1.0",
        "0.0",
        "0.0",
        "0.0",
        "-0.0",
        "nan",
        "-inf",
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_zero_off_mask_takes_statistics_that_are_no_floating_point_numbers(
    dtype: torch.dtype,
) -> None:
    tensor = torch.ones(3, dtype=dtype)
    zero_off_mask(tensor, torch.tensor([True, False, True]))
    assert tensor.tolist() == [1, 0, 1]


def test_zero_off_mask_goes_by_position_in_whatever_memory_format() -> None:
    tensor, mask = torch.randn(4, 5, 3, 3), torch.rand(4, 5, 3, 3) < 0.5
    expected = torch.where(mask, tensor, 0.0)
    for other in (tensor.clone(), tensor.contiguous(memory_format=torch.channels_last)):
        zero_off_mask(other, mask)
        assert torch.equal(other, expected)


@pytest.mark.filterwarnings(
    "ignore"
)  # tracing is deprecated, and what exporters to other runtimes still do
def test_a_masked_layer_can_be_traced_and_the_trace_follows_the_mask() -> None:
    layer, x = masked(nn.Linear(6, 4)), torch.randn(2, 6)
    traced = torch.jit.trace(layer, x)
    for itop in itop_prune.find_masks(layer).values():
        itop.mask.zero_()
    assert torch.equal(traced(x), layer(x))


def test_torch_func_works_on_the_steps_that_listen_too() -> None:
    layer = nn.Linear(4, 3)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    x = torch.randn(5, 4)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    sparse = torch.func.grad(loss)(parameters)["weight_orig"]
    itop.listen()
    listening = torch.func.grad(loss)(parameters)["weight_orig"]
    assert torch.equal(listening, sparse)
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))
