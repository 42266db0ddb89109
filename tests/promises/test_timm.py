"""Small models of timm and torch where masks by hook go wrong: exact, copied, loaded, exported."""

import copy
import functools
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from itop_prune_tools.checks import exactness
from timm.layers.ml_decoder import TransformerDecoderLayerOptimal
from timm.utils import ModelEmaV2, ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.torch_version import TorchVersion
from torchvision.models.feature_extraction import create_feature_extractor

import itop_prune

# timm scripts functions and uses parts of torch that torch deprecates; nothing of ours warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)


class Encoder(nn.Module):
    """nn.TransformerEncoder with a head: attention, and torch's fast path in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.flatten(2)[:, :, :12]).mean(1))


def small(name: str, **keywords: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **keywords)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder()


ONES, WIDTHS = (1, 1, 1, 1), (16, 24, 32, 40)
SWIN = {"img_size": 64, "window_size": 4, "depths": (2, 1), "embed_dim": 24, "num_heads": (2, 4)}
COAT = {"img_size": 32, "embed_dims": (64,) * 4, "serial_depths": ONES, "parallel_depth": 1}
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
RESNET = functools.partial(small, "resnet18", layers=ONES, channels=WIDTHS)
VIT = functools.partial(small, "vit_tiny_patch16_224", img_size=32, **TINY)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "beit": (functools.partial(small, "beit_base_patch16_224", img_size=32, **TINY), 32),
    "beitv2": (functools.partial(small, "beitv2_base_patch16_224", img_size=32, **TINY), 32),
    "eva02": (functools.partial(small, "eva02_tiny_patch14_224", img_size=28, **TINY), 28),
    "swinv2": (functools.partial(small, "swinv2_tiny_window8_256", **SWIN), 64),
    "convnext": (functools.partial(small, "convnext_atto", depths=ONES, dims=WIDTHS), 32),
    "mobilenetv3": (functools.partial(small, "mobilenetv3_small_050"), 32),
    "coat": (functools.partial(small, "coat_tiny", **COAT), 32),
    "xcit": (functools.partial(small, "xcit_nano_12_p16_224", depth=1), 32),
    "convit": (
        functools.partial(small, "convit_tiny", img_size=32, depth=2, local_up_to_layer=1),
        32,
    ),
    "edgenext": (
        functools.partial(small, "edgenext_xx_small", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
        64,
    ),
    "resnet": (RESNET, 64),
    "vit": (VIT, 32),
    "nn.TransformerEncoder": (encoder, 8),
}


def images(size: int, seed: int = 0, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def awake(model: nn.Module) -> nn.Module:
    """Give every parameter a value: one that starts at 0 would hide what lies before it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.3)
    return model


def masked(
    name: str, sparsity: float = 0.5
) -> tuple[nn.Module, dict[str, itop_prune.ITOP], Tensor]:
    """A masked model of the table in evaluation (no dropout), and images for it."""
    build, size = MODELS[name]
    model = awake(build()).eval()
    return model, itop_prune.apply(model, sparsity, method="uniform"), images(size)


def twin_of(name: str, model: nn.Module) -> nn.Module:
    """The dense model with the masked model's weights."""
    twin = MODELS[name][0]().eval()
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    return twin


def assert_gradients_of_twin(
    model: nn.Module, twin: nn.Module, masks: dict[str, itop_prune.ITOP]
) -> None:
    pairs = zip(model.parameters(), twin.named_parameters(), strict=True)
    for parameter, (key, other) in pairs:
        expected = other.grad * masks[key].mask if key in masks else other.grad
        torch.testing.assert_close(parameter.grad, expected)


