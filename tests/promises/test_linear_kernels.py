"""Linear layers in sparse storage compute with kernels, and nothing else about them changes."""

import copy
import functools
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import batch, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import itop_prune
from itop_prune.kernels import known_orders, linear_products, runtime

ROOT = Path(__file__).parents[2]
F32, F64 = torch.float32, torch.float64


@dataclass
class Calls:
    """How often kernels computed, in which type, and how often orders were made."""

    forward: int = 0
    backward: int = 0
    orders: int = 0
    types: set[torch.dtype] = field(default_factory=set)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            setattr(counted, name, getattr(counted, name) + 1)
            if name != "orders":
                counted.types.add(arguments[0].dtype)
            return function(*arguments)

        return call

    for name, attribute in (("forward", "forward"), ("backward", "backward")):
        function = getattr(linear_products, attribute)
        monkeypatch.setattr(linear_products, attribute, counting(name, function))
    monkeypatch.setattr(known_orders, "_make", counting("orders", vars(known_orders)["_make"]))
    return counted


def linear(
    dtype: torch.dtype = F64, *, bias: bool = True, sparsity: float = 0.7, seed: int = 0
) -> nn.Linear:
    """A layer of 20 inputs and 12 outputs in sparse storage."""
    torch.manual_seed(seed)
    layer = nn.Linear(20, 12, bias=bias, dtype=dtype)
    itop_prune.apply(nn.Sequential(layer), sparsity, storage="sparse", seed=seed)
    return layer


def dense(layer: nn.Linear, x: Tensor) -> Tensor:
    """What torch computes with the layer's dense weight."""
    return F.linear(x, layer.weight, layer.bias)


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.dtype == expected.dtype
    tolerance = 1e-9 if found.dtype == F64 else 1e-4
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(
    layer: nn.Linear, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda y: y.square().sum()
) -> None:
    """The layer's output and all gradients are those of the dense weight."""
    sources = [p for p in (x, *layer.parameters()) if p.requires_grad]
    found, expected = layer(x), dense(layer, x)
    assert found.shape == expected.shape
    assert close(found, expected)
    if sources:
        pairs = (torch.autograd.grad(loss(y), sources) for y in (found, expected))
        for one, other in zip(*pairs, strict=True):
            assert one.shape == other.shape
            assert close(one, other)


# --- inputs --------------------------------------------------------------------------------------


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "1 dimension": lambda: draw(20),
    "2 dimensions": lambda: draw(3, 20),
    "3 dimensions": lambda: draw(2, 3, 20),
    "4 dimensions": lambda: draw(2, 1, 3, 20),
    "5 dimensions": lambda: draw(2, 3, 1, 2, 20),
    "no rows": lambda: draw(0, 20),
    "no rows of 3 dimensions": lambda: draw(2, 0, 20),
    "no rows at all": lambda: draw(0, 0, 20),
    "transposed": lambda: draw(20, 5).t(),
    "every second feature": lambda: draw(5, 40)[:, ::2],
    "every second row, from the third on": lambda: draw(9, 20)[2::2],
    "permuted": lambda: draw(2, 20, 3).permute(2, 0, 1),
    "expanded": lambda: draw(1, 20).expand(5, 20),
    "expanded features": lambda: draw(5, 1).expand(5, 20),
    "flipped": lambda: draw(5, 20).flip(1),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_any_form_compute_as_with_the_dense_weight(kind: str, calls: Calls) -> None:
    for bias in (True, False):
        x = INPUTS[kind]().detach().requires_grad_()
        assert_same_gradients(linear(bias=bias), x)
        assert_same_gradients(linear(bias=bias), x, Tensor.sum)  # its gradient is expanded
    assert calls.forward == calls.backward == 4


