"""What an update needs of any optimizer: it holds the weights, and their statistics are found."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from itop_prune.layers.handle import ITOP
from itop_prune.layers.masked_layer import has_base
from itop_prune.messages import listed
from itop_prune.sharding import is_sharded, local, zero_off_mask

MATRIX_OPTIMIZERS = {
    "Adafactor": "factors its second moment by rows and columns",
    "AdafactorBigVision": "likewise",
    "Adahessian": "averages the Hessian's diagonal over a kernel",
    "AdamP": "projects the step by output channels",
    "Kron": "preconditions rows and columns",
    "Muon": "makes the step orthogonal",
    "SGDP": "projects the step by output channels",
    "Shampoo": "preconditions rows and columns",
    "SOAP": "preconditions rows and columns",
}
"""Optimizers by class name that look at the matrix, which sparse storage does not have, and how."""


def statistics(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Find what the optimizer keeps of every single weight: tensors of the parameter's shape."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def zero_statistics(
    optimizer: Optimizer, parameter: nn.Parameter, found: Mapping[str, Tensor], stayed: Tensor
) -> None:
    """Set statistics to 0 of weights that did not stay active.

    Args:
        optimizer: It holds the parameter.
        parameter: After the update; in sparse storage it may be longer than before.
        found: Its `statistics` before the update.
        stayed: Bool, of the parameter's shape: active before and after.
    """
    for key, tensor in found.items():
        if tensor.shape != stayed.shape:
            tensor = optimizer.state[parameter][key] = pad_to(tensor, stayed.shape)
        zero_off_mask(tensor, stayed)


def pad_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Make the last dimension as long as that of a shape, with zeros."""
    return F.pad(tensor, (0, shape[-1] - tensor.shape[-1]))


def check_holds_parameters(optimizer: Optimizer, masks: Mapping[str, ITOP]) -> None:
    """Refuse an optimizer that does not hold every masked parameter that can be trained.

    Raises:
        ValueError: It does not, or a parameter was flattened or moved away from its mask.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name
        for name, itop in masks.items()
        if itop.parameter.requires_grad and id(itop.parameter) not in held
    ]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {listed(missing)}; build it from model.parameters() of "
            "the masked model, and the MaskScheduler after accelerator.prepare; or pass only the "
            "masks that this optimizer holds; after a forward of an FSDP2 model call "
            "model.reshard() first"
        )

    for name, itop in masks.items():
        parameter, buffer = itop.parameter, itop.buffer
        if itop.storage == "sparse" and is_sharded(parameter):
            raise ValueError(
                f"{name} is in sparse storage, and FSDP2 has sharded its values, one of which says "
                'nothing without the positions of all; take storage="mask", or DDP'
            )
        if parameter.shape != itop.used.shape:
            raise ValueError(
                f"{name} has the shape {tuple(parameter.shape)}, its mask {tuple(buffer.shape)}: "
                "FSDP1 and ZeRO-3 flatten parameters, which masks can't follow; FSDP2 "
                "(fully_shard) does not"
            )
        if parameter.device != buffer.device:
            raise ValueError(
                f"{name} is on {parameter.device}, its mask on {buffer.device}; both must be on "
                "one device: move the whole model, and leave out FSDP2's CPUOffloadPolicy"
            )


def has_any_gradient(optimizer: Optimizer) -> bool:
    """Tell whether any gradient is not 0, of biases and norms too: after `zero_grad` none is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and bool(local(parameter.grad).any()):
                return True
    return False


def may_write_nan(optimizer: Optimizer) -> bool:
    """Tell whether 0 / (0 + eps) may be 0 / 0, as for weights whose gradient is always 0.

    The usual eps of Adam, 1e-8, is 0 in float16.
    """
    return any(
        group.get("eps") == 0 or any(p.dtype == torch.float16 for p in group["params"])
        for group in optimizer.param_groups
    )


def check_statistics(optimizer: Optimizer, masks: Mapping[str, ITOP]) -> None:
    """Refuse an optimizer whose statistics of single weights can't be set to 0.

    Raises:
        ValueError: They are step sizes, quantized, or kept outside of `optimizer.state`.
    """
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError(
            "Rprop keeps a step size of each weight, and with 0 a weight that has grown would "
            "stand still; pass an optimizer whose statistics may begin at 0, such as SGD or AdamW"
        )

    sparse = [name for name, itop in masks.items() if itop.storage == "sparse"]
    if sparse and has_base(type(optimizer), MATRIX_OPTIMIZERS):
        raise ValueError(
            f"{type(optimizer).__name__} looks at the rows and columns of a weight, and in sparse "
            f"storage {listed(sparse)} has none; pass an optimizer that treats each weight alone, "
            'such as SGD or AdamW, or take storage="mask"'
        )

    parameters = [itop.parameter for itop in masks.values()]
    for name, part in vars(optimizer).items():
        if isinstance(part, Optimizer):
            check_statistics(part, masks)
            hidden = part.state is not optimizer.state
        else:
            hidden = part is not optimizer.state and _holds_tensors(part, parameters)
        if hidden:
            raise ValueError(
                f"{type(optimizer).__name__} keeps statistics of weights in its {name}, out of "
                "reach: pruned weights would come back; pass an optimizer whose statistics are all "
                "in its own state"
            )

    for name, itop in masks.items():
        for key, value in statistics(optimizer, itop.parameter).items():
            if not value.is_floating_point() and value.dtype != torch.bool:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as {value.dtype}, where 0 "
                    "may mean anything; pass an optimizer with statistics in floating point"
                )


def _holds_tensors(attribute: Any, parameters: list[nn.Parameter]) -> bool:
    """Tell whether an attribute of an optimizer maps parameters to tensors."""
    if not isinstance(attribute, Mapping):
        return False
    for parameter in parameters:
        if parameter in attribute:
            leaves = tree_leaves(attribute[parameter])
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                return True
    return False