def train_a_little(model: nn.Module, size: int, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    regrow = itop_prune.MaskScheduler(
        itop_prune.find_masks(model), optimizer, total_steps=10, every=2, grow="gradient"
    )
    model.train()
    for step in range(steps):
        F.cross_entropy(model(images(size, step)), torch.tensor([0, 1])).backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    assert regrow.updates == steps // 2


# --- coverage and exactness ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_a_dense_twin_before_and_after_remove(
    name: str,
) -> None:
    model, masks, x = masked(name)
    twin, fresh = twin_of(name, model), MODELS[name][0]()
    assert len(masks) > 4
    with torch.no_grad():
        expected = twin(x)
        torch.testing.assert_close(model(x), expected)
    for one in (model, twin):
        one(x).square().sum().backward()
    assert_gradients_of_twin(model, twin, masks)
    assert [key for key, itop in masks.items() if not itop.parameter.grad.any()] == []

    itop_prune.remove(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    names = [key for key, _ in fresh.named_parameters()]
    assert [key for key, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in fresh.modules()]
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_reacts_to_a_change_of_every_masked_parameter(name: str) -> None:
    model, masks, x = masked(name)
    generator, unread = torch.Generator(), []
    with torch.no_grad():
        expected = model(x)
        for key, itop in masks.items():
            value = itop.parameter.clone()
            change = torch.rand(value.shape, generator=generator.manual_seed(2))
            itop.parameter.mul_(1.0 + change)
            if torch.equal(model(x), expected):
                unread.append(key)
            itop.parameter.copy_(value)
    assert unread == []


# coat calls its convolutions several times in a forward.
@pytest.mark.parametrize("name", ["coat", "beit", "resnet"])
def test_growth_by_gradient_sees_the_dense_gradient_of_a_twin(name: str) -> None:
    model, masks, x = masked(name)
    twin = twin_of(name, model)
    seen: list[Tensor] = []

    def grow(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=1, every=1, grow=grow)
    for one in (model, twin):
        one(x).square().sum().backward()
    optimizer.step()
    assert regrow.step()
    expected = [parameter.grad for key, parameter in twin.named_parameters() if key in masks]
    assert len(seen) == len(expected)
    for found, gradient in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_forward_features_computes_with_the_current_weights() -> None:
    for name in ("resnet", "vit"):
        model, masks, x = masked(name)
        with torch.no_grad():
            model.forward_features(x)
            for itop in masks.values():
                itop.parameter.mul_(2.0)
            twin = twin_of(name, model)
            assert torch.equal(model.forward_features(x), twin.forward_features(x))


@pytest.mark.parametrize("name", ["xcit", "convit", "edgenext", "beit", "swinv2"])
def test_a_model_moved_to_bfloat16_after_apply_runs_and_keeps_its_masks(name: str) -> None:
    model, masks, x = masked(name)
    before = {key: itop.mask.clone() for key, itop in masks.items()}
    model.to(torch.bfloat16)
    output = model(x.bfloat16())
    output.square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(torch.equal(itop.mask, before[key]) for key, itop in masks.items())


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(name: str) -> None:
    plain, _, x = masked(name)
    checkpointing, _, _ = masked(name)
    checkpointing.set_grad_checkpointing()
    for model in (plain.train(), checkpointing.train()):
        model(x).square().sum().backward()
    for one, other in zip(plain.parameters(), checkpointing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradient_checkpointing_grows_what_plain_training_grows() -> None:
    masks = []
    for checkpointing in (False, True):
        model, found, _ = masked("vit")
        model.set_grad_checkpointing(checkpointing)
        train_a_little(model, 32, steps=4)
        masks.append(found)
    assert all(torch.equal(itop.mask, masks[1][key].mask) for key, itop in masks[0].items())


def test_a_model_in_channels_last_trains_and_stays_so() -> None:
    model = RESNET().to(memory_format=torch.channels_last)
    masks = itop_prune.apply(model, 0.8)
    counts = {key: int(itop.mask.sum()) for key, itop in masks.items()}
    train_a_little(model, 32, steps=4)
    assert {key: int(itop.mask.sum()) for key, itop in masks.items()} == counts
    for itop in masks.values():
        if itop.mask.ndim == 4:
            assert itop.mask.is_contiguous(memory_format=torch.channels_last)
            assert itop.parameter.is_contiguous(memory_format=torch.channels_last)


def with_statistics(name: str) -> nn.Module:
    """A masked model whose batch norms are not 1 and 0 when they are fused into convolutions."""
    model = small(name)
    itop_prune.apply(model, 0.5, "uniform")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(0.0, 0.2, generator=generator)
        for step in range(2):
            model(images(32, step, count=4))
        for itop in itop_prune.find_masks(model).values():
            itop.parameter.mul_(1.1)  # no forward in between
    return model.eval()


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_a_fused_model_has_the_outputs_of_the_masked_one_and_its_zeros_are_counted(
    name: str,
) -> None:
    model = with_statistics(name)
    with torch.no_grad():
        fused = reparameterize_model(model)
        torch.testing.assert_close(fused(images(32)), model(images(32)), atol=1e-4, rtol=1e-4)
    zeros = sum(
        int((layer.weight == 0).sum()) for layer in fused.modules() if isinstance(layer, WEIGHTED)
    )
    summary = itop_prune.summarize(fused)
    assert summary.weights - summary.active == zeros > 0
    assert not all(row.masked for row in summary.rows)


WEIGHTED = (nn.Conv2d, nn.Linear)


def test_branches_fused_into_one_kernel_are_less_sparse_than_they_were() -> None:
    model = with_statistics("mobileone_s0")
    assert itop_prune.summarize(model).density == pytest.approx(0.5, abs=1e-3)
    assert itop_prune.summarize(reparameterize_model(model)).density > 0.8


# NextViT writes fused weights through `weight.data`, which a masked layer can't see.
def test_a_model_fused_after_remove_has_the_same_outputs_however_it_writes_its_weights() -> None:
    model = with_statistics("nextvit_small")
    with torch.no_grad():
        expected = model(images(32))
        wrong = reparameterize_model(model)(images(32))
        itop_prune.remove(model)
        torch.testing.assert_close(
            reparameterize_model(model)(images(32)), expected, atol=1e-4, rtol=1e-4
        )
    assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max()


# --- timm's own ways to use and to change a model ------------------------------------------------


def test_features_of_a_masked_backbone_are_those_of_its_dense_twin() -> None:
    keywords = {"window_size": 4, "img_size": 64, "depths": (2, 1), "embed_dim": 24}
    for name, more in (("resnet18", {}), ("swinv2_tiny_window8_256", keywords)):
        model, twin = (timm.create_model(name, features_only=True, **more).eval() for _ in range(2))
        masks = itop_prune.apply(model, 0.5)
        twin.load_state_dict(itop_prune.dense_state_dict(model))
        assert len(masks) > 5
        with torch.no_grad():
            for ours, theirs in zip(model(images(64)), twin(images(64)), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["resnet", "vit", "swinv2"])
def test_intermediates_of_a_masked_model_are_those_of_its_dense_twin(name: str) -> None:
    model, _, x = masked(name)
    twin = twin_of(name, model)
    with torch.no_grad():
        ours, theirs = (
            one.forward_intermediates(x, intermediates_only=True) for one in (model, twin)
        )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_extractor_traced_from_a_masked_model_shares_its_masks() -> None:
    model, masks, x = masked("resnet")
    extractor = create_feature_extractor(model, ["layer1", "fc"])
    assert list(itop_prune.find_masks(extractor)) == list(masks)
    with torch.no_grad():
        for itop in masks.values():
            itop.parameter.mul_(2.0)
        assert torch.equal(extractor(x)["fc"], model(x))


def replace_classifier(model: nn.Module) -> list[str]:
    model.reset_classifier(4)
    return ["head.weight"]


def replace_patches(model: nn.Module) -> list[str]:
    model.set_input_size(patch_size=8)
    return ["patch_embed.proj.weight"]


def two_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, regrow: itop_prune.MaskScheduler
) -> None:
    for step in range(2):
        model(images(32, step)).square().sum().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("replace", [replace_classifier, replace_patches])
def test_a_layer_replaced_after_apply_is_named_at_the_next_update_with_what_to_do(
    replace: Callable[[nn.Module], list[str]], grow: str
) -> None:
    model = VIT()
    masks = itop_prune.apply(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=2, grow=grow)
    replaced = replace(model)
    with pytest.warns(
        UserWarning, match=rf"{replaced[0]} got no gradient .*find_masks\(model\)"
    ) as caught:
        two_steps(model, optimizer, regrow)
    assert len(caught) == 1
    assert set(masks) - set(itop_prune.find_masks(model)) == set(replaced)

    itop_prune.apply(model, 0.5, include=replaced)  # as the warning says
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(
        itop_prune.find_masks(model), optimizer, total_steps=10, every=2, grow=grow
    )
    train_a_little(model, 32)
    assert set(itop_prune.find_masks(model)) == set(masks)


def test_an_input_of_another_size_leaves_all_masks() -> None:
    model = VIT()
    masks = itop_prune.apply(model, 0.5)
    model.set_input_size(img_size=64)
    assert list(itop_prune.find_masks(model)) == list(masks)
    train_a_little(model, 64)


# --- weights read in places off the common path --------------------------------------------------


# timm's ML-Decoder head does not run with present torch, masked or dense; this is its layer.
def test_the_layer_of_the_decoder_head_reads_its_attention_through_the_masks() -> None:
    torch.manual_seed(0)
    layer = TransformerDecoderLayerOptimal(12, 2, 24, dropout=0.0)
    twin = copy.deepcopy(layer)
    masks = itop_prune.apply(layer, 0.5)
    twin.load_state_dict(itop_prune.dense_state_dict(layer))
    assert "multihead_attn.in_proj_weight" in masks
    queries, memory = (
        torch.randn(count, 2, 12, generator=torch.Generator().manual_seed(count))
        for count in (3, 5)
    )
    for one in (layer, twin):
        one(queries, memory).square().sum().backward()
    assert_gradients_of_twin(layer, twin, masks)


def test_naflex_patches_of_another_size_are_made_of_the_masked_weights() -> None:
    keywords = {"depth": 1, "embed_dim": 48, "num_heads": 3, "enable_patch_interpolator": True}
    model, twin = (small("naflexvit_base_patch16_gap", **keywords).eval() for _ in range(2))
    masks = itop_prune.apply(model, 0.5)
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    patches = torch.randn(
        2, 16, 8, 8, 3, generator=torch.Generator().manual_seed(1)
    )  # the model's own are 16 x 16
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    coordinates = torch.stack([rows, columns], -1).view(1, 16, 2).expand(2, -1, -1)
    outputs = [
        one(patches, coordinates, torch.ones(2, 16, dtype=torch.bool)) for one in (model, twin)
    ]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    itop = masks["embeds.proj.weight"]
    torch.testing.assert_close(itop.parameter.grad, twin.embeds.proj.weight.grad * itop.mask)


# --- models that are not timm's ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_v2_t", "vit_b_16", "googlenet", "fcn_resnet50", "r3d_18"]
)
def test_models_of_torchvision_are_covered(name: str) -> None:
    found = exactness.count_masks(f"torchvision/{name}")
    assert not found.wrong
    assert not found.refused
    assert found.covered > 0.98


