"""Exported files compute the outputs of the model; one that can't be written says why."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.training import command as train
from itop_prune_tools.training import export, loop
from itop_prune_tools.training.build import build_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import itop_prune
from itop_prune.files.state_dicts import read_state
from itop_prune.inference import deployment

CPU = torch.device("cpu")
OPTIMIZER = "optimizer: {opt: sgd, lr: 0.1}"
FAMILIES = {
    "lenet300": "img_size: 8",
    "test_resnet": "num_classes: 4",
    "vit_tiny_patch16_224": "img_size: 32, depth: 2, embed_dim: 48, num_heads: 3, num_classes: 4",
    "convnext_atto": "depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], num_classes: 4",
    "test_nfnet": "num_classes: 4",
    "test_efficientnet": "num_classes: 4",
}

GRAPHED = ["lenet300"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("test_resnet", "vit_tiny_patch16_224", "convnext_atto")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the runner's, with an average beside its weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    quickstart = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "attempt", lambda folder: "")
        assert train.main([quickstart, "epochs=1", "ema={decay: 0.9}", "--out", str(folder)]) == 0
    return folder


def recipe_of(path: Path) -> Recipe:
    return export.read_recipe_for_weights(path)


def family(folder: Path, name: str) -> tuple[Path, nn.Module, Tensor]:
    """A recipe with the weights of a masked model beside it, the model, and images."""
    recipe = folder / "recipe.yaml"
    model = f"model: {{model_name: {name}, {FAMILIES[name]}}}"
    data = "data: {name: folder, image_size: 32, batch_size: 2}"
    recipe.write_text("\n".join([model, data, OPTIMIZER, "masks: {sparsity: 0.8}", "epochs: 1"]))
    built = build_model(recipe_of(recipe), None, CPU).eval()
    itop_prune.apply(built, 0.8)
    save_file(built.state_dict(), folder / "weights.safetensors")
    channels, size = (1, 8) if name == "lenet300" else (3, 32)
    return folder / "weights.safetensors", built, torch.randn(3, channels, size, size)


def shape(x: Tensor) -> str:
    return ",".join(map(str, x.shape[1:]))


def of_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def of_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the tool says when it fails, in one line."""
    assert export.main(list(map(str, arguments))) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


