"""Writes into `layer.weight` that would be lost, refused where that costs nothing.

The weight of a masked layer is made anew at each read. What is written into it in place, or into
its `.data`, is gone at the next read, and no hook sees it. Two writers are known beforehand: the
layer's own method of initialization, and PEFT, which asks for the base layer before it writes.
"""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

RESETS = ("reset_parameters", "_reset_parameters")
"""Methods of torch's layers that initialize their parameters."""

PEFT_WRITERS = frozenset(
    {
        *("merge", "unmerge", "_merge", "_unmerge", "set_base_weight"),
        *(f"{kind}_init" for kind in ("corda", "loftq", "lora_ga", "olora", "pissa")),
        "_truncate_base_weight",  # of KaSA
    }
)
"""Methods of PEFT's layers that write into `weight.data` of their base layer."""


def refused_resets(base: type) -> dict[str, Callable[[Any], NoReturn]]:
    """Make methods that refuse, for those by which a class initializes its parameters."""

    def refuse(layer: nn.Module, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"a masked {type(layer).__name__} can't initialize its parameters: what is written "
            "into the weight would be lost. Initialize before itop_prune.apply, or write values "
            'under the mask: layer.load_state_dict({"weight": values}, strict=False)'
        )

    return {name: refuse for name in RESETS if hasattr(base, name)}


def refuse_peft_write(layer: nn.Module) -> None:
    """Refuse if PEFT is about to write into the weight of a masked layer.

    Call it from the property `base_layer`. `get_base_layer` of PEFT's layers looks for that
    attribute, and is called by all methods that write.

    Raises:
        RuntimeError: The caller of `get_base_layer` is one of `PEFT_WRITERS`.
    """
    if torch.compiler.is_compiling():  # a graph writes into no weight
        return
    frame: Any = inspect.currentframe()
    callers: list[str] = []  # this function, the property, get_base_layer, its caller
    while frame is not None and len(callers) < 4:
        callers.append(frame.f_code.co_name)
        frame = frame.f_back

    if callers[2:3] == ["get_base_layer"] and callers[-1] in PEFT_WRITERS:
        raise RuntimeError(
            f"{callers[-1]}() of PEFT writes into the weight of a masked {type(layer).__name__}, "
            "where it would be lost. Call itop_prune.remove(model) before a merge, whose result is "
            "dense, and itop_prune.apply after an initialization of this kind"
        )
