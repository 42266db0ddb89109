"""Copy a masked model for inference, with the layers in sparse storage that are faster so."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from itop_prune.analysis.flops import run
from itop_prune.inference.folding import fold_norms
from itop_prune.inference.measurement import (
    Choice,
    Report,
    clone_tensors,
    layer_seconds,
    relative_error,
    tensors_in,
)
from itop_prune.kernels.runtime import has_numba, uses_kernels
from itop_prune.layers.handle import find_masks, remove
from itop_prune.layers.maskable import Target, unwrap
from itop_prune.layers.masked_layer import attach_sparse
from itop_prune.layers.sparse_products import can_take_kernels, forward_of
from itop_prune.messages import nearest

CHOICES = ("dense", "sparse")
TOLERANCE = 1e-5
"""The largest relative error of outputs."""
CLEARLY = 1.05
"""A sparse layer must be so many times as fast as the dense one to take its place."""


def deploy(
    model: nn.Module, example_inputs: Any, *, choices: Sequence[str] | None = None
) -> nn.Module:
    """Copy a masked model for inference on a CPU, each layer dense or sparse, whichever is faster.

    Batch norms become part of the convolutions before them, which scale and shift their outputs.
    A sparse layer holds its active weights alone, as in `apply(..., storage="sparse")`. If kernels
    can compute it (`pip install 'itop_prune[sparse]'`), it is timed beside the dense one, within
    forwards of this example. Kernels compute linear layers and 2-d convolutions of one group, in
    float32 or float64, of which at most a quarter is active. All others stay dense. The whole model
    stays dense if it is not faster in the end. Kernels are compiled at the first use in an
    environment, which takes some seconds.

    Args:
        model: Masked by `itop_prune.apply` or `load`, on the CPU; wrapped or not. It is left as it
            was.
        example_inputs: What its forward takes, a tensor or a tuple of arguments, of the sizes that
            should be fast.
        choices: What each layer may choose from, "dense" and "sparse"; None: both. With "sparse"
            alone every masked weight is held sparse, even where that is slower.

    Returns:
        The copy, without masks, in evaluation mode; no parameter requires a gradient. It computes
        inputs of other sizes too. `print(copy.report)` shows what was chosen. `torch.export.export`
        and `torch.onnx.export` take the copy. They write only the active weights of sparse layers.
        What they wrote makes the dense weights of them and computes with these.

    Raises:
        ValueError: The model has no masks, is not on the CPU or can't be run with these inputs; or
            a choice is unknown.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> masks = itop_prune.apply(model, sparsity=0.9)
    >>> deployed = deploy(model, torch.zeros(1, 64), choices=("sparse",))
    >>> [choice.storage for choice in deployed.report.choices]
    ['sparse', 'sparse']
    """
    choices = _checked(choices)
    _check(model)
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    deployed = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
    deployed.zero_grad()
    targets = {
        name: (itop._layer, itop._tensor_name) for name, itop in find_masks(deployed).items()
    }
    remove(deployed)
    dense = copy.deepcopy(deployed)

    with torch.no_grad():
        expected = run(dense, clone_tensors(arguments))
        norms = fold_norms(deployed, arguments)
        rows = _choose(deployed, targets, arguments, choices)
        for row, (layer, tensor) in zip(rows, targets.values(), strict=True):
            if row.storage == "sparse":
                _make_sparse(layer, tensor)

        error = relative_error(deployed(*clone_tensors(arguments)), expected)
        models = {"dense": dense, "deployed": deployed}
        seconds = layer_seconds(models, [""], arguments)[""]

    fallback = ""
    if not norms and all(row.storage == "dense" for row in rows):
        seconds["deployed"] = seconds["dense"]  # both are the same model
    elif math.isnan(error):
        fallback = "all of it dense: no numbers in the outputs, or NaN, to compare"
    elif error > TOLERANCE:
        fallback = f"all of it dense: the outputs would differ by {error:.1e}"
    elif "dense" in choices and seconds["deployed"] > seconds["dense"]:
        fallback = f"all of it dense: it would take {1e3 * seconds['deployed']:.3f} ms"
    if fallback:
        deployed, norms, error, seconds["deployed"] = dense, 0, 0.0, seconds["dense"]
        rows = [
            dataclasses.replace(row, storage="dense", seconds=row.dense_seconds) for row in rows
        ]

    deployed.report = Report(  # type: ignore[assignment]
        choices=tuple(rows),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors_in(arguments)),
        threads=torch.get_num_threads(),
        dense_seconds=seconds["dense"],
        seconds=seconds["deployed"],
        difference=error,
        fallback=fallback,
        norms=norms,
    )
    return deployed


def _checked(choices: Sequence[str] | None) -> Sequence[str]:
    """Check choices; None stands for all."""
    if choices is None:
        return CHOICES
    if isinstance(choices, str) or not choices:
        raise ValueError(
            f"choices is {choices!r}; allowed are some of {', '.join(CHOICES)}, as a tuple"
        )
    for choice in choices:
        if choice not in CHOICES:
            raise ValueError(
                f"unknown choice {choice!r}; known are {', '.join(CHOICES)}"
                f"{nearest(choice, CHOICES)}"
            )
    return choices


def _check(model: nn.Module) -> None:
    kind = type(unwrap(model)).__name__
    if not find_masks(model):
        raise ValueError(
            f"{kind} has no masks; deploy what itop_prune.apply or itop_prune.load made sparse, "
            "and before itop_prune.remove"
        )
    if hasattr(unwrap(model), "report"):
        raise ValueError(
            f"{kind} has a `report` of its own, where the table of a deployed model goes; give it "
            "another name"
        )

    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        raise ValueError(
            f"the model is on {', '.join(sorted(devices))}; allowed is the CPU, for which the "
            "kernels are: call model.cpu() first"
        )


def _choose(
    model: nn.Module,
    targets: Mapping[str, Target],
    arguments: tuple[Any, ...],
    choices: Sequence[str],
) -> list[Choice]:
    """Choose storages by the time of layers within forwards, one dense and one sparse."""
    reasons = {name: _why_dense(*place) for name, place in targets.items()}
    timed = [name.rpartition(".")[0] for name, why in reasons.items() if not why]
    seconds: dict[str, dict[str, float]] = {}
    if timed and "sparse" in choices:
        sparse = copy.deepcopy(model)
        for layer in timed:
            _make_sparse(sparse.get_submodule(layer), "weight")
        seconds = layer_seconds({"dense": model, "sparse": sparse}, timed, arguments)

    rows = []
    for name, place in targets.items():
        layer, why = name.rpartition(".")[0], reasons[name]
        found = {} if why else seconds.get(layer, {})
        if "sparse" in choices and not why and not found:
            why = "not called: what holds it reads its weight"
        faster = bool(found) and found["dense"] >= CLEARLY * found["sparse"]
        storage = "sparse" if faster or "dense" not in choices else "dense"
        weight = place[0].get_parameter(place[1])
        rows.append(
            Choice(
                name=name,
                shape=tuple(weight.shape),
                density=int(weight.count_nonzero()) / weight.numel(),
                storage=storage,
                dense_seconds=found.get("dense", 0.0),
                seconds=found.get(storage, 0.0),
                why=why,
            )
        )
    return rows


def _make_sparse(layer: nn.Module, tensor: str) -> None:
    """Let a layer hold the active weights of a dense parameter alone."""
    attach_sparse(layer, tensor, layer.get_parameter(tensor) != 0)


def _why_dense(layer: nn.Module, tensor: str) -> str:
    """Say why kernels can't compute a layer, or ""."""
    kind = type(layer).__name__
    if tensor != "weight" or forward_of(type(layer)) is None or "forward" in vars(layer):
        package = type(layer).__module__.partition(".")[0]
        return f"{package}'s {kind} computes in a way of its own"
    if not can_take_kernels(layer):
        return f"no kernel computes such a {kind}"
    weight = layer.get_parameter(tensor)
    if weight.dtype not in (torch.float32, torch.float64):
        return f"{weight.dtype}, not float32 or float64"
    if not uses_kernels(weight.shape, int(weight.count_nonzero())):
        return "too many active weights for a kernel"
    return "" if has_numba() else "Numba is not installed"
