"""After training: `deploy` copies a masked model for inference and gives each layer its fastest kernel."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.analysis.flops import run
from itop_prune.inference.kernels import KERNELS
from itop_prune.inference.measurement import (
    Choice,
    Report,
    copied,
    difference,
    in_turns,
    tensors_in,
)
from itop_prune.inference.sparse_layers import SparseLinear, obstacle, replace, sparse
from itop_prune.layers.handle import find_masks, remove
from itop_prune.layers.maskable import unwrap
from itop_prune.messages import nearest

CHOICES = ("dense", *KERNELS)
TOLERANCE = 1e-5
"""How far outputs may be from the dense ones, as a share of their norm; of half types twice their precision."""
CLEARLY = 1.05
"""How many times as fast as its dense layer another one must be to take its place."""
HOPELESS = 3.0
"""What takes so many times as long in its first calls is not measured closer."""
IN_A_ROW = 8
"""How many calls of a layer a GPU is given at a time, as in a model, where it computes while the host goes on."""


def deploy(model: nn.Module, example_inputs: Any, *, choices: Sequence[str] = CHOICES) -> nn.Module:
    """Return a copy of a masked model for inference, in which each layer computes in the fastest way measured.

    A linear layer or a convolution stays dense unless a kernel for sparse weights is clearly faster
    on the inputs that the layer has here, and the whole model stays dense unless it is faster in
    the end. What no kernel here can do stays dense too: grouped, transposed and weight-standardised
    convolutions, recurrent layers, layers whose weight is read by what holds them, classes of their
    own, other types than float32 on a CPU.

    The kernels are "csr" and "embedding_bag", for masks of any kind.

    Args: model: Masked by `itop_prune.apply` or `load`, on the CPU or a GPU; in a wrapper or not.
        It is left as it was. example_inputs: What its forward takes, a tensor or a tuple of
        arguments, of the sizes that are to be fast. choices: What each layer may choose from.
        Without "dense" every layer that can takes another kernel, whether that is faster or not.

    Returns: The copy, without masks, in evaluation mode; no parameter asks for a gradient.
        `print(copy.report)` shows what was chosen. Other batch sizes, image sizes and numbers of
        threads give the same outputs; how fast was not measured. `torch.export.export` and
        `torch.onnx.export` take it, on the CPU; both write the active weights of sparse layers
        alone. The first computes with them alone, the second makes dense layers of them, which
        onnxruntime does once, when it loads the file.

    Raises: ValueError: The model has no masks, is not on one device or can't be run with these
        inputs; a choice is unknown.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> masks = itop_prune.apply(model, sparsity=0.9)
    >>> deployed = deploy(model, torch.zeros(1, 64), choices=("csr",))
    >>> [choice.kernel for choice in deployed.report.choices]
    ['csr', 'csr']
    """
    _check(model, choices)
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    deployed = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
    deployed.zero_grad()
    places = {name: (itop._layer, itop._tensor_name) for name, itop in find_masks(deployed).items()}
    remove(deployed)
    dense = copy.deepcopy(deployed)
    with torch.no_grad():
        expected = run(dense, copied(arguments))
        rows = _choose(deployed, places, arguments, choices)
        for row, (layer, _) in zip(rows, places.values(), strict=True):
            if row.kernel != "dense":
                replace(layer, sparse(layer, row.kernel))
        _keep_transposed(deployed, arguments)
        apart = difference(found := deployed(*copied(arguments)), expected)
        arguments = copied(arguments)  # a forward may write into them
        models = {"dense": lambda: dense(*arguments), "deployed": lambda: deployed(*arguments)}
        seconds = in_turns(models, at_least=11, within=1.0, of=median, wait=_wait_for(deployed))
    fallback = ""
    if all(row.kernel == "dense" for row in rows):
        seconds["deployed"] = seconds["dense"]  # the same model twice
    elif math.isnan(apart):
        fallback = "all of it dense: no numbers in the outputs, or NaN, to compare"
    elif apart > _tolerance(found):
        fallback = f"all of it dense: the outputs would differ by {apart:.1e}"
    elif "dense" in choices and seconds["deployed"] > seconds["dense"]:
        fallback = f"all of it dense: it would take {1e3 * seconds['deployed']:.3f} ms"
    if fallback:
        deployed, apart, seconds["deployed"] = dense, 0.0, seconds["dense"]
        rows = [dataclasses.replace(row, kernel="dense", seconds=row.dense_seconds) for row in rows]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(arguments))
    whole = (seconds["dense"], seconds["deployed"], apart, fallback)
    deployed.report = Report(tuple(rows), shapes, torch.get_num_threads(), *whole)  # type: ignore[assignment]
    return deployed


def _check(model: nn.Module, choices: Sequence[str]) -> None:
    if isinstance(choices, str) or not choices:
        raise ValueError(
            f"choices is {choices!r}; allowed are some of {', '.join(CHOICES)}, as a tuple"
        )
    if unknown := [choice for choice in choices if choice not in CHOICES]:
        raise ValueError(
            f"unknown choice {unknown[0]!r}; known are {', '.join(CHOICES)}{nearest(unknown[0], CHOICES)}"
        )
    masks = find_masks(model)
    if not masks:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no masks; deploy what itop_prune.apply or itop_prune.load made "
            "sparse, and before itop_prune.remove"
        )
    if hasattr(unwrap(model), "report"):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has a `report` of its own, where the table of a deployed model goes; give "
            "it another name"
        )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or {device.type for device in devices} - {"cpu", "cuda"}:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the model is on {where}; allowed is one device, the CPU or a GPU: call model.to(...) first"
        )


def _choose(
    model: nn.Module,
    places: Mapping[str, tuple[nn.Module, str]],
    arguments: tuple[Any, ...],
    choices: Sequence[str],
) -> list[Choice]:
    """Run the model once, every kernel of each layer on the inputs that the layer has in it, and choose."""
    calls: dict[nn.Module, list[dict[str, float]]] = {}

    def measure(
        layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        calls.setdefault(layer, []).append(
            _seconds(layer, (*inputs, *named.values()), output, choices)
        )

    reasons = {name: obstacle(*place) for name, place in places.items()}
    layers = [layer for name, (layer, _) in places.items() if not reasons[name]]
    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    model(*copied(arguments))
    for hook in hooks:
        hook.remove()
    rows = []
    for name, (layer, tensor) in places.items():
        found = calls.get(layer, [])
        seconds = {
            k: sum(call[k] for call in found)
            for k in CHOICES
            if found and all(k in call for call in found)
        }
        dense = seconds.pop("dense", 0.0)
        kernel = min(seconds, key=seconds.__getitem__, default="dense")
        if "dense" in choices and seconds and dense < CLEARLY * seconds[kernel]:
            kernel = "dense"
        why = reasons[name] or ("" if found else "not called: what holds it reads its weight")
        weight = layer.get_parameter(tensor)
        density = int(weight.count_nonzero()) / weight.numel()
        rows.append(
            Choice(
                name, tuple(weight.shape), density, kernel, dense, seconds.get(kernel, dense), why
            )
        )
    return rows


def _seconds(
    layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, choices: Sequence[str]
) -> dict[str, float]:
    """Return the shortest seconds of one call of a layer, dense and with each kernel that gives the same output."""
    functions = {"dense": functools.partial(layer.forward, *inputs)}
    for kernel in (kernel for kernel in CHOICES if kernel in choices and kernel != "dense"):
        with contextlib.suppress(
            RuntimeError
        ):  # this torch was built without it, or has none for this layer
            function = functools.partial(sparse(layer, kernel).forward, *inputs)
            if difference(function(), output) <= _tolerance(output):
                functions[kernel] = function
    timed = functools.partial(
        in_turns, of=min, wait=_wait_for(layer), in_a_row=IN_A_ROW if output.is_cuda else 1
    )
    if "dense" in choices:
        first = timed(functions, at_least=2, within=0.0)
        functions = {
            name: call
            for name, call in functions.items()
            if first[name] <= HOPELESS * first["dense"]
        }
    return timed(functions, at_least=7, within=0.05)


def _tolerance(outputs: Any) -> float:
    """Return how far outputs may be from the dense ones."""
    types = {tensor.dtype for tensor in tensors_in(outputs) if tensor.is_floating_point()}
    return max([TOLERANCE, *(2 * torch.finfo(dtype).eps for dtype in types)])


def _wait_for(model: nn.Module) -> Callable[[], object]:
    """Return what waits until the device of a model has done all that it was asked for."""
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    return (
        functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    )


def _keep_transposed(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Let linear layers leave their output as the next one takes it, where only what acts on elements lies between.

    That is seen for inputs of the shapes that they have here, and done for these alone.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    if not layers:
        return
    called: list[tuple[SparseLinear, torch.Size]] = []
    arrived: set[tuple[SparseLinear, torch.Size]] = set()

    def note(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = (*inputs, *named.values())[0]
        fits = called and called[-1][0].out_features == layer.in_features < x.numel()
        if fits and x.reshape(-1, layer.in_features).t().is_contiguous():
            arrived.add(called[-1])
        called.append((layer, x.shape))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model(*copied(arguments))
    kept, tried = set(called), set[tuple[SparseLinear, torch.Size]]()
    while kept != tried:
        tried = set(kept)
        called.clear()
        arrived.clear()
        for layer in layers:
            layer.keeps_transposed = {shape for keeper, shape in kept if keeper is layer}
        try:
            model(*copied(arguments))
            kept &= arrived
        except (
            RuntimeError
        ):  # it views what lies otherwise than a dense layer leaves it, most likely the last one's
            kept = kept - {called[-1]} if called[-1] in kept else set()
    for hook in hooks:
        hook.remove()
