"""Dynamic sparse training for PyTorch: In-Time Over-Parameterization (ITOP) as a torch pruning method.

`apply` places the masks, `MaskScheduler` moves them. What differs between papers is a function of plain tensors or
plain numbers: see `itop_prune.criteria`, `.distributions`, `.redistribution`, `.saliency`, `.schedules` and, for the
algorithm itself, `.topology`, and `.patterns` for N:M.

To read the code in some twenty minutes, the head of each of these files and in it:

- `topology`: `prune_and_regrow`, the algorithm.
- `layer`: from `effective` to `_subclass`, a weight that is mask times parameter.
- `mask`: `ITOP`, from `place` to `weight`, one mask on one parameter.
- `scheduler`: `step`, `_update` and `_move`, when, and what becomes of weights and optimizer statistics.
- `turnover`: `counts`, how many weights leave and enter each layer; `update`: `exchange`, which.
- `criteria`: `magnitude`, `gradient` and `random`, functions whose parameters' names say what they are given.
- `exploration`: `note`, from which R_s comes, the share of weights that were ever active.
- `listening`: `Listener`, the dense gradient beside the sparse `.grad`; in `layer` its `_DenseBackward`.

What else is in these files serves that. The modules from `criteria` to `schedules` above are menus, lists of small
functions, read as they are needed. Of the others `placement` draws the first masks, `budget` and `density` count,
`ranks` keeps processes alike, and most check arguments. `files` and `inference`, for after the training, are folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from itop_prune import criteria, distributions, patterns, redistribution, schedules, topology
from itop_prune.mask import ITOP, find_masks, remove
from itop_prune.placement import apply
from itop_prune.scheduler import MaskScheduler

if TYPE_CHECKING:
    from itop_prune import saliency
    from itop_prune.cost import FLOPs, flops
    from itop_prune.files.compact import save
    from itop_prune.files.storage import dense_state_dict, load
    from itop_prune.inference.deployment import deploy
    from itop_prune.report import Summary, summarize

__version__ = "0.1.0"

__all__ = [
    "ITOP",
    "FLOPs",
    "MaskScheduler",
    "Summary",
    "apply",
    "criteria",
    "dense_state_dict",
    "deploy",
    "distributions",
    "find_masks",
    "flops",
    "load",
    "patterns",
    "redistribution",
    "remove",
    "saliency",
    "save",
    "schedules",
    "summarize",
    "topology",
]

LATER = {
    **dict.fromkeys(("FLOPs", "flops"), "cost"),
    **dict.fromkeys(("Summary", "summarize"), "report"),
    **dict.fromkeys(("dense_state_dict", "load"), "files.storage"),
    "deploy": "inference.deployment",
    "saliency": "saliency",
    "save": "files.compact",
}
"""What no training step needs, by its module; imported when it is asked for: that is a third of the import's time."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{LATER[name]}")
    return module if name == LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})
