"""Sparse layers: outputs of the dense ones at any input; copies, files; what is refused."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from itop_prune.inference.kernels import KERNELS, ROW_KERNELS
from itop_prune.inference.sparse_layers import (
    RowLinear,
    SparseConv2d,
    SparseLinear,
    kernels_for,
    obstacle,
    replace,
    sparse,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "linear without bias": lambda: nn.Linear(12, 7, bias=False),
    "1x1": lambda: nn.Conv2d(12, 7, 1),
    "1x1 with stride": lambda: nn.Conv2d(12, 7, 1, stride=2, bias=False),
    "3x3": lambda: nn.Conv2d(12, 7, 3, padding=1),
    "3x3 with stride, no border": lambda: nn.Conv2d(12, 7, 3, stride=2),
    "oblong": lambda: nn.Conv2d(12, 7, (3, 5), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "dilated": lambda: nn.Conv2d(12, 7, 3, dilation=2, padding="same"),
    "even, same": lambda: nn.Conv2d(12, 7, 4, padding="same"),
    "reflecting": lambda: nn.Conv2d(12, 7, 3, padding=2, padding_mode="reflect"),
    "patches": lambda: nn.Conv2d(12, 7, 4, stride=4),
}


LINEAR = [name for name in LAYERS if name.startswith("linear")]
CASES = [
    *((name, kernel) for name in LAYERS for kernel in KERNELS),
    *((name, kernel) for name in LINEAR for kernel in ROW_KERNELS),
]
"""All layers, each with all kernels that can compute it."""


def built(name: str, density: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]().requires_grad_(False)
    layer.weight *= torch.rand(layer.weight.shape) < density
    layer.weight[2] = 0
    return layer


def inputs(layer: nn.Module) -> list[Tensor]:
    """Inputs of several sizes and layouts: one, many, none; in order and not."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Linear):
        shapes = [(12,), (1, 12), (1, 1, 12), (5, 12), (2, 3, 12), (0, 12)]
        found = [torch.randn(shape, generator=generator) for shape in shapes]
        return [
            *found,
            torch.randn(12, 9, generator=generator).t(),
            torch.randn(2, 9, 24, generator=generator)[..., ::2],
        ]
    images = [
        torch.randn(shape, generator=generator)
        for shape in [(12, 9, 9), (1, 12, 9, 9), (3, 12, 11, 8)]
    ]
    rows = torch.randn(2, 9, 9, 12, generator=generator)
    return [
        *images,
        rows.permute(0, 3, 1, 2),
        rows[:1].permute(0, 3, 1, 2),
        torch.zeros(0, 12, 9, 9),
    ]


# torch warns about its own layer
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_outputs_are_those_of_the_dense_layer(name: str, kernel: str) -> None:
    layer = built(name)
    new = sparse(layer, kernel)
    assert type(new) in (RowLinear, SparseLinear, SparseConv2d)
    for x in inputs(layer):
        expected = layer(x)
        found = new(x)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride() or found.numel() <= max(found.shape)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_what_stays_transposed_has_the_same_values_and_the_next_layer_takes_it_as_it_is(
    kernel: str, bias: bool
) -> None:
    torch.manual_seed(0)
    first, second = (
        nn.Linear(12, 8, bias=bias).requires_grad_(False),
        nn.Linear(8, 5).requires_grad_(False),
    )
    one, two = sparse(first, kernel), sparse(second, kernel)
    shapes = [(6, 12), (2, 3, 12), (1, 12)]
    one.keeps_transposed = {torch.Size(shape) for shape in shapes}
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(one(x), first(x))
        torch.testing.assert_close(two(torch.relu(one(x))), second(torch.relu(first(x))))
    assert one(torch.randn(6, 12)).t().is_contiguous()
    assert one(torch.randn(7, 12)).is_contiguous()  # of another shape than those


@pytest.mark.parametrize("name", LAYERS)
def test_the_dense_weight_is_there_for_whoever_reads_it(name: str) -> None:
    layer = built(name)
    new = sparse(layer, "csr")
    assert torch.equal(new.weight, layer.weight)
    assert new.weight.dtype is torch.float32


