"""Fold batch norms into the convolutions before them, for inference.

In evaluation mode a batch norm scales and shifts each channel, which the weight and the bias of a
convolution can do as well. Weights of 0 stay 0. A forward is watched to find which batch norm reads
the output of which convolution, and that nothing else does.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from itop_prune.inference.measurement import clone_tensors, tensors_in
from itop_prune.layers.sparse_products import convolution_forward, forward_of


class FoldedNorm(nn.Module):
    """A batch norm that the convolution before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input


class FoldedNormAct(nn.Module):
    """The same of timm, with its dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Compute what follows the batch norm."""
        output: Tensor = self.act(self.drop(input))
        return output


FOLDED = {
    "torch.nn.modules.batchnorm._BatchNorm.forward": FoldedNorm,
    "timm.layers.norm_act.BatchNormAct2d.forward": FoldedNormAct,
}
"""By the forward of a batch norm's class: the class that stands in for it."""


def fold_norms(model: nn.Module, arguments: tuple[Any, ...]) -> int:
    """Fold batch norms into the convolutions before them; return how many.

    Both must be called once in a forward, and compute as those of torch do, in float32 or float64.
    A batch norm of timm may have an activation.

    Args:
        model: In evaluation mode. Weights are replaced.
        arguments: Of its forward.
    """
    watch = _Watch(model)
    with torch.no_grad(), watch:
        output = model(*clone_tensors(arguments))
    pairs = watch.finish(output)
    for convolution, norm in pairs.items():
        _fold(convolution, norm)
    return len(pairs)


def _fold(convolution: Any, norm: Any) -> None:
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    norm.__class__ = _folded_class(norm)
    norm._parameters.clear()
    norm._buffers.clear()


def _folded_class(norm: nn.Module) -> type[nn.Module] | None:
    """Find the class that stands in for a batch norm; None if there is none."""
    forward = type(norm).forward
    return FOLDED.get(f"{forward.__module__}.{forward.__qualname__}")


def _can_fold(norm: nn.Module) -> bool:
    """Tell whether a module is a batch norm that scales and shifts, and no more."""
    if _folded_class(norm) is None or "forward" in vars(norm):
        return False
    return norm.running_mean is not None and norm.running_var is not None


def _can_take(layer: nn.Module) -> bool:
    """Tell whether a module is a convolution whose weight and bias can be replaced."""
    if forward_of(type(layer)) is not convolution_forward or "forward" in vars(layer):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer._parameters.get("weight")  # a parametrized one has another place
    return weight is not None and weight.dtype in (torch.float32, torch.float64)


class _Watch(TorchDispatchMode):
    """See who reads the weights and the outputs of convolutions in one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.readers: dict[int | None, tuple[nn.Module, nn.Module]] = {}
        """By storage: the convolution that it belongs to, and the module that may read it."""
        self.read_by_others: set[nn.Module] = set()
        self.outputs: dict[nn.Module, Tensor] = {}
        self.pairs: dict[nn.Module, nn.Module] = {}
        self.calls: Counter[nn.Module] = Counter()
        """Of batch norms."""
        self.running: nn.Module | None = None
        self.hooks: list[RemovableHandle] = []

        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # its class has no forward
                continue
            if _can_take(module):
                self._hook(module, self._before, self._after_convolution)
                for parameter in module.parameters(recurse=False):
                    # Of two that share it, the other one reads what is not its own.
                    self.readers.setdefault(_storage(parameter), (module, module))
            elif _can_fold(module):
                self._hook(module, self._before_norm, self._after)

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        self._read((arguments, named))
        return operation(*arguments, **(named or {}))

    def finish(self, output: Any) -> dict[nn.Module, nn.Module]:
        """Find the batch norm that reads the output of a convolution, where nothing else does."""
        self._read(output)
        for hook in self.hooks:
            hook.remove()
        return {
            convolution: norm
            for convolution, norm in self.pairs.items()
            if convolution not in self.read_by_others and self.calls[norm] == 1
        }

    def _read(self, values: Any) -> None:
        for tensor in tensors_in(values):
            owner, reader = self.readers.get(_storage(tensor), (None, None))
            if owner is not None and reader is not self.running:
                self.read_by_others.add(owner)

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        self.hooks.append(module.register_forward_pre_hook(before))
        self.hooks.append(module.register_forward_hook(after))

    def _before(self, module: nn.Module, inputs: Any) -> None:
        self.running = module

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running = None

    def _after_convolution(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.running = None
        self.outputs[module] = output
        self.readers[_storage(output)] = module, module

    def _before_norm(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.running = module
        self.calls[module] += 1
        for convolution, output in self.outputs.items():
            if inputs and inputs[0] is output:
                if convolution in self.pairs:
                    self.read_by_others.add(convolution)
                self.pairs[convolution] = module
                self.readers[_storage(output)] = convolution, module


def _storage(tensor: Tensor) -> int | None:
    """Identify where numbers lie; views have the same place."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
