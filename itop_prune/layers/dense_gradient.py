"""The dense gradient of one masked parameter, beside the sparse `.grad` that the optimizer sees."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from itop_prune.layers.masked_layer import pass_dense_gradient
from itop_prune.layers.sharding import like, zero_off_mask


class Listener:
    """Collects what the backward passes bring, from when it is made until `take`.

    Hooks on the parameter keep what arrives and hand on what the mask lets through, so that
    clipping and the optimizer's step are those of any other step. What adds up in `.grad`,
    micro-batches, adds up here. Where `.grad` was cleared between two passes, to None or to 0,
    collecting starts anew (with FSDP2 only where to None); what `torch.autograd.grad` is asked for
    is not counted.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer, self._name = layer, name
        self._heard: Tensor | None = None
        self._arriving: Tensor | None = None
        self._left: tuple[Tensor, int] | None = None
        pass_dense_gradient(layer, name, on=True)
        self._hooks = self._hook(layer.get_parameter(f"{name}_orig"))

    def _hook(self, parameter: nn.Parameter) -> list[RemovableHandle]:
        first = parameter.register_hook(self._arrives)
        put_first(parameter._backward_hooks, first)
        return [first, parameter.register_post_accumulate_grad_hook(self._added)]

    def take(self) -> Tensor | None:
        """Return the sum of what came, float32, or None; and stop."""
        for hook in self._hooks:
            hook.remove()
        pass_dense_gradient(self._layer, self._name, on=False)
        return self._heard

    @property
    def _mask(self) -> Tensor:
        return getattr(self._layer, f"{self._name}_mask")

    @unserializable_hook  # a copy or a pickle does without, and that is meant
    def _arrives(self, gradient: Tensor) -> Tensor:
        """Keep the dense gradient, and hand on the sparse one; this comes before `.grad` is added to."""
        present = getattr(self._layer, f"{self._name}_orig").grad
        if present is None:
            self._heard = None
        elif self._heard is not None and not self._is_as_left(present):
            # Somebody wrote into it: to all 0 if it was cleared, and then collecting starts anew. No wait for a device.
            self._heard = torch.where(present.any(), self._heard, 0.0)
        self._arriving = gradient.detach()
        return gradient * self._mask

    @unserializable_hook
    def _added(self, parameter: Tensor) -> None:
        """Count what arrived, now that `.grad` has its sparse part."""
        arrived, self._arriving = self._arriving, None
        if arrived is not None:
            self._heard = (
                arrived.to(torch.float32, copy=True)
                if self._heard is None
                else self._heard + arrived.float()
            )
        self._leave(parameter.grad)

    def _leave(self, gradient: Tensor | None) -> None:
        self._left = None if gradient is None else (gradient, gradient._version)

    def _is_as_left(self, gradient: Tensor) -> bool:
        """Return whether it is the `.grad` of the last pass, and nobody has written to it since."""
        return (
            self._left is not None
            and self._left[0] is gradient
            and self._left[1] == gradient._version
        )


class ShardedListener(Listener):
    """The same where FSDP2 shards the parameter and brings its gradient, of which a rank holds a part."""

    def _hook(self, parameter: nn.Parameter) -> list[RemovableHandle]:
        handle = parameter.register_post_accumulate_grad_hook(self._added_by_fsdp)
        put_first(parameter._post_accumulate_grad_hooks, handle)
        return [handle]

    @unserializable_hook
    def _added_by_fsdp(self, parameter: Tensor) -> None:
        """FSDP2 puts the mean over ranks into `.grad`, no hook between, and adds micro-batches up there.

        Whether it was set to 0 in between can't be told: all gradients that it holds share one
        version counter.
        """
        gradient = parameter.grad
        if gradient is None:
            return
        if self._heard is None or self._left is None or self._left[0] is not gradient:
            self._heard = gradient.to(torch.float32, copy=True)
        else:
            # What is active has added up in it; the rest was set to 0 after the last pass, and is of this one alone.
            self._heard = torch.where(
                like(self._mask, gradient), gradient, self._heard + gradient
            ).float()
        zero_off_mask(gradient, self._mask)
        self._leave(gradient)


def put_first(hooks: Any, handle: RemovableHandle) -> None:
    """Put a hook before all others of its kind: those see the sparse gradient then, as in any other step."""
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)
