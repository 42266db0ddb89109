"""Models of the papers that timm lacks, registered with timm: `timm.create_model` and recipes find them by name."""

from itertools import pairwise
from typing import Any

import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
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
def lenet300(*, img_size: int = 28, in_chans: int = 1, num_classes: int = 10, **given: Any) -> MLP:
    """LeNet-300-100 (LeCun et al., 1998): 784-300-100-10 at the default sizes, 266,200 weights without biases."""
    _refuse_weights("lenet300", given)
    return MLP((300, 100), img_size, in_chans, num_classes, **given)


@register_model
def cifar_resnet18(**given: Any) -> ResNet:
    """ResNet-18 for images of 32 by 32, as in Liu et al., 2021: 11,220,132 parameters with 100 classes."""
    return _cifar_resnet("cifar_resnet18", BasicBlock, (2, 2, 2, 2), given)


@register_model
def cifar_resnet34(**given: Any) -> ResNet:
    """ResNet-34 for images of 32 by 32, as in Liu et al., 2021: 21,328,292 parameters with 100 classes."""
    return _cifar_resnet("cifar_resnet34", BasicBlock, (3, 4, 6, 3), given)


@register_model
def cifar_resnet50(**given: Any) -> ResNet:
    """ResNet-50 for images of 32 by 32, as in Liu et al., 2021: 23,705,252 parameters with 100 classes."""
    return _cifar_resnet("cifar_resnet50", Bottleneck, (3, 4, 6, 3), given)


def _cifar_resnet(
    name: str, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], given: dict[str, Any]
) -> ResNet:
    """Build timm's ResNet with a first convolution of 3 by 3 and stride 1, and without the max-pooling after it.

    No scale starts at 0 as in timm's own: growth by gradient would hear nothing behind it.
    """
    _refuse_weights(name, given)
    model = ResNet(block, depths, **{"zero_init_last": False, **given})
    width = model.conv1.out_channels
    model.conv1 = nn.Conv2d(model.conv1.in_channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _refuse_weights(name: str, given: dict[str, Any]) -> None:
    """Take out what timm passes to each model, of which these have none.

    Raises:
        ValueError: Pretrained weights are asked for.
    """
    if given.pop("pretrained", False):
        raise ValueError(f"{name} has no pretrained weights; leave out `pretrained`")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        given.pop(key, None)
