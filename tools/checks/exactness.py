"""Does an architecture train sparsely, and exactly? The two checks of tools/check_architectures.py.

`count_masks` builds a model on the meta device, where a billion weights cost nothing, and looks at
its masks. `train_beside_twin` takes two optimizer steps with an update between them. A dense twin
holds the same effective weights at each step.
"""

import copy
import fnmatch
import math
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import itop_prune
from itop_prune.inference.measurement import relative_error
from itop_prune.kernels import runtime
from itop_prune.layers.sparse_handle import Storage
from itop_prune.layers.sparse_storage import gather

from .architectures import on_meta, size_of, with_images

OWN_INPUTS = {
    "*rcnn*": "it is trained on images with boxes",
    "*/fcos_*": "it is trained on images with boxes",
    "*/retinanet_*": "it is trained on images with boxes",
    "*/ssd*": "it is trained on images with boxes",
    "*/raft_*": "it takes two images",
}
"""Models that take more than a batch of images or clips, by pattern, and what they take."""
OPERATIONS = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}
"""The functions of torch to which a masked layer hands its weight as the second argument."""
TOLERANCE = 1e-5


@dataclass
class Finding:
    """What a check found out about a model."""

    masked: int = 0
    """Masked tensors."""
    covered: float = 0.0
    """Share of all parameters that is masked."""
    size: int | None = None
    """Of the images trained on, in pixels."""
    difference: float = 0.0
    """The largest relative error between a tensor of the model and the twin's."""
    wrong: list[str] = field(default_factory=list)
    """The failures, in words."""
    refused: str = ""
    """Why `apply` refused the model, or why the check can't be made."""

    def cover(self, masks: dict[str, itop_prune.ITOP], model: nn.Module) -> None:
        """Record how much of a model is masked."""
        self.masked = len(masks)
        self.covered = sum(itop.size for itop in masks.values()) / size_of(model)

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Record the relative error between two tensors if it is the largest so far."""
        error = relative_error(ours.detach(), theirs.detach())
        if math.isnan(error):  # max() would drop it
            error = math.inf
        self.difference = max(self.difference, error)


def count_masks(name: str, sparsity: float = 0.9) -> Finding:
    """Count the active weights of a model on the meta device, then place masks without values."""
    model = on_meta(name)
    before = dict(model.named_parameters())
    try:
        counts = itop_prune.count_active(model, sparsity)
    except ValueError as error:
        return Finding(refused=str(error))

    masks = {}
    for key in counts:
        layer, _, tensor = key.rpartition(".")
        masks[key] = itop_prune.ITOP.place(model.get_submodule(layer), tensor)
    found = Finding()
    found.cover(masks, model)
    weights = sum(itop.size for itop in masks.values())
    if sum(counts.values()) != round((1.0 - sparsity) * weights):
        found.wrong.append("the number of active weights is not the budget's")
    if not all(1 <= counts[key] <= itop.size for key, itop in masks.items()):
        found.wrong.append("a layer has less than one active weight, or more than all")

    parameters = list(model.parameters())
    if list(map(id, parameters)) != list(map(id, before.values())):
        found.wrong.append("parameters are not the same objects in the same order")
    missed = [key for key in before if key not in masks and _is_weight_matrix(model, key)]
    if missed:
        found.wrong.append(f"not masked: {', '.join(missed)}")

    itop_prune.remove(model)
    if list(dict(model.named_parameters())) != list(before):
        found.wrong.append("remove does not give the names back")
    return found


def train_beside_twin(
    name: str, storage: Storage = "mask", sparsity: float = 0.5, **keywords: Any
) -> Finding:
    """Train a model for two steps with an update between them, beside a dense twin.

    In sparse storage all layers compute with their dense weight.

    Args:
        name: A model of timm, or of torchvision with the prefix.
        storage: As `itop_prune.apply` takes it.
        sparsity: The same in every layer.
        keywords: For timm's `create_model`, to make the model smaller. Without any, a large model
            that takes `depth` is made four blocks deep.
    """
    for pattern, reason in OWN_INPUTS.items():
        if fnmatch.fnmatch(name, pattern):
            return Finding(refused=f"it needs inputs of its own kind: {reason}")

    torch.manual_seed(0)
    model, x = with_images(name, keywords)
    _move_from_zero(model)
    # Kernels round differently, and a gradient that is 0 up to rounding would then differ wholly.
    with mock.patch.object(runtime, "uses_kernels", return_value=False):
        pair = _Pair(model.train(), x, storage, sparsity)
        for step in range(2):
            pair.take_step(step)
        pair.check_masks()
        pair.check_removal()

    found = pair.found
    if not found.difference <= TOLERANCE:
        found.wrong.append(f"model and twin differ by {found.difference:.1e}")
    return found


class _Pair:
    """A masked model and its dense twin, which train side by side."""

    def __init__(self, model: nn.Module, x: Tensor, storage: Storage, sparsity: float) -> None:
        self.model, self.twin, self.x = model, copy.deepcopy(model), x
        self.found = Finding(size=x.shape[-1])
        self.masks = itop_prune.apply(model, sparsity, method="uniform", storage=storage)
        self.found.cover(self.masks, self.twin)
        self.active = {key: itop.active for key, itop in self.masks.items()}
        self.first_masks = [itop.mask.clone() for itop in self.masks.values()]

        layers = dict(self.twin.named_modules(remove_duplicate=False))
        self.standardized = set()
        for key in self.masks:
            if "Std" in type(layers.get(key.rpartition(".")[0])).__name__:
                self.standardized.add(key)

        self.dense_gradients: dict[str, Tensor] = {}  # of the twin
        self.to_grow: list[str] = []  # in the order in which the scheduler asks for scores
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.regrow = itop_prune.MaskScheduler(
            self.masks,
            self.optimizer,
            total_steps=2,
            every=1,
            stop=0.5,
            min_rate=0.3,
            grow=self._grow_by_gradient,
        )

    def _grow_by_gradient(self, grad: Tensor) -> Tensor:
        """Score by magnitude; compare the dense gradient with the twin's on the way."""
        self.found.compare(grad, self.dense_gradients[self.to_grow.pop(0)])
        return grad.abs()

    def take_step(self, step: int) -> None:
        """Take a step and compare outputs and gradients; the first step ends with an update."""
        self.twin.load_state_dict(itop_prune.dense_state_dict(self.model))
        outputs = self._run(self.model, step, self.masks)
        expected = self._run(self.twin, step, {})
        for ours, theirs in zip(outputs, expected, strict=True):
            self.found.compare(ours, theirs)
        self._compare_gradients()

        self.to_grow[:] = [
            key
            for key, itop in self.masks.items()
            if key in self.dense_gradients and self.active[key] < itop.size
        ]
        # A deep model has gradients of 1e8 on two small images.
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights without a gradient are reported already
            moved = self.regrow.step()

        if moved != (step == 0):
            made = "was made" if moved else "was not made"
            self.found.wrong.append(f"step {step}: an update {made}")
        if moved and self.to_grow:
            self.found.wrong.append(f"not grown: {', '.join(self.to_grow)}")
        self.dense_gradients.clear()
        self.model.zero_grad()
        self.twin.zero_grad()

    def _run(self, model: nn.Module, seed: int, masks: dict[str, itop_prune.ITOP]) -> list[Tensor]:
        """Run a model forward and backward; return its outputs."""
        torch.manual_seed(seed)  # dropout
        with _WeightsInUse(masks, self.model) as weights:
            outputs = _tensors_of(model(self.x))
        self.found.wrong += weights.wrong

        losses = [nn.functional.log_softmax(y.flatten(1), 1)[:, 0].mean() for y in outputs]
        sum(losses).backward()  # type: ignore[union-attr]
        return outputs

    def _compare_gradients(self) -> None:
        """Compare gradients with the twin's, multiplied by the masks."""
        named = self.twin.named_parameters()
        for parameter, (key, other) in zip(self.model.parameters(), named, strict=True):
            expected = other.grad
            if key in self.masks and expected is not None:
                mask = self.masks[key].mask
                if key in self.standardized:
                    expected = _center(expected, mask)
                self.dense_gradients[key] = expected
                expected = _as_stored(expected, self.masks[key])

            if parameter.grad is not None and expected is not None:
                self.found.compare(parameter.grad, expected)
            elif parameter.grad is not None or expected is not None:
                self.found.wrong.append(f"{key}: only one of model and twin has a gradient")

        unread = [key for key, itop in self.masks.items() if itop.parameter.grad is None]
        if unread:
            self.found.wrong.append(f"no gradient: {', '.join(unread)}")

    def check_masks(self) -> None:
        """Check that masks have moved and hold as many active weights as before."""
        masks = [itop.mask for itop in self.masks.values()]
        if all(map(torch.equal, masks, self.first_masks)):
            self.found.wrong.append("no mask moved")
        if {key: itop.active for key, itop in self.masks.items()} != self.active:
            self.found.wrong.append("the number of active weights changed")

    def check_removal(self) -> None:
        """Check that `remove` leaves the weights, classes and outputs of the twin."""
        dense = itop_prune.dense_state_dict(self.model)
        itop_prune.remove(self.model)
        self.twin.load_state_dict(dense)

        after = self.model.state_dict()
        same_names = list(after) == list(self.twin.state_dict())
        if not same_names or not all(torch.equal(after[key], dense[key]) for key in after):
            self.found.wrong.append("remove does not give the twin's weights")
        classes, expected = (
            [(key, type(part)) for key, part in one.named_modules()]
            for one in (self.model, self.twin)
        )
        if classes != expected:
            self.found.wrong.append("remove does not give the classes back")

        with torch.no_grad():
            outputs = _tensors_of(self.model.eval()(self.x))
            others = _tensors_of(self.twin.eval()(self.x))
        for ours, theirs in zip(outputs, others, strict=True):
            self.found.compare(ours, theirs)


