"""The papers' models that timm lacks: their sizes, their names, and no pretrained weights."""

import inspect

import pytest
import timm
import torch
from itop_prune_tools.models import registration as models
from torch import nn

import itop_prune

OURS = timm.list_models(module="registration")
SMALL = [name for name in OURS if name != "resnet50_fan_in"]


def image(name: str, *shape: int) -> torch.Tensor:
    """Blank images of the shape that a model takes by default, or of this one."""
    default = (1, 28, 28) if name in ("lenet300", "mlp1568", "mlp_of") else (3, 32, 32)
    return torch.zeros(2, *(shape or default))


def count(model: nn.Module, end: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(end))


def test_lenet300_has_784_300_100_10_units() -> None:
    model = timm.create_model("lenet300")
    weights = {
        name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")
    }
    assert weights == {
        "layers.0.weight": (300, 784),
        "layers.1.weight": (100, 300),
        "head.weight": (10, 100),
    }
    assert count(model, "weight") == 266_200
    assert count(model, "bias") == 410


def test_mlp1568_has_three_hidden_layers_of_1568_units() -> None:
    model = timm.create_model("mlp1568")
    assert [tuple(layer.weight.shape) for layer in model.layers] == [
        (1568, 784),
        (1568, 1568),
        (1568, 1568),
    ]
    assert count(model, "weight") == 6_162_240


def test_lenet300_takes_another_size_of_images_and_number_of_classes() -> None:
    model = timm.create_model("lenet300", img_size=8, in_chans=3, num_classes=7)
    assert count(model, "weight") == 3 * 8 * 8 * 300 + 300 * 100 + 100 * 7
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert model.num_classes == 7


def test_lenet300_is_found_by_name() -> None:
    assert timm.is_model("lenet300")
    assert "lenet300" in timm.list_models("lenet*")
    assert isinstance(timm.create_model("lenet300"), models.MLP)


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
    [
        ("cifar_resnet18", 11_220_132),
        ("cifar_resnet34", 21_328_292),
        ("cifar_resnet50", 23_705_252),
    ],
)
def test_a_cifar_resnet_has_its_parameters_and_halves_the_image_three_times(
    name: str, parameters: int
) -> None:
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


# Numbers of parameters, by hand: out * in * kernel for a convolution, out * in for a map, out for
# a bias, 2 * out for batch norm.


def test_the_mlp_for_cifar_has_3072_1024_512_10_units() -> None:
    model = timm.create_model("cifar_mlp")
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [
        (1024, 3072),
        (512, 1024),
        (10, 512),
    ]
    assert count(model, "weight") == 3072 * 1024 + 1024 * 512 + 512 * 10 == 3_675_136
    assert count(model, "bias") == 1024 + 512 + 10
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


def test_vgg_c_has_16_layers_with_a_third_convolution_of_1_by_1() -> None:
    model = timm.create_model("cifar_vgg_c")
    convolutions = [
        (64, 3, 3),
        (64, 64, 3),
        (128, 64, 3),
        (128, 128, 3),
    ]  # out, in, side of the kernel
    convolutions += [(256, 128, 3), (256, 256, 3), (256, 256, 1)]
    convolutions += [
        (512, 256, 3),
        (512, 512, 3),
        (512, 512, 1),
        (512, 512, 3),
        (512, 512, 3),
        (512, 512, 1),
    ]
    maps = [(512, 2048), (512, 512), (10, 512)]
    shapes = [(out, inputs, side, side) for out, inputs, side in convolutions] + maps
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == shapes
    weights = (
        sum(out * inputs * side**2 for out, inputs, side in convolutions)
        + 2048 * 512
        + 512 * 512
        + 512 * 10
    )
    others = (
        3 * sum(out for out, *_ in convolutions) + 3 * 512 + 3 * 512 + 10
    )  # a bias, a scale and a shift each
    assert weights == 11_307_712
    assert sum(p.numel() for p in model.parameters()) == weights + others == 11_323_466


