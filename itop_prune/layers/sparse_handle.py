"""The handle of a mask in sparse storage: the layer holds active values and their positions."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from itop_prune.layers import sparse_storage
from itop_prune.layers.dense_gradient import DenseGradientHook, put_first
from itop_prune.layers.handle import ITOP
from itop_prune.layers.largest_gradients import LargestGradients, keep_largest
from itop_prune.layers.masked_layer import (
    attach_sparse,
    attach_values,
    detach_sparse,
    effective,
    is_standardized,
)
from itop_prune.layers.names import layout_name, positions_name, probe_name, values_name
from itop_prune.layers.sparse_storage import Layout
from itop_prune.sharding import zero_off_mask


class SparseITOP(ITOP):
    """One mask on one parameter of one layer, in sparse storage.

    The layer holds the parameter `<name>_values` of the shape (1, slots). The buffer
    `<name>_positions`, (slots,), says where each value is in the flattened dense weight. A free
    slot has -1. `layer.<name>` is the dense weight, made when it is read.
    """

    storage = "sparse"

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that the optimizer holds (`<name>_values`); 0 in free slots."""
        return getattr(self._layer, values_name(self._tensor_name))

    @property
    def positions(self) -> Tensor:
        """The buffer (`<name>_positions`); -1 marks a free slot. Never write into it."""
        return getattr(self._layer, positions_name(self._tensor_name))

    @property
    def buffer(self) -> Tensor:
        """The positions."""
        return self.positions

    @property
    def used(self) -> Tensor:
        """Bool, of the parameter's shape: which slots hold a weight."""
        return (self.positions >= 0).unsqueeze(0)

    @property
    def mask(self) -> Tensor:
        """Make the mask: bool, True = active, of the dense shape."""
        return sparse_storage.mask_of(self.positions, self.shape)

    @property
    def _layout(self) -> Layout:
        return getattr(self._layer, layout_name(self._tensor_name))

    def active_positions(self) -> Tensor:
        """List the positions of active weights in the flattened dense weight, in any order."""
        return self.positions.masked_select(self.positions >= 0)

    def active_values(self) -> tuple[Tensor, Tensor] | None:
        """Look up positions and values of all slots; free ones have the position -1.

        None for standardized layers: what they use is not what is stored.
        """
        if is_standardized(type(self._layer)):
            return None
        return self.positions, self.parameter.detach()[0]

    @classmethod
    def place(cls, module: nn.Module, name: str) -> ITOP:
        """Give one parameter a mask without active weights, which the caller must write."""
        itop = cls(module, name)
        itop._attach(torch.zeros_like(module.get_parameter(name), dtype=torch.bool))
        module.register_forward_pre_hook(itop)
        return itop

    @classmethod
    def place_values(
        cls, module: nn.Module, name: str, values: Tensor, positions: Tensor
    ) -> "SparseITOP":
        """Replace a parameter, which may be on the meta device, by values and their positions.

        Args:
            module: The layer.
            name: Of the parameter in the layer.
            values: (1, active).
            positions: (active,), in the flattened weight, none of them twice.
        """
        itop = cls(module, name)
        attach_values(module, name, values, positions)
        module.register_forward_pre_hook(itop)
        return itop

    def _attach(self, mask: Tensor) -> None:
        attach_sparse(self._layer, self._tensor_name, mask)

    def _detach(self) -> None:
        detach_sparse(self._layer, self._tensor_name)

    @torch.no_grad()
    def write_mask(self, before: Tensor, after: Tensor) -> Tensor:
        """Give the slots of weights that leave to those that enter, whose values become 0.

        Where there are too few slots the parameter gets longer. It stays the same object.

        Returns:
            Bool, of the parameter's shape: which slots keep their weight.
        """
        parameter, positions = self.parameter, self.positions
        if is_standardized(type(self._layer)):
            weight = sparse_storage.dense(parameter, positions, self._layout)
            centred = effective(weight, before & after, True)
            parameter.copy_(sparse_storage.gather(centred, positions))
        return self._hand_over(*sparse_storage.reassign(positions, before, after))

    @torch.no_grad()
    def write_positions(self, stayed: Tensor, entered: Tensor) -> Tensor:
        """Do the same without masks, for a layer that does not standardize its weight.

        Args:
            stayed: Bool, (slots,): which slots keep their weight.
            entered: The positions of the weights that enter.

        Returns:
            As `write_mask`.
        """
        moved = sparse_storage.hand_over(self.positions, stayed, entered, self.size)
        return self._hand_over(*moved)

    def _hand_over(self, positions: Tensor, stayed: Tensor) -> Tensor:
        sparse_storage.resize_layer(self._layer, self._tensor_name, len(positions))
        self.positions.copy_(positions)
        stayed = stayed.unsqueeze(0)
        zero_off_mask(self.parameter, stayed)
        return stayed

    @torch.no_grad()
    def follow(self, other: ITOP, changed: Tensor | None) -> None:
        """Set slots of an average to 0 whose owner has changed, and make as many as there are."""
        slots = other.parameter.shape[1]
        sparse_storage.resize_layer(self._layer, self._tensor_name, slots)
        if changed is not None:
            self.parameter.masked_fill_(changed.to(self.parameter.device), 0)

    def _kind_of_hook(self, largest_alone: bool) -> type[DenseGradientHook]:
        # Groups of a pattern regrow what they lost, so each needs its own largest.
        return LargestGradientHook if largest_alone and not self.pattern else SparseGradientHook