# Outputs


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)
@pytest.mark.parametrize(("to", "read"), [("onnx", of_onnx), ("torch", of_torch)])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", GRAPHED)
def test_a_graph_computes_what_the_masked_model_does_for_any_number_of_images(
    name: str,
    deployed: bool,
    to: str,
    read: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, model, x = family(tmp_path, name)
    monkeypatch.setattr(  # nothing is timed
        deployment,
        "layer_seconds",
        lambda models, layers, _: {name: dict.fromkeys(models, 1.0) for name in layers},
    )
    out = tmp_path / f"model{export.SUFFIXES[to][0]}"
    assert (
        export.main(
            [*map(str, (weights, out, "--to", to, "--shape", shape(x))), *["--deployed"] * deployed]
        )
        == 0
    )
    computed = read(out)
    for images in (x, x[:1]):
        torch.testing.assert_close(computed(images), model(images).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pth", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_file_is_a_checkpoint_of_timm_s(name: str, suffix: str, tmp_path: Path) -> None:
    weights, model, x = family(tmp_path, name)
    out = tmp_path / f"dense{suffix}"
    assert export.main(list(map(str, (weights, out, "--to", "dense", "--shape", shape(x))))) == 0
    settings = recipe_of(tmp_path / "recipe.yaml").model
    plain = timm.create_model(**{**settings, "checkpoint_path": str(out)}).eval()
    assert torch.equal(plain(x), model(x))
    other = timm.create_model(**settings).eval()
    other.load_state_dict(
        load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    )
    assert torch.equal(other(x), model(x))


def test_a_sparse_file_has_masks_and_weights_rounded_as_asked(run: Path, tmp_path: Path) -> None:
    small, half = tmp_path / "small.safetensors", tmp_path / "half.safetensors"
    assert export.main([str(run), str(small), "--to", "sparse"]) == 0
    assert export.main([str(run), str(half), "--to", "sparse", "--dtype", "float16"]) == 0
    before, whole, rounded = read_state(run), read_state(small), read_state(half)
    assert before.keys() == whole.keys() == rounded.keys()
    for name, tensor in before.items():
        assert torch.equal(whole[name], tensor)
        assert torch.equal(rounded[name], tensor.half() if tensor.is_floating_point() else tensor)


@pytest.mark.slow
def test_it_says_what_it_wrote_and_the_file_of_a_deployed_model_is_smaller(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, small = tmp_path / "plain.onnx", tmp_path / "small.onnx"
    assert export.main([str(run), str(plain), "--to", "onnx"]) == 0
    size = f"{plain.stat().st_size:,}"
    assert capsys.readouterr().out.startswith(f"{plain}: {size} bytes, outputs differ by ")
    assert export.main([str(run), str(small), "--to", "onnx", "--deployed"]) == 0
    said = "bytes, 3 of 3 masked weights without their zeros, outputs differ by"
    assert said in capsys.readouterr().out
    assert small.stat().st_size < 0.5 * plain.stat().st_size


# Sources


def test_of_a_checkpoint_with_an_average_the_average_is_taken_as_the_run_ends_with(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = max((run / "checkpoints").glob("step-*"))
    for source, name in ((run, "run.pth"), (checkpoint, "checkpoint.pth")):
        assert export.main([str(source), str(tmp_path / name), "--to", "dense"]) == 0
    one, other = (torch.load(tmp_path / name) for name in ("run.pth", "checkpoint.pth"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_elsewhere_is_read_with_its_recipe_and_the_shape_comes_from_the_data(
    run: Path, tmp_path: Path
) -> None:
    weights = shutil.copy(run / "sparse.safetensors", tmp_path)
    arguments = [
        str(weights),
        str(tmp_path / "dense.pth"),
        "--to",
        "dense",
        "--recipe",
        str(run / "recipe.yaml"),
    ]
    assert export.main(arguments) == 0
    plain = torch.load(tmp_path / "dense.pth")
    state = read_state(run)
    assert torch.equal(plain["head.weight"], state["head.weight_orig"] * state["head.weight_mask"])


def test_a_dense_run_is_exported_too_but_not_as_sparse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, model, x = family(tmp_path, "lenet300")
    itop_prune.remove(model)
    save_file(model.state_dict(), weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("masks: {sparsity: 0.8}\n", ""))
    arguments = ("--shape", shape(x))
    assert (
        export.main(list(map(str, (weights, tmp_path / "model.pt2", "--to", "torch", *arguments))))
        == 0
    )
    assert torch.equal(of_torch(tmp_path / "model.pt2")(x), model(x))
    capsys.readouterr()
    sparse = (weights, tmp_path / "small.safetensors", "--to", "sparse", *arguments)
    assert "there are no masks" in error_of(capsys, *sparse)
    deployed = (weights, tmp_path / "small.onnx", "--to", "onnx", "--deployed", *arguments)
    assert "has no masks" in error_of(capsys, *deployed)


def test_the_recipe_s_own_checkpoint_and_pretrained_weights_are_not_asked_for(
    run: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (
        (run / "recipe.yaml")
        .read_text()
        .replace("{model_name: lenet300,", "{model_name: lenet300, pretrained: true,")
    )
    recipe.write_text(f"{text}init: {tmp_path / 'gone.pth'}\n")
    weights = shutil.copy(run / "model.safetensors", tmp_path)
    assert export.main([str(weights), str(tmp_path / "dense.pth"), "--to", "dense"]) == 0


# Bad input


def test_nothing_is_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "there.pth"
    out.write_text("mine")
    assert "exists, and nothing is written over" in error_of(capsys, run, out, "--to", "dense")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("to", ["dense", "sparse", "torch"])
def test_what_fails_leaves_no_file(
    run: Path,
    tmp_path: Path,
    to: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "relative_error", lambda *_: float("nan"))
    out = tmp_path / f"model{export.SUFFIXES[to][0]}"
    assert "the outputs would differ by nan" in error_of(capsys, run, out, "--to", to)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    assert "no space left" in error_of(capsys, run, tmp_path / "dense.pth", "--to", "dense")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "arguments", "message"),
    [
        ("model.pt2", ("--to", "onnx"), "give one that ends in .onnx"),
        ("model.onnx", ("--to", "dense"), "give one that ends in .safetensors or .pth"),
        ("nowhere/model.onnx", ("--to", "onnx"), "nowhere is no folder; make it first"),
        (
            "model.onnx",
            ("--to", "onnx", "--shape", "3,8,8"),
            "does not take images of shape (3, 8, 8)",
        ),
        (
            "model.pt2",
            ("--to", "torch", "--deployed", "--shape", "1,9,8"),
            "does not take images of shape (1, 9, 8)",
        ),
        ("model.onnx", ("--to", "onnx", "--recipe", "nothing.yaml"), "no such file"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(
    run: Path,
    tmp_path: Path,
    out: str,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in error_of(capsys, run, tmp_path / out, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "dense", "--deployed"), "--deployed is for onnx and torch"),
        (("--to", "onnx", "--dtype", "float16"), "--dtype is for sparse"),
        (("--to", "onnx", "--shape", "8,8"), "argument --shape: invalid shape value: '8,8'"),
        (("--to", "onnx", "--shape", "1,0,8"), "argument --shape: invalid shape value: '1,0,8'"),
        ((), "required: --to"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export.parse(["run", "file", *arguments])
    assert message in capsys.readouterr().err


def test_a_source_that_is_none_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dense.pth"
    assert "gone does not exist" in error_of(capsys, run.parent / "gone", out, "--to", "dense")
    weights = shutil.copy(run / "model.safetensors", tmp_path)
    assert "lies in no folder of a run; name the recipe" in error_of(
        capsys, weights, out, "--to", "dense"
    )
    stated = ("--to", "dense", "--recipe", run / "recipe.yaml")
    Path(weights).write_bytes(b"damaged")
    assert "is damaged or no safetensors file" in error_of(capsys, weights, out, *stated)
    save_file({"head.weight": torch.zeros(10, 100)}, weights)
    assert "the source has no masks" in error_of(capsys, weights, out, *stated)
    content = (run / "sparse.safetensors").read_bytes()
    newer = content.replace(b'"itop_prune":"3 ', b'"itop_prune":"4 ')
    Path(weights).write_bytes(newer)
    assert "is of version 4; this itop_prune reads version 3: install" in error_of(
        capsys, weights, out, *stated
    )
    assert not out.exists()


def test_without_the_data_the_shape_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _, _ = family(tmp_path, "test_resnet")
    assert "give it with --shape C,H,W" in error_of(
        capsys, weights, tmp_path / "dense.pth", "--to", "dense"
    )


def test_weights_that_onnx_has_no_room_for_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 100_000)
    assert "use --to torch" in error_of(capsys, run, tmp_path / "model.onnx", "--to", "onnx")


@pytest.mark.slow
def test_onnx_is_written_unchecked_without_a_runtime_and_refused_without_the_exporter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.sys.modules, "onnxruntime", None)
    assert export.main([str(run), str(tmp_path / "model.onnx"), "--to", "onnx"]) == 0
    assert "not checked, for there is no onnxruntime" in capsys.readouterr().out

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", missing)
    said = error_of(capsys, run, tmp_path / "other.onnx", "--to", "onnx")
    assert "No module named 'onnxscript'; install the extra `export`" in said
