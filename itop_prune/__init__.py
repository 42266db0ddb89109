"""Dynamic sparse training for PyTorch: In-Time Over-Parameterization (ITOP) as a torch pruning method.

`apply` places the masks, `MaskScheduler` moves them. What differs between papers is a function of
plain tensors or plain numbers: see `itop_prune.criteria`, `.distributions`, `.redistribution`,
`.saliency`, `.schedules` and, for the algorithm itself, `.topology`, and `.patterns` for N:M.

To read the code in some twenty minutes, the head of each of these files and in it:

- `topology`: `prune_and_regrow`, the algorithm.
- `layer`: from `effective` to `_subclass`, a weight that is mask times parameter.
- `mask`: `ITOP`, from `place` to `weight`, one mask on one parameter.
- `scheduler`: `step`, `_update` and `_move`, when, and what becomes of weights and optimizer statistics.
- `turnover`: `counts`, how many weights leave and enter each layer; `update`: `exchange`, which.
- `criteria`: `magnitude`, `gradient` and `random`, functions whose parameters' names say what they are given.
- `exploration`: `note`, from which R_s comes, the share of weights that were ever active.
- `listening`: `Listener`, the dense gradient beside the sparse `.grad`; in `layer` its `_DenseBackward`.

What else is in these files serves that. The modules from `criteria` to `schedules` above are menus,
lists of small functions, read as they are needed. Of the others `placement` draws the first masks,
`budget` and `density` count, `ranks` keeps processes alike, and most check arguments. `files` and
`inference`, for after the training, are folders.
"""

from itop_prune import topology
from itop_prune.analysis.flops import FLOPs, flops
from itop_prune.analysis.summary import Summary, summarize
from itop_prune.files.small_files import save
from itop_prune.files.state_dicts import dense_state_dict, load
from itop_prune.inference.deployment import deploy
from itop_prune.initial_masks import apply
from itop_prune.layers.handle import ITOP, find_masks, remove
from itop_prune.methods import (
    criteria,
    distributions,
    patterns,
    redistribution,
    saliency,
    schedules,
)
from itop_prune.scheduler import MaskScheduler

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
