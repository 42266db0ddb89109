"""Small files of sparse models: exact, small, whole or not there, and refused if damaged."""

import copy
import functools
import io
import json
import math
import os
import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
from helpers.toys import batch, convnet, mlp, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn.utils import prune

import itop_prune
from itop_prune.files.small_files import write
from itop_prune.files.state_dicts import read_state
from itop_prune.layers.maskable import unwrap

# timm scripts functions and uses parts of torch that torch deprecates; nothing of ours warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)

Build = Callable[[], nn.Module]


def small(name: str, **keywords: object) -> nn.Module:
    return timm.create_model(name, num_classes=4, **keywords)


MODELS: dict[str, Build] = {
    "mlp": mlp,
    "convnet": convnet,
    "a masked layer alone": functools.partial(nn.Linear, 8, 4),
    "several masks in a layer": functools.partial(nn.LSTM, 6, 8, num_layers=2),
    "attention": functools.partial(nn.MultiheadAttention, 8, 2),
    "resnet": functools.partial(small, "resnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40)),
    "vit": functools.partial(
        small, "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3
    ),
    "beit": functools.partial(
        small, "beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3
    ),
    "layers under two names": functools.partial(
        small,
        "coat_tiny",
        img_size=32,
        embed_dims=(64,) * 4,
        serial_depths=(1,) * 4,
        parallel_depth=1,
    ),
    "standardized convolutions": functools.partial(small, "test_nfnet"),
    "kernels of experts": functools.partial(CondConv2d, 4, 6, 3, num_experts=3),
}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """List the names under which not every bit is the same, those of NaN and -0 too."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    def same(a: Tensor, b: Tensor) -> bool:
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))

    return [
        name
        for name in one.keys() | other
        if name not in one or name not in other or not same(one[name], other[name])
    ]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert [*one.state_dict()] == [*other.state_dict()]
    assert differing(one.state_dict(), other.state_dict()) == []


def sparse(
    build: Build = mlp, sparsity: float = 0.6, seed: int = 0, storage: str = "mask"
) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    itop_prune.apply(model, sparsity, seed=seed, storage=storage)
    return model


def other(build: Build = mlp) -> nn.Module:
    """The dense model with other numbers."""
    torch.manual_seed(5)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def saved(path: Path, model: nn.Module | None = None) -> bytes:
    itop_prune.save(model or sparse(), path)
    return path.read_bytes()


# --- what is loaded is what was saved --------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True], ids=["into a dense model", "into a masked one"])
def test_weights_masks_and_buffers_come_back_bit_for_bit(
    name: str, masked: bool, path: Path
) -> None:
    model, target = (
        sparse(MODELS[name]),
        sparse(MODELS[name], seed=3) if masked else other(MODELS[name]),
    )
    parameters = [*target.parameters()]
    itop_prune.save(model, path)
    masks = itop_prune.load(target, path)
    assert [*masks] == [*itop_prune.find_masks(model)]
    assert_same(model, target)
    assert all(one is two for one, two in zip(parameters, target.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_dtype_keeps_it_bit_for_bit(dtype: torch.dtype, path: Path) -> None:
    model, target = sparse(convnet).to(dtype), other(convnet).to(dtype)
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)


def test_after_training_batch_statistics_and_integer_buffers_come_back(path: Path) -> None:
    model, target = sparse(convnet), other(convnet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = itop_prune.MaskScheduler(
        itop_prune.find_masks(model), optimizer, total_steps=10, every=2
    )
    train(model, optimizer, regrow, shape=(3, 8, 8))
    assert model[1].num_batches_tracked == 10
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)
    x, _ = batch(7, 3, 8, 8)
    assert torch.equal(model.eval()(x), target.eval()(x))


def test_numbers_that_are_not_ordinary_keep_their_bits_and_their_places(path: Path) -> None:
    model, target = sparse(), other()
    itop = itop_prune.find_masks(model)["0.weight"]
    strange = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    with torch.no_grad():
        itop.parameter[itop.mask] = strange.repeat(itop.active)[: itop.active]
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_masks_that_are_full_and_masks_with_one_weight_come_back(
    sparsity: float, path: Path
) -> None:
    model, target = nn.Linear(50, 40), nn.Linear(50, 40)
    itop_prune.apply(model, sparsity)
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)


def test_an_empty_mask_comes_back(path: Path) -> None:
    model, target = nn.Linear(6, 4), nn.Linear(6, 4)
    itop_prune.ITOP.apply(model, "weight", torch.zeros(4, 6))
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)


@pytest.mark.parametrize("formats", ["saved", "loaded", "both"])
def test_the_memory_format_is_the_model_s_own(formats: str, path: Path) -> None:
    model, target = sparse(convnet), other(convnet)
    if formats != "loaded":
        model = model.to(memory_format=torch.channels_last)
    if formats != "saved":
        target = target.to(memory_format=torch.channels_last)
    itop_prune.save(model, path)
    itop_prune.load(target, path)
    assert_same(model, target)
    assert (
        target[3].weight_orig.is_contiguous()
        == target[3].weight_mask.is_contiguous()
        == (formats == "saved")
    )


def test_two_memory_formats_give_one_file(path: Path) -> None:
    written = [
        saved(path, sparse(convnet).to(memory_format=f))
        for f in (torch.contiguous_format, torch.channels_last)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile]
)
def test_a_wrapped_model_gives_the_file_of_the_plain_one_and_takes_it(
    wrap: Callable, path: Path
) -> None:
    model, target = sparse(), wrap(other())
    itop_prune.save(wrap(model), path)
    itop_prune.load(target, path)
    assert path.read_bytes() == saved(path, model)
    assert_same(model, unwrap(target))


def test_a_compiled_layer_inside_does_not_show_in_the_file(path: Path) -> None:
    model, target = sparse(), other()
    plain = saved(path, model)
    for inside in (model, target):
        inside[2] = torch.compile(inside[2], backend="eager")
    assert saved(path, model) == plain
    itop_prune.load(target, path)
    assert_same(model, target)


def test_the_state_dict_of_a_wrapped_model_can_be_written_and_loaded(path: Path) -> None:
    model, target = sparse(), other()
    write(nn.DataParallel(model).state_dict(), path)
    itop_prune.load(target, path)
    assert_same(model, target)


def test_names_may_have_any_letters(path: Path) -> None:
    model, target = (
        nn.ModuleDict({'größe "1"': nn.Linear(8, 4), "itop_prune": nn.Linear(4, 2)})
        for _ in range(2)
    )
    itop_prune.apply(model, 0.5)
    itop_prune.save(model, path)
    assert [*itop_prune.load(target, path)] == ['größe "1".weight', "itop_prune.weight"]
    assert_same(model, target)


def test_a_model_that_torch_pruned_can_be_saved(path: Path) -> None:
    model, target = mlp(), other()
    for layer in (model[0], model[2]):
        prune.random_unstructured(layer, "weight", 0.5)
    itop_prune.save(model, path)
    assert [*itop_prune.load(target, path)] == ["0.weight", "2.weight"]
    assert torch.equal(target(batch(7, 20)[0]), model(batch(7, 20)[0]))


def test_what_lies_off_the_mask_is_not_saved(path: Path) -> None:
    model, drifted = sparse(), sparse()
    with torch.no_grad():
        for itop in itop_prune.find_masks(drifted).values():
            itop.parameter[~itop.mask] = float("nan")
    assert saved(path, model) == saved(path, drifted)


def test_saving_changes_nothing(path: Path) -> None:
    model = sparse(convnet)
    before = copy.deepcopy(model)
    itop_prune.save(model, path, torch.float16)
    assert_same(model, before)


def test_a_loaded_model_holds_nothing_of_the_file(path: Path) -> None:
    model, target = sparse(), other()
    content = saved(path, model)
    itop_prune.load(target, path)
    path.write_bytes(bytes(len(content)))
    assert_same(model, target)


def test_a_loaded_model_trains_sparse(path: Path) -> None:
    saved(path)
    target = other()
    masks = itop_prune.load(target, path)
    train(target, torch.optim.SGD(target.parameters(), lr=0.1, momentum=0.9), steps=range(3))
    assert not any(itop.parameter[~itop.mask].any() for itop in masks.values())


def test_not_strict_another_head_keeps_its_values_and_the_rest_is_loaded(path: Path) -> None:
    model, target = sparse(), nn.Sequential(*other()[:4], nn.Linear(12, 7))
    head = target[4].weight.detach().clone()
    saved(path, model)
    with pytest.raises(
        ValueError, match=r"4\.weight: the model has \(7, 12\), the source \(4, 12\)"
    ):
        itop_prune.load(target, path)
    assert [*itop_prune.load(target, path, strict=False)] == ["0.weight", "2.weight"]
    assert torch.equal(target[4].weight, head)
    assert_same(model[:4], target[:4])


def test_the_file_is_safetensors_and_reads_as_a_plain_state_dict(path: Path) -> None:
    model = sparse(convnet)
    saved(path, model)
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"itop_prune"}
        assert {*file.keys()} == {*model.state_dict()}
    assert differing(model.state_dict(), read_state(path)) == []


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_point_tensor_is_rounded_and_no_other(
    dtype: torch.dtype, path: Path
) -> None:
    model, target = sparse(convnet), other(convnet)
    itop_prune.save(model, path, dtype)
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    whole_numbers = {name for name in found if name.endswith(("_mask", "num_batches_tracked"))}
    assert {found[name] for name in found.keys() - whole_numbers} == {dtype}
    assert found["1.num_batches_tracked"] == torch.int64
    itop_prune.load(target, path)
    assert_same(copy.deepcopy(model).to(dtype).to(torch.float32), target)


def test_a_model_in_half_precision_can_be_saved_in_full(path: Path) -> None:
    model, target = sparse().half(), other()
    itop_prune.save(model, path, torch.float32)
    itop_prune.load(target, path)
    assert_same(model.float(), target)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "float16"])
def test_another_dtype_is_refused_with_those_that_are_allowed(dtype: object, path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=rf"dtype is {dtype}; allowed are None, torch.float32, torch.float16, torch.bf",
    ):
        itop_prune.save(sparse(), path, dtype)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_number_that_the_dtype_can_not_hold_is_refused_by_name(path: Path) -> None:
    model = sparse(convnet)
    model[1].running_var[3] = 1e6
    with pytest.raises(
        ValueError, match=r"1\.running_var holds numbers beyond the range of torch\.float16; .*None"
    ):
        itop_prune.save(model, path, torch.float16)
    assert not path.exists()
    itop_prune.save(model, path, torch.bfloat16)


def test_an_infinity_is_no_number_that_does_not_fit(path: Path) -> None:
    model, target = sparse(), other()
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    itop_prune.save(model, path, torch.float16)
    itop_prune.load(target, path)
    assert target[0].bias[0] == float("inf")


# --- sizes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, int]:
    """A ResNet-50, and the bytes of its dense file."""
    torch.manual_seed(0)
    model, file = (
        timm.create_model("resnet50"),
        tmp_path_factory.mktemp("dense") / "dense.safetensors",
    )
    save_file(model.state_dict(), file)
    return model, file.stat().st_size


@pytest.mark.parametrize(("sparsity", "fp32", "fp16"), [(0.98, 0.031, 0.020), (0.9, 0.13, 0.075)])
def test_a_sparse_resnet50_takes_a_small_share_of_its_dense_file(
    sparsity: float, fp32: float, fp16: float, resnet: tuple[nn.Module, int], path: Path
) -> None:
    model, dense = resnet
    itop_prune.apply(model, sparsity, method="ERK")
    try:
        for dtype, share in ((None, fp32), (torch.float16, fp16)):
            itop_prune.save(model, path, dtype)
            assert path.stat().st_size <= share * dense
    finally:
        itop_prune.remove(model)


# --- what is refused ---------------------------------------------------------------------------


def test_a_dense_model_is_refused_with_what_to_do(path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"there are no masks, .*; call itop_prune\.apply first, or save .*safetensors",
    ):
        itop_prune.save(mlp(), path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["model.pt", "model", "model.safetensors.bin"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"the name of .*{name} tells of another format; .*ends in \.safetensors"
    ):
        itop_prune.save(sparse(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_path_may_be_text(path: Path) -> None:
    model, target = sparse(), other()
    itop_prune.save(model, str(path))
    itop_prune.load(target, str(path))
    assert_same(model, target)


def refused(path: Path, model: nn.Module, strict: bool = True) -> str:
    """Return why a file is not loaded, and see that the model is as it was."""
    before = copy.deepcopy(model)
    with pytest.raises(ValueError) as error:
        itop_prune.load(model, path, strict=strict)
    assert_same(model, before)
    return str(error.value)


def test_a_file_with_a_flipped_bit_in_any_byte_is_refused(path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

    content, target = saved(path, sparse(build)), build()
    before, bits = copy.deepcopy(target), random.Random(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError):
            itop_prune.load(target, path, strict=bool(place % 2))
    assert_same(target, before)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.9999])
def test_a_file_that_ends_early_is_refused(share: float, path: Path) -> None:
    content = saved(path)
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path} is damaged or no safetensors file" in refused(path, other())


def test_a_file_that_goes_on_is_refused(path: Path) -> None:
    content = saved(path)
    path.write_bytes(content + b"\0")
    assert f"{path} is damaged or no safetensors file" in refused(path, other())


def test_a_file_whose_values_were_changed_is_refused_by_its_checksum(path: Path) -> None:
    content = saved(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    message = f"{path} is damaged: its checksum is not that of what it holds; copy or save it again"
    assert refused(path, other()) == message


@pytest.mark.parametrize("version", ["2", "4"])
def test_a_file_of_another_version_is_refused_with_both_versions(version: str, path: Path) -> None:
    saved(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()["itop_prune"]
    save_file(load_file(path), path, {"itop_prune": f"{version}{about[1:]}"})
    assert refused(path, other()) == (
        f"{path} is of version {version}; this itop_prune reads version 3: install the one that "
        "wrote it"
    )


Tensors = dict[str, Tensor]


def forge(path: Path, change: Callable[[Tensors, dict], object]) -> None:
    """Write a file by hand: tensors or layouts that `save` never writes, the right checksum."""
    saved(path, sparse(sparsity=0.9))
    with safe_open(path, framework="pt") as file:
        _, _, layouts = file.metadata()["itop_prune"].split(" ", 2)
    tensors, masked = load_file(path), json.loads(layouts)
    changed = change(tensors, masked)
    about = changed if isinstance(changed, str) else json.dumps(masked)
    content = to_bytes(tensors, {"itop_prune": f"3 00000000 {about}"})
    checksum = f"3 {zlib.crc32(content):08x} ".encode()
    path.write_bytes(content.replace(b"3 00000000 ", checksum, 1))


def set_layout(**entries: object) -> Callable[[Tensors, dict], object]:
    return lambda tensors, masked: masked["0.weight"].update(entries)


def set_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, dict], object]:
    return lambda tensors, masked: tensors.update({name: change(tensors[name]).contiguous()})


def add_one(code: Tensor) -> Tensor:
    return torch.cat([code, code.new_zeros(1)])


FORGED: dict[str, Callable[[Tensors, dict], object]] = {
    "a shape that holds fewer": set_layout(shape=[2, 20]),
    "a shape that holds more": set_layout(shape=[10**9, 10**9]),
    "a shape beyond all numbers": set_layout(shape=[10**30, 10**30]),
    "the shape of a matrix turned": set_layout(shape=[20, 16]),
    "a negative shape": set_layout(shape=[-16, -20]),
    "a shape of fractions": set_layout(shape=[16.0, 20]),
    "a shape of text": set_layout(shape="16"),
    "no shape": lambda tensors, masked: masked["0.weight"].pop("shape"),
    "an unknown encoding": set_layout(positions="runs"),
    "an encoding that is no text": set_layout(positions=["gaps"]),
    "the other encoding": set_layout(positions="bits"),
    "no encoding": lambda tensors, masked: masked["0.weight"].pop("positions"),
    "one position more": set_tensor("0.weight_mask", add_one),
    "one position less": set_tensor("0.weight_mask", lambda code: code[:-1]),
    "a position beyond the last": set_tensor("0.weight_mask", lambda code: code // 2 + 120),
    "positions in two dimensions": set_tensor("0.weight_mask", lambda code: code[None]),
    "positions that are no bytes": set_tensor("0.weight_mask", lambda code: code.long()),
    "positions in half precision": set_tensor("0.weight_mask", lambda code: code.bfloat16()),
    "one value more": set_tensor("0.weight_orig", add_one),
    "one value less": set_tensor("0.weight_orig", lambda values: values[:-1]),
    "values in two dimensions": set_tensor("0.weight_orig", lambda values: values[None]),
    "one value for all": set_tensor("0.weight_orig", lambda values: values[0]),
    "no positions": lambda tensors, masked: tensors.pop("0.weight_mask"),
    "no values": lambda tensors, masked: tensors.pop("0.weight_orig"),
    "a weight that is not there": lambda tensors, masked: masked.update(x=masked["0.weight"]),
    "a weight inside of another": lambda tensors, masked: masked.update(
        {"0.weight_orig": masked["0.weight"]}
    ),
    "complex values": set_tensor("0.weight_orig", lambda values: values.to(torch.complex64)),
    "a complex bias": set_tensor("0.bias", lambda values: values.to(torch.complex64)),
    "a dense weight beside the masked one": lambda tensors, masked: tensors.update(
        {"0.weight": torch.zeros(16, 20)}
    ),
    "no layout": lambda tensors, masked: masked.update({"0.weight": None}),
    "no layouts": lambda tensors, masked: masked.clear(),
    "a list of layouts": lambda tensors, masked: "[]",
    "no JSON": lambda tensors, masked: "{",
    "deep JSON": lambda tensors, masked: "[" * 100_000,
}


@pytest.mark.parametrize("masked", [False, True], ids=["into a dense model", "into a masked one"])
@pytest.mark.parametrize("name", FORGED)
def test_a_file_made_by_hand_is_loaded_whole_or_refused(
    name: str, masked: bool, path: Path
) -> None:
    forge(path, FORGED[name])
    refused(path, sparse(seed=3) if masked else other())


OTHERS = [None, True, -1, 0, 15, 2**63, 10**40, 1.5, math.inf, "", "x", "bits", [], [[]], {}]
OTHERS += [[16, 20, 1], [16, -20], [True, True], [2**62, 4], [320], {"shape": [16, 20]}]


@pytest.mark.parametrize("field", ["shape", "row", "column", "positions"])
def test_a_field_of_a_layout_takes_no_other_value(field: str, path: Path) -> None:
    for value in OTHERS:

        def change(tensors: Tensors, masked: dict, value: object = value) -> None:
            layout = masked["0.weight"]
            if field in ("row", "column"):
                layout["shape"][field == "column"] = value
            else:
                layout[field] = value

        forge(path, change)
        refused(path, other())


@pytest.mark.parametrize("value", OTHERS)
def test_layouts_that_are_something_else_are_refused(value: object, path: Path) -> None:
    forge(path, lambda tensors, masked: masked.update({"0.weight": value}))
    refused(path, other())
    forge(path, lambda tensors, masked: json.dumps(value))
    refused(path, other())


CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor.flip(0),
    lambda tensor: tensor[:0],
    lambda tensor: tensor[None],
    lambda tensor: tensor.bool(),
    lambda tensor: tensor.to(torch.uint16),
    lambda tensor: tensor.to(torch.float8_e4m3fn),
    lambda tensor: tensor.to(torch.complex64),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_of_another_kind_is_loaded_or_refused(
    change: Callable[[Tensor], Tensor], path: Path
) -> None:
    in_groups = mlp()
    itop_prune.apply(in_groups, 0.5, pattern="2:4")
    for name in ("0.weight_orig", "0.weight_mask", "0.bias"):
        forge(path, set_tensor(name, change))
        for target in (other(), sparse(seed=3), in_groups):
            before = copy.deepcopy(target)
            try:
                itop_prune.load(target, path)
            except ValueError:
                assert_same(target, before)


def test_what_forge_leaves_as_it_is_loads(path: Path) -> None:
    target = other()
    forge(path, lambda tensors, masked: None)
    itop_prune.load(target, path)
    assert_same(sparse(sparsity=0.9), target)


def test_a_weight_that_no_memory_holds_is_refused_also_when_read(path: Path) -> None:
    for shape in ([10**9, 10**9], [10**30, 10**30]):
        forge(path, set_layout(shape=shape))
        with pytest.raises(ValueError, match="can't be made"):
            read_state(path)


def test_a_foreign_safetensors_file_has_no_masks(path: Path) -> None:
    save_file({"embedding": torch.zeros(4, 5)}, path, {"format": "pt"})
    assert "the source has no masks" in refused(path, other())


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\3\4" + bytes(100), b"# Notes\n" * 20])
def test_what_is_no_safetensors_file_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert f"{path} is damaged or no safetensors file" in refused(path, other())


# --- whole or not there ------------------------------------------------------------------------


def fail_in_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[:100])
            raise error

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(path, mode))


def fail_in_fsync(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fsync(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)


def fail_in_replace(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def replace(source: Path, target: Path) -> Path:
        raise error

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("fail", [fail_in_write, fail_in_fsync, fail_in_replace])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"]
)
def test_where_writing_fails_the_file_of_before_is_whole(
    fail: Callable, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved(path)
    with monkeypatch.context() as patch:
        fail(patch, error)
        with pytest.raises(type(error)) as caught:
            itop_prune.save(sparse(seed=1), path)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{path} could not be written: ")
        assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_that_is_not_there_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere/model\.safetensors could not be written"):
        itop_prune.save(sparse(), tmp_path / "nowhere" / "model.safetensors")


def test_the_name_is_given_once_all_is_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fsync = [], os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        (written,) = path.parent.iterdir()
        seen.append((path.exists(), written.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    content = saved(path)
    assert seen == [(False, content), (True, content)]  # of the file, then of its folder


def test_two_that_write_one_name_at_once_leave_a_whole_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two ranks of a sharded model do: one writes all of its file while the other is at it."""
    model, target, fsync = sparse(), other(), os.fsync

    def meanwhile(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        itop_prune.save(model, path)

    monkeypatch.setattr(os, "fsync", meanwhile)
    itop_prune.save(model, path)
    assert [*path.parent.iterdir()] == [path]
    itop_prune.load(target, path)
    assert_same(model, target)


def test_a_state_that_is_no_tensor_is_refused_by_name(path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

    model = nn.Sequential(nn.Linear(4, 6), Counting(6, 4))
    itop_prune.apply(model, 0.5)
    with pytest.raises(
        ValueError, match=r"^1\._extra_state holds no dense tensor with values, and this file noth"
    ):
        itop_prune.save(model, path)
    assert not path.exists()


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_a_tensor_that_is_not_dense_or_has_no_values_is_refused_by_name(
    change: Callable[[Tensor], Tensor], path: Path
) -> None:
    model = sparse()
    model.register_buffer("table", change(torch.eye(3)))
    with pytest.raises(ValueError, match=r"^table holds no dense tensor with values"):
        itop_prune.save(model, path)
    assert not path.exists()


# --- sparse storage ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_both_storages_give_one_file_and_both_take_it(name: str, path: Path) -> None:
    build = MODELS[name]
    masked, stored = (sparse(build, storage=storage) for storage in ("mask", "sparse"))
    assert saved(path, stored) == saved(path, masked)

    for storage, source in (("mask", masked), ("sparse", stored)):
        again = sparse(build, seed=3, storage=storage)
        parameters = [*again.parameters()]
        itop_prune.load(again, path)
        assert_same(again, source)
        assert all(one is two for one, two in zip(parameters, again.parameters(), strict=True))

        fresh = other(build)
        itop_prune.load(fresh, path, storage=storage)
        assert_same(fresh, source)


def trained_to_sparser() -> nn.Module:
    """A model in sparse storage, with free slots and weights that took those of others."""
    model = sparse(storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = itop_prune.find_masks(model)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=4, every=1, density="cubic", final_sparsity=0.8
    )
    train(model, optimizer, regrow, steps=range(4))
    for itop in masks.values():
        used = itop.positions[itop.positions >= 0]
        assert 0 < len(used) < len(itop.positions)
    assert any(itop.positions.diff().min() < -1 for itop in masks.values())
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_slots_that_are_free_or_out_of_order_do_not_show_in_the_file(
    dtype: torch.dtype | None, path: Path
) -> None:
    model, twin = trained_to_sparser(), other()
    itop_prune.load(twin, model.state_dict())
    assert differing(*(itop_prune.dense_state_dict(one) for one in (model, twin))) == []
    itop_prune.save(twin, path, dtype)
    content = path.read_bytes()
    itop_prune.save(model, path, dtype)
    assert path.read_bytes() == content

    again = other()
    for name, itop in itop_prune.load(again, path, storage="sparse").items():
        assert itop.used.all(), name
        assert torch.equal(itop.positions, itop.positions.sort().values), name
        assert torch.equal(itop.mask, itop_prune.find_masks(model)[name].mask), name


def test_a_state_dict_in_sparse_storage_is_loaded_with_its_slots_as_they_are() -> None:
    model, fresh, stored = trained_to_sparser(), other(), sparse(seed=3, storage="sparse")
    itop_prune.load(fresh, model.state_dict(), storage="sparse")
    itop_prune.load(stored, model.state_dict())
    for again in (fresh, stored):
        assert_same(again, model)


def test_the_state_dict_of_a_model_in_sparse_storage_can_be_written(path: Path) -> None:
    model = trained_to_sparser()
    itop_prune.save(model, path)
    content = path.read_bytes()
    write(model.state_dict(), path)
    assert path.read_bytes() == content


def test_values_and_positions_that_do_not_fit_are_refused_by_name(path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained_to_sparser().state_dict().items()}
    state["2.weight_positions"][0] = 192
    with pytest.raises(ValueError, match=r"2\.weight: position 192 is outside of a weight of 192"):
        write(state, path)
    assert not path.exists()