@pytest.mark.parametrize("frozen", ["input", "values", "bias", "values and bias", "all"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str, calls: Calls) -> None:
    layer = linear()
    x = draw(5, 20).requires_grad_("input" not in frozen and frozen != "all")
    layer.weight_values.requires_grad_("values" not in frozen and frozen != "all")
    layer.bias.requires_grad_("bias" not in frozen and frozen != "all")
    assert_same_gradients(layer, x)
    assert (calls.forward, calls.backward) == (1, 0 if frozen == "all" else 1)


def test_gradients_are_those_of_finite_differences_and_can_be_differentiated_again(
    calls: Calls,
) -> None:
    layer = linear()

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        parts = {"weight_values": values, "bias": bias}
        return torch.func.functional_call(layer, parts, (x,))

    inputs = [draw(4, 20), layer.weight_values, layer.bias]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert calls.forward
    assert calls.backward
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_layer_that_is_used_twice_adds_its_gradients(calls: Calls) -> None:
    layer, x = linear(), draw(5, 20).requires_grad_()
    sources = [x, layer.weight_values, layer.bias]
    losses = [(run(x) * run(2 * x)).sum() for run in (layer, functools.partial(dense, layer))]
    for one, other in zip(*(torch.autograd.grad(loss, sources) for loss in losses), strict=True):
        assert close(one, other)
    assert calls.forward == calls.backward == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same(reentrant: bool, calls: Calls) -> None:
    layer, x = linear(), draw(5, 20).requires_grad_()
    sources = [x, layer.weight_values, layer.bias]
    layer(x).square().sum().backward()
    expected = [source.grad for source in sources]
    for source in sources:
        source.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(s.grad, one) for s, one in zip(sources, expected, strict=True))
    assert (calls.forward, calls.backward) == (3, 2)


def test_autocast_computes_in_the_type_of_the_values_and_gives_its_own(calls: Calls) -> None:
    for dtype in (F32, torch.bfloat16):
        layer, x = linear(F32), draw(5, 20).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        assert output.dtype == torch.bfloat16
        exact = dense(layer, x.float())
        assert torch.allclose(output.float(), exact, rtol=2**-8, atol=1e-6)  # rounded once

        sources = [x, layer.weight_values, layer.bias]
        found = torch.autograd.grad(output.float().sum(), sources)
        expected = torch.autograd.grad(exact.sum(), sources)
        for source, one, other in zip(sources, found, expected, strict=True):
            assert one.dtype == source.dtype
            assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-5)
    assert calls.types == {F32}
    assert calls.forward == calls.backward == 2


def test_inference_mode_computes_also_in_a_model_that_was_copied_in_it(calls: Calls) -> None:
    layer, x = linear(), draw(5, 20)
    with torch.inference_mode():
        assert close(layer(x), dense(layer, x))
        copied = copy.deepcopy(layer)  # positions whose changes torch does not count
        assert close(copied(x), dense(copied, x))
        copied.weight_positions.copy_(copied.weight_positions.flip(0))
        assert close(copied(x), dense(copied, x))
        assert not close(copied(x), layer(x))
    assert calls.forward == 5


@pytest.mark.parametrize("x", [draw(5, 19), draw(5, 20, dtype=F32), draw(2, 3, 21), draw()])
def test_wrong_inputs_raise_what_a_dense_layer_raises(x: Tensor, calls: Calls) -> None:
    with pytest.raises(RuntimeError) as expected:
        nn.Linear(20, 12, dtype=F64)(x)
    layer = linear()
    for fitting in range(2):  # whether or not the layer has computed before
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(expected.value)
        assert calls.forward == fitting
        layer(draw(5, 20))


@pytest.mark.parametrize("parts", [{"bias": draw(3)}, {"weight_values": draw(1, 3)}])
def test_wrong_parts_of_a_layer_raise(parts: dict[str, Tensor], calls: Calls) -> None:
    layer = linear()
    layer(draw(5, 20))
    with pytest.raises(RuntimeError, match=r"size|index"):
        torch.func.functional_call(layer, parts, (draw(5, 20),))
    assert calls.forward == 1


def test_sparse_inputs_compute_with_the_dense_weight() -> None:
    layer, x = linear(), F.dropout(draw(5, 20))
    assert close(layer(x.to_sparse()), dense(layer, x))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 5])
