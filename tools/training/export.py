"""Take a model out of a run into a file for somewhere else, and check that the file computes what the model does.

  python tools/export.py runs/quickstart/seed0 digits.safetensors --to dense            # a plain
  timm checkpoint python tools/export.py runs/quickstart/seed0 small.safetensors --to sparse --dtype
  float16 python tools/export.py runs/quickstart/seed0 digits.onnx --to onnx                    #
  for any ONNX runtime python tools/export.py runs/quickstart/seed0 digits.pt2 --to torch --deployed
  # for torch.export.load python tools/export.py weights.pt digits.onnx --to onnx --recipe
  recipes/quickstart.yaml --shape 1,8,8

dense    weights under their plain names with zeros where a mask was, as timm's `checkpoint_path`
    and `load_state_dict` take them: .safetensors or .pth sparse   active weights and masks, as
    `itop_prune.load` takes them: .safetensors onnx     the graph and dense weights, for any number
    of images; needs the extra `export` torch    the same as torch.export.save writes it; whoever
    loads it needs torch alone

With --deployed a file of ONNX holds the active weights of most layers alone; onnxruntime makes them
dense once, when it loads the file, another runtime may do so at every call. One of torch holds the
active weights alone, and computes with them alone, in the layers where that was faster, as measured
here on one image.

A file appears under its name when it is whole and computes the same, and never in place of another.
Of a run whose recipe has an average (ema), the average is taken.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.inference.measurement import Report, relative_error

from ..config.recipe import Recipe, RecipeError
from ..data.datasets import open_data
from ..data.source import CPU, DataError
from ..run_folder.folder import RunError, in_a_line
from .build import build_model
from .checkpoint import save_model
from .evaluation import load_weights, read_for_weights

TOLERANCE = 1e-4
"""How far outputs may be from those of the model, as a share of their norm; rounded values are shown, not judged."""
SUFFIXES = {
    "dense": (".safetensors", ".pth"),
    "sparse": (".safetensors",),
    "onnx": (".onnx",),
    "torch": (".pt2",),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_ONNX = 2**31
"""Bytes of a file of ONNX: what protocol buffers can hold."""

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
        "out", type=Path, metavar="file", help="what is written; its name ends as its target's does"
    )
    parser.add_argument("--to", choices=SUFFIXES, required=True, help="what it is for, see above")
    parser.add_argument(
        "--deployed", action="store_true", help="onnx, torch: active weights alone, see above"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="sparse: what values are rounded to; as they are without it"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="YAML", help="of the model, where the source lies in no run"
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="C,H,W",
        help="of an image, in place of what the run was given",
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
    """Read the shape of an image.

    >>> shape("3,224,224")
    (3, 224, 224)
    """
    channels, height, width = map(int, text.split(","))
    if min(channels, height, width) < 1:
        raise ValueError
    return channels, height, width


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and say how large it is and how near its outputs are; return 0, or 1 for an error."""
    args = parse(argv)
    try:
        print(export(args))
    except (RunError, RecipeError, DataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(args: argparse.Namespace) -> str:
    """Write the file; return what there is to say about it, in a line.

    Raises:
        RunError: Something is missing, damaged or does not fit; the message says what.
        RecipeError, DataError, ImportError, OSError: Likewise.
    """
    check_name(args.out, args.to)
    run = next(
        (
            place
            for place in (args.source, *args.source.parents[:3])
            if (place / "recipe.yaml").is_file()
        ),
        None,
    )
    path = args.recipe or (run and run / "recipe.yaml")
    if not args.source.exists():
        raise RunError(
            f"{args.source} does not exist; give a run folder, one of its checkpoints, or a file of weights"
        )
    if path is None:
        raise RunError(
            f"{args.source} lies in no folder of a run; name the recipe of the model with --recipe YAML"
        )
    recipe = read_for_weights(path)
    model = build_model(recipe, None, CPU).eval()
    load_weights(recipe, model, args.source)
    image = args.shape or shape_of(run, recipe)
    inputs = torch.randn(3, *image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            expected = model(inputs)
        except Exception as error:  # whatever a model raises at a wrong shape
            hint = "give the shape of an image with --shape C,H,W"
            raise RunError(
                f"the model does not take images of shape {image}: {in_a_line(error)}; {hint}"
            ) from None
        unfinished = args.out.with_name(f"unfinished-{os.getpid()}-{args.out.name}")
        try:
            again, note = write(args, recipe, model, unfinished, inputs[:2])
            apart = relative_error(again(inputs), expected) if again else None
            if apart is not None and not (apart <= TOLERANCE or args.dtype):
                raise RunError(
                    f"the outputs would differ by {apart:.1e} of their norm; {args.out} was not written"
                )
            unfinished.replace(args.out)
        finally:
            unfinished.unlink(missing_ok=True)
    checked = (
        "not checked, for there is no onnxruntime"
        if apart is None
        else f"outputs differ by {apart:.1e} of their norm"
    )
    return f"{args.out}: {args.out.stat().st_size:,} bytes, {note}{checked}"


def check_name(out: Path, target: str) -> None:
    """Refuse a name that tells of another format, is taken, or is in no folder.

    Raises:
        RunError: This one does.
    """
    if out.suffix not in SUFFIXES[target]:
        allowed = " or ".join(SUFFIXES[target])
        raise RunError(
            f"the name of {out} tells of another format; for --to {target} give one that ends in {allowed}"
        )
    if out.exists():
        raise RunError(
            f"{out} exists, and nothing is written over; give another name, or remove it first"
        )
    if not out.parent.is_dir():
        raise RunError(f"{out.parent} is no folder; make it first")


def shape_of(run: Path | None, recipe: Recipe) -> tuple[int, ...]:
    """Return the shape of an image: what the run noted, or what its data have."""
    if run:
        with (
            suppress(OSError, ValueError, KeyError, TypeError),
            (run / "layers.jsonl").open(encoding="utf-8") as notes,
        ):
            return tuple(map(int, json.loads(notes.readline())["image"]))
    try:
        return open_data(**recipe.data, augment=recipe.augment).shape
    except DataError as error:
        raise RunError(
            f"the shape of an image is not known: {error}; give it with --shape C,H,W"
        ) from None


def write(
    args: argparse.Namespace, recipe: Recipe, model: nn.Module, path: Path, example: Tensor
) -> tuple[Function | None, str]:
    """Write the file; return what it computes, read back, or None where nothing here can run it, and a note.

    Raises:
        RunError: The model can't be exported, or has no masks where they are needed.
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
            kernels = ("embedding_bag",) if args.to == "onnx" else ("dense", "embedding_bag")
            model = itop_prune.deploy(model, example[:1], choices=kernels)
            chosen = [choice.kernel != "dense" for choice in cast(Report, model.report).choices]
            note = f"{sum(chosen)} of {len(chosen)} masked weights without their zeros, "
        else:
            itop_prune.remove(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about itself
            return EXPORTS[args.to](model, path, example), note
    except (
        ValueError,
        RuntimeError,
    ) as error:  # also torch's own, of operations and shapes that it can't follow
        raise RunError(f"the model can't be exported: {in_a_line(error)}") from None


def loaded(recipe: Recipe, path: Path) -> nn.Module:
    """Return a new model with the weights of a file."""
    model = build_model(recipe, None, CPU).eval()
    load_weights(recipe, model, path)
    return model


def to_torch(model: nn.Module, path: Path, example: Tensor) -> Function:
    """Write what torch.export makes of a model, for any number of images, and return what it computes."""
    exported = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    torch.export.save(exported, path)
    return torch.export.load(path).module()


def to_onnx(model: nn.Module, path: Path, example: Tensor) -> Function | None:
    """Write a model as ONNX, for any number of images, and return what onnxruntime computes, where there is one."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size >= LARGEST_ONNX:
        raise RunError(
            f"the weights take {size:,} bytes, and a file of ONNX holds {LARGEST_ONNX:,}; use --to torch"
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


EXPORTS: dict[str, Callable[[nn.Module, Path, Tensor], Function | None]] = {
    "onnx": to_onnx,
    "torch": to_torch,
}
