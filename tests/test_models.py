"""The papers' models that timm lacks: their sizes, found by name, and without weights that nobody has."""

import models
import pytest
import timm
import torch
from torch import nn

import itop_prune


def count(model: nn.Module, end: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(end))


def test_lenet300_has_784_300_100_10_units() -> None:
    model = timm.create_model("lenet300")
    weights = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    assert weights == {"layers.0.weight": (300, 784), "layers.1.weight": (100, 300), "head.weight": (10, 100)}
    assert count(model, "weight") == 266_200
    assert count(model, "bias") == 410


def test_lenet300_takes_another_size_of_images_and_number_of_classes() -> None:
    model = timm.create_model("lenet300", img_size=8, in_chans=3, num_classes=7)
    assert count(model, "weight") == 3 * 8 * 8 * 300 + 300 * 100 + 100 * 7
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert model.num_classes == 7


def test_lenet300_is_found_by_name() -> None:
    assert timm.is_model("lenet300")
    assert "lenet300" in timm.list_models("lenet*")
    assert isinstance(timm.create_model("lenet300"), models.MLP)


def test_lenet300_has_no_pretrained_weights_and_says_so() -> None:
    with pytest.raises(ValueError, match="lenet300 has no pretrained weights; leave out `pretrained`"):
        timm.create_model("lenet300", pretrained=True)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="width"):
        timm.create_model("lenet300", width=3)


def test_lenet300_is_three_maps_with_relu_between() -> None:
    torch.manual_seed(0)
    model = timm.create_model("lenet300", img_size=8)
    x = torch.randn(5, 1, 8, 8)
    first, second = model.layers
    hidden = torch.relu(second(torch.relu(first(x.reshape(5, 64)))))
    torch.testing.assert_close(model(x), model.head(hidden))
    torch.testing.assert_close(model.forward_features(x), hidden)
    assert (model.forward_features(x) >= 0).all()
    assert (model(x) < 0).any()


def test_lenet300_says_how_many_features_its_head_takes() -> None:
    model = timm.create_model("lenet300", img_size=8)
    assert model.num_features == model.head.in_features == 100


def test_apply_masks_all_three_maps() -> None:
    masks = itop_prune.apply(timm.create_model("lenet300"), 0.98)
    assert list(masks) == ["layers.0.weight", "layers.1.weight", "head.weight"]
    assert sum(int(itop.mask.sum()) for itop in masks.values()) == round(0.02 * 266_200)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar_resnet18", 11_220_132), ("cifar_resnet34", 21_328_292), ("cifar_resnet50", 23_705_252)],
)
def test_a_cifar_resnet_has_its_parameters_and_halves_the_image_three_times(name: str, parameters: int) -> None:
    model = timm.create_model(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_no_scale_of_a_cifar_resnet_starts_at_zero() -> None:
    model = timm.create_model("cifar_resnet18")
    assert all(m.weight.all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_every_convolution_of_a_cifar_resnet_and_its_classifier_are_masked() -> None:
    model = timm.create_model("cifar_resnet34", num_classes=100)
    masks = itop_prune.apply(model, 0.98)
    assert len(masks) == 37
    assert sum(itop.active for itop in masks.values()) == round(0.02 * 21_311_168)


def test_a_cifar_resnet_has_no_pretrained_weights_and_says_so() -> None:
    with pytest.raises(ValueError, match="cifar_resnet18 has no pretrained weights"):
        timm.create_model("cifar_resnet18", pretrained=True)
