"""Models of transformers, from small configs: all matrices are masked, trained and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.storages import both_storages
from torch import nn

import itop_prune

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2}
TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, n_inner=48
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def mixtral(**options: Any) -> nn.Module:
    config = transformers.MixtralConfig(**EXPERTS, num_local_experts=4)
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def olmoe() -> nn.Module:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**EXPERTS, num_experts=4))


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **EXPERTS, num_experts=4, moe_intermediate_size=40, shared_expert_intermediate_size=24
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **EXPERTS, num_experts=4, moe_intermediate_size=40, head_dim=16
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss(**options: Any) -> nn.Module:
    config = transformers.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=16)
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **EXPERTS, num_local_experts=4, head_dim=16, intermediate_size_mlp=48, pad_token_id=0
    )
    return transformers.Llama4ForCausalLM(config)


# Of the first layer: shape, as distributions count it, outputs, and the dimension of the inputs.
GATE, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
LAYER = "transformer.h.0"
READ: dict[Callable[[], nn.Module], dict[str, tuple]] = {
    gpt2: {
        f"{LAYER}.attn.c_attn.weight": ((32, 96), (96, 32), 96, 0),
        f"{LAYER}.attn.c_proj.weight": ((32, 32), (32, 32), 32, 0),
        f"{LAYER}.mlp.c_fc.weight": ((32, 48), (48, 32), 48, 0),
        f"{LAYER}.mlp.c_proj.weight": ((48, 32), (32, 48), 32, 0),
    },
    llama: {"model.layers.0.mlp.down_proj.weight": ((32, 48), (32, 48), 32, 1)},
    mixtral: {
        GATE: ((4, 96, 32), (384, 32), 384, 2),
        DOWN: ((4, 32, 48), (128, 48), 128, 2),
    },
    olmoe: {
        GATE: ((4, 96, 32), (384, 32), 384, 2),
        DOWN: ((4, 32, 48), (128, 48), 128, 2),
    },
    qwen2_moe: {
        GATE: ((4, 80, 32), (320, 32), 320, 2),
        DOWN: ((4, 32, 40), (128, 40), 128, 2),
    },
    qwen3_moe: {
        GATE: ((4, 80, 32), (320, 32), 320, 2),
        DOWN: ((4, 32, 40), (128, 40), 128, 2),
    },
    gpt_oss: {
        GATE: ((4, 32, 96), (384, 32), 384, 1),
        DOWN: ((4, 48, 32), (128, 48), 128, 1),
    },
    llama4: {
        "model.layers.0.feed_forward.experts.gate_up_proj": ((4, 32, 96), (384, 32), 384, 1),
        "model.layers.0.feed_forward.experts.down_proj": ((4, 48, 32), (128, 48), 128, 1),
    },
}
MODELS = pytest.mark.parametrize("build", READ, ids=lambda build: build.__name__)
FIRST = (gpt2, mixtral)
MOST_SLOW = pytest.mark.parametrize(
    "build",
    [pytest.param(build, marks=() if build in FIRST else pytest.mark.slow) for build in READ],
    ids=[build.__name__ for build in READ],
)
TIED = {gpt2, llama}


def options(build: Callable[[], nn.Module]) -> dict[str, Any]:
    return {"exclude": "lm_head"} if build in TIED else {}


@MODELS
def test_all_matrices_but_routers_are_masked_and_read_as_they_are_stored(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    masks = itop_prune.apply(model, 0.8, **options(build))
    for name, expected in READ[build].items():
        itop = masks[name]
        found = (itop.shape, itop.kernel_shape, itop.outputs, itop.input_dim)
        assert found == expected, name
    assert itop_prune.summarize(model).masked_share > 0.99
    assert sum(itop.active for itop in masks.values()) == round(
        0.2 * sum(itop.size for itop in masks.values())
    )


def trained(build: Callable[[], nn.Module], storage: str, steps: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    masks = itop_prune.apply(model, 0.8, storage=storage, **options(build))
    first = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=9, every=2, grow="gradient")
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    assert regrow.updates == steps // 2
    for name in READ[build]:
        itop = masks[name]
        assert not torch.equal(itop.mask, first[name]), name
        assert itop.active == int(first[name].sum()), name
        assert not itop.weight[~itop.mask].any(), name
    return model.eval()


@both_storages
@MOST_SLOW
def test_masks_move_by_gradient_and_files_bring_them_back(
    build: Callable[[], nn.Module], storage: str, tmp_path: Path
) -> None:
    model = trained(build, storage)
    with torch.no_grad():
        expected = model(TOKENS).logits

    itop_prune.save(model, tmp_path / "sparse.safetensors")
    again = build()
    itop_prune.load(again, tmp_path / "sparse.safetensors")
    plain = build()
    plain.load_state_dict(itop_prune.dense_state_dict(model))
    deployed = itop_prune.deploy(model, (TOKENS,), choices=("dense",))
    for other in (again, plain, deployed):
        with torch.no_grad():
            found = other.eval()(TOKENS).logits
        assert torch.allclose(found, expected, atol=1e-6)
    assert list(itop_prune.find_masks(again)) == list(itop_prune.find_masks(model))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "fallback"])
@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_experts_are_masked_however_their_parent_reads_them(
    build: Callable[..., nn.Module], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if implementation == "fallback":  # of grouped_mm, for tensors that torch's own does not take
        can_use = "transformers.integrations.moe._can_use_grouped_mm"
        monkeypatch.setattr(can_use, lambda *tensors: False)
        implementation = "grouped_mm"
    model = build(experts_implementation=implementation)
    masks = itop_prune.apply(model, 0.8)
    twin = build(experts_implementation=implementation)
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    losses = [network(TOKENS, labels=TOKENS).loss for network in (model, twin)]
    assert torch.allclose(*losses)
    for loss in losses:
        loss.backward()
    for name in (GATE, DOWN):
        gradient, dense = masks[name].parameter.grad, twin.get_parameter(name).grad
        assert torch.allclose(gradient, dense * masks[name].mask, atol=1e-6)

    cost = itop_prune.flops(model, (TOKENS,))
    each = 2 * 2 * TOKENS.numel()  # two experts for each token, a multiply-add is 2
    assert cost.by_weight[GATE] == each * 32 * 96
    assert cost.by_weight[DOWN] == each * 48 * 32


def test_flops_of_gpt2_are_those_of_its_matrices() -> None:
    model = gpt2()
    itop_prune.apply(model, 0.8, exclude="lm_head")
    cost = itop_prune.flops(model, (TOKENS,))
    rows = TOKENS.numel()
    assert cost.by_weight == {
        name: 2 * rows * shape[0] * shape[1] for name, (shape, *_) in READ[gpt2].items()
    }


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_language_model_needs_three_lines_and_stays_tied(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    with pytest.warns(UserWarning, match=r"left dense, .*lm_head\.weight \(tied to .*exclude="):
        itop_prune.apply(model, 0.9)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    summary = itop_prune.summarize(model)
    assert (summary.masked_share, round(summary.overall_sparsity, 3)) == (1.0, 0.9)


def test_a_tied_vocabulary_may_be_resized_after_apply() -> None:
    model = llama()
    masks = itop_prune.apply(model, 0.8, exclude="lm_head")
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(TOKENS).logits.shape == (2, 8, 70)
    assert list(itop_prune.find_masks(model)) == list(masks)


@both_storages
def test_a_masked_head_that_is_resized_is_missed_at_the_next_update(storage: str) -> None:
    model = llama(tied=False)
    masks = itop_prune.apply(model, 0.8, storage=storage)
    model.resize_token_embeddings(70)
    assert itop_prune.find_masks(model).keys() == masks.keys() - {"lm_head.weight"}
    assert itop_prune.summarize(model).masked_share < 0.8

    optimizer = torch.optim.SGD([itop.parameter for itop in masks.values()], lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"lm_head\.weight got no gradient .*resize_token_embed"):
        regrow.step()
