"""The handle of a mask, `ITOP`; `find_masks` finds all of a model, `remove` bakes them in."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import prune

from itop_prune.layers.dense_gradient import DenseGradientHook, ShardedDenseGradientHook
from itop_prune.layers.largest_gradients import LargestGradients
from itop_prune.layers.maskable import obstacle, unwrap, walk
from itop_prune.layers.masked_layer import (
    attach,
    detach,
    effective,
    is_standardized,
    masked_names,
    pattern_of,
    shape_of,
    sparse_names,
)
from itop_prune.layers.matrices import count_outputs, input_dim, kernel_shape
from itop_prune.layers.names import mask_name, parameter_name, pattern_name, positions_name
from itop_prune.patterns import Pattern, holds
from itop_prune.sharding import is_sharded, like, zero_off_mask
from itop_prune.topology import true_count, true_positions


class ITOP(prune.BasePruningMethod):
    """One mask on one parameter of one layer, registered as the layer's forward pre-hook.

    The layer holds the parameter `<name>_orig` and the bool buffer `<name>_mask`. `layer.<name>` is
    the effective weight, their product (see `itop_prune.layers.masked_layer`). The hook computes
    nothing. It exists so that `torch.nn.utils.prune` recognizes the layer and can undo the mask.
    """

    PRUNING_TYPE = "unstructured"
    storage = "mask"
    """How the layer holds the weight, as `apply` names it."""
    _gradient_hook: DenseGradientHook | None = None
    _moved_by: object | None = None  # the MaskScheduler that stepped last, by a token of it

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer = layer
        self._tensor_name = name

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, mask: Tensor, pattern: Pattern | None = None
    ) -> "ITOP":
        """Mask one parameter of one layer with a given mask, as `prune.custom_from_mask` does.

        Args:
            module: The layer.
            name: Of the parameter in the layer, such as "weight".
            mask: Of the parameter's shape; True (or not 0) = active. It is copied.
            pattern: N and M, if of every M consecutive weights along the inputs always N are
                active.

        Raises:
            ValueError: The parameter can't be masked, the mask has another shape, or it breaks the
                pattern.
        """
        reason = obstacle(module, name)
        if reason:
            raise ValueError(f"{name} of {type(module).__name__} can't be masked: {reason}")
        parameter = module.get_parameter(name)
        if mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter shape "
                f"{tuple(parameter.shape)}; they must agree"
            )
        mask = mask.to(parameter.device, torch.bool)
        dim = input_dim(module, name)
        if pattern is not None and not holds(mask, *pattern, dim):
            n, m = pattern
            raise ValueError(
                f"the mask of {name}, {tuple(mask.shape)}, does not hold the pattern {n}:{m}; of "
                f"every {m} along dimension {dim} exactly {n} must be True: "
                "itop_prune.patterns.best_of_groups makes such a mask"
            )

        itop = cls(module, name)
        itop._attach(mask)
        if pattern is not None:
            setattr(module, pattern_name(name), pattern)
        module.register_forward_pre_hook(itop)
        return itop

    @classmethod
    def place(cls, module: nn.Module, name: str) -> "ITOP":
        """Give one parameter a mask that holds nothing yet, which the caller must write.

        It does not check whether the parameter can be masked, and does not touch it.
        """
        itop = cls(module, name)
        attach(module, name, torch.empty_like(module.get_parameter(name), dtype=torch.bool))
        module.register_forward_pre_hook(itop)
        return itop

    def _attach(self, mask: Tensor) -> None:
        """Turn the parameter into what the storage holds; 0 off the mask."""
        weight = self._layer.get_parameter(self._tensor_name)
        attach(self._layer, self._tensor_name, torch.empty_like(weight, dtype=torch.bool))
        self.mask.copy_(mask)
        self.zero_off_mask()

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that the optimizer holds (`<name>_orig`); 0 off the mask after each update."""
        return getattr(self._layer, parameter_name(self._tensor_name))

    @property
    def mask(self) -> Tensor:
        """The bool buffer (`<name>_mask`), True = active. Write into it in place only."""
        return getattr(self._layer, mask_name(self._tensor_name))

    @property
    def buffer(self) -> Tensor:
        """The buffer that says which weights are active, in the form of the storage."""
        return self.mask

    @property
    def used(self) -> Tensor:
        """Bool, of the parameter's shape: which of its numbers are active weights."""
        return self.mask

    @property
    def weight(self) -> Tensor:
        """The effective weight, detached; 0 wherever the mask is False."""
        return getattr(self._layer, self._tensor_name).detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return shape_of(self._layer, self._tensor_name)

    @property
    def size(self) -> int:
        """How many weights the dense tensor has."""
        return math.prod(self.shape)

    def active_positions(self) -> Tensor:
        """List the positions of active weights in the flattened dense weight, in any order."""
        return true_positions(self.mask.flatten())

    def active_values(self) -> tuple[Tensor, Tensor] | None:
        """Look up positions and values as they are stored; None where a dense tensor is."""
        return None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape that distributions count with: (out, in, ...)."""
        return kernel_shape(self._layer, self._tensor_name, self.shape)

    @property
    def outputs(self) -> int:
        """How many outputs the weights of the tensor feed."""
        return count_outputs(self._layer, self._tensor_name, self.shape)

    @property
    def input_dim(self) -> int:
        """Which dimension of the dense weight holds its inputs; N:M patterns run along it."""
        return input_dim(self._layer, self._tensor_name)

    @property
    def pattern(self) -> Pattern | None:
        """N and M, if of every M consecutive weights along the inputs always N are active.

        It stays with the layer, in copies and pickles too, and is not in its state dict.
        """
        return pattern_of(self._layer, self._tensor_name)

    @property
    def active(self) -> int:
        """How many weights are active."""
        return int(self.count())

    def count(self) -> Tensor:
        """Count the active weights, as a tensor on their device: the host need not wait."""
        return true_count(self.used)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Restrict `default_mask` to the present mask; part of torch's contract."""
        return default_mask.bool() & self.mask

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Do nothing, since the layer's property is always current."""

    def remove(self, module: nn.Module) -> None:
        """Bake the mask in; `prune.remove` calls this and then takes the hook away.

        Raises:
            RuntimeError: FSDP2 has sharded the parameter and keeps its name.
        """
        if is_sharded(self.parameter):
            raise RuntimeError(
                f"{self._tensor_name} of {type(module).__name__} is sharded by FSDP2, which keeps "
                "its name; load itop_prune.dense_state_dict(model) into a plain model instead"
            )
        self.take_dense_gradient()  # its hooks would stay on the parameter
        self._detach()

    def _detach(self) -> None:
        detach(self._layer, self._tensor_name)

    @torch.no_grad()
    def write_mask(self, before: Tensor, after: Tensor) -> Tensor:
        """Write a new mask; set the parameter to 0 unless a weight is active before and after.

        Filters that the layer standardizes are centred over the weights that stay, too. So a weight
        of 0 that grows into them is 0 in use.

        Returns:
            Bool, of the parameter's shape: active before and after.
        """
        stayed = before & after
        if is_standardized(type(self._layer)):
            self.parameter.copy_(effective(self.parameter, like(stayed, self.parameter), True))
        zero_off_mask(self.parameter, stayed)
        self.mask.copy_(after)
        return stayed

    def zero_off_mask(self) -> None:
        """Set the parameter to 0 wherever it holds no active weight."""
        zero_off_mask(self.parameter, self.used)

    def follow(self, other: "ITOP", changed: Tensor | None) -> None:
        """Set weights of an average to 0 that are not those of another model's mask any more.

        Args:
            other: The mask of the model that is averaged.
            changed: Bool, of the other parameter's shape: what has moved since the last call. Only
                sparse storage needs it; None: nothing.
        """
        zero_off_mask(self.parameter, other.mask.to(self.parameter.device))

    def collect_dense_gradient(
        self, scaler: GradScaler | None = None, largest_alone: bool = False
    ) -> None:
        """Collect the dense gradient in the backward passes to come; `.grad` stays sparse.

        Args:
            scaler: The gradient of each pass is divided by its scale.
            largest_alone: Whether there is one pass, of which growth needs the largest gradients
                alone. Sparse storage then drops the others.
        """
        if self._gradient_hook is None:
            kind = self._kind_of_hook(largest_alone)
            self._gradient_hook = kind(self._layer, self._tensor_name, scaler)

    def _kind_of_hook(self, largest_alone: bool) -> type[DenseGradientHook]:
        return ShardedDenseGradientHook if is_sharded(self.parameter) else DenseGradientHook

    def take_dense_gradient(self) -> Tensor | LargestGradients | None:
        """Stop collecting and return the dense gradient, float32, or None if there is none."""
        hook, self._gradient_hook = self._gradient_hook, None
        return hook.take() if hook else None

    def __getstate__(self) -> dict[str, object]:
        return {"_layer": self._layer, "_tensor_name": self._tensor_name}

    def __repr__(self) -> str:
        where = f"{type(self._layer).__name__}.{self._tensor_name}"
        if self._tensor_name not in masked_names(self._layer):
            return f"{type(self).__name__}({where}, removed)"
        pattern = "" if self.pattern is None else f" in {self.pattern[0]}:{self.pattern[1]}"
        count = "?" if self.parameter.is_meta else f"{self.active:,}"
        return f"{type(self).__name__}({where}, {count} of {self.size:,} active{pattern})"


