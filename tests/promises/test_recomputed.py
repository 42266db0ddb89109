"""Layers that compute another weight from theirs, mix kernels, or read weights from a list."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from helpers.sparse_run import apply, dense
from helpers.storages import both_storages
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import itop_prune
from itop_prune.layers import STANDARDIZED as STANDARDIZED_NAMES
from itop_prune.methods import distributions

pytestmark = [
    both_storages,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

STANDARDIZED = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
standardized = pytest.mark.parametrize("kind", STANDARDIZED)


def filters(
    kind: Callable[..., nn.Conv2d], density: float = 0.4, seed: int = 0
) -> tuple[nn.Conv2d, itop_prune.ITOP]:
    """A masked standardized convolution of 6 filters with 5 channels, of a mean that is not 0."""
    torch.manual_seed(seed)
    layer = kind(5, 6, 3)
    with torch.no_grad():
        layer.weight.add_(0.1)
    return layer, apply(layer, 1.0 - density)["weight"]


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 5, size, size, generator=torch.Generator().manual_seed(3))


def kernel_in_use(layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The kernel with which the layer calls torch's convolution."""
    seen: list[Tensor] = []
    convolution = F.conv2d

    def conv2d(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        seen.append(weight.detach())
        return convolution(x, weight, *others)

    with monkeypatch.context() as patched:
        patched.setattr(F, "conv2d", conv2d)
        layer(images().to(layer.weight.dtype))
    return seen[0]


def centred_by_hand(weight: Tensor, mask: Tensor) -> Tensor:
    """Each filter without the mean of its active weights, 0 elsewhere; filter by filter."""
    rows = []
    for row, keep in zip(weight, mask, strict=True):
        mean = row[keep].mean() if keep.any() else row.new_zeros(())
        rows.append(torch.where(keep, row - mean, row.new_zeros(())))
    return torch.stack(rows)


# --- weight standardization ----------------------------------------------------------------------


def assert_sparse(kernel: Tensor, mask: Tensor, tolerance: float = 1e-6) -> None:
    assert kernel[~mask].abs().max() < tolerance * kernel.abs().max()


@standardized
def test_the_weight_is_centred_and_the_kernel_in_use_is_sparse_and_of_unit_variance(
    kind: Callable[..., nn.Conv2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, itop = filters(kind)
    expected = centred_by_hand(dense(itop, itop.parameter), itop.mask)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert not layer.weight[~itop.mask].any()
    kernel = kernel_in_use(layer, monkeypatch)
    assert_sparse(kernel, itop.mask)
    variances = kernel.flatten(1).var(1, correction=0)
    expected = torch.full_like(variances, float(getattr(layer, "scale", 1.0)) ** 2)
    torch.testing.assert_close(variances, expected, rtol=0.01, atol=0)


def test_without_centring_the_kernel_in_use_would_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, itop = filters(StdConv2d)
    multiplied = dense(itop, itop.parameter) * itop.mask
    itop_prune.remove(layer)
    with torch.no_grad():
        layer.weight.copy_(multiplied)
    assert kernel_in_use(layer, monkeypatch).count_nonzero() == layer.weight.numel()


def test_a_class_derived_from_a_standardized_one_is_centred_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Special(StdConv2d):
        pass

    layer, itop = filters(Special)
    assert_sparse(kernel_in_use(layer, monkeypatch), itop.mask)


@standardized
def test_the_gradient_is_that_of_the_formula_and_zero_off_the_mask(
    kind: Callable[..., nn.Conv2d],
) -> None:
    layer, itop = filters(kind)
    twin, x = kind(5, 6, 3).double(), images().double()
    layer.double()
    leaf = dense(itop, itop.parameter).requires_grad_()
    torch.func.functional_call(
        twin,
        {**dict(layer.named_parameters()), "weight": centred_by_hand(leaf, itop.mask)},
        (x,),
        strict=False,
    ).square().sum().backward()
    layer(x).square().sum().backward()
    found = dense(itop, itop.parameter.grad)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-5)
    assert not found[~itop.mask].any()
    assert found.any()


@standardized
def test_the_dense_gradient_is_the_sparse_one_on_the_mask_and_says_what_a_grown_weight_would_do(
    kind: Callable[..., nn.Conv2d],
) -> None:
    layer, itop = filters(kind)
    layer(images()).square().sum().backward()
    sparse = itop.parameter.grad.clone()
    layer.zero_grad()
    itop.collect_dense_gradient()
    layer(images()).square().sum().backward()
    collected = itop.take_dense_gradient()
    torch.testing.assert_close(itop.parameter.grad, sparse)
    torch.testing.assert_close(collected * itop.mask, dense(itop, sparse))

    # The derivative of a position that joins n active ones is n / (n + 1) of the dense gradient.
    # The filter is centred first, so that a new weight of 0 changes nothing.
    mask = itop.mask.clone()
    i = tuple((~mask).nonzero()[7].tolist())
    n = int(mask[i[0]].sum())
    mask[i] = True
    itop.write_mask(itop.mask, mask)
    layer.zero_grad()
    layer(images()).square().sum().backward()
    found, expected = dense(itop, itop.parameter.grad)[i], collected[i] * n / (n + 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@standardized
def test_exported_weights_compute_the_same_in_a_plain_layer_and_loaded_again(
    kind: Callable[..., nn.Conv2d],
) -> None:
    layer, _ = filters(kind)
    twin, expected = kind(5, 6, 3), layer(images())
    twin.load_state_dict(itop_prune.dense_state_dict(layer), strict=True)
    assert torch.equal(twin(images()), expected)
    layer.load_state_dict(itop_prune.dense_state_dict(layer), strict=True)
    torch.testing.assert_close(layer(images()), expected)


@standardized
@pytest.mark.parametrize("remove", [itop_prune.remove, lambda layer: prune.remove(layer, "weight")])
def test_remove_leaves_the_effective_weights(
    kind: Callable[..., nn.Conv2d], remove: Callable
) -> None:
    layer, itop = filters(kind)
    expected, output = itop.weight, layer(images())
    remove(layer)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer(images()), output)


@standardized
@pytest.mark.parametrize("active", [0, 1])
def test_a_filter_with_less_than_two_active_weights_gives_no_signal_and_no_nan(
    kind: Callable[..., nn.Conv2d], active: int
) -> None:
    layer, itop = filters(kind)
    mask = itop.mask.clone()
    mask[2] = False
    mask[2].flatten()[:active] = True
    itop.write_mask(itop.mask, mask)
    output = layer(images())
    output.square().sum().backward()
    spread = output.detach()[:, 2]
    assert torch.equal(spread, spread[:, :1, :1].expand_as(spread))
    assert itop.parameter.grad.isfinite().all()


def test_magnitude_is_that_of_the_centred_weights() -> None:
    layer = StdConv2d(1, 1, (1, 4))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([9.0, 10.0, 10.1, 12.0]).view(1, 1, 1, 4))  # mean 10.275
    itop = apply(layer, 0.5, scores="magnitude")["weight"]
    assert itop.mask.flatten().tolist() == [True, False, False, True]


def test_pruning_by_magnitude_sees_the_centred_weights() -> None:
    layer, itop = filters(StdConv2d)
    seen: list[Tensor] = []

    def smallest(weight: Tensor) -> Tensor:
        seen.append(weight.clone())
        return weight.abs()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(
        {"weight": itop}, optimizer, total_steps=1, every=1, prune=smallest
    )
    layer(images()).square().sum().backward()
    optimizer.step()
    expected = centred_by_hand(dense(itop, itop.parameter), itop.mask)
    assert regrow.step()
    torch.testing.assert_close(seen[0], expected)


@standardized
def test_training_keeps_counts_zeros_and_a_sparse_kernel(
    kind: Callable[..., nn.Conv2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, itop = filters(kind)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    regrow = itop_prune.MaskScheduler(
        {"weight": itop}, optimizer, total_steps=8, every=2, grow="gradient"
    )
    active = itop.active
    for _ in range(8):
        layer(images()).square().sum().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    assert regrow.updates == 4
    assert itop.active == active
    assert not itop.parameter[~itop.used].any()
    assert_sparse(kernel_in_use(layer, monkeypatch), itop.mask)


@pytest.mark.parametrize("growth", ["random", "gradient"])
@standardized
def test_what_grows_into_a_filter_is_zero_in_use_and_what_stays_is_centred(
    kind: Callable[..., nn.Conv2d], growth: str
) -> None:
    layer, itop = filters(kind)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(
        {"weight": itop}, optimizer, total_steps=1, every=1, min_rate=0.4, grow=growth
    )
    layer(images()).square().sum().backward()
    optimizer.step()
    before, value = itop.mask.clone(), dense(itop, itop.parameter)
    assert regrow.step()
    grown, stayed = itop.mask & ~before, itop.mask & before
    assert grown.any()
    after = dense(itop, itop.parameter)
    assert not after[grown].any()
    assert itop.weight[grown].abs().max() < 1e-6
    torch.testing.assert_close(after, centred_by_hand(value, stayed))


@standardized
def test_in_bfloat16_kernels_are_sparse_to_its_rounding(
    kind: Callable[..., nn.Conv2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, itop = filters(kind)
    with torch.no_grad():
        itop.parameter.add_(0.3)
        itop.zero_off_mask()
    layer.bfloat16()
    kernel = kernel_in_use(layer, monkeypatch)
    assert kernel.dtype == torch.bfloat16
    assert_sparse(kernel, itop.mask, tolerance=0.003)


def test_a_standardized_network_can_be_traced() -> None:
    model = timm.create_model("test_nfnet", num_classes=4).eval()
    apply(model, 0.5)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_class_of_ones_own_is_centred_once_its_name_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Whitened(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.flatten(1)
            rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
            return F.conv2d(x, rows.view_as(self.weight), self.bias)

    monkeypatch.setattr(
        "itop_prune.layers.masked_layer.STANDARDIZED", STANDARDIZED_NAMES | {"Whitened"}
    )
    layer, itop = filters(Whitened)
    assert_sparse(kernel_in_use(layer, monkeypatch), itop.mask)


# --- kernels of several experts ------------------------------------------------------------------


def test_mixed_kernels_are_masked_and_counted_as_the_kernels_they_are() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def method(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
        seen.update(shapes)
        return distributions.erk(shapes, density)

    model = nn.ModuleList([CondConv2d(4, 6, (3, 5), num_experts=2), nn.Conv2d(4, 6, 3)])
    masks = apply(model, 0.5, method)
    assert seen == {"0.weight": (12, 4, 3, 5), "1.weight": (6, 4, 3, 3)}
    assert masks["0.weight"].mask.shape == (2, 6 * 4 * 3 * 5)


def test_a_model_with_mixed_kernels_is_covered() -> None:
    model = timm.create_model("efficientnet_cc_b0_4e", num_classes=4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masks = apply(model, 0.9)
    assert sum(itop.mask.numel() for itop in masks.values()) > 0.99 * parameters


# --- recurrent layers ----------------------------------------------------------------------------

RECURRENT = {
    "LSTM": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
    "LSTM, projected": lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True),
    "GRU": lambda: nn.GRU(6, 5, bias=False, batch_first=True),
    "RNN": lambda: nn.RNN(6, 5, batch_first=True),
}
recurrent = pytest.mark.parametrize("build", RECURRENT.values(), ids=RECURRENT)


def sequence() -> Tensor:
    return torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))


@recurrent
def test_all_matrices_of_a_recurrent_layer_are_masked_and_it_computes_as_its_twin(
    build: Callable[[], nn.RNNBase],
) -> None:
    layer, twin = build(), build()
    matrices = [key for key, parameter in layer.named_parameters() if parameter.ndim == 2]
    masks = apply(layer, 0.5)
    assert list(masks) == matrices
    twin.load_state_dict(itop_prune.dense_state_dict(layer))
    for one in (layer, twin):
        one(sequence())[0].square().sum().backward()
    expected = layer(sequence())[0]
    assert torch.equal(expected, twin(sequence())[0])
    for parameter, (key, other) in zip(layer.parameters(), twin.named_parameters(), strict=True):
        found, gradient = parameter.grad, other.grad
        if key in masks:
            found, gradient = dense(masks[key], found), gradient * masks[key].mask
        torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(layer.double()(sequence().double())[0], expected.double())


@recurrent
def test_a_copy_of_a_recurrent_layer_is_equal_and_independent(
    build: Callable[[], nn.RNNBase],
) -> None:
    layer = build()
    masks = apply(layer, 0.5)
    expected = layer(sequence())[0].detach()
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    with torch.no_grad():
        for itop in masks.values():
            itop.parameter.mul_(2.0)
    assert all(torch.equal(other(sequence())[0], expected) for other in copies)
    assert not torch.equal(layer(sequence())[0], expected)


@recurrent
def test_remove_leaves_a_recurrent_layer_that_reads_its_parameters(
    build: Callable[[], nn.RNNBase],
) -> None:
    layer = build()
    masks = apply(layer, 0.5)
    expected, first = layer(sequence())[0], next(iter(masks))
    prune.remove(layer, first)
    assert torch.equal(layer(sequence())[0], expected)
    itop_prune.remove(layer)
    assert torch.equal(layer(sequence())[0], expected)
    assert type(layer) in (nn.LSTM, nn.GRU, nn.RNN)
    with torch.no_grad():
        getattr(layer, first).add_(0.5)
    assert not torch.equal(layer(sequence())[0], expected)


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_recurrent_layer_trains_and_its_masks_move(grow: str) -> None:
    layer = RECURRENT["LSTM"]()
    masks = apply(layer, 0.5)
    before = {key: itop.mask.clone() for key, itop in masks.items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2, grow=grow)
    for _ in range(4):
        layer(sequence())[0].square().sum().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    assert regrow.updates == 2
    for key, itop in masks.items():
        assert itop.active == before[key].sum()
        assert not torch.equal(itop.mask, before[key])
        assert not itop.parameter[~itop.used].any()


def test_recurrent_cells_are_masked_too() -> None:
    cell = nn.LSTMCell(6, 5)
    twin = copy.deepcopy(cell)
    assert list(apply(cell, 0.5)) == ["weight_ih", "weight_hh"]
    twin.load_state_dict(itop_prune.dense_state_dict(cell))
    x = sequence()[:, 0]
    assert torch.equal(cell(x)[0], twin(x)[0])
