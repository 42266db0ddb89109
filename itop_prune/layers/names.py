"""Names of what a mask adds to its layer; the first two are those of `torch.nn.utils.prune`."""


def parameter_name(name: str) -> str:
    """Name the parameter that the optimizer holds: "weight" -> "weight_orig"."""
    return f"{name}_orig"


def mask_name(name: str) -> str:
    """Name the bool buffer: "weight" -> "weight_mask"."""
    return f"{name}_mask"


def pattern_name(name: str) -> str:
    """Name the attribute with N and M of an N:M pattern: "weight" -> "weight_pattern"."""
    return f"{name}_pattern"


def dense_backward_name(name: str) -> str:
    """Name the switch that lets the backward pass the dense gradient."""
    return f"{name}_dense_backward"


def values_name(name: str) -> str:
    """Name the parameter of sparse storage: "weight" -> "weight_values"."""
    return f"{name}_values"


def positions_name(name: str) -> str:
    """Name the buffer of sparse storage: "weight" -> "weight_positions"."""
    return f"{name}_positions"


def shape_name(name: str) -> str:
    """Name the state dict's entry with the dense shape: "weight" -> "weight_shape"."""
    return f"{name}_shape"


def layout_name(name: str) -> str:
    """Name the attribute with the dense shape and memory format: "weight" -> "weight_layout"."""
    return f"{name}_layout"


def probe_name(name: str) -> str:
    """Name the tensor whose gradient is the dense gradient, in sparse storage."""
    return f"{name}_probe"
