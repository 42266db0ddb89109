"""The dense gradient of one masked parameter, beside the sparse `.grad` that the optimizer sees."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.hooks import RemovableHandle, unserializable_hook

from itop_prune.layers.largest_gradients import LargestGradients
from itop_prune.layers.masked_layer import pass_dense_gradient
from itop_prune.layers.names import mask_name, parameter_name
from itop_prune.sharding import like, zero_off_mask


class DenseGradientHook:
    """Collects the dense gradient of the backward passes from its creation until `take`.

    Hooks on the parameter keep the dense gradient and hand on the masked one, so clipping and the
    optimizer's step are the same as in any other step. The sum follows `.grad`: micro-batches add
    up, and the sum starts anew when `.grad` was cleared between two passes, to None or to 0 (with
    FSDP2 only to None). Gradients of `torch.autograd.grad` are not counted.
    """

    def __init__(self, layer: nn.Module, name: str, scaler: GradScaler | None) -> None:
        self._layer, self._name, self._scaler = layer, name, scaler
        self._sum: Tensor | None = None
        self._arriving: Tensor | None = None
        self._last_grad: tuple[Tensor, int] | None = (
            None  # `.grad` after the last pass, its version
        )
        self._handles = self._register()

    @property
    def _parameter(self) -> nn.Parameter:
        return self._layer.get_parameter(parameter_name(self._name))

    def _register(self) -> list[RemovableHandle]:
        parameter = self._parameter
        pass_dense_gradient(self._layer, self._name, on=True)
        first = parameter.register_hook(self._before_accumulation)
        put_first(parameter._backward_hooks, first)
        return [first, parameter.register_post_accumulate_grad_hook(self._after_accumulation)]

    def take(self) -> Tensor | LargestGradients | None:
        """Stop collecting and return the sum, float32, or None if nothing came."""
        for handle in self._handles:
            handle.remove()
        self._release()
        return self._sum

    def _release(self) -> None:
        pass_dense_gradient(self._layer, self._name, on=False)

    @property
    def _mask(self) -> Tensor:
        return getattr(self._layer, mask_name(self._name))

    @unserializable_hook  # copies and pickles of the parameter go without the hook, on purpose
    def _before_accumulation(self, gradient: Tensor) -> Tensor:
        """Keep the dense gradient and hand on the masked one."""
        self._follow_clearing()
        self._arriving = gradient.detach()
        return gradient * self._mask

    def _follow_clearing(self) -> None:
        """Start the sum anew if `.grad` was cleared since the last pass."""
        present = self._parameter.grad
        if present is None:
            self._sum = None
        elif self._sum is not None and not self._is_last_grad(present):
            # Somebody wrote into `.grad`. If it is all 0 now it was cleared, and the sum starts
            # anew.
            self._sum = torch.where(present.any(), self._sum, 0.0)

    @unserializable_hook
    def _after_accumulation(self, parameter: Tensor) -> None:
        """Add what arrived, now that `.grad` has its masked part."""
        self._add()
        self._remember(parameter.grad)

    def _add(self) -> None:
        """Add what arrived to the sum."""
        arrived, self._arriving = self._arriving, None
        if arrived is not None:
            before = self._sum
            dense = self._unscaled(arrived, copy=before is None)
            self._sum = dense if before is None else before + dense

    def _unscaled(self, gradient: Tensor, *, copy: bool = False) -> Tensor:
        """Convert a gradient to float32, divided by the scale of the present backward."""
        if self._scaler is None:
            return gradient.to(torch.float32, copy=copy)
        one = torch.ones((), device=gradient.device)
        return gradient.float() / self._scaler.scale(one)  # the scale, without a synchronization

    def _remember(self, gradient: Tensor | None) -> None:
        self._last_grad = None if gradient is None else (gradient, gradient._version)

    def _is_last_grad(self, gradient: Tensor) -> bool:
        """Tell whether it is the `.grad` of the last pass, unwritten since."""
        if self._last_grad is None:
            return False
        last, version = self._last_grad
        return last is gradient and version == gradient._version


class ShardedDenseGradientHook(DenseGradientHook):
    """The same for a parameter that FSDP2 shards; a rank holds a part of its gradient."""

    def _register(self) -> list[RemovableHandle]:
        parameter = self._parameter
        pass_dense_gradient(self._layer, self._name, on=True)
        handle = parameter.register_post_accumulate_grad_hook(self._after_reduction)
        put_first(parameter._post_accumulate_grad_hooks, handle)
        return [handle]

    @unserializable_hook
    def _after_reduction(self, parameter: Tensor) -> None:
        """Split `.grad` into its dense and its masked part.

        FSDP2 puts the mean over ranks there, and adds up micro-batches. A `.grad` set to 0
        between passes can't be told apart: all gradients of FSDP2 share one version.
        """
        gradient = parameter.grad
        if gradient is None:
            return

        if self._sum is None or self._last_grad is None or self._last_grad[0] is not gradient:
            self._sum = self._unscaled(gradient, copy=True)
        else:
            # Active positions have added up in `.grad`. The others were set to 0 after the last
            # pass.
            mask, total = like(self._mask, gradient), self._unscaled(gradient)
            self._sum = torch.where(mask, total, self._sum + total)
        zero_off_mask(gradient, self._mask)
        self._remember(gradient)


def put_first(hooks: Any, handle: RemovableHandle) -> None:
    """Move a hook before all others of its kind, so that those see the masked gradient."""
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)
