"""FSDP2: refuse at start what does not work, and write the same checkpoints as any other run.

Weights and optimizer statistics are sharded over the ranks. They are gathered to be written, and
sharded again when read, so a run can go on with or without FSDP2. Unsharded tensors pass through.
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


def check_sharding(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse settings that do not work on a sharded model.

    Raises:
        RunError: The message names all of them.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RunError(
            f"accelerator: {kind.value} is not supported here; launch data-parallel, or with "
            "FSDP version 2"
        )
    if kind != DistributedType.FSDP:
        return

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RunError(
            f"accelerator: FSDP version {plugin.fsdp_version} flattens parameters, which masks "
            "can't follow; launch with --fsdp_version 2"
        )

    # A slow import, which other runs do without.
    from torch.distributed.fsdp import CPUOffloadPolicy

    asked = {
        "ema": recipe.ema,
        "channels_last": recipe.channels_last,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    refused = [name for name, wanted in asked.items() if wanted]
    if refused:
        raise RunError(
            f"{', '.join(refused)} can't be had with FSDP2; leave it out, or launch data-parallel"
        )

    # Efficient loading sends parameters but no buffers, and masks are buffers. So it is turned
    # off, and every rank builds the model.
    plugin.cpu_ram_efficient_loading = False
    _check_optimizer(recipe)


def _check_optimizer(recipe: Recipe) -> None:
    """Try two steps of the recipe's optimizer on small sharded layers.

    Raises:
        RunError: The optimizer fails, or shards statistics of another shape than the weights'.
    """
    from torch.distributed.fsdp import fully_shard

    layers = nn.Sequential(nn.Linear(256, 256), nn.Conv2d(16, 16, 3))
    fully_shard(layers)
    problem = ""
    try:
        optimizer = timm.optim.create_optimizer_v2([*layers.parameters()], **recipe.optimizer)
        for _ in range(2):
            for parameter in layers.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if not problem and is_sharded(value) and value.shape != parameter.shape:
                    shape = tuple(value.shape)
                    problem = f"it shards {name} of shape {shape} for {tuple(parameter.shape)}"
    except Exception as error:  # an optimizer may raise anything at sharded tensors
        problem = f"{type(error).__name__}: {error}"

    if problem:
        raise RunError(
            f"optimizer: {recipe.optimizer['opt']} does not work with FSDP2 ({problem}); "
            "take adamw or sgd"
        )


def model_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather a model's state dict; empty unless kept. All ranks must call."""
    return _gather(model.state_dict(), keep)


def optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """Gather an optimizer's state dict; its statistics are empty unless kept. All ranks must call.

    `get_optimizer_state_dict` of torch does not serve here: without statistics, as at step 0, it
    takes an optimizer step of its own to make some.
    """
    state = optimizer.state_dict()
    gathered = {index: _gather(values, keep) for index, values in state["state"].items()}
    return {**state, "state": gathered}


def _gather(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    gathered = {}
    for name, value in values.items():
        if is_sharded(value):
            value = whole(value).cpu()
        if keep:  # the other ranks hold one whole tensor at a time
            gathered[name] = value
    return gathered


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: like(tensor, own.get(name)) for name, tensor in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        sharded[index] = {}
        for name, value in values.items():
            if getattr(value, "shape", None) == parameters[index].shape:
                value = like(value, parameters[index])
            sharded[index][name] = value

    optimizer.load_state_dict({**state, "state": sharded})
