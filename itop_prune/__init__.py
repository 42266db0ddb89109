"""Dynamic sparse training for PyTorch: In-Time Over-Parameterization (ITOP) as a pruning method.

`apply` places the masks and `MaskScheduler` moves them. Papers differ in functions of plain tensors
or plain numbers: `itop_prune.criteria`, `.distributions`, `.redistribution`, `.saliency`,
`.schedules`. The algorithm itself is `itop_prune.topology`, and `itop_prune.patterns` for N:M. The
README.md beside this file is a map of the code.
"""

from itop_prune import patterns, topology
from itop_prune.analysis.flops import FLOPs, flops
from itop_prune.analysis.summary import Summary, summarize
from itop_prune.files.small_files import save
from itop_prune.files.state_dicts import dense_state_dict, load
from itop_prune.inference.deployment import deploy
from itop_prune.initial_masks import apply, count_active
from itop_prune.layers.handle import ITOP, find_masks, remove
from itop_prune.layers.matrices import MASKABLE
from itop_prune.methods import criteria, distributions, redistribution, saliency, schedules
from itop_prune.methods.presets import preset
from itop_prune.scheduler import MaskScheduler

__version__ = "0.1.0"

__all__ = [
    "ITOP",
    "MASKABLE",
    "FLOPs",
    "MaskScheduler",
    "Summary",
    "apply",
    "count_active",
    "criteria",
    "dense_state_dict",
    "deploy",
    "distributions",
    "find_masks",
    "flops",
    "load",
    "patterns",
    "preset",
    "redistribution",
    "remove",
    "saliency",
    "save",
    "schedules",
    "summarize",
    "topology",
]
