"""LoRA over a sparse model: adapters train, the base stays sparse, a merge is right or refused.

Both orders of `apply` and `get_peft_model`, in both storages.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers.sparse_run import apply
from helpers.storages import both_storages
from helpers.toys import batch, convnet, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import itop_prune


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options})


def masked_first(model: nn.Module, config: peft.PeftConfig, sparsity: float = 0.5) -> nn.Module:
    apply(model, sparsity)
    return peft.get_peft_model(model, config)


def masked_last(model: nn.Module, config: peft.PeftConfig, sparsity: float = 0.5) -> nn.Module:
    model = peft.get_peft_model(model, config)
    apply(model, sparsity)
    return model


each_order = pytest.mark.parametrize("make", [masked_first, masked_last])


def train(model: nn.Module, steps: int = 3) -> None:
    """Train what is not frozen; adapters start as zero, so it takes more than a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for step in range(steps):
        x, y = batch(step, 20)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: itop.weight.clone() for name, itop in itop_prune.find_masks(model).items()}


@both_storages
@each_order
def test_adapters_train_and_the_sparse_base_stays_as_it_is(make: Callable) -> None:
    model, (x, _) = make(mlp(), lora()), batch(9, 20)
    names = list(itop_prune.find_masks(model))
    assert [name.removesuffix(".weight").split(".")[2:] for name in names] == [
        ["0", "base_layer"],
        ["2", "base_layer"],
        ["4"],
    ]
    active = sum(itop.active for itop in itop_prune.find_masks(model).values())
    assert active == 280

    before, outputs = weights(model), model(x)
    train(model)
    assert not torch.allclose(model(x), outputs)
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


CONFIGS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "loha": peft.LoHaConfig(r=2, target_modules=["0", "2"]),
    "ia3": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=[]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["0", "2"]),
    "gralora": peft.GraloraConfig(r=2, gralora_k=2, target_modules=["0", "2"]),
}
MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@both_storages
@each_order
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_merge_into_masked_weights_is_refused_and_right_after_remove(
    config: str, merge: str, make: Callable
) -> None:
    model, (x, _) = make(mlp(), CONFIGS[config]), batch(9, 20)
    train(model)
    expected, before = model.eval()(x), weights(model)
    with pytest.raises(RuntimeError, match=r"of PEFT writes .*lost\. Call itop_prune\.remove"):
        MERGES[merge](model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert torch.allclose(model(x), expected, atol=1e-5)

    itop_prune.remove(model)
    merged = MERGES[merge](model) or model
    assert torch.allclose(merged(x), expected, atol=1e-5)


@both_storages
def test_a_merged_adapter_is_not_taken_out_of_masked_weights() -> None:
    """Merged first and masked then: without the mask's zeros it could be taken out again."""
    model = peft.get_peft_model(mlp(), lora())
    train(model)
    model.merge_adapter()
    apply(model, 0.5)
    with pytest.raises(RuntimeError, match=r"unmerge\(\) of PEFT writes"):
        model.unmerge_adapter()


@both_storages
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_changes_the_base_is_refused_over_masks(init: str) -> None:
    model = mlp()
    apply(model, 0.5)
    with pytest.raises(RuntimeError, match=rf"{init}_init\(\) of PEFT writes .*apply after"):
        peft.get_peft_model(model, lora(init_lora_weights=init))


def test_kasa_is_refused_over_masks() -> None:
    model = mlp()
    apply(model, 0.5)
    with pytest.raises(RuntimeError, match=r"_truncate_base_weight\(\) of PEFT writes"):
        peft.get_peft_model(model, lora(kasa_config=peft.KasaConfig()))


def test_layers_that_are_trained_as_a_whole_are_masked_and_not_their_originals() -> None:
    model = peft.get_peft_model(mlp(), lora(modules_to_save=["4"]))
    names = [name.split(".", 3)[3] for name in itop_prune.apply(model, 0.5)]
    assert names == ["base_layer.weight", "base_layer.weight", "modules_to_save.default.weight"]


@both_storages
def test_convolutions_are_merged_likewise() -> None:
    model, (x, _) = convnet(), batch(0, 3, 8, 8)
    apply(model, 0.5)
    model = peft.get_peft_model(model.eval(), lora(target_modules=["0", "3"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = model.eval()(x)
    with pytest.raises(RuntimeError, match="masked Conv2d, where it would be lost"):
        model.merge_and_unload()
    itop_prune.remove(model)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-4)


@both_storages
def test_attention_whose_weight_peft_deletes_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    apply(model, 0.5)
    with pytest.raises(RuntimeError, match=r"in_proj_weight .* can't be assigned or deleted"):
        peft.get_peft_model(model, lora(target_modules=["attention"]))


@both_storages
def test_adapters_go_away_and_leave_the_sparse_base() -> None:
    model = masked_first(mlp(), lora())
    before = weights(model)
    train(model)
    base = model.unload()
    found = itop_prune.find_masks(base)
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    for itop, weight in zip(found.values(), before.values(), strict=True):
        assert torch.equal(itop.weight, weight)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's
@both_storages
@each_order
def test_a_llama_trains_its_adapters_and_is_merged(make: Callable) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    wanted = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = make(LlamaForCausalLM(config), wanted, 0.8)
    masks = itop_prune.find_masks(model)
    assert len(masks) == 2 * 7 + 1
    assert not any("lora" in name for name in masks)

    tokens = torch.arange(40).view(4, 10)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    expected = model.eval()(tokens).logits
    itop_prune.remove(model)
    assert torch.allclose(model.merge_and_unload()(tokens).logits, expected, atol=1e-4)
