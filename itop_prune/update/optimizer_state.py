"""What the package needs of an optimizer, whichever it is: that it holds the weights, and where its statistics lie."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from itop_prune.layers.handle import ITOP
from itop_prune.layers.sharding import local
from itop_prune.methods.lookup import listed


def statistics(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what the optimizer remembers of every single weight: by shape, whatever the optimizer."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def check_holds(optimizer: Optimizer, masks: Mapping[str, ITOP]) -> None:
    """Refuse an optimizer that does not hold every masked parameter that can be trained."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        n
        for n, itop in masks.items()
        if itop.parameter.requires_grad and id(itop.parameter) not in held
    ]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {listed(missing)}; build it from model.parameters() of the masked model, and "
            "the MaskScheduler after accelerator.prepare; or pass only the masks that this optimizer holds; after a "
            "forward of an FSDP2 model call model.reshard() first"
        )
    for name, itop in masks.items():
        if itop.parameter.shape != itop.mask.shape:
            raise ValueError(
                f"{name} has the shape {tuple(itop.parameter.shape)}, its mask {tuple(itop.mask.shape)}: FSDP1 and "
                "ZeRO-3 flatten parameters, which masks can't follow; FSDP2 (fully_shard) does not"
            )
        if itop.parameter.device != itop.mask.device:
            raise ValueError(
                f"{name} is on {itop.parameter.device}, its mask on {itop.mask.device}; both must be on one device: "
                "move the whole model, and leave out FSDP2's CPUOffloadPolicy"
            )


def has_any_gradient(optimizer: Optimizer) -> bool:
    """Return whether any gradient, of a bias or norm too, is not 0: after `zero_grad` none is."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(
        bool(local(parameter.grad).any()) for parameter in parameters if parameter.grad is not None
    )


def check_statistics(optimizer: Optimizer, masks: Mapping[str, ITOP]) -> None:
    """Refuse an optimizer whose statistics can't be set to 0: kept out of `optimizer.state`, quantized, a step size."""
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError(
            "Rprop keeps a step size of each weight, and with 0 a weight that has grown would stand still; pass an "
            "optimizer whose statistics may begin at 0, such as SGD or AdamW"
        )
    parameters = [itop.parameter for itop in masks.values()]
    for name, part in vars(optimizer).items():
        if isinstance(part, Optimizer):
            check_statistics(part, masks)
            hidden = part.state is not optimizer.state
        else:
            kept = part if isinstance(part, Mapping) and part is not optimizer.state else {}
            hidden = any(
                isinstance(leaf, Tensor)
                for p in parameters
                if p in kept
                for leaf in tree_leaves(kept[p])
            )
        if hidden:
            raise ValueError(
                f"{type(optimizer).__name__} keeps statistics of weights in its {name}, out of reach: pruned weights "
                "would come back; pass an optimizer whose statistics are all in its own state"
            )
    for name, itop in masks.items():
        for key, value in statistics(optimizer, itop.parameter).items():
            if not value.is_floating_point() and value.dtype != torch.bool:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as {value.dtype}, where 0 may mean anything; "
                    "pass an optimizer with statistics in floating point"
                )
