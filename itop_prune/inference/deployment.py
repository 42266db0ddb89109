"""Copy a masked model for inference and give each layer its fastest kernel."""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.analysis.flops import run
from itop_prune.inference.kernels import KERNELS, ROW_KERNELS
from itop_prune.inference.measurement import (
    Choice,
    Report,
    clone_tensors,
    interleaved_times,
    relative_error,
    tensors_in,
)
from itop_prune.inference.sparse_layers import (
    SparseLinear,
    kernels_for,
    obstacle,
    replace,
    sparse,
)
from itop_prune.kernels.runtime import is_installed
from itop_prune.layers.handle import find_masks, remove
from itop_prune.layers.maskable import Target, unwrap
from itop_prune.messages import nearest

CHOICES = ("dense", *KERNELS, *ROW_KERNELS)
TOLERANCE = 1e-5
"""The largest relative error of outputs."""
CLEARLY = 1.05
"""A kernel must be so many times as fast as the dense layer to take its place."""
HOPELESS = 3.0
"""A kernel that takes so many times as long in its first calls is not measured closer."""


def deploy(
    model: nn.Module, example_inputs: Any, *, choices: Sequence[str] | None = None
) -> nn.Module:
    """Copy a masked model for inference, each layer computed in the fastest way measured.

    A linear layer or a convolution takes a sparse kernel if that is clearly faster on the inputs
    that the layer gets here. The whole model stays dense if it is not faster in the end. Some
    layers always stay dense: grouped, transposed and weight-standardized convolutions, recurrent
    layers, and subclasses. So do weights that a parent reads or that are not float32.

    The kernels are "csr", "embedding_bag" and "numba". The last one is for linear layers on the
    CPU, and needs Numba (`pip install 'itop_prune[sparse]'`). Numba compiles it at the first use in
    an environment, which takes some seconds. Its calls from several threads take turns.

    Args:
        model: Masked by `itop_prune.apply` or `load`, on the CPU or a GPU; wrapped or not. It is
            left as it was.
        example_inputs: What its forward takes, a tensor or a tuple of arguments, of the sizes that
            should be fast.
        choices: What each layer may choose from; None: "dense" and all kernels that are installed.
            Without "dense" every layer takes a kernel if it can, even a slower one.

    Returns:
        The copy, without masks, in evaluation mode; no parameter requires a gradient. It computes
        inputs of other sizes too. `print(copy.report)` shows what was chosen. `torch.export.export`
        and `torch.onnx.export` take the copy on the CPU, and write only the active weights of
        sparse layers. A program of torch.export computes with these alone; onnxruntime makes dense
        layers of them once, when it loads the file.

    Raises:
        ValueError: The model has no masks, is not on one device or can't be run with these inputs;
            or a choice is unknown or not installed.

    >>> import itop_prune
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> masks = itop_prune.apply(model, sparsity=0.9)
    >>> deployed = deploy(model, torch.zeros(1, 64), choices=("csr",))
    >>> [choice.kernel for choice in deployed.report.choices]
    ['csr', 'csr']
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
        rows = _choose(deployed, targets, arguments, choices)
        for row, (layer, _) in zip(rows, targets.values(), strict=True):
            if row.kernel != "dense":
                replace(layer, sparse(layer, row.kernel))
        _keep_transposed(deployed, arguments)

        error = relative_error(deployed(*clone_tensors(arguments)), expected)
        inputs = clone_tensors(arguments)
        models = {"dense": lambda: dense(*inputs), "deployed": lambda: deployed(*inputs)}
        seconds = interleaved_times(
            models, at_least=11, within=1.0, reduce=median, wait=_wait_for(deployed)
        )

    fallback = ""
    if all(row.kernel == "dense" for row in rows):
        seconds["deployed"] = seconds["dense"]  # both are the same model
    elif math.isnan(error):
        fallback = "all of it dense: no numbers in the outputs, or NaN, to compare"
    elif error > TOLERANCE:
        fallback = f"all of it dense: the outputs would differ by {error:.1e}"
    elif "dense" in choices and seconds["deployed"] > seconds["dense"]:
        fallback = f"all of it dense: it would take {1e3 * seconds['deployed']:.3f} ms"
    if fallback:
        deployed, error, seconds["deployed"] = dense, 0.0, seconds["dense"]
        rows = [dataclasses.replace(row, kernel="dense", seconds=row.dense_seconds) for row in rows]

    deployed.report = Report(  # type: ignore[assignment]
        choices=tuple(rows),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors_in(arguments)),
        threads=torch.get_num_threads(),
        dense_seconds=seconds["dense"],
        seconds=seconds["deployed"],
        difference=error,
        fallback=fallback,
    )
    return deployed


def _checked(choices: Sequence[str] | None) -> Sequence[str]:
    """Check choices; None stands for all that are installed."""
    if choices is None:
        return CHOICES if is_installed() else ("dense", *KERNELS)
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
        if choice in ROW_KERNELS and not is_installed():
            raise ValueError(
                f"choice {choice!r} needs Numba, which is not installed; allowed without it are "
                f"dense, {', '.join(KERNELS)}: leave it out, or pip install 'itop_prune[sparse]'"
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

    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or {device.type for device in devices} - {"cpu", "cuda"}:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the model is on {where}; allowed is one device, the CPU or a GPU: call model.to(...) "
            "first"
        )


def _choose(
    model: nn.Module,
    targets: Mapping[str, Target],
    arguments: tuple[Any, ...],
    choices: Sequence[str],
) -> list[Choice]:
    """Choose kernels: run the model once and time all kernels of a layer on its inputs."""
    calls: dict[nn.Module, list[dict[str, float]]] = {}

    def measure(
        layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        seconds = _seconds(layer, (*inputs, *named.values()), output, choices)
        calls.setdefault(layer, []).append(seconds)

    reasons = {name: obstacle(*place) for name, place in targets.items()}
    layers = [layer for name, (layer, _) in targets.items() if not reasons[name]]
    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    model(*clone_tensors(arguments))
    for hook in hooks:
        hook.remove()

    rows = []
    for name, (layer, tensor) in targets.items():
        # A layer may be called several times; a kernel counts if it could compute every call.
        found = calls.get(layer, [])
        seconds = {}
        for kernel in CHOICES:
            if found and all(kernel in call for call in found):
                seconds[kernel] = sum(call[kernel] for call in found)

        dense = seconds.pop("dense", 0.0)
        kernel = min(seconds, key=seconds.__getitem__, default="dense")
        if "dense" in choices and seconds and dense < CLEARLY * seconds[kernel]:
            kernel = "dense"

        why = reasons[name]
        if not why and not found:
            why = "not called: what holds it reads its weight"
        weight = layer.get_parameter(tensor)
        rows.append(
            Choice(
                name=name,
                shape=tuple(weight.shape),
                density=int(weight.count_nonzero()) / weight.numel(),
                kernel=kernel,
                dense_seconds=dense,
                seconds=seconds.get(kernel, dense),
                why=why,
            )
        )
    return rows


def _seconds(
    layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, choices: Sequence[str]
) -> dict[str, float]:
    """Time one call of a layer, dense and with each kernel that gives the same output."""
    functions = {"dense": functools.partial(layer.forward, *inputs)}
    for kernel in kernels_for(layer):
        if kernel not in choices:
            continue
        with contextlib.suppress(RuntimeError):  # this torch has no such product for this layer
            function = functools.partial(sparse(layer, kernel).forward, *inputs)
            if relative_error(function(), output) <= TOLERANCE:
                functions[kernel] = function

    timed = functools.partial(interleaved_times, reduce=min, wait=_wait_for(layer))
    if "dense" in choices:
        first = timed(functions, at_least=2, within=0.0)
        limit = HOPELESS * first["dense"]
        functions = {name: call for name, call in functions.items() if first[name] <= limit}
    return timed(functions, at_least=7, within=0.05)


def _wait_for(model: nn.Module) -> Callable[[], object]:
    """Make a function that waits until the device of a model has computed all."""
    tensors = [*model.parameters(), *model.buffers()]
    if tensors[0].is_cuda:
        return functools.partial(torch.cuda.synchronize, tensors[0].device)
    return lambda: None


def _keep_transposed(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Let a linear layer leave its output transposed if the next linear layer takes it so.

    The product of a sparse layer gives columns, and a layer takes columns. Between two layers that
    are called one after the other, with only elementwise functions between, two transposes can be
    left out. All layers try it, and those keep it whose output arrives transposed. It is done only
    for inputs of the shapes in the example.
    """
    layers = [layer for layer in model.modules() if type(layer) is SparseLinear]
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
    model(*clone_tensors(arguments))
    kept, tried = set(called), set[tuple[SparseLinear, torch.Size]]()
    while kept != tried:
        tried = set(kept)
        called.clear()
        arrived.clear()
        for layer in layers:
            layer.keeps_transposed = {shape for keeper, shape in kept if keeper is layer}
        try:
            model(*clone_tensors(arguments))
            kept &= arrived
        except RuntimeError:  # a view of a transposed output, most likely of the last layer
            kept = kept - {called[-1]} if called[-1] in kept else set()
    for hook in hooks:
        hook.remove()
