"""Models on the meta device, whose masked weights are made without their dense tensors.

All other parameters and buffers become real tensors, which each module's own `reset_parameters`
fills. A masked weight stays on the meta device meanwhile. What `reset_parameters` does to it, such
as `uniform_(-bound, bound)`, is done to its active values instead. So they are drawn as the layer
draws them, with the fan-in of the dense layer.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from itop_prune.kernels import runtime
from itop_prune.layers import sparse_products
from itop_prune.layers.maskable import Target, plain_name, unwrap
from itop_prune.memory import in_bytes, total_memory
from itop_prune.messages import listed

ELEMENTWISE = {
    "uniform_", "normal_", "zero_", "fill_", "erfinv_", "mul_", "div_", "add_", "sub_", "clamp_",
}  # fmt: skip
"""What may be done to a weight in place: it treats all its numbers alike."""

BYTES = 16
"""Of an active weight, at least: its value and gradient, and its position."""

BUILD_IT = (
    "build this model on a real device and call apply on it, or give the class a reset_parameters "
    "that fills them"
)


class _Redirect(TorchDispatchMode):
    """Does to the active values what is done in place to their weight, which has no numbers."""

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        values = self._values.get(id(args[0])) if args else None
        name = func.overloadpacket.__name__
        if values is None or not name.endswith("_"):
            return func(*args, **given)
        if name not in ELEMENTWISE or any(isinstance(other, Tensor) for other in args[1:]):
            raise ValueError(f"its initialization, {name}, looks at the whole weight")
        func(values, *args[1:], **given)
        return args[0]


def check_can_be_made(
    targets: Mapping[str, Target],
    scores: object,
    method: object,
    pattern: object,
    storage: str,
) -> None:
    """Refuse arguments of `apply` that a model on the meta device can't follow.

    Raises:
        ValueError: As above.
    """
    real = [name for name, (layer, its) in targets.items() if not layer.get_parameter(its).is_meta]
    if real:
        raise ValueError(
            f"device is for a model on the meta device, and {listed(real)} has values: build the "
            'model under torch.device("meta"), or leave device out and move the model'
        )
    if storage != "sparse":
        raise ValueError(
            f"storage is {storage!r}, whose weights are dense; a model on the meta device takes "
            'storage="sparse"'
        )
    if scores != "random" or method == "magnitude" or isinstance(method, Mapping) or pattern:
        raise ValueError(
            "scores and patterns look at every weight, and on the meta device there is none; leave "
            "scores, pattern and a method of scores out: positions are then random"
        )


def check_memory(
    targets: Mapping[str, Target], counts: Mapping[str, int], device: torch.device
) -> None:
    """Refuse a model whose active weights, or a dense weight that a layer needs, do not fit.

    Raises:
        ValueError: As above.
    """
    there = total_memory(device)
    active = sum(counts.values())
    if BYTES * active > there:
        raise ValueError(
            f"{active:,} active weights take {in_bytes(BYTES * active)} with their positions and "
            f"gradients, and {device} has {in_bytes(there)}: raise the sparsity"
        )
    for name, (layer, tensor) in targets.items():
        weight = layer.get_parameter(tensor)
        by_kernel = (
            device.type == "cpu"
            and tensor == sparse_products.NAME
            and sparse_products.can_take_kernels(layer)
            and runtime.uses_kernels(weight.shape, counts[name])
            and runtime.is_installed()
        )
        if not by_kernel and weight.nbytes > there:
            raise ValueError(
                f"{name} computes with its dense weight of {in_bytes(weight.nbytes)}, and "
                f"{device} has {in_bytes(there)}. Linear layers on a CPU need none if at most a "
                "quarter of their weights are active and Numba is installed: pip install "
                "'itop_prune[sparse]'"
            )


def materialize(
    model: nn.Module,
    targets: Mapping[str, Target],
    counts: Mapping[str, int],
    device: torch.device,
) -> dict[str, Tensor]:
    """Make all tensors of a model on the meta device, except for its masked weights.

    Torch's global generators draw the numbers, as for any new model.

    Args:
        model: Its parameters and buffers on the meta device become real ones.
        targets: The weights that are to be masked, by name.
        counts: How many active values each has.
        device: Where the tensors are made.

    Returns:
        The active values of each masked weight, (1, active).

    Raises:
        ValueError: A module does not fill its parameters or buffers in `reset_parameters`. The
            model is then on the meta device, as before.
    """
    weights = {name: layer.get_parameter(tensor) for name, (layer, tensor) in targets.items()}
    values = {
        name: torch.full((1, counts[name]), torch.nan, dtype=weight.dtype, device=device)
        for name, weight in weights.items()
    }
    masked = {id(weight): values[name] for name, weight in weights.items()}

    before: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    owners: dict[str, nn.Module] = {}
    for name, module, tensors in _meta_tensors(model):
        for key, tensor in tensors.items():
            owners[plain_name(name, key)] = module
            if id(tensor) not in masked:
                held: dict[str, Any] = module._buffers
                if key in module._parameters:
                    held = module._parameters
                before.append((held, key, tensor))
                made.setdefault(id(tensor), _blank(tensor, device))
                held[key] = made[id(tensor)]

    try:
        with _Redirect(masked):
            for module in dict.fromkeys(owners.values()):
                _reset(module)
        left = [name for name, found in values.items() if _is_blank(found)]
        left += [
            name
            for name, module in owners.items()
            if name not in values and _is_blank(getattr(module, name.rpartition(".")[2]))
        ]
        if left:
            kinds = sorted({type(owners[name]).__name__ for name in left})
            raise ValueError(
                f"{listed(left)} of {', '.join(kinds)} can't be made from the meta device: "
                f"reset_parameters does not fill them; {BUILD_IT}"
            )
    except BaseException:
        for place, key, tensor in before:
            place[key] = tensor
        raise
    return values


def _meta_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Yield each module that holds tensors on the meta device, with its name and those tensors."""
    for name, module in unwrap(model).named_modules():
        own = {**module._parameters, **module._buffers}
        meta = {key: its for key, its in own.items() if its is not None and its.is_meta}
        if meta:
            yield name, module, meta


def _blank(tensor: Tensor, device: torch.device) -> Tensor:
    """Make a tensor like one on the meta device, of numbers that no initialization writes."""
    empty = torch.empty_like(tensor, device=device)
    if empty.is_floating_point() or empty.is_complex():
        empty.detach().fill_(torch.nan)
    elif empty.dtype is not torch.bool:
        empty.fill_(torch.iinfo(empty.dtype).min)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty.detach(), tensor.requires_grad)
    return empty


def _is_blank(tensor: Tensor) -> bool:
    """Tell whether any number is still as `_blank` made it."""
    tensor = tensor.detach()
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    if tensor.dtype is torch.bool:
        return True  # which of the two was written can't be told
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())


def _reset(module: nn.Module) -> None:
    """Let a module fill its own tensors."""
    reset: Callable[[], object] | None = getattr(
        module, "reset_parameters", getattr(module, "_reset_parameters", None)
    )
    if reset is None:
        return
    try:
        reset()
    except Exception as error:  # of any kind, as the module happens to read its tensors
        raise ValueError(
            f"{type(module).__name__} can't be made from the meta device: {error}; {BUILD_IT}"
        ) from None
