"""Does an architecture train sparsely, exactly? The two checks that tools/sweep.py makes of every model it is given.

`counts` builds it on the meta device, where a billion weights cost nothing, and looks at what is
masked. `trained` takes two optimizer steps with an update between them, beside a dense twin that
holds the same effective weights.
"""

import copy
import fnmatch
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import itop_prune

from .architectures import on_meta, size_of, with_images

KERNELS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)} | {"linear"}
OWN_INPUTS = {
    "*rcnn*": "it is trained on images with boxes",
    "*/fcos_*": "it is trained on images with boxes",
    "*/retinanet_*": "it is trained on images with boxes",
    "*/ssd*": "it is trained on images with boxes",
    "*/raft_*": "it takes two images",
}
"""Models that take more than a batch of images or clips, by pattern, and what they take."""


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
    """The largest one between model and twin, relative to the largest number of the tensor it is in."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be, in words."""
    refused: str = ""
    """Why `apply` refused the model, or why the check can't be made."""

    def cover(self, masks: dict[str, itop_prune.ITOP], model: nn.Module) -> None:
        """Take down how much of a model is masked."""
        self.masked = len(masks)
        self.covered = sum(itop.mask.numel() for itop in masks.values()) / size_of(model)

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Take down how far two tensors are apart, if it is further than any before."""
        self.difference = max(self.difference, difference(ours, theirs))


def counts(name: str, sparsity: float = 0.9) -> Finding:
    """Mask a model on the meta device and count."""
    model = on_meta(name)
    before = dict(model.named_parameters())
    try:
        masks = itop_prune.apply(model, sparsity)
    except ValueError as error:
        return Finding(refused=str(error))
    found = Finding()
    found.cover(masks, model)
    weights = sum(itop.mask.numel() for itop in masks.values())
    if sum(itop.active for itop in masks.values()) != round((1.0 - sparsity) * weights):
        found.wrong.append("the number of active weights is not the budget's")
    if not all(1 <= itop.active <= itop.mask.numel() for itop in masks.values()):
        found.wrong.append("a layer has less than one active weight, or more than all")
    if [id(parameter) for parameter in model.parameters()] != [
        id(parameter) for parameter in before.values()
    ]:
        found.wrong.append("parameters are not the same objects in the same order")
    if missed := [
        key
        for key, parameter in before.items()
        if key not in masks and _looks_like_a_matrix(model, key)
    ]:
        found.wrong.append(f"not masked: {', '.join(missed)}")
    itop_prune.remove(model)
    if list(dict(model.named_parameters())) != list(before):
        found.wrong.append("remove does not give the names back")
    return found


def trained(name: str, sparsity: float = 0.5, **keywords: Any) -> Finding:
    """Train a model for two steps with an update between them, and compare with a dense twin at each.

    Args: name: Of timm's, or of torchvision's with the prefix. sparsity: The same in every layer.
        keywords: Of timm's `create_model`, to make the model smaller; without them a large one is
        made four blocks deep where it takes `depth`.
    """
    for pattern, reason in OWN_INPUTS.items():
        if fnmatch.fnmatch(name, pattern):
            return Finding(refused=f"it needs inputs of its own kind: {reason}")
    torch.manual_seed(0)
    model, x = with_images(name, keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                not parameter.any() or parameter.ndim < 2
            ):  # scales and heads that start at 0 hide what lies before them
                parameter.add_(0.1 * torch.randn(parameter.shape) + 0.1)
    model.train()
    twin = copy.deepcopy(model)
    found = Finding(size=x.shape[-1])
    masks = itop_prune.apply(model, sparsity, method="uniform")
    found.cover(masks, model)
    before, first = (
        {key: itop.active for key, itop in masks.items()},
        [itop.mask.clone() for itop in masks.values()],
    )
    layers = dict(twin.named_modules(remove_duplicate=False))
    standardized = {
        key for key in masks if "Std" in type(layers.get(key.rpartition(".")[0])).__name__
    }
    to_grow: list[str] = []  # names, in the order in which growth asks
    dense: dict[str, Tensor] = {}

    def by_gradient(grad: Tensor) -> Tensor:
        found.compare(grad, dense[to_grow.pop(0)])
        return grad.abs()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=2, every=1, stop=0.5, min_rate=0.3, grow=by_gradient
    )
    for step in range(2):
        twin.load_state_dict(itop_prune.dense_state_dict(model))
        outputs = []
        for one in (model, twin):
            torch.manual_seed(step)  # dropout
            with _Kernels(masks if one is model else {}, model) as kernels:
                outputs.append(_numbers(one(x)))
            found.wrong += kernels.wrong
            loss = sum(
                nn.functional.log_softmax(output.flatten(1), 1)[:, 0].mean()
                for output in outputs[-1]
            )
            loss.backward()  # type: ignore[union-attr]
        for ours, theirs in zip(*outputs, strict=True):
            found.compare(ours, theirs)
        for parameter, (key, other) in zip(
            model.parameters(), twin.named_parameters(), strict=True
        ):
            expected = other.grad
            if key in masks and expected is not None:
                dense[key] = (
                    _centred(expected, masks[key].mask) if key in standardized else expected
                )
                expected = dense[key] * masks[key].mask
            if parameter.grad is not None and expected is not None:
                found.compare(parameter.grad, expected)
            elif parameter.grad is not None or expected is not None:
                found.wrong.append(f"{key}: only one of model and twin has a gradient")
        if unread := [key for key, itop in masks.items() if itop.parameter.grad is None]:
            found.wrong.append(f"no gradient: {', '.join(unread)}")
        to_grow[:] = [
            key for key in masks if key in dense and before[key] < masks[key].mask.numel()
        ]
        nn.utils.clip_grad_norm_(
            model.parameters(), 1.0
        )  # a deep model on two small images has gradients of 1e8
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights without a gradient are reported above
            moved = regrow.step()
        if moved != (step == 0):
            found.wrong.append(f"step {step}: an update {'was made' if moved else 'was not made'}")
        if moved and to_grow:
            found.wrong.append(f"not grown: {', '.join(to_grow)}")
        dense.clear()
        for one in (model, twin):
            one.zero_grad()
    if all(torch.equal(itop.mask, mask) for itop, mask in zip(masks.values(), first, strict=True)):
        found.wrong.append("no mask moved")
    if {key: itop.active for key, itop in masks.items()} != before:
        found.wrong.append("the number of active weights changed")
    _check_removal(model, twin, x, found)
    if not found.difference <= 1e-5:
        found.wrong.append(f"model and twin differ by {found.difference:.1e}")
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest number; NaN counts as infinite."""
    largest = torch.linalg.vector_norm(theirs.detach(), torch.inf).clamp(min=1e-12)
    share = float(torch.linalg.vector_norm((ours - theirs).detach(), torch.inf) / largest)
    return share if share == share else float("inf")