def test_the_layer_it_is_made_of_is_left_as_it_was() -> None:
    layer = built("3x3")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    sparse(layer, "csr")
    assert type(layer) is nn.Conv2d
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_layer_that_is_replaced_is_so_wherever_it_is_held() -> None:
    layer = built("linear")
    model = nn.ModuleDict({"one": layer, "other": layer})
    replace(layer, sparse(layer, "csr"))
    assert model["one"] is model["other"] is layer
    assert type(layer) is SparseLinear
    assert [name for name, _ in model.named_parameters()] == ["one.bias"]


@pytest.mark.parametrize(
    ("name", "kernel"), [case for case in CASES if case[0] in ("linear", "3x3")]
)
def test_copies_are_independent(name: str, kernel: str) -> None:
    layer = built(name)
    x = inputs(layer)[-3]
    new = sparse(layer, kernel)
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(new),
        pickle.loads(pickle.dumps(new)),
        torch.load(buffer, weights_only=False),
    ]
    new.weight_values.zero_()
    for other in copies:
        assert type(other) is type(new)
        torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("kernel", [*KERNELS, *ROW_KERNELS])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_into_a_layer_with_as_many_weights(
    kernel: str, assign: bool
) -> None:
    layer = built("linear")
    other = copy.deepcopy(layer)
    other.weight.copy_(layer.weight.flip(1) * 3.0)
    other.bias.copy_(layer.bias + 1.0)
    new = copy.deepcopy(sparse(layer, kernel))
    assert new.state_dict().keys() == {"bias", "weight_starts", "weight_inputs", "weight_values"}
    new.load_state_dict(sparse(other, kernel).state_dict(), assign=assign)
    for x in inputs(layer)[:5]:
        torch.testing.assert_close(new(x), other(x))
    other.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        new.load_state_dict(sparse(other, kernel).state_dict())


@pytest.mark.parametrize("kernel", [*KERNELS, pytest.param("numba", marks=pytest.mark.slow)])
def test_it_computes_in_another_type_when_converted(kernel: str) -> None:
    layer = built("linear")
    new = sparse(layer, kernel).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(new(x), layer.double()(x))


def test_gradients_and_other_types_are_refused() -> None:
    for layer in (built("linear"), built("3x3")):
        new, x = sparse(layer, "csr"), inputs(layer)[1]
        with pytest.raises(RuntimeError, match=r"given torch\.bfloat16; allowed is torch\.float32"):
            new(x.bfloat16())
        x.requires_grad_()
        with pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
            new(x)
        with torch.no_grad():
            new(x)


@pytest.mark.parametrize(
    ("name", "kernel"), [case for case in CASES if case[0] in ("linear", "3x3")]
)
def test_inputs_that_do_not_fit_are_refused(name: str, kernel: str) -> None:
    new = sparse(built(name), kernel)
    for shape in {
        "linear": [(5, 13), (2, 24), (12, 1), (6, 2)],
        "3x3": [(1, 13, 9, 9), (1, 11, 9, 9)],
    }[name]:
        with pytest.raises(RuntimeError):
            new(torch.randn(shape))


def test_numba_computes_linear_layers_on_the_cpu_alone() -> None:
    assert kernels_for(nn.Linear(4, 4)) == ("csr", "embedding_bag", "numba")
    assert kernels_for(nn.Conv2d(4, 4, 1)) == ("csr", "embedding_bag")
    assert kernels_for(nn.Linear(4, 4, device="meta")) == ("csr", "embedding_bag")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
def test_what_numba_can_not_take_is_computed_all_the_same() -> None:
    layer = built("linear")
    new, x = sparse(layer, "numba"), torch.randn(5, 12)
    expected = layer(x)
    narrow = copy.deepcopy(new).bfloat16()(x.bfloat16())
    torch.testing.assert_close(narrow.float(), expected, atol=0.05, rtol=0.05)
    assert copy.deepcopy(new).to("meta")(x.to("meta")).shape == (5, 7)
    assert new(x.to("meta")).is_meta
    torch.testing.assert_close(torch.func.vmap(new)(x[None])[0], expected)


def test_autocast_leaves_numba_s_layer_in_float32() -> None:
    layer = built("linear")
    new, x = sparse(layer, "numba"), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = new(x)
    torch.testing.assert_close(found, layer(x))


