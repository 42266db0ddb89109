"""Export a model from a run to a file, and check that the file computes the same outputs.

  itop-prune export runs/quickstart/seed0 digits.safetensors --to dense
  itop-prune export runs/quickstart/seed0 small.safetensors --to sparse --dtype float16
  itop-prune export runs/quickstart/seed0 digits.onnx --to onnx
  itop-prune export runs/quickstart/seed0 digits.pt2 --to torch --deployed
  itop-prune export weights.pt digits.onnx --to onnx --recipe quickstart

  --to dense    .safetensors or .pth: plain weights with zeros under the masks, for timm's
                `checkpoint_path` and `load_state_dict`
  --to sparse   .safetensors: active weights and masks, for `itop_prune.load`
  --to onnx     .onnx: the graph and dense weights, for any batch size; needs the extra `export`
  --to torch    .pt2: the same, written by torch.export.save; loading it needs only torch

With --deployed the file of onnx or torch stores only active weights. Layers are made dense again
where the file is used: by onnxruntime once, when it loads the file; by others at every call.

The file gets its name only after it is complete and checked, and never replaces another. If the
recipe has an average (ema), the average is exported.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.files.writing import replacing
from itop_prune.inference.measurement import Report, relative_error

from ..config.packaged import find_recipe
from ..config.recipe import Recipe, RecipeError
from ..data.datasets import open_data
from ..data.source import CPU, DataError
from ..run_folder.folder import RunError, in_a_line
from .build import build_model
from .checkpoint import save_model
from .evaluation import check_holds_weights, load_weights, read_recipe_for_weights

TOLERANCE = 1e-4
"""Largest allowed difference of the outputs, as a share of their norm; not with --dtype."""
SUFFIXES = {
    "dense": (".safetensors", ".pth"),
    "sparse": (".safetensors",),
    "onnx": (".onnx",),
    "torch": (".pt2",),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_ONNX = 2**31
"""Largest ONNX file in bytes, a limit of protocol buffers."""

Function = Callable[[Tensor], Tensor]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="a run folder, one of its checkpoints, or a file of weights"
    )
    parser.add_argument(
        "out", type=Path, metavar="file", help="the file to write; its suffix must fit --to"
    )
    parser.add_argument("--to", choices=SUFFIXES, required=True, help="the format, see above")
    parser.add_argument(
        "--deployed", action="store_true", help="onnx, torch: store only active weights, see above"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="sparse: round the values to this type")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="RECIPE",
        help="recipe of the model, if the source is not in a run folder",
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="C,H,W",
        help="shape of an image, instead of that of the run",
    )
    args = parser.parse_args(argv)
    if args.deployed and args.to not in ("onnx", "torch"):
        parser.error(
            f"--deployed is for onnx and torch; --to {args.to} has no layers, leave it out"
        )
    if args.dtype and args.to != "sparse":
        parser.error(f"--dtype is for sparse; leave it out with --to {args.to}")
    return args


def shape(text: str) -> tuple[int, int, int]:
    """Parse the shape of an image.

    >>> shape("3,224,224")
    (3, 224, 224)
    """
    channels, height, width = map(int, text.split(","))
    if min(channels, height, width) < 1:
        raise ValueError
    return channels, height, width


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and print its size and the difference of its outputs; return 0, 1 on error."""
    args = parse(argv)
    try:
        print(export(args))
    except (RunError, RecipeError, DataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(args: argparse.Namespace) -> str:
    """Write the file; return one line about it.

    Raises:
        RunError: Something is missing, damaged or does not fit; the message says what.
        RecipeError, DataError, ImportError, OSError: Likewise.
    """
    check_name(args.out, args.to)
    if not args.source.exists():
        raise RunError(
            f"{args.source} does not exist; give a run folder, one of its checkpoints, or a file "
            "of weights"
        )

    check_holds_weights(args.source)
    run = find_run(args.source)
    recipe = read_recipe_for_weights(recipe_path(args, run))
    model = build_model(recipe, None, CPU).eval()
    load_weights(recipe, model, args.source)

    image = args.shape or image_shape(run, recipe)
    inputs = torch.randn(3, *image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), replacing(args.out) as unfinished:
        expected = outputs_of(model, inputs)
        written, note = write(args, recipe, model, unfinished, inputs[:2])
        checked = "not checked, for there is no onnxruntime"
        if written:
            checked = check_outputs(written(inputs), expected, args)

    return f"{args.out}: {args.out.stat().st_size:,} bytes, {note}{checked}"


def find_run(source: Path) -> Path | None:
    """Find the folder of the run that a file or checkpoint belongs to."""
    for folder in (source, *source.parents[:3]):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None


def recipe_path(args: argparse.Namespace, run: Path | None) -> Path:
    """Find the recipe of the model.

    Raises:
        RunError: There is none.
        FileNotFoundError: The given one does not exist.
    """
    if args.recipe:
        return find_recipe(args.recipe)
    if run:
        return run / "recipe.yaml"
    raise RunError(
        f"{args.source} lies in no folder of a run; name the recipe of the model with --recipe"
    )


def image_shape(run: Path | None, recipe: Recipe) -> tuple[int, ...]:
    """Read the shape of an image from layers.jsonl of the run, or else from its data.

    Raises:
        RunError: Neither is there.
    """
    if run:
        try:
            with (run / "layers.jsonl").open(encoding="utf-8") as lines:
                return tuple(map(int, json.loads(lines.readline())["image"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or damaged: ask the data

    try:
        return open_data(**recipe.data, augment=recipe.augment).shape
    except DataError as error:
        raise RunError(
            f"the shape of an image is not known: {error}; give it with --shape C,H,W"
        ) from None


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the outputs of the model.

    Raises:
        RunError: It does not take images of this shape.
    """
    try:
        return model(inputs)
    except Exception as error:  # a model may raise anything at a wrong shape
        raise RunError(
            f"the model does not take images of shape {tuple(inputs.shape[1:])}: "
            f"{in_a_line(error)}; give the shape of an image with --shape C,H,W"
        ) from None


def check_outputs(outputs: Tensor, expected: Tensor, args: argparse.Namespace) -> str:
    """Compare the outputs of the file with those of the model; return the result as text.

    Raises:
        RunError: They differ, although no value was rounded.
    """
    apart = relative_error(outputs, expected)
    if not (apart <= TOLERANCE or args.dtype):
        raise RunError(
            f"the outputs would differ by {apart:.1e} of their norm; {args.out} was not written"
        )
    return f"outputs differ by {apart:.1e} of their norm"


def check_name(out: Path, target: str) -> None:
    """Refuse a name that is taken, has the suffix of another format, or is in no folder.

    Raises:
        RunError: This one does.
    """
    if out.suffix not in SUFFIXES[target]:
        allowed = " or ".join(SUFFIXES[target])
        raise RunError(
            f"the name of {out} tells of another format; for --to {target} give one that ends in "
            f"{allowed}"
        )
    if out.exists():
        raise RunError(
            f"{out} exists, and nothing is written over; give another name, or remove it first"
        )
    if not out.parent.is_dir():
        raise RunError(f"{out.parent} is no folder; make it first")


def write(
    args: argparse.Namespace, recipe: Recipe, model: nn.Module, path: Path, example: Tensor
) -> tuple[Function | None, str]:
    """Write the file and read it back.

    Returns:
        The function that the file computes, None without a runtime for it; and a note.

    Raises:
        RunError: The model can't be exported, or has no masks although they are needed.
    """
    if args.to == "dense":
        state = itop_prune.dense_state_dict(model)
        if path.suffix == ".pth":
            torch.save(state, path)
        else:
            save_model(state, path)
        return loaded(replace(recipe, masks=None), path), ""

    if args.to == "sparse":
        try:
            itop_prune.save(model, path, DTYPES.get(args.dtype))
        except ValueError as error:
            raise RunError(f"{args.source} can't be written so: {error}") from None
        return loaded(recipe, path), ""

    note = ""
    try:
        if args.deployed:
            model = itop_prune.deploy(model, example[:1], choices=("sparse",))
            choices = cast(Report, model.report).choices
            sparse = sum(choice.storage == "sparse" for choice in choices)
            note = f"{sparse} of {len(choices)} masked weights without their zeros, "
        else:
            itop_prune.remove(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about itself
            return GRAPHS[args.to](model, path, example), note
    except (ValueError, RuntimeError) as error:  # also torch's, about operations it can't follow
        raise RunError(f"the model can't be exported: {in_a_line(error)}") from None


def loaded(recipe: Recipe, path: Path) -> nn.Module:
    """Build a new model with the weights of a file."""
    model = build_model(recipe, None, CPU).eval()
    load_weights(recipe, model, path)
    return model


def to_torch(model: nn.Module, path: Path, example: Tensor) -> Function:
    """Write a model with torch.export, for any batch size; return the function it computes."""
    dynamic_shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes)
    torch.export.save(exported, path)
    return torch.export.load(path).module()


def to_onnx(model: nn.Module, path: Path, example: Tensor) -> Function | None:
    """Write a model as ONNX, for any batch size; return what onnxruntime, if there, computes."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size >= LARGEST_ONNX:
        raise RunError(
            f"the weights take {size:,} bytes, and a file of ONNX holds {LARGEST_ONNX:,}; "
            "use --to torch"
        )

    names: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": ["logits"],
        "dynamic_shapes": ({0: "batch"},),
    }
    try:
        program: Any = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **names)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}; install the extra `export`: pip install -e '.[export]'"
        ) from None
    program.save(path)

    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


GRAPHS: dict[str, Callable[[nn.Module, Path, Tensor], Function | None]] = {
    "onnx": to_onnx,
    "torch": to_torch,
}
