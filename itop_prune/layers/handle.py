"""Masks live here: `ITOP` holds one, `find_masks` finds all of a model, `remove` bakes them in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from itop_prune import distributed as ranks
from itop_prune.counting import active_in, count_each
from itop_prune.layers.dense_gradient import Listener, ShardedListener
from itop_prune.layers.maskable import kernel_shape, obstacle, walk
from itop_prune.layers.masked_layer import attach, detach, effective, pattern_of, standardizes
from itop_prune.layers.sharding import is_sharded, like, zero_off_mask
from itop_prune.methods.patterns import Pattern, holds


class ITOP(prune.BasePruningMethod):
    """One mask on one parameter of one layer; the layer's registered forward pre-hook, as torch's pruning wants it.

    The layer holds the parameter `<name>_orig` and the bool buffer `<name>_mask`, and
    `layer.<name>` is the effective weight, their product (see `itop_prune.layers.masked_layer`).
    The hook itself computes nothing: by it `torch.nn.utils.prune` recognises the layer, and
    `prune.remove` undoes it.
    """

    PRUNING_TYPE = "unstructured"
    _listener: Listener | None = None

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer = layer
        self._tensor_name = name

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, mask: Tensor, pattern: Pattern | None = None
    ) -> "ITOP":
        """Mask one parameter of one layer with a given mask, as `prune.custom_from_mask` does.

        Args: module: The layer. name: Of the parameter in the layer, such as "weight". mask: Of the
            parameter's shape; True (or not 0) = active. It is copied. pattern: N and M, where of
            every M consecutive weights along dimension 1 always N are active.

        Raises: ValueError: The parameter can't be masked, the mask has another shape, or it does
            not hold the pattern.
        """
        if reason := obstacle(module, name):
            raise ValueError(f"{name} of {type(module).__name__} can't be masked: {reason}")
        parameter = module.get_parameter(name)
        if mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter shape {tuple(parameter.shape)}; they "
                "must agree"
            )
        if pattern is not None and not mask.is_meta and not holds(mask.bool(), *pattern):
            n, m = pattern
            raise ValueError(
                f"the mask of {name}, {tuple(mask.shape)}, does not hold the pattern {n}:{m}; of every {m} along "
                f"dimension 1 exactly {n} must be True: itop_prune.patterns.best_of_groups makes such a mask"
            )
        mask = mask.to(
            parameter.device, torch.bool
        )  # this may fail, so it comes before the layer is changed
        itop = cls.place(module, name)
        if pattern is not None:
            setattr(module, f"{name}_pattern", pattern)
        itop.mask.copy_(mask)
        itop.zero_off_mask()
        return itop

    @classmethod
    def place(cls, module: nn.Module, name: str) -> "ITOP":
        """Give one parameter a mask whose values are whatever its memory held: the caller must write them.

        What may hinder it is not looked for, and the parameter is not touched.
        """
        itop = cls(module, name)
        attach(module, name, torch.empty_like(module.get_parameter(name), dtype=torch.bool))
        module.register_forward_pre_hook(itop)
        return itop

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that the optimizer holds (`<name>_orig`); 0 wherever the mask is False."""
        return getattr(self._layer, f"{self._tensor_name}_orig")

    @property
    def mask(self) -> Tensor:
        """The bool buffer (`<name>_mask`), True = active. Write into it in place only."""
        return getattr(self._layer, f"{self._tensor_name}_mask")

    @property
    def weight(self) -> Tensor:
        """The effective weight that the layer computes with, detached: 0 wherever the mask is False."""
        return getattr(self._layer, self._tensor_name).detach()

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape that distributions count with, (out, in, ...); of several kernels (kernels * out, in, ...)."""
        return kernel_shape(self._layer, f"{self._tensor_name}_orig")

    @property
    def outputs(self) -> int:
        """How many outputs the weights of the tensor feed."""
        transposed = getattr(self._layer, "transposed", False)
        return self.mask.shape[1] * int(self._layer.groups) if transposed else self.mask.shape[0]  # type: ignore[arg-type]

    @property
    def pattern(self) -> Pattern | None:
        """N and M, where of every M consecutive weights along dimension 1 always N are active; None: there is no rule.

        It stays with the layer, in copies and pickles too, and is not in its state dict.
        """
        return pattern_of(self._layer, self._tensor_name)

    @property
    def active(self) -> int:
        """How many weights are active; of a mask made on the meta device how many would be."""
        return int(active_in(self.mask)) if self._planned is None else self._planned

    @property
    def _planned(self) -> int | None:
        """The count of a mask that was made on the meta device, until its positions are loaded."""
        return getattr(self._layer, f"{self._tensor_name}_planned")

    def check_drawn(self) -> None:
        """Refuse a mask that was made on the meta device, where it has a count and no positions.

        Raises:
            RuntimeError: It has none yet.
        """
        if self._planned is not None:
            raise RuntimeError(
                f"{self!r} was made on the meta device: it has a count and no positions; build the model on a real "
                "device and call itop_prune.apply there, or load the weights and masks of a sparse model"
            )

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the present mask within `default_mask`; part of torch's contract."""
        return default_mask.bool() & self.mask

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Refuse a mask without positions; otherwise nothing is to be done: the layer's property is always current."""
        if self._planned is not None and not self.mask.is_meta:
            self.check_drawn()

    def remove(self, module: nn.Module) -> None:
        """Bake the mask in: a plain parameter again; called by `prune.remove`, which then takes the hook away.

        Raises:
            RuntimeError: FSDP2 has sharded the parameter, and knows it by its name.
        """
        if is_sharded(self.parameter):
            raise RuntimeError(
                f"{self._tensor_name} of {type(module).__name__} is sharded by FSDP2, which keeps its name; load "
                "itop_prune.dense_state_dict(model) into a plain model instead"
            )
        self.take_gradient()
        detach(module, self._tensor_name)

    def keep(self, stayed: Tensor) -> None:
        """Set the parameter to 0 wherever `stayed` is False; call it under torch.no_grad().

        Filters that the layer standardises are centred over it as well, so that a weight of 0 that
        grows into them is 0 in use.
        """
        if standardizes(type(self._layer)):
            self.parameter.copy_(
                effective(self.parameter, like(stayed, self.parameter), centred=True)
            )
        zero_off_mask(self.parameter, stayed)

    def zero_off_mask(self) -> None:
        """Set the parameter to 0 wherever the mask is False: after an update an average still has pruned weights."""
        zero_off_mask(self.parameter, self.mask)

    def listen(self) -> None:
        """Collect the dense gradient in the backward passes to come; `.grad` stays sparse."""
        kind = ShardedListener if is_sharded(self.parameter) else Listener
        self._listener = self._listener or kind(self._layer, self._tensor_name)

    def take_gradient(self) -> Tensor | None:
        """Return the dense gradient collected since `listen`, float32, or None; and stop listening."""
        listener, self._listener = self._listener, None
        return listener.take() if listener else None

    def __getstate__(self) -> dict[str, object]:
        return {"_layer": self._layer, "_tensor_name": self._tensor_name}

    def __repr__(self) -> str:
        layer, mask = (
            type(self._layer).__name__,
            self._layer._buffers.get(f"{self._tensor_name}_mask"),
        )
        if mask is None:
            return f"ITOP({layer}.{self._tensor_name}, removed)"
        pattern = "" if self.pattern is None else f" in {self.pattern[0]}:{self.pattern[1]}"
        return f"ITOP({layer}.{self._tensor_name}, {self.active:,} of {mask.numel():,} active{pattern})"


def active_weights(masks: Mapping[str, ITOP]) -> dict[str, int]:
    """Return `ITOP.active` of each; the host waits for the device once, and not for every mask."""
    counted = count_each({name: itop.mask for name, itop in masks.items() if itop._planned is None})
    return {
        name: counted[name] if itop._planned is None else itop._planned
        for name, itop in masks.items()
    }


def find_masks(model: nn.Module) -> dict[str, ITOP]:
    """Return the masks as `apply` did: after loading, unpickling, of an EMA copy, inside DDP or torch.compile."""
    return {
        name: hook
        for name, layer, tensor in walk(model)
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, ITOP) and hook._tensor_name == tensor
    }


def remove(model: nn.Module) -> None:
    """Bake all masks in: plain parameters again, 0 where a mask was False; classes, names and order as before.

    The parameters stay the same objects, so an optimizer goes on with them; nothing keeps them
    sparse any more.
    """
    for itop in find_masks(model).values():
        prune.remove(itop._layer, itop._tensor_name)
    ranks.leave_out_of_ddp(model)
