"""Models of the papers that timm lacks, registered with timm: `timm.create_model` and recipes find them by name."""

from itertools import pairwise

import torch
from timm.models import register_model
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, on flattened images; with what timm asks of a model."""

    def __init__(self, widths: tuple[int, ...], img_size: int, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = widths[-1]
        sizes = (in_chans * img_size * img_size, *widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the activations of the last hidden layer, [batch, widths[-1]]."""
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [batch, num_classes], of images [batch, in_chans, img_size, img_size]."""
        return self.head(self.forward_features(x))


@register_model
def lenet300(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    *,
    img_size: int = 28,
    in_chans: int = 1,
    num_classes: int = 10,
) -> MLP:
    """LeNet-300-100 (LeCun et al., 1998): 784-300-100-10 at the default sizes, 266,200 weights without biases."""
    if pretrained:
        raise ValueError("lenet300 has no pretrained weights; leave out `pretrained`")
    return MLP((300, 100), img_size, in_chans, num_classes)
