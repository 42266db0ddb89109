"""Register the papers' models that timm lacks: `timm.create_model` finds them by name."""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .networks import MLP, VGG, WideResNet

VGG_C = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each block, which ends with a pooling; the third is 1 by 1."""


@register_model
def lenet300(*, img_size: int = 28, in_chans: int = 1, num_classes: int = 10, **given: Any) -> MLP:
    """LeNet-300-100 (LeCun et al., 1998): 784-300-100-10, 266,200 weights without biases."""
    _refuse_weights("lenet300", given)
    return MLP((300, 100), img_size, in_chans, num_classes, **given)


@register_model
def mlp1568(*, img_size: int = 28, in_chans: int = 1, num_classes: int = 10, **given: Any) -> MLP:
    """The MLP of Zhang et al., 2025, arXiv 2501.19107: 784-1568-1568-1568-10, 6,162,240 weights."""
    _refuse_weights("mlp1568", given)
    return MLP((1568, 1568, 1568), img_size, in_chans, num_classes, **given)


@register_model
def mlp_of(
    *,
    widths: Sequence[int] = (300, 100),
    img_size: int = 28,
    in_chans: int = 1,
    num_classes: int = 10,
    **given: Any,
) -> MLP:
    """An MLP of any hidden widths, also of a million: see `masks.device`."""
    _refuse_weights("mlp_of", given)
    return MLP(tuple(widths), img_size, in_chans, num_classes, **given)


@register_model
def cifar_mlp(*, img_size: int = 32, in_chans: int = 3, num_classes: int = 10, **given: Any) -> MLP:
    """The MLP for CIFAR-10 of Liu et al., 2021: 3,675,136 weights without biases."""
    _refuse_weights("cifar_mlp", given)
    return MLP((1024, 512), img_size, in_chans, num_classes, **given)


@register_model
def cifar_vgg_c(
    *, img_size: int = 32, in_chans: int = 3, num_classes: int = 10, **given: Any
) -> VGG:
    """VGG-C, the VGG-16 of Liu et al., 2021, for 32 by 32: 11,323,466 parameters, 10 classes."""
    _refuse_weights("cifar_vgg_c", given)
    return VGG(VGG_C, img_size, in_chans, num_classes, **given)


@register_model
def cifar_wrn22_2(
    *, in_chans: int = 3, num_classes: int = 10, drop_rate: float = 0.0, **given: Any
) -> WideResNet:
    """WRN-22-2 of Liu et al., 2021, for 32 by 32: 1,079,642 parameters, 10 classes."""
    _refuse_weights("cifar_wrn22_2", given)
    return WideResNet(22, 2, in_chans, num_classes, drop_rate, **given)


@register_model
def cifar_resnet18(**given: Any) -> ResNet:
    """ResNet-18 of Liu et al., 2021, for 32 by 32: 11,220,132 parameters, 100 classes."""
    return _cifar_resnet("cifar_resnet18", BasicBlock, (2, 2, 2, 2), given)


@register_model
def cifar_resnet34(**given: Any) -> ResNet:
    """ResNet-34 of Liu et al., 2021, for 32 by 32: 21,328,292 parameters, 100 classes."""
    return _cifar_resnet("cifar_resnet34", BasicBlock, (3, 4, 6, 3), given)


@register_model
def cifar_resnet50(**given: Any) -> ResNet:
    """ResNet-50 of Liu et al., 2021, for 32 by 32: 23,705,252 parameters, 100 classes."""
    return _cifar_resnet("cifar_resnet50", Bottleneck, (3, 4, 6, 3), given)


@register_model
def resnet50_fan_in(**given: Any) -> ResNet:
    """The ResNet-50 of timm, with convolutions drawn by their fan-in as in Liu et al., 2021.

    No scale starts at 0, unlike in timm's own: behind it every dense gradient would be 0.
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
    """Build timm's ResNet with a first convolution of 3 by 3, stride 1, and no pooling after it.

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
    """Drop the arguments about pretrained weights that timm passes to every model.

    Raises:
        ValueError: The recipe asks for pretrained weights.
    """
    if given.pop("pretrained", False):
        raise ValueError(f"{name} has no pretrained weights; leave out `pretrained`")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        given.pop(key, None)
