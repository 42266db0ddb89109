"""Runs under FSDP2: what they can't do is refused at start, and checkpoints are those of any run, whole.

Weights and optimizer statistics lie in parts on the ranks. They are gathered to be written and laid
out again when read, so that a run may go on with FSDP2 or without. What is not in parts passes
through as it is.
"""

from collections.abc import Mapping
from typing import Any

import timm.optim
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from itop_prune.sharding import is_sharded, like, whole

from ..config.recipe import Recipe
from ..run_folder.folder import RunError


def check(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what can't work on a sharded model.

    Raises:
        RunError: Something can't; all of it is named.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RunError(
            f"accelerator: {kind.value} is not supported here; launch data-parallel, or with FSDP version 2"
        )
    if kind != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RunError(
            f"accelerator: FSDP version {plugin.fsdp_version} flattens parameters, which masks can't follow; launch "
            "with --fsdp_version 2"
        )
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,  # the import takes long, and other runs do without
    )

    asked = {
        "ema": recipe.ema,
        "channels_last": recipe.channels_last,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    if refused := [name for name, wanted in asked.items() if wanted]:
        raise RunError(
            f"{', '.join(refused)} can't be had with FSDP2; leave it out, or launch data-parallel"
        )
    plugin.cpu_ram_efficient_loading = (
        False  # it sends no buffers, and masks are some; all ranks build the model
    )
    _check_optimizer(recipe)


def _check_optimizer(recipe: Recipe) -> None:
    """Try two steps on small sharded layers.

    Raises: RunError: The optimizer fails, or keeps statistics in parts that are not laid out as the
        weights are.
    """
    from torch.distributed.fsdp import fully_shard

    layers = nn.Sequential(nn.Linear(256, 256), nn.Conv2d(16, 16, 3))
    fully_shard(layers)
    try:
        optimizer = timm.optim.create_optimizer_v2([*layers.parameters()], **recipe.optimizer)
        for _ in range(2):
            for parameter in layers.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        strange = [
            f"{name} of shape {tuple(value.shape)} for {tuple(parameter.shape)}"
            for parameter, values in optimizer.state.items()
            for name, value in values.items()
            if is_sharded(value) and value.shape != parameter.shape
        ]
        problem = f"it shards {strange[0]}" if strange else ""
    except Exception as error:  # whatever an optimizer raises at sharded tensors
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise RunError(
            f"optimizer: {recipe.optimizer['opt']} does not work with FSDP2 ({problem}); take adamw or sgd"
        )


def model_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return a model's state dict with whole tensors; empty where it is not to be kept. All ranks must ask."""
    return _gather(model.state_dict(), keep)


def optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state dict with whole tensors; empty where it is not to be kept. All ranks must ask."""
    state = optimizer.state_dict()
    return {
        **state,
        "state": {index: _gather(values, keep) for index, values in state["state"].items()},
    }


def _gather(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    gathered = {}
    for name, value in values.items():
        value = whole(value).cpu() if is_sharded(value) else value
        if keep:  # one tensor at a time is whole on the other ranks
            gathered[name] = value
    return gathered


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: like(tensor, own.get(name)) for name, tensor in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid_out = {
        index: {
            name: like(value, parameters[index])
            if getattr(value, "shape", None) == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": laid_out})