def active_weights(masks: Mapping[str, ITOP]) -> dict[str, int]:
    """Count the active weights of each mask."""
    return {name: itop.active for name, itop in masks.items()}


def find_masks(model: nn.Module) -> dict[str, ITOP]:
    """Find the masks that `apply` placed, also in loaded models, copies and wrappers."""
    masks = {}
    for name, layer, tensor in walk(model):
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, ITOP) and hook._tensor_name == tensor:
                masks[name] = hook
    return masks


def refuse_deployed(model: nn.Module) -> None:
    """Refuse a model for inference: sparse layers without masks.

    Raises:
        ValueError: `itop_prune.deploy` made it.
    """
    if any(sparse_names(layer) for layer in model.modules()) and not find_masks(model):
        raise ValueError(
            f"this {type(unwrap(model)).__name__} is for inference alone: itop_prune.deploy made "
            "it; ask the one that was deployed, which has its masks still"
        )


def remove(model: nn.Module) -> None:
    """Bake all masks in: plain parameters again, 0 where a mask was False.

    Classes, names and order are as before `apply`. The parameters stay the same objects, so an
    optimizer goes on with them, but nothing keeps them sparse any more. Weights in sparse storage
    become new parameters; build the optimizer anew.
    """
    for itop in find_masks(model).values():
        prune.remove(itop._layer, itop._tensor_name)
    exclude_masks_from_ddp(model)


def exclude_masks_from_ddp(model: nn.Module) -> None:
    """Stop DistributedDataParallel from sending the masks at every forward; all ranks hold them."""
    model = unwrap(model)
    key = "_ddp_params_and_buffers_to_ignore"  # what DDP reads from the module that it is given
    names = set()
    for prefix, layer in model.named_modules():
        for name in masked_names(layer):
            buffer = positions_name(name) if name in sparse_names(layer) else mask_name(name)
            names.add(f"{prefix}.{buffer}".lstrip("."))
    others = set(getattr(model, key, ()))
    if others:  # of the user, or of masks that are gone
        present = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        names |= others & present

    if names:
        setattr(model, key, sorted(names))
    else:  # an attribute that a wrapper (PEFT's) merely forwards stays
        vars(model).pop(key, None)
