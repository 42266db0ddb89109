"""Weights in and out: dense exports, forms of saved sparse models, sources that do not fit."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.toys import batch, convnet, mlp, train
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import itop_prune
from itop_prune.files import state_dicts

State = dict[str, Tensor]


def trained(seed: int = 0, sparsity: float = 0.6) -> nn.Module:
    model = mlp(seed)
    itop_prune.apply(model, sparsity, seed=seed)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=range(3))
    return model


def outputs(model: nn.Module) -> Tensor:
    return model(batch(7, 20)[0])


def save_pt(state: State, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def save_wrapped(state: State, folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, folder / "checkpoint.pth.tar")
    return folder / "checkpoint.pth.tar"


def save_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_folder(state: State, folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


def save_folder_of_pickles(state: State, folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def save_shards(state: State, folder: Path) -> Path:
    names = list(state)
    parts = {
        "model-00001-of-00002.safetensors": names[:4],
        "model-00002-of-00002.safetensors": names[4:],
    }
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


FORMS: list[Callable[[State, Path], object]] = [
    save_pt,
    save_wrapped,
    save_safetensors,
    save_folder,
    save_folder_of_pickles,
    save_shards,
]


def untouched(model: nn.Module, before: State) -> bool:
    """Whether the model has this state dict."""
    state = model.state_dict()
    return list(state) == list(before) and all(
        torch.equal(state[name], before[name]) for name in before
    )


def test_a_dense_state_dict_loads_strictly_into_the_plain_model_with_the_same_outputs() -> None:
    model, plain = trained(), mlp(seed=5)
    plain.load_state_dict(itop_prune.dense_state_dict(model), strict=True)
    assert torch.equal(outputs(plain), outputs(model))


def test_a_dense_state_dict_of_a_convolutional_net_has_buffers_too() -> None:
    model, plain = convnet(), convnet(seed=5)
    itop_prune.apply(model, 0.7)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=range(2), shape=(3, 8, 8))
    plain.load_state_dict(itop_prune.dense_state_dict(model), strict=True)
    x, _ = batch(7, 3, 8, 8)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_a_dense_state_dict_is_zero_off_the_mask_whatever_the_parameter_holds() -> None:
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    with torch.no_grad():
        itop.parameter[~itop.mask] = float("nan")
    assert not itop_prune.dense_state_dict(layer)["weight"][~itop.mask].any()


def test_a_dense_state_dict_of_masked_weights_is_a_copy() -> None:
    model = trained()
    before = outputs(model)
    itop_prune.dense_state_dict(model)["0.weight"].fill_(1.0)
    assert torch.equal(outputs(model), before)


def test_a_dense_state_dict_of_a_dense_model_is_its_state_dict() -> None:
    model = mlp()
    assert untouched(model, itop_prune.dense_state_dict(model))


def test_a_dense_state_dict_of_a_model_pruned_by_torch() -> None:
    model, plain = mlp(), mlp(seed=5)
    prune.random_unstructured(model[2], "weight", 0.5)
    plain.load_state_dict(itop_prune.dense_state_dict(model))
    assert torch.equal(outputs(plain), outputs(model))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile]
)
def test_a_dense_state_dict_of_a_wrapped_model_has_plain_names_in_order(wrap: Callable) -> None:
    assert list(itop_prune.dense_state_dict(wrap(trained()))) == list(mlp().state_dict())


def test_a_parameter_that_merely_ends_in_orig_is_exported_as_it_is() -> None:
    model = nn.Module()
    model.scale_orig = nn.Parameter(torch.ones(3))
    assert list(itop_prune.dense_state_dict(model)) == ["scale_orig"]


def test_load_from_a_state_dict_keeps_the_parameter_objects() -> None:
    model, source = mlp(seed=5), trained()
    before = [id(parameter) for parameter in model.parameters()]
    itop_prune.load(model, source.state_dict())
    assert torch.equal(outputs(model), outputs(source))
    assert [id(parameter) for parameter in model.parameters()] == before


@pytest.mark.parametrize("save", FORMS, ids=lambda save: save.__name__)
def test_load_from_disk(save: Callable[[State, Path], Path], tmp_path: Path) -> None:
    model, source = mlp(seed=5), trained()
    itop_prune.load(model, save(source.state_dict(), tmp_path))
    assert torch.equal(outputs(model), outputs(source))


def test_load_returns_the_masks_of_the_source() -> None:
    model, source = mlp(seed=5), trained()
    masks, expected = itop_prune.load(model, source.state_dict()), itop_prune.find_masks(source)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name].mask, itop.mask) for name, itop in expected.items())


def test_a_layer_under_two_names_loads_and_has_one_mask() -> None:
    def shared() -> nn.ModuleDict:
        layer = nn.Linear(8, 8)
        return nn.ModuleDict(
            {"x": nn.Sequential(layer, nn.ReLU()), "y": layer, "z": nn.Linear(8, 4)}
        )

    source, model = shared(), shared()
    itop_prune.apply(source, 0.5)
    for _ in range(2):  # into a dense model, then into one that has masks
        masks = itop_prune.load(model, source.state_dict())
        found = itop_prune.find_masks(model)
        assert list(masks) == list(found) == ["x.0.weight", "z.weight"]
        assert all(masks[name] is itop for name, itop in found.items())
        assert untouched(model, source.state_dict())


def test_load_into_a_model_that_is_masked_replaces_its_masks_in_place() -> None:
    model, source = trained(seed=1), trained()
    masks = itop_prune.find_masks(model)
    buffers = {name: itop.mask for name, itop in masks.items()}
    itop_prune.load(model, source.state_dict())
    assert all(itop.mask is buffers[name] for name, itop in masks.items())
    assert torch.equal(outputs(model), outputs(source))


def test_a_loaded_model_trains_sparse() -> None:
    model = mlp(seed=5)
    masks = itop_prune.load(model, trained().state_dict())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps=range(3))
    assert not any(itop.parameter[~itop.mask].any() for itop in masks.values())


def test_the_source_is_not_changed() -> None:
    state = trained().state_dict()
    before = copy.deepcopy(state)
    itop_prune.load(mlp(seed=5), state)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_loaded_model_shares_nothing_with_the_source() -> None:
    model, source = mlp(seed=5), trained()
    masks = itop_prune.load(model, source.state_dict())
    before = outputs(source)
    with torch.no_grad():
        for itop in masks.values():
            itop.mask.fill_(True)
            itop.parameter.fill_(1.0)
    assert torch.equal(outputs(source), before)


def test_weights_off_the_mask_of_a_source_that_is_not_clean_become_zero() -> None:
    layer, state = (
        nn.Linear(6, 4),
        {"weight_orig": torch.ones(4, 6), "weight_mask": torch.eye(4, 6), "bias": torch.ones(4)},
    )
    itop_prune.load(layer, state)
    assert torch.equal(layer.weight_orig, torch.eye(4, 6))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    model, source = mlp(seed=5), trained()
    itop_prune.load(model, {prefix + name: tensor for name, tensor in source.state_dict().items()})
    assert torch.equal(outputs(model), outputs(source))


def test_a_source_without_prefix_loads_into_a_wrapped_model() -> None:
    model, source = nn.DataParallel(mlp(seed=5)), trained()
    masks = itop_prune.load(model, source.state_dict())
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    assert torch.equal(outputs(model.module), outputs(source))


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_whose_own_layer_is_called_module_loads(bias: bool) -> None:
    model, source = (nn.ModuleDict({"module": nn.Linear(6, 4, bias=bias)}) for _ in range(2))
    itop_prune.apply(source, 0.5)
    itop_prune.load(model, source.state_dict())
    assert torch.equal(model["module"].weight, source["module"].weight)


def test_a_model_whose_own_layer_is_called_module_loads_from_a_wrapped_one() -> None:
    model, source = (nn.ModuleDict({"module": nn.Linear(6, 4)}) for _ in range(2))
    itop_prune.apply(source, 0.5)
    itop_prune.load(
        model, {"module." + name: tensor for name, tensor in source.state_dict().items()}
    )
    assert torch.equal(model["module"].weight, source["module"].weight)


def test_float_masks_of_torch_pruning_load() -> None:
    model, source = mlp(seed=5), mlp()
    for layer in (source[0], source[4]):
        prune.random_unstructured(layer, "weight", 0.5)
    masks = itop_prune.load(model, source.state_dict())
    assert list(masks) == ["0.weight", "4.weight"]
    assert all(itop.mask.dtype is torch.bool for itop in masks.values())
    assert torch.equal(outputs(model), outputs(source))


def test_layers_pruned_again_by_torch_load() -> None:
    model, source = mlp(seed=5), mlp()
    for amount in (0.3, 0.3):
        prune.l1_unstructured(source[0], "weight", amount)
    itop_prune.load(model, source.state_dict())
    assert torch.equal(outputs(model), outputs(source))


def test_a_bias_that_torch_pruned_is_refused_and_nothing_changes() -> None:
    """Torch prunes biases too; this package masks weights only."""
    model, source = mlp(seed=5), mlp()
    prune.random_unstructured(source[0], "weight", 0.5)
    prune.random_unstructured(source[2], "bias", 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2\.bias"):
        itop_prune.load(model, source.state_dict())
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("layers", "difference"),
    [
        (
            [*mlp()[:4], nn.Linear(12, 7)],
            r"4\.weight: the model has \(7, 12\), the source \(4, 12\)",
        ),
        ([*mlp(), nn.Linear(4, 3)], r"5\.weight: the model has \(3, 4\), the source none"),
        (mlp()[:4], r"4\.weight: the model has none, the source \(4, 12\)"),
    ],
    ids=["another shape", "missing in the source", "missing in the model"],
)
def test_a_layer_that_differs_is_refused_with_both_shapes(
    layers: list[nn.Module], difference: str
) -> None:
    with pytest.raises(ValueError, match=difference):
        itop_prune.load(nn.Sequential(*layers), trained().state_dict())


def test_many_differences_are_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    with pytest.raises(
        ValueError, match=r"strict=False loads the rest\n(  .*\n){10}  and \d+ more$"
    ):
        itop_prune.load(model, trained().state_dict())


def bad_shape(state: State) -> State:
    return {**state, "4.weight_orig": torch.zeros(5, 12), "4.weight_mask": torch.zeros(5, 12)}


def bad_parameter_alone(state: State) -> State:
    return {**state, "4.weight_orig": torch.zeros(5, 12)}


def bad_mask_alone(state: State) -> State:
    return {**state, "4.weight_mask": torch.zeros(5, 12)}


def missing_bias(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "4.bias"}


def missing_mask(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "4.weight_mask"}


def extra_layer(state: State) -> State:
    return {**state, "6.weight": torch.zeros(2, 2)}


def both_dense_and_masked(state: State) -> State:
    return {**state, "0.weight": torch.zeros(16, 20)}


@pytest.mark.parametrize(
    "damage",
    [
        both_dense_and_masked,
        bad_shape,
        bad_parameter_alone,
        bad_mask_alone,
        missing_bias,
        missing_mask,
        extra_layer,
    ],
)
def test_a_source_that_does_not_fit_leaves_the_model_as_it_was(
    damage: Callable[[State], State],
) -> None:
    model = mlp(seed=5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        itop_prune.load(model, damage(trained().state_dict()))
    assert untouched(model, before)
    assert itop_prune.find_masks(model) == {}


class Versions(dict):
    """A state dict with what torch keeps of the versions of layers."""

    def __init__(self, state: State, versions: object) -> None:
        super().__init__(state)
        self._metadata = versions


OTHER_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float(), tensor.float()]),
}
OTHER_NAMES = [0, None, ("0", "bias"), b"bias", 1.5]
OTHER_VALUES = [None, 3, "x", [0.0] * 16, {}]
OTHER_VERSIONS = [None, 3, [], {3: {}}, {"0": None}, {"0": {"version": "one"}}]


def refused(source: object) -> str:
    """Return why a source is not loaded, and see that the models are as they were."""
    for model in (mlp(seed=5), trained(seed=5)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as error:
            itop_prune.load(model, source)
        assert untouched(model, before)
    return str(error.value)


@pytest.mark.filterwarnings(
    "ignore:.*prototype stage:UserWarning", "ignore:.*quantize_per_tensor:UserWarning"
)
@pytest.mark.parametrize("name", ["0.weight_orig", "0.weight_mask", "0.bias"])
@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_a_tensor_that_is_not_plain_is_refused_with_its_kind(kind: str, name: str) -> None:
    state = trained().state_dict()
    message = refused({**state, name: OTHER_TENSORS[kind](state[name])})
    assert re.search(rf"0\.(weight|bias): the model has \(16.*, the source .*{kind}", message)


@pytest.mark.filterwarnings(
    "ignore:.*prototype stage:UserWarning", "ignore:.*quantize_per_tensor:UserWarning"
)
@pytest.mark.parametrize("entry", ["values", "positions", "shape"])
@pytest.mark.parametrize("kind", [*OTHER_TENSORS, "rows"])
def test_a_tensor_of_sparse_storage_that_is_not_plain_is_refused(kind: str, entry: str) -> None:
    model = mlp()
    itop_prune.apply(model, 0.6, storage="sparse")
    state, name = model.state_dict(), f"0.weight_{entry}"
    change = OTHER_TENSORS.get(kind, lambda tensor: tensor.repeat(2, 2))
    assert "0.weight" in refused({**state, name: change(state[name])})


def test_a_buffer_that_is_sparse_in_the_model_too_loads() -> None:
    model, source = mlp(seed=5), trained()
    for module, table in ((model, torch.zeros(3, 3)), (source, torch.eye(3))):
        module.register_buffer("table", table.to_sparse())
    itop_prune.load(model, source.state_dict())
    assert torch.equal(model.table.to_dense(), torch.eye(3))


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    assert f"the name {name!r} is no text" in refused(
        {**trained().state_dict(), name: torch.ones(2)}
    )


@pytest.mark.parametrize("value", OTHER_VALUES)
def test_a_value_that_is_no_tensor_is_refused_by_its_name(value: object) -> None:
    message = refused({**trained().state_dict(), "0.bias": value})
    assert f"0.bias is of type {type(value).__name__}" in message


@pytest.mark.parametrize("versions", OTHER_VERSIONS)
def test_versions_that_are_none_are_refused(versions: object) -> None:
    assert "_metadata are not the versions" in refused(Versions(trained().state_dict(), versions))


def test_not_strict_a_new_head_stays_dense_and_the_rest_is_loaded() -> None:
    model, source = nn.Sequential(*mlp(seed=5)[:4], nn.Linear(12, 7)), trained()
    before = model[4].weight.detach().clone()
    masks = itop_prune.load(model, source.state_dict(), strict=False)
    assert list(masks) == ["0.weight", "2.weight"]
    assert torch.equal(model[4].weight, before)
    x, _ = batch(7, 20)
    assert torch.equal(model[:4](x), source[:4](x))


def test_not_strict_a_source_of_which_nothing_fits_is_refused_with_the_nearest_name() -> None:
    model = nn.ModuleDict({"fc0": nn.Linear(3, 3)})
    source = nn.ModuleDict({"fc1": nn.Linear(3, 3)})
    itop_prune.apply(source, 0.5)
    with pytest.raises(
        ValueError, match=r"no masked weight of the source fits the model: .*nearest: 'fc"
    ):
        itop_prune.load(model, source.state_dict(), strict=False)


@pytest.mark.parametrize("state", [mlp().state_dict(), {}, {"module": torch.zeros(2)}])
def test_a_source_without_masks_is_refused_with_what_to_do(state: State) -> None:
    with pytest.raises(
        ValueError,
        match=r"no masks; .*model\.load_state_dict, then call itop_prune\.apply.*'nonzero'",
    ):
        itop_prune.load(mlp(), state)


def test_a_layer_masked_in_the_model_and_dense_in_the_source_is_refused() -> None:
    model, source = mlp(seed=5), mlp()
    itop_prune.apply(model, 0.5)
    itop_prune.apply(source, 0.5, exclude="2")
    with pytest.raises(
        ValueError,
        match=r"masked in the model and dense in the source: 2\.weight; load into.*'nonzero'",
    ):
        itop_prune.load(model, source.state_dict())


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        itop_prune.load(mlp(), tmp_path / name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has neither model\.safetensors nor pytorch_model\.bin"
    ):
        itop_prune.load(mlp(), tmp_path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, torch.zeros(3)], ids=["list", "numbers", "tensor"]
)
def test_a_file_that_is_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model\.pt holds no state dict.*save model\.state_dict\(\)"
    ):
        itop_prune.load(mlp(), tmp_path / "model.pt")


def flip_a_byte_of(tensor: Tensor, path: Path) -> None:
    """Flip one byte in the numbers of a tensor in a file."""
    content, numbers = bytearray(path.read_bytes()), tensor.numpy().tobytes()
    assert content.count(numbers) == 1
    content[content.index(numbers) + len(numbers) // 2] ^= 0x80
    path.write_bytes(content)


def test_a_file_of_torch_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path, source, model = tmp_path / "model.pt", mlp(), mlp(seed=5)
    itop_prune.apply(source, 0.5)
    torch.save(source.state_dict(), path)
    flip_a_byte_of(source.state_dict()["0.weight_orig"], path)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"model\.pt is damaged: Bad CRC-32 for .*; copy or save it again"
    ):
        itop_prune.load(model, path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.load(path, weights_only=True)  # torch does not notice


def test_files_of_torch_without_checksums_can_be_loaded(tmp_path: Path) -> None:
    source = mlp()
    itop_prune.apply(source, 0.5)
    torch.save(source.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)

    for path in tmp_path.iterdir():
        model = mlp(seed=5)
        itop_prune.load(model, path)
        assert torch.equal(model[0].weight, source[0].weight)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "executed"
    torch.save({"weight": Malicious(marker)}, path)
    with pytest.raises(ValueError, match=r"model\.pt holds more than tensors and plain values"):
        itop_prune.load(mlp(), path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it is no harmless one
    assert marker.exists()


class Versioned(nn.Linear):
    """A layer that reads its version when it is loaded, as batch norm does."""

    _version = 3

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: object
    ) -> None:
        if local_metadata.get("version") != 3:
            raise RuntimeError(f"version is {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_layers_go_with_the_weights() -> None:
    model, plain, dense = (nn.Sequential(nn.Linear(4, 6), Versioned(6, 4)) for _ in range(3))
    itop_prune.apply(model, 0.5)
    plain.load_state_dict(itop_prune.dense_state_dict(model))
    for source in (
        model.state_dict(),
        dict(model.state_dict()),
    ):  # a file of tensors alone has no versions
        itop_prune.load(dense, source)
    assert torch.equal(dense[1].weight, plain[1].weight)


def test_versions_are_found_inside_a_compiled_layer() -> None:
    model, plain = (nn.Sequential(nn.Linear(4, 6), Versioned(6, 4)) for _ in range(2))
    itop_prune.apply(model, 0.5)
    model[1] = torch.compile(model[1], backend="eager")
    plain.load_state_dict(itop_prune.dense_state_dict(model))
    assert torch.equal(plain[1].weight, model[1].weight)


def test_a_model_on_the_meta_device_is_not_loaded_into() -> None:
    saved = mlp()
    itop_prune.apply(saved, 0.5)
    with pytest.raises(ValueError, match=r"meta device; call model\.to_empty"):
        itop_prune.load(mlp().to("meta"), saved.state_dict())


def test_a_model_of_which_a_part_can_not_be_masked_is_left_as_it_was() -> None:
    saved, model = mlp(), mlp()
    itop_prune.apply(saved, 0.5)
    model[2].kept = [model[2].weight]
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"2.weight: Linear reads it from its kept"):
        itop_prune.load(model, saved.state_dict())
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("where", ["source", "model"])
def test_versions_are_found_behind_prefixes(where: str) -> None:
    model, dense = (nn.Sequential(nn.Linear(4, 6), Versioned(6, 4)) for _ in range(2))
    itop_prune.apply(model, 0.5)
    state = nn.DataParallel(model).state_dict() if where == "source" else model.state_dict()
    if where == "model":
        dense[1] = torch.compile(dense[1], backend="eager")
    itop_prune.load(dense, state)
    assert torch.equal(dense[1].weight, model[1].weight)


def tied(kind: str) -> nn.Module:
    if kind == "two layers":
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model
    model = nn.ModuleDict({"0": nn.Embedding(10, 4), "1": nn.Linear(4, 10)})
    model["1"].weight = model["0"].weight
    return model


@pytest.mark.parametrize("kind", ["two layers", "embedding"])
def test_tied_weights_are_refused_as_by_apply_and_nothing_changes(kind: str) -> None:
    model = tied(kind)
    source = copy.deepcopy(model)
    source["1" if kind == "embedding" else 1].weight = nn.Parameter(
        source.get_submodule("0").weight.detach().clone()
    )
    itop_prune.apply(source, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"can't mask\n(.*\n)?  1\.weight: it is tied to 0\.weight.*untie them"
    ):
        itop_prune.load(model, source.state_dict())
    assert untouched(model, before)
    assert itop_prune.find_masks(model) == {}


class Counting(nn.Linear):
    """A layer with something else than tensors in its state."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_the_extra_state_of_a_layer_goes_with_the_weights(form: str, tmp_path: Path) -> None:
    model, source = (nn.Sequential(nn.Linear(4, 6), Counting(6, 4)) for _ in range(2))
    itop_prune.apply(source, 0.5)
    source[1].seen = 7
    itop_prune.load(
        model, source.state_dict() if form == "mapping" else save_pt(source.state_dict(), tmp_path)
    )
    assert model[1].seen == 7
    assert torch.equal(model[1].weight, source[1].weight)


