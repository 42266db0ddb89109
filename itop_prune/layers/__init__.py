"""What a masked layer is: which layers can have a mask, how it is attached, the dense gradient."""

from itop_prune.layers.masked_layer import STANDARDIZED

__all__ = ["STANDARDIZED"]
