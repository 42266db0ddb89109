"""Networks for small images that the papers train and timm lacks, with timm's interface."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """The interface of a timm model; subclasses add `forward_features`."""

    head: nn.Module
    """The last layer."""
    forward_features: Callable[[Tensor], Tensor]
    """Compute features of images [batch, in_chans, height, width]."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features

    def make_head(self, num_classes: int) -> nn.Module:
        """Make a last layer; the identity for 0 classes."""
        return nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer. `global_pool`, an option of timm's models, changes nothing."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = self.make_head(num_classes).to(like.device, like.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits [batch, num_classes] of features; `pre_logits` skips the last layer."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [batch, num_classes] of images [batch, in_chans, height, width]."""
        return self.forward_head(self.forward_features(x))


class MLP(Classifier):
    """Fully connected layers with ReLU between them, on flattened images."""

    def __init__(
        self, widths: tuple[int, ...], img_size: int, in_chans: int, num_classes: int
    ) -> None:
        super().__init__(widths[-1], num_classes)
        sizes = (in_chans * img_size * img_size, *widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = self.make_head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the activations of the last hidden layer, [batch, widths[-1]]."""
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class VGG(Classifier):
    """Blocks of convolutions with batch norm, and a classifier of three layers.

    As in the code of the paper's authors, 1 by 1 convolutions are padded by 1 too. So an image of
    32 by 32 becomes 2 by 2, and the classifier has 2048 inputs. It has batch norm, no dropout.
    """

    def __init__(
        self, blocks: tuple[tuple[int, ...], ...], img_size: int, in_chans: int, num_classes: int
    ) -> None:
        super().__init__(512, num_classes)
        layers: list[nn.Module] = []
        channels, size = in_chans, img_size
        for block in blocks:
            for index, width in enumerate(block):
                kernel = 1 if index == 2 else 3
                layers += [
                    nn.Conv2d(channels, width, kernel, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels, size = width, size + 3 - kernel
            layers.append(nn.MaxPool2d(2))
            size //= 2

        self.features = nn.Sequential(*layers)

        hidden: list[nn.Module] = []
        for inputs in (channels * size * size, 512):
            hidden += [nn.Linear(inputs, 512), nn.ReLU(inplace=True), nn.BatchNorm1d(512)]
        self.pre_logits = nn.Sequential(*hidden)

        self.head = self.make_head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute feature maps, [batch, 512, 2, 2] for images of 32 by 32."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits of feature maps; `pre_logits` gives the 512 inputs of the head."""
        return super().forward_head(self.pre_logits(x.flatten(1)), pre_logits)


class PreActivationBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, with a shortcut.

    The shortcut is a 1 by 1 convolution if the width changes.
    """

    def __init__(self, inputs: int, width: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shortcut plus the convolutions."""
        active = torch.relu(self.bn1(x))
        out = self.conv2(self.drop(torch.relu(self.bn2(self.conv1(active)))))
        return out + (self.shortcut(active) if self.shortcut else x)


class WideResNet(Classifier):
    """A wide ResNet for small images: Zagoruyko & Komodakis, 2016, arXiv 1605.07146."""

    def __init__(
        self, depth: int, widen: int, in_chans: int, num_classes: int, drop_rate: float
    ) -> None:
        super().__init__(64 * widen, num_classes)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)

        blocks: list[nn.Module] = []
        inputs = 16
        for group, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for index in range((depth - 4) // 6):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(PreActivationBlock(inputs, width, stride, drop_rate))
                inputs = width
        self.blocks = nn.Sequential(*blocks)

        self.norm = nn.BatchNorm2d(inputs)
        self.head = self.make_head(num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute feature maps, [batch, 64 * widen, 8, 8] for images of 32 by 32."""
        return torch.relu(self.norm(self.blocks(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits of feature maps; `pre_logits` gives their means."""
        return super().forward_head(x.mean((2, 3)), pre_logits)