class SparseGradientHook(DenseGradientHook):
    """The same for sparse storage: a probe beside the values gets the dense gradient.

    The probe has the dense shape and takes no memory. In each backward pass the probe and the
    values get a gradient, in either order.
    """

    _values_came_first = False

    @property
    def _parameter(self) -> nn.Parameter:
        return self._layer.get_parameter(values_name(self._name))

    def _register(self) -> list[RemovableHandle]:
        parameter, layout = self._parameter, getattr(self._layer, layout_name(self._name))
        probe = parameter.detach().new_zeros(()).expand(layout.shape).requires_grad_()
        setattr(self._layer, probe_name(self._name), probe)
        first = parameter.register_hook(self._before_accumulation)
        put_first(parameter._backward_hooks, first)
        return [
            first,
            parameter.register_post_accumulate_grad_hook(self._after_accumulation),
            probe.register_post_accumulate_grad_hook(self._dense_arrived),
        ]

    def _release(self) -> None:
        self._layer.__dict__.pop(probe_name(self._name), None)

    @unserializable_hook
    def _before_accumulation(self, gradient: Tensor) -> Tensor:
        self._follow_clearing()
        return gradient

    @unserializable_hook
    def _after_accumulation(self, parameter: Tensor) -> None:
        self._values_came_first = self._arriving is None
        super()._after_accumulation(parameter)

    @unserializable_hook
    def _dense_arrived(self, probe: Tensor) -> None:
        """Take the dense gradient, before or after that of the values."""
        self._arriving, probe.grad = probe.grad, None
        if self._values_came_first:
            self._add()
        self._values_came_first = False


class LargestGradientHook(SparseGradientHook):
    """The same for one backward pass, of which it keeps what an update can choose from."""

    _largest: LargestGradients | None = None

    def _follow_clearing(self) -> None:
        present = self._parameter.grad
        if present is None or not (self._is_last_grad(present) or present.any()):
            self._largest = None

    def _add(self) -> None:
        if self._arriving is not None and self._largest is not None:
            raise RuntimeError(
                f"a second gradient of {self._name} of a {type(self._layer).__name__} arrived in "
                "one step, and the first has been reduced to its largest numbers; leave "
                "one_backward out of the MaskScheduler where gradients accumulate"
            )
        super()._add()
        if self._sum is not None:
            mask = sparse_storage.mask_of(self._positions, self._sum.shape)
            self._largest, self._sum = keep_largest(self._sum, mask), None

    @property
    def _positions(self) -> Tensor:
        return self._layer.get_buffer(positions_name(self._name))

    def take(self) -> LargestGradients | None:
        """Stop collecting and return what was kept, or None if nothing came."""
        super().take()
        return self._largest


Storage = Literal["mask", "sparse"]
STORAGES: dict[str, type[ITOP]] = {"mask": ITOP, "sparse": SparseITOP}