def test_a_decoder_of_torch_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(12, 2, 1, 1, 24, dropout=0.0, batch_first=True)
    twin = copy.deepcopy(model)
    masks = itop_prune.apply(model, 0.5)
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    source, target = (
        torch.randn(2, length, 12, generator=torch.Generator().manual_seed(1)) for length in (5, 3)
    )
    for one in (model, twin):
        one(source, target).square().sum().backward()
    assert_gradients_of_twin(model, twin, masks)


# --- exports -------------------------------------------------------------------------------------

RECOMPUTED = {
    "nfnet": functools.partial(small, "test_nfnet"),
    "condconv": functools.partial(small, "efficientnet_cc_b0_4e"),
    "sequencer": functools.partial(
        small, "sequencer2d_s", layers=ONES, embed_dims=(24, 24, 48, 48)
    ),
}
EXPORTED = [
    "resnet",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("vit", "swinv2", "coat", "convnext", *RECOMPUTED)
    ),
]


def masked_for_export(name: str) -> tuple[nn.Module, dict[str, itop_prune.ITOP], Tensor]:
    if name not in RECOMPUTED:
        return masked(name)
    model = RECOMPUTED[name]().eval()
    return model, itop_prune.apply(model, 0.5, method="uniform"), images(64)


@pytest.mark.parametrize("name", [*EXPORTED, pytest.param("beit", marks=pytest.mark.slow)])
def test_torch_export_of_a_masked_model_computes_the_same(name: str) -> None:
    model, masks, x = masked_for_export(name)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert len([key for key in exported.state_dict if key.endswith("_mask")]) >= len(masks)


