"""Models of the papers that timm lacks, registered with timm: `timm.create_model` and recipes find them by name."""

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .networks import MLP, VGG, WideResNet

VGG_C = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each block; a pooling ends it. A third one is 1 by 1."""


@register_model
def lenet300(*, img_size: int = 28, in_chans: int = 1, num_classes: int = 10, **given: Any) -> MLP:
    """LeNet-300-100 (LeCun et al., 1998): 784-300-100-10 at the default sizes, 266,200 weights without biases."""
    _refuse_weights("lenet300", given)
    return MLP((300, 100), img_size, in_chans, num_classes, **given)


@register_model
def cifar_mlp(*, img_size: int = 32, in_chans: int = 3, num_classes: int = 10, **given: Any) -> MLP:
    """The MLP for CIFAR-10 of Liu et al., 2021: 3072-1024-512-10, 3,675,136 weights without biases."""
    _refuse_weights("cifar_mlp", given)
    return MLP((1024, 512), img_size, in_chans, num_classes, **given)


@register_model
def cifar_vgg_c(
    *, img_size: int = 32, in_chans: int = 3, num_classes: int = 10, **given: Any
) -> VGG:
    """VGG-C, the VGG-16 of Liu et al., 2021, for images of 32 by 32: 11,323,466 parameters with 10 classes."""
    _refuse_weights("cifar_vgg_c", given)
    return VGG(VGG_C, img_size, in_chans, num_classes, **given)


@register_model
def cifar_wrn22_2(
    *, in_chans: int = 3, num_classes: int = 10, drop_rate: float = 0.0, **given: Any
) -> WideResNet:
    """WRN-22-2, as in Liu et al., 2021, for images of 32 by 32: 1,079,642 parameters with 10 classes."""
    _refuse_weights("cifar_wrn22_2", given)
    return WideResNet(22, 2, in_chans, num_classes, drop_rate, **given)


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


@register_model
def resnet50_fan_in(**given: Any) -> ResNet:
    """ResNet-50 as timm has it, but convolutions drawn by their inputs, as Liu et al., 2021, train it on ImageNet.

    No scale starts at 0 as in timm's own: growth by gradient would hear nothing behind it.
    """
    _refuse_weights("resnet50_fan_in", given)
    model = ResNet(Bottleneck, (3, 4, 6, 3), **{"zero_init_last": False, **given})
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return model


def _cifar_resnet(
    name: str, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], given: dict[str, Any]
) -> ResNet:
    """Build timm's ResNet with a first convolution of 3 by 3 and stride 1, and without the max-pooling after it.

    No scale starts at 0 here either.
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
