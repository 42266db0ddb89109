"""What a run costs in FLOPs, as shares of dense training."""

import torch
from torch import nn

import itop_prune
from itop_prune.layers.handle import active_weights


class Cost:
    """The cost of a model whose masks move: each operation by the weight that it reads, counted once."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        """Count the FLOPs of a forward.

        Raises:
            ValueError: The model can't be run on one image of this shape.
        """
        self._flops = itop_prune.flops(model, torch.zeros(1, *shape, device=device))
        self.forward = self.share(model)
        """Of a forward at the present masks, over that of the dense model."""

    def share(self, model: nn.Module) -> float:
        """Return the cost of a forward at the masks of a model, over that of the dense one."""
        masks = itop_prune.find_masks(model)
        densities = {
            name: active / masks[name].mask.numel()
            for name, active in active_weights(masks).items()
        }
        return self._flops.forward(densities) / max(1, self._flops.dense_forward)

    def step(self, listens: bool) -> float:
        """Return the cost of a training step at the present masks, over that of a dense one.

        Args: listens: Whether it computes the dense gradient of the weights, as growth by gradient
            asks for.
        """
        return self.forward + (1.0 - self.forward) / 3.0 if listens else self.forward
