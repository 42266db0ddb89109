"""Dynamic sparse training for PyTorch: In-Time Over-Parameterization (ITOP) as a torch pruning method.

`apply` places the masks, `MaskScheduler` moves them. What differs between papers is a function of plain tensors or
plain numbers: see `itop_prune.criteria`, `.distributions`, `.redistribution`, `.saliency`, `.schedules` and, for the
algorithm itself, `.topology`, and `.patterns` for N:M.

To read the code, begin with five files: `topology` (the algorithm), `layer` and `mask` (where it acts), `update` (what
happens at one) and `scheduler` (when). The menus above are lists of small functions, read as they are needed; all else
is checks, ranks and files.
"""

from typing import TYPE_CHECKING, Any

from itop_prune import criteria, distributions, patterns, redistribution, saliency, schedules, topology
from itop_prune.compact import save
from itop_prune.cost import FLOPs, flops
from itop_prune.mask import ITOP, find_masks, remove
from itop_prune.placement import apply
from itop_prune.report import Summary, summarize
from itop_prune.scheduler import MaskScheduler
from itop_prune.storage import dense_state_dict, load

if TYPE_CHECKING:
    from itop_prune.deployment import deploy

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


def __getattr__(name: str) -> Any:
    """Import `deploy` when it is asked for: training does without, and it takes a fifth of the time of the others."""
    if name != "deploy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from itop_prune.deployment import deploy

    return deploy