def test_vgg_c_ends_an_image_of_32_by_32_as_2_by_2() -> None:
    """Each third convolution has a border: 32, 16, 8 + 2, 5 + 2, 3 + 2, each halved."""
    model = timm.create_model("cifar_vgg_c").eval()
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (2, 512)


def test_wrn_22_2_has_three_groups_of_three_blocks_of_two_convolutions() -> None:
    model = timm.create_model("cifar_wrn22_2")
    expected = 3 * 16 * 9
    for inputs, width in ((16, 32), (32, 64), (64, 128)):
        expected += (
            2 * inputs + inputs * width * 9 + 2 * width + width * width * 9 + inputs * width
        )  # with its shortcut
        expected += 2 * (2 * width + width * width * 9 + 2 * width + width * width * 9)
    expected += 2 * 128 + 128 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected == 1_079_642
    depth = (
        sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) + 3
    )  # three shortcuts
    assert depth == 22
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 128, 8, 8)


def test_a_block_of_wrn_activates_before_it_convolves_and_adds_what_came_in() -> None:
    torch.manual_seed(0)
    first, second = timm.create_model("cifar_wrn22_2").eval().blocks[:2]
    x = torch.randn(2, 16, 8, 8)
    active = torch.relu(first.bn1(x))
    out = first.conv2(torch.relu(first.bn2(first.conv1(active)))) + first.shortcut(active)
    torch.testing.assert_close(first(x), out)
    assert second.shortcut is None
    torch.testing.assert_close(
        second(out) - second.conv2(torch.relu(second.bn2(second.conv1(second.bn1(out).relu())))),
        out,
    )


def test_the_dropout_of_wrn_is_an_option() -> None:
    rates = [
        m.p
        for m in timm.create_model("cifar_wrn22_2", drop_rate=0.3).modules()
        if isinstance(m, nn.Dropout)
    ]
    assert rates == [0.3] * 9
    assert not any(
        m.p for m in timm.create_model("cifar_wrn22_2").modules() if isinstance(m, nn.Dropout)
    )


def test_the_resnet50_of_the_paper_is_timm_s_drawn_by_its_inputs() -> None:
    torch.manual_seed(0)
    ours, theirs = timm.create_model("resnet50_fan_in"), timm.create_model("resnet50")
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    for name in ("conv1", "layer1.0.conv2", "layer4.0.downsample.0"):
        layer = ours.get_submodule(name)
        inputs = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.05)
    assert all(m.weight.all() for m in ours.modules() if isinstance(m, nn.BatchNorm2d))


# What timm asks of every model


def test_every_model_of_the_file_is_found_by_its_name() -> None:
    made = {
        name
        for name, f in vars(models).items()
        if inspect.isfunction(f) and f.__module__ == models.__name__
    }
    assert set(OURS) == {name for name in made if not name.startswith("_")}
    assert len(OURS) >= 8


@pytest.mark.parametrize("name", SMALL)
def test_a_forward_is_its_features_and_its_head(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn_like(image(name))
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model(x), model.get_classifier()(before))


@pytest.mark.parametrize("name", SMALL)
def test_the_classifier_can_be_another_or_none(name: str) -> None:
    model = timm.create_model(name, num_classes=7).double().eval()
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(image(name).double()).shape == (2, 5)
    model.reset_classifier(0)
    assert model(image(name).double()).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", SMALL)
def test_images_may_have_another_number_of_channels(name: str) -> None:
    channels = 2
    model = timm.create_model(name, in_chans=channels).eval()
    size = image(name).shape[-1]
    assert model(image(name, channels, size, size)).shape[0] == 2


@pytest.mark.parametrize("name", OURS)
def test_no_model_has_pretrained_weights_and_each_says_so(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"{name} has no pretrained weights; leave out `pretrained`"
    ):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", OURS)
def test_every_matrix_of_a_model_is_masked(name: str) -> None:
    model = timm.create_model(name)
    weights = {key: p.numel() for key, p in model.named_parameters() if p.dim() > 1}
    masks = itop_prune.apply(model, 0.9)
    assert list(masks) == list(weights)
    assert sum(itop.active for itop in masks.values()) == round(0.1 * sum(weights.values()))