@pytest.mark.filterwarnings(r"ignore:`torch\.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_numba_s_layer_computes_other_inputs() -> None:
    layer = built("linear")
    traced = torch.jit.trace(sparse(layer, "numba"), torch.randn(3, 12))
    x = torch.randn(5, 12)
    torch.testing.assert_close(traced(x), layer(x))


def test_a_layer_that_took_half_a_state_dict_refuses_to_compute() -> None:
    new, x = sparse(built("linear"), "numba"), torch.randn(5, 12)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        new.load_state_dict(sparse(built("linear", density=0.9), "numba").state_dict())
    for rows in (x, x[0]):
        with pytest.raises(RuntimeError, match="outside of its matrix"):
            new(rows)


class Scaled(nn.Linear):
    """A linear layer of one's own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "tensor", "why"),
    [
        (nn.Linear(4, 4), "weight", ""),
        (nn.Conv2d(4, 4, 3), "weight", ""),
        (nn.Conv2d(4, 4, 3, groups=2), "weight", "2 groups"),
        (nn.Linear(4, 4).double(), "weight", "torch.float64, not float32"),
        (Scaled(4, 4), "weight", "test_sparse_layers's Scaled computes in a way of its own"),
        (patched(), "weight", "torch's Linear computes in a way of its own"),
        (
            nn.ConvTranspose2d(4, 4, 3),
            "weight",
            "torch's ConvTranspose2d computes in a way of its own",
        ),
        (nn.Conv1d(4, 4, 3), "weight", "torch's Conv1d computes in a way of its own"),
        (nn.LSTM(4, 4), "weight_ih_l0", "torch's LSTM computes in a way of its own"),
        (
            nn.MultiheadAttention(4, 2),
            "in_proj_weight",
            "torch's MultiheadAttention computes in a way of its own",
        ),
        (
            parametrizations.weight_norm(nn.Linear(4, 4)),
            "weight",
            "torch's ParametrizedLinear computes in a way of its own",
        ),
    ],
)
def test_what_has_to_stay_dense_says_why(layer: nn.Module, tensor: str, why: str) -> None:
    assert obstacle(layer, tensor) == why


def test_a_layer_shows_its_kernel_and_its_weights() -> None:
    new = sparse(built("linear"), "csr")
    count = len(new.weight_values)
    assert (
        repr(new)
        == f"SparseLinear(in_features=12, out_features=7, bias=True, csr, {count} of 84 weights)"
    )


def test_hooks_are_called() -> None:
    layer, seen = built("linear"), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    sparse(layer, "csr")(torch.randn(2, 12))
    assert seen == [1]


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths", "ignore::DeprecationWarning:torch.*"
)
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_what_torch_exports_computes_with_the_active_weights_alone_for_any_batch(
    name: str, kernel: str
) -> None:
    layer = built(name)
    x = inputs(layer)[-2] if isinstance(layer, nn.Linear) else inputs(layer)[2]
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(sparse(layer, kernel), (x,), dynamic_shapes=shapes)
    for other in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(exported.module()(other), layer(other))
    tensors = [*exported.state_dict.values(), *exported.constants.values()]
    values = [
        tensor
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel() != len(layer.weight)
    ]
    assert [tensor.numel() for tensor in values] == [int(layer.weight.count_nonzero())]


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths",
    "ignore::DeprecationWarning:torch.*",
    "ignore:.*LeafSpec:FutureWarning",  # of an older exporter, about itself
)
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "even, same",
        pytest.param("linear without bias", marks=pytest.mark.slow),
        pytest.param("oblong", marks=pytest.mark.slow),
    ],
)
def test_what_is_exported_to_onnx_is_a_dense_layer(name: str, tmp_path: Path) -> None:
    layer = built(name)
    x = inputs(layer)[-2] if isinstance(layer, nn.Linear) else inputs(layer)[2]
    program = torch.onnx.export(
        sparse(layer.eval(), "csr"),
        (x,),
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for other in (x, x[:1]):
        found = session.run(None, {session.get_inputs()[0].name: other.contiguous().numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), layer(other))
    operations = {node.op_type for node in program.model.graph}
    assert operations & {"Gemm", "MatMul", "Conv"}
    assert "Loop" not in operations