# BEiT is not exported by torch to ONNX, masked or dense.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("removed", [False, True], ids=["masked", "removed"])
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_export_of_a_masked_model_computes_the_same(
    name: str, removed: bool, tmp_path: Path
) -> None:
    if not removed and TorchVersion(torch.__version__) < (2, 15):
        pytest.skip("torch 2.10 does not export a product with bools to ONNX; 2.15 is known to")
    model, _, x = masked_for_export(name)
    expected = model(x).detach()
    if removed:
        itop_prune.remove(model)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-4, rtol=1e-4)


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "beit"])
def test_a_copy_of_a_trained_model_is_equal_and_independent(name: str) -> None:
    model, _, x = masked(name)
    train_a_little(model, x.shape[-1])
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = duplicate(model.eval())
        expected = other(x)
        assert torch.equal(model(x), expected)
        train_a_little(model, x.shape[-1])
        assert torch.equal(other(x), expected)
        assert not torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("name", ["resnet", "vit", "beit"])
def test_model_ema_v3_has_the_masks_of_the_model_and_averages_its_weights(name: str) -> None:
    model, masks, x = masked(name)
    train_a_little(model, x.shape[-1])
    ema = ModelEmaV3(model, decay=0.9)
    old = {key: itop.parameter.detach().clone() for key, itop in masks.items()}
    train_a_little(model, x.shape[-1], steps=4)
    trained = {key: itop.parameter.detach().clone() for key, itop in masks.items()}
    ema.update(model)
    averaged = itop_prune.find_masks(ema.module)
    assert list(averaged) == list(masks)
    for key, itop in averaged.items():
        assert itop.mask.dtype == torch.bool
        assert torch.equal(itop.mask, masks[key].mask)
        torch.testing.assert_close(itop.parameter.detach(), 0.9 * old[key] + 0.1 * trained[key])
        assert torch.equal(masks[key].parameter, trained[key])
    assert ema.module(x).isfinite().all()