def test_numbers_that_are_not_finite_pass_through_active_weights(number: float, rows: int) -> None:
    """An inactive weight hands nothing on: no NaN of 0 times infinity, as in a dense product."""
    layer, x = linear(bias=False), draw(rows, 20)
    mask = layer.weight != 0
    feature, output = (int(n) for n in mask.t().nonzero()[0])
    x[0, feature] = number
    x.requires_grad_()
    found, expected = layer(x), torch.where(mask, layer.weight, 0.0)
    reached = torch.zeros(rows, 12, dtype=torch.bool)
    reached[0] = mask[:, feature]
    assert torch.equal(found.isfinite(), ~reached)
    product = number * expected[output, feature]
    assert found[0, output].isnan() if number != number else found[0, output] == product

    gradient = torch.zeros(rows, 12, dtype=F64)
    gradient[0, output] = number
    for_x, for_values = torch.autograd.grad(found, [x, layer.weight_values], gradient)
    reached = torch.zeros(rows, 20, dtype=torch.bool)
    reached[0] = mask[output]
    assert torch.equal(for_x.isfinite(), ~reached)
    positions = layer.weight_positions.long()
    assert not for_values[0, (positions // 20 == output) & (positions % 20 == feature)].isfinite()


# --- masks that move -----------------------------------------------------------------------------


def run_of(model: nn.Module, **rules: Any) -> itop_prune.MaskScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rules = {"total_steps": 20, "every": 1, **rules}
    return itop_prune.MaskScheduler(itop_prune.find_masks(model), optimizer, **rules)


def _step(model: nn.Module, other: nn.Module) -> nn.Module:
    regrow = run_of(model, grow="gradient")
    for step in range(3):
        x, y = batch(step, 20)
        F.cross_entropy(model(x), y).backward()
        assert regrow.step() or not step
    return model


def _write_mask(model: nn.Module, other: nn.Module) -> nn.Module:
    for itop in itop_prune.find_masks(model).values():
        itop.write_mask(itop.mask, itop.mask.flip(0))
        nn.init.normal_(itop.parameter)
    return model


def _longer(model: nn.Module, other: nn.Module) -> nn.Module:
    for itop in itop_prune.find_masks(model).values():
        itop.write_mask(itop.mask, itop.mask | itop.mask.flip(0))
        nn.init.normal_(itop.parameter)  # free slots too, which nobody may read
    return model


def _load(model: nn.Module, other: nn.Module, assign: bool = False) -> nn.Module:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    return model


def _pickled(model: nn.Module, other: nn.Module) -> nn.Module:
    file = io.BytesIO(pickle.dumps(model))
    return _write_mask(pickle.load(file), other)


def _copied(model: nn.Module, other: nn.Module) -> nn.Module:
    return _write_mask(copy.deepcopy(model), other)


def _there_and_back(model: nn.Module, other: nn.Module) -> nn.Module:
    return _write_mask(model.to(F64), other).to(F32)


CHANGES: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "steps of the scheduler": _step,
    "write_mask": _write_mask,
    "write_mask with more weights": _longer,
    "load_state_dict": _load,
    "load_state_dict, assign": functools.partial(_load, assign=True),
    "load": lambda model, other: (itop_prune.load(model, other.state_dict()), model)[1],
    "deepcopy": _copied,
    "pickle": _pickled,
    "to": _there_and_back,
}


@pytest.mark.parametrize("change", CHANGES)
def test_masks_that_moved_are_those_that_compute(change: str, calls: Calls) -> None:
    model, other = mlp(), mlp(seed=1)
    itop_prune.apply(model, 0.7, storage="sparse")
    itop_prune.apply(other, 0.8, storage="sparse", seed=1)
    x = batch(0, 20)[0]
    before = model(x)
    calls.forward = 0

    changed = CHANGES[change](model, other)
    assert not torch.allclose(changed(x), before, atol=1e-3)
    calls.forward = 0
    for one in (changed, model):
        for layer in one:
            if isinstance(layer, nn.Linear):
                inputs = draw(5, layer.in_features, dtype=layer.weight.dtype).requires_grad_()
                assert_same_gradients(layer, inputs)
    assert calls.forward == 6


def test_positions_of_another_layer_compute_in_a_functional_call() -> None:
    layer, other, x = linear(), linear(seed=1), draw(5, 20)
    layer(x)
    parts = dict(other.state_dict(keep_vars=True))
    parts = {name: parts[name] for name in ("weight_values", "weight_positions", "bias")}
    assert close(torch.func.functional_call(layer, parts, (x,)), dense(other, x))
    assert close(layer(x), dense(layer, x))


def test_masks_that_move_between_forward_and_backward_are_refused() -> None:
    layer = linear()
    (itop,) = itop_prune.find_masks(nn.Sequential(layer)).values()
    loss = layer(draw(5, 20)).sum()
    itop.write_mask(itop.mask, itop.mask.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WRONG: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "above": (lambda p: p[:1].fill_(240), r"position 240 is outside of a weight of 240; allowed"),
    "far above": (lambda p: p[:1].fill_(2**31 - 1), r"position 2147483647 is outside"),
    "below": (lambda p: p[:1].fill_(-2), r"position -2 is outside"),
    "twice": (lambda p: p[:1].copy_(p[1:2]), r"position \d+ has two slots; allowed is one; load"),
}


@pytest.mark.parametrize("how", WRONG)
def test_positions_that_were_written_wrongly_are_refused_and_nothing_is_computed(
    how: str, calls: Calls
) -> None:
    layer, x = linear(), draw(5, 20)
    layer(x)
    calls.forward = 0
    spoil, message = WRONG[how]
    spoil(layer.weight_positions)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer(x)
    assert not calls.forward


def test_another_number_of_positions_is_refused(calls: Calls) -> None:
    for positions in (torch.arange(3).int(), torch.arange(200).int()):
        layer = linear()
        layer.weight_positions = positions
        with pytest.raises(RuntimeError):
            layer(draw(5, 20)).sum().backward()
    assert not calls.forward


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
            ],
        ),
    ],
)
def test_compiled_graphs_compute_with_kernels_and_make_an_order_once_for_each_update(
    backend: str, calls: Calls
) -> None:
    torch.compiler.reset()
    model = mlp()
    itop_prune.apply(model, 0.7, storage="sparse")
    regrow = run_of(model, every=3, total_steps=100)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    orders = []
    for step in range(8):
        x, y = batch(step, 20)
        calls.forward = calls.backward = calls.orders = 0
        F.cross_entropy(compiled(x), y).backward()
        assert (calls.forward, calls.backward) == (3, 3)
        orders.append(calls.orders)
        expected = model(x)
        assert torch.allclose(compiled(x), expected, atol=1e-6)
        regrow.step()
        model.zero_grad()
    assert regrow.updates == 2
    assert orders == [3, 0, 0, 3, 0, 0, 3, 0]