class _WeightsInUse(TorchFunctionMode):
    """Checks that the weights which masked layers hand to torch are 0 off the mask."""

    def __init__(self, masks: dict[str, itop_prune.ITOP], model: nn.Module) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self._masks = masks
        self._running = ""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        layers = dict(model.named_modules(remove_duplicate=False))
        self._layers = {}
        for key in masks:
            owner = key.rpartition(".")[0]
            if owner in layers:
                self._layers[key] = layers[owner]

    def __enter__(self) -> "_WeightsInUse":
        for key, layer in self._layers.items():

            def start(layer: nn.Module, inputs: object, key: str = key) -> None:
                self._running = key

            def stop(layer: nn.Module, inputs: object, output: object) -> None:
                self._running = ""

            self._handles.append(layer.register_forward_pre_hook(start))
            self._handles.append(layer.register_forward_hook(stop))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._running and getattr(func, "__name__", "") in OPERATIONS:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            self._check(weight, self._masks[self._running].mask)
        return func(*args, **kwargs)

    def _check(self, weight: object, mask: Tensor) -> None:
        if not isinstance(weight, Tensor) or weight.shape != mask.shape:
            return

        size = weight.detach().abs()
        pruned = size[~mask]
        if pruned.numel() and pruned.max() > 1e-5 * size.max():
            self.wrong.append(f"{self._running}: the kernel in use is not 0 where the mask is")