def test_an_extra_state_that_is_missing_is_a_difference() -> None:
    model, source = (nn.Sequential(nn.Linear(4, 6), kind(6, 4)) for kind in (Counting, nn.Linear))
    itop_prune.apply(source, 0.5)
    with pytest.raises(ValueError, match=r"1\._extra_state: the model has \(\), the source none"):
        itop_prune.load(model, source.state_dict())
    assert itop_prune.find_masks(model) == {}


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_checkpoint_in_memory_is_unwrapped_as_one_in_a_file(key: str) -> None:
    model, source = mlp(seed=5), trained()
    itop_prune.load(model, {key: source.state_dict(), "epoch": 3})
    assert torch.equal(outputs(model), outputs(source))


def test_a_mapping_of_something_else_is_no_state_dict() -> None:
    with pytest.raises(
        ValueError, match="the source holds no state dict, a dict of tensors by name"
    ):
        itop_prune.load(mlp(), {"weights": trained().state_dict(), "epoch": 3})


def test_the_state_dict_of_an_averaged_model_loads() -> None:
    source = torch.optim.swa_utils.AveragedModel(trained())
    model = mlp(seed=5)
    itop_prune.load(model, source.state_dict())
    assert torch.equal(outputs(model), outputs(source.module))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"hello world",
        lambda c: bytes(99),
    ],
    ids=["half", "empty", "text", "zeros"],
)
def test_a_damaged_torch_file_is_refused_by_its_name(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path, model = save_pt(trained().state_dict(), tmp_path), mlp(seed=5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.pt (is|holds .*or is) damaged"):
        itop_prune.load(model, path)
    assert itop_prune.find_masks(model) == {}


@pytest.mark.parametrize(
    "content", ["{", "[" * 5000, "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_of_shards_is_refused_by_its_name(content: str, tmp_path: Path) -> None:
    save_shards(trained().state_dict(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors\.index\.json is damaged: it has no weight_map"
    ):
        itop_prune.load(mlp(), tmp_path)


@pytest.mark.parametrize("name", [".", "..", "", "absent", "a" * 300, "a\0"])
def test_an_index_of_shards_that_names_no_file_is_refused(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FileNotFoundError) as error:
        itop_prune.load(mlp(), tmp_path)
    message = f"{index} names {name!r}, no file beside it; copy the folder again"
    assert str(error.value) == message


def test_a_file_larger_than_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    itop_prune.apply(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    for name in ("weights.pt", "weights.safetensors"):
        if name.endswith("pt"):
            torch.save(model.state_dict(), tmp_path / name)
        else:
            itop_prune.save(model, tmp_path / name)
        monkeypatch.setattr(state_dicts, "total_memory", lambda device: 1000)
        with pytest.raises(ValueError, match=f"{name} has .* kB, and this machine has 1 kB"):
            itop_prune.load(model, tmp_path / name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