# --- Numba ---------------------------------------------------------------------------------------


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = functools.wraps(find)(lambda name, *rest: None if name == "numba" else find(name))
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(runtime, "has_numba", functools.cache(runtime.has_numba.__wrapped__))


@pytest.mark.usefixtures("no_numba")
def test_without_numba_one_warning_says_what_to_install_and_the_dense_weight_computes(
    calls: Calls,
) -> None:
    layer, x = linear(), draw(5, 20).requires_grad_()
    with pytest.warns(UserWarning, match=r"pip install 'itop_prune\[sparse\]'"):
        layer(x)
    assert_same_gradients(layer, x)  # a second warning is an error
    assert_same_gradients(linear(seed=1), x)
    assert not calls.forward
    assert not calls.backward


def in_fresh_interpreter(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_numba_is_imported_by_the_first_product_of_sparse_storage_and_not_before() -> None:
    in_fresh_interpreter("""
import sys, torch, itop_prune
from torch import nn

for storage in ("mask", "sparse"):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    masks = itop_prune.apply(model, 0.7, storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)
    assert "numba" not in sys.modules, storage
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    regrow.step()
    assert ("numba" in sys.modules) == (storage == "sparse")
""")


@pytest.mark.slow
def test_workers_that_load_may_be_forked_after_kernels_have_run() -> None:
    """A forked process that calls a kernel itself is ended by GNU OpenMP, which is not tested."""
    found = in_fresh_interpreter("""
import torch, itop_prune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(2)
model = nn.Sequential(nn.Linear(2048, 512))
itop_prune.apply(model, 0.9, storage="sparse")
data = TensorDataset(torch.randn(64, 2048))
for epoch in range(2):
    rows = 0
    loader = DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context="fork")
    for x, in loader:
        model(x).sum().backward()
        rows += len(x)
    assert rows == 64
print("done")
""")
    assert found.stdout == "done\n"
