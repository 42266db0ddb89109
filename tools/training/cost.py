"""Count the FLOPs of a run as shares of dense training."""

import torch
from torch import nn

import itop_prune
from itop_prune.layers.handle import active_weights


class Cost:
    """The FLOPs of a model whose masks move; each operation counts the weights it reads."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        """Count the FLOPs of a forward.

        Raises:
            ValueError: The model can't be run on one image of this shape.
        """
        self._flops = itop_prune.flops(model, torch.zeros(1, *shape, device=device))
        self.dense_forward = self._flops.dense_forward
        """FLOPs of a forward of one image through the dense model."""
        self.measure(model)

    def measure(self, model: nn.Module) -> None:
        """Set the share of a forward to that of the model's present masks."""
        masks = itop_prune.find_masks(model)
        densities = {
            name: active / masks[name].size for name, active in active_weights(masks).items()
        }
        self.forward = self._flops.forward(densities) / max(1, self.dense_forward)
        """FLOPs of a forward, divided by those of the dense model."""

    def step(self, dense_gradient: bool) -> float:
        """Compute the cost of a training step at the present masks, divided by a dense step.

        Args:
            dense_gradient: Whether the step computes the dense gradient of the weights.
        """
        if not dense_gradient:
            return self.forward

        return self.forward + (1.0 - self.forward) / 3.0