def test_model_ema_v2_averages_masks_into_their_union_and_is_not_supported() -> None:
    model, masks, _ = masked("resnet")
    ema = ModelEmaV2(model, decay=0.9)
    before = {key: itop.mask.clone() for key, itop in masks.items()}
    train_a_little(model, 64, steps=4)
    ema.update(model)
    for key, itop in itop_prune.find_masks(ema.module).items():
        assert torch.equal(itop.mask, before[key] | masks[key].mask)
    assert itop_prune.summarize(ema.module).active > itop_prune.summarize(model).active


def test_averaging_of_buffers_by_torch_can_not_take_masks() -> None:
    model, _, _ = masked("resnet")
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    with pytest.raises((NotImplementedError, RuntimeError), match="bool"):
        averaged.update_parameters(model)


def answer(model: nn.Module, x: Tensor, pipe: Connection) -> None:
    """In a spawned process: the output, and whether what arrived is a model that is pruned."""
    torch.set_num_threads(1)
    with torch.no_grad():
        pipe.send((model(x).numpy(), prune.is_pruned(model), list(itop_prune.find_masks(model))))


@pytest.mark.slow
def test_a_model_reaches_a_spawned_process_with_its_masks() -> None:
    model, masks, x = masked("vit")
    train_a_little(model, 32)
    model.eval()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(model, x, there))
    process.start()
    assert here.poll(120)
    output, pruned, names = here.recv()
    process.join()
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach())
    assert pruned
    assert names == list(masks)


# --- dense weights in and out --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "coat"])
def test_dense_weights_load_strictly_into_a_masked_model_and_its_masks_stay(name: str) -> None:
    model, masks, x = masked(name)
    before = {key: itop.mask.clone() for key, itop in masks.items()}
    torch.manual_seed(5)
    dense = awake(MODELS[name][0]()).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(dense.state_dict(), strict=True)
    parameters = dict(dense.named_parameters())
    for key, itop in masks.items():
        assert torch.equal(itop.mask, before[key])
        assert torch.equal(itop.parameter, parameters[key] * before[key])
        parameters[key].data.mul_(before[key])
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("name", ["resnet", "vit", "coat"])
def test_dense_state_dict_has_the_names_and_order_of_a_plain_model(name: str) -> None:
    model, _, _ = masked(name)
    assert list(itop_prune.dense_state_dict(model)) == list(MODELS[name][0]().state_dict())