def _check_removal(model: nn.Module, twin: nn.Module, x: Tensor, found: Finding) -> None:
    dense = itop_prune.dense_state_dict(model)
    itop_prune.remove(model)
    twin.load_state_dict(dense)
    after = model.state_dict()
    if list(after) != list(twin.state_dict()) or not all(
        torch.equal(after[key], dense[key]) for key in after
    ):
        found.wrong.append("remove does not give the twin's weights")
    if [(key, type(part)) for key, part in model.named_modules()] != [
        (key, type(part)) for key, part in twin.named_modules()
    ]:
        found.wrong.append("remove does not give the classes back")
    with torch.no_grad():
        for ours, theirs in zip(_numbers(model.eval()(x)), _numbers(twin.eval()(x)), strict=True):
            found.compare(ours, theirs)


class _Kernels(TorchFunctionMode):
    """Looks, while a model runs, at the kernels that its masked layers hand to torch: 0 wherever the mask is."""

    def __init__(self, masks: dict[str, itop_prune.ITOP], model: nn.Module) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self._masks, self._running = masks, ""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        layers = dict(model.named_modules(remove_duplicate=False))
        self._layers = {
            key: layers[key.rpartition(".")[0]] for key in masks if key.rpartition(".")[0] in layers
        }

    def __enter__(self) -> "_Kernels":
        for key, layer in self._layers.items():

            def start(layer: nn.Module, inputs: object, key: str = key) -> None:
                self._running = key

            def stop(layer: nn.Module, inputs: object, output: object) -> None:
                self._running = ""

            self._handles += [
                layer.register_forward_pre_hook(start),
                layer.register_forward_hook(stop),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._running and getattr(func, "__name__", "") in KERNELS:
            kernel = kwargs.get("weight", args[1] if len(args) > 1 else None)
            mask = self._masks[self._running].mask
            if isinstance(kernel, Tensor) and kernel.shape == mask.shape:
                size = kernel.detach().abs()
                if size[~mask].numel() and size[~mask].max() > 1e-5 * size.max():
                    self.wrong.append(
                        f"{self._running}: the kernel in use is not 0 where the mask is"
                    )
        return func(*args, **kwargs)


def _centred(gradient: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of filters whose mean over active weights is taken off before they are used."""
    filters, masks = gradient.flatten(1), mask.flatten(1)
    means = [
        row[keep].mean() if keep.any() else row.new_zeros(())
        for row, keep in zip(filters, masks, strict=True)
    ]
    return (filters - torch.stack(means)[:, None]).view_as(gradient)


def _looks_like_a_matrix(model: nn.Module, key: str) -> bool:
    """Return whether a parameter is the weight of a layer that multiplies by it, as far as its name and class tell."""
    owner, _, tensor = key.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__.lower()
    multiplies = any(word in kind for word in ("conv", "linear", "lstm", "gru", "rnn", "multihead"))
    return (
        multiplies
        and "weight" in tensor
        and model.get_submodule(owner).get_parameter(tensor).ndim > 1
    )


def _numbers(output: Any) -> list[Tensor]:
    """Return the tensors in what a model gives back."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if part is not None for tensor in _numbers(part)]