def _move_from_zero(model: nn.Module) -> None:
    """Add noise to scales and heads that start at 0: they would hide the layers before them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape) + 0.1)


def _as_stored(gradient: Tensor, itop: itop_prune.ITOP) -> Tensor:
    """Turn a dense gradient into that of the masked parameter."""
    if itop.storage == "sparse":
        return gather(gradient, itop.buffer)
    return gradient * itop.mask


def _center(gradient: Tensor, mask: Tensor) -> Tensor:
    """Subtract from each filter's gradient its mean over the active weights."""
    rows = []
    for row, keep in zip(gradient.flatten(1), mask.flatten(1), strict=True):
        mean = row[keep].mean() if keep.any() else row.new_zeros(())
        rows.append(row - mean)
    return torch.stack(rows).view_as(gradient)


def _is_weight_matrix(model: nn.Module, key: str) -> bool:
    """Guess from names whether a layer multiplies by this parameter."""
    owner, _, tensor = key.rpartition(".")
    layer = model.get_submodule(owner)
    if "weight" not in tensor or layer.get_parameter(tensor).ndim < 2:
        return False

    kind = type(layer).__name__.lower()
    multiplying = ("conv", "linear", "lstm", "gru", "rnn", "multihead")
    return any(word in kind for word in multiplying)


def _tensors_of(output: Any) -> list[Tensor]:
    """Collect the tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    found = []
    for part in parts:
        if part is not None:
            found += _tensors_of(part)
    return found
