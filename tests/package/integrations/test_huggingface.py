"""The callback in the real Trainer of transformers, on small models without downloads."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from helpers.processes import finished, gloo, start
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import itop_prune
from itop_prune.integrations.huggingface import SparseTrainingCallback

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
ARGUMENTS = {"sparsity": 0.8, "every": 2, "grow": "gradient"}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts, intermediate_size=64))


def rows(model: nn.Module, count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Token rows; the label is a class for BERT, and the row itself for language models."""
    tokens = torch.randint(50, (count, 8), generator=torch.Generator().manual_seed(0))
    of_classes = any(isinstance(part, BertForSequenceClassification) for part in model.modules())
    return [{"input_ids": row, "labels": row[0] % 2 if of_classes else row} for row in tokens]


class StopAt(TrainerCallback):
    """Ends training early, as an interruption after a checkpoint does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    model: Callable[[], nn.Module] | nn.Module = bert,
    **settings: Any,
) -> Trainer:
    """A Trainer of 8 optimizer steps of 2 micro-batches in bf16, with a checkpoint at 4 and 8."""
    built = model if isinstance(model, nn.Module) else model()
    defaults = {
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "save_steps": 4,
        "logging_steps": 2,
        "bf16": True,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    return Trainer(built, arguments, train_dataset=rows(built), callbacks=list(callbacks))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two nested dicts hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let sparse layers compute with their dense weight, since kernels compile for long."""
    monkeypatch.setattr("itop_prune.kernels.runtime.uses_kernels", lambda shape, active: False)
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["mask", "sparse"])
@pytest.mark.parametrize("model", [bert, llama, gpt2, mixtral])
def test_a_model_trains_sparse_and_leaves_a_dense_copy(
    model: Callable[[], nn.Module], storage: str, tmp_path: Path
) -> None:
    arguments = {**ARGUMENTS, "storage": storage}
    if model is not bert:  # heads of language models may be tied to the embedding
        arguments["exclude"] = "lm_head"
    callback = SparseTrainingCallback(**arguments)
    run = trainer(tmp_path, callback, model=model)
    start = {name: itop.mask.clone() for name, itop in callback.masks.items()}
    run.train()

    assert callback.scheduler.updates == 4
    assert callback.scheduler.state_dict()["step"] == 8
    total = sum(itop.size for itop in callback.masks.values())
    assert itop_prune.summarize(run.model).active == round(0.2 * total)
    assert any(not itop.mask.equal(start[name]) for name, itop in callback.masks.items())

    dense = type(run.model).from_pretrained(tmp_path / "dense")
    wanted = itop_prune.dense_state_dict(run.model)
    assert same(dict(dense.state_dict()), dict(wanted))
    assert itop_prune.find_masks(dense) == {}


@pytest.mark.parametrize(("storage", "micro_batches"), [("mask", 2), ("sparse", 1)])
def test_the_trainer_moves_masks_as_the_loop_of_the_readme_does(
    storage: str, micro_batches: int, tmp_path: Path
) -> None:
    """Once in an optimizer step, by the gradient of all its micro-batches."""
    settings = {
        "gradient_accumulation_steps": micro_batches,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    config = BertConfig(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    twin = BertForSequenceClassification(config)
    twin.load_state_dict(model.state_dict())
    callback = SparseTrainingCallback(**ARGUMENTS, storage=storage)
    trainer(tmp_path, callback, model=model, **settings).train()

    masks = itop_prune.apply(twin, 0.8, storage=storage)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=5e-5, weight_decay=0.0)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=8, every=2, grow="gradient")
    data = rows(twin)
    twin.train()
    for step in range(8):
        for part in range(micro_batches):
            first = 8 * (micro_batches * step + part) % 64
            batch = data[first : first + 8]
            tokens = torch.stack([row["input_ids"] for row in batch])
            labels = torch.stack([row["labels"] for row in batch])
            twin(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()

    assert regrow.updates == callback.scheduler.updates == 4
    assert all(itop.mask.equal(callback.masks[name].mask) for name, itop in masks.items())


def test_a_step_that_a_scaler_skipped_is_not_counted(tmp_path: Path) -> None:
    callback = SparseTrainingCallback(**ARGUMENTS)
    run = trainer(tmp_path, callback, max_steps=2, save_strategy="no")
    run.train()
    skipped = SimpleNamespace(step_was_skipped=True)
    callback.on_optimizer_step(run.args, run.state, run.control, optimizer=skipped)
    assert callback.scheduler.state_dict()["step"] == 2


def test_logs_of_the_loss_hold_sparsity_and_r_s_also_for_callbacks_behind(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **others: Any) -> None:
            seen.append(dict(logs))

    callback = SparseTrainingCallback(**ARGUMENTS)
    run = trainer(tmp_path, callback, Tracker(), save_strategy="no")
    run.train()

    losses = [line for line in run.state.log_history if "loss" in line]
    assert len(losses) == 4
    for lines in (losses, [line for line in seen if "loss" in line]):
        assert [line["sparsity"] for line in lines] == pytest.approx([0.8] * 4)
        explored = [line["R_s"] for line in lines]
        assert explored == sorted(explored)
        assert explored[-1] == callback.scheduler.exploration_rate() > 0.2


def test_a_model_that_has_masks_keeps_them(tmp_path: Path) -> None:
    model = bert()
    masks = itop_prune.apply(model, 0.9, include="bert.encoder.*")
    callback = SparseTrainingCallback(every=2)
    run = trainer(tmp_path, callback, model=model, save_strategy="no")
    run.train()
    assert callback.masks == masks
    assert callback.scheduler.updates == 4


ON_A_RANK = """
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from itop_prune.integrations.huggingface import SparseTrainingCallback

folder, storage = sys.argv[1:]
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64))
tokens = torch.randint(50, (64, 8), generator=torch.Generator().manual_seed(0))
arguments = TrainingArguments(folder, max_steps=4, save_steps=4, use_cpu=True, report_to=[])
callback = SparseTrainingCallback(
    sparsity=0.8, every=2, grow="gradient", check_ranks=True, storage=storage
)
run = Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row, "labels": row[0] % 2} for row in tokens],
    callbacks=[callback],
)
run.train()
assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
assert callback.scheduler.updates == 2
torch.save(model.state_dict(), f"{folder}/rank{arguments.process_index}.pt")
"""


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_two_ranks_hold_the_same_model(storage: str, tmp_path: Path) -> None:
    script, folder = tmp_path / "on_a_rank.py", tmp_path / "out"
    script.write_text(ON_A_RANK)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished(start([*launcher, str(script), str(folder), storage]))

    one, other = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(dict(one), dict(other))
    assert (folder / "checkpoint-4" / "mask_scheduler.pt").exists()
    BertForSequenceClassification.from_pretrained(folder / "dense")


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(
    storage: str, tmp_path: Path
) -> None:
    arguments = {**ARGUMENTS, "storage": storage, "gradient_steps": 2, "every": 3}
    whole, callback = trainer(tmp_path / "whole", SparseTrainingCallback(**arguments)), None
    whole.train()

    trainer(tmp_path / "parts", SparseTrainingCallback(**arguments), StopAt(4)).train()
    callback = SparseTrainingCallback(**arguments)
    resumed = trainer(tmp_path / "parts", callback)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 8
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    (first,) = [it for it in whole.callback_handler.callbacks if type(it) is type(callback)]
    assert same(callback.scheduler.state_dict(), first.scheduler.state_dict())
    assert callback.scheduler.updates == 2


@pytest.mark.slow
def test_the_folder_to_resume_from_may_lie_elsewhere_if_it_is_named(tmp_path: Path) -> None:
    trainer(tmp_path / "one", SparseTrainingCallback(**ARGUMENTS), StopAt(4)).train()
    moved = shutil.move(tmp_path / "one" / "checkpoint-4", tmp_path / "moved")

    unnamed = trainer(tmp_path / "two", SparseTrainingCallback(**ARGUMENTS))
    with pytest.raises(ValueError, match=r"no mask_scheduler\.pt.*resume_from_checkpoint"):
        unnamed.train(resume_from_checkpoint=str(moved))

    callback = SparseTrainingCallback(**ARGUMENTS)
    named = trainer(tmp_path / "two", callback, resume_from_checkpoint=str(moved))
    named.train(resume_from_checkpoint=str(moved))
    assert callback.scheduler.updates == 4


@pytest.mark.slow
def test_a_folder_that_is_named_and_not_resumed_from_is_passed_over(tmp_path: Path) -> None:
    trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS)).train()
    named = str(tmp_path / "checkpoint-4")
    callback = SparseTrainingCallback(**ARGUMENTS)
    run = trainer(tmp_path, callback, resume_from_checkpoint=named)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert callback.scheduler.state_dict()["step"] == 8


def test_a_search_over_hyperparameters_is_refused(tmp_path: Path) -> None:
    callback = SparseTrainingCallback(**ARGUMENTS)
    run = trainer(tmp_path, callback)
    run.state.is_hyper_param_search = True
    with pytest.raises(ValueError, match=r"searches hyperparameters.*Trainer and a callback of"):
        callback.on_train_begin(run.args, run.state, run.control, run.model, run.optimizer)


@pytest.mark.slow
def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        callback = SparseTrainingCallback(**ARGUMENTS, seed=seed)
        trainer(tmp_path / name, callback, StopAt(4)).train()
    callback = SparseTrainingCallback(**ARGUMENTS)
    with pytest.raises(ValueError, match="are of two runs"):
        trainer(tmp_path / "one", callback).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4")
        )


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS), StopAt(4)).train()
    path = tmp_path / "checkpoint-4" / "mask_scheduler.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged"):
        trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_the_best_model_comes_back_with_its_masks(storage: str, tmp_path: Path) -> None:
    model, scores = bert(), iter([0.1, 0.9, 0.2, 0.3])
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    callback = SparseTrainingCallback(**ARGUMENTS, storage=storage)
    Trainer(
        model,
        arguments,
        train_dataset=rows(model),
        eval_dataset=rows(model, 8),
        compute_metrics=lambda found: {"score": next(scores)},
        callbacks=[callback],
    ).train()

    best, last = (
        safetensors.torch.load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for step in (4, 8)
    )
    assert same(dict(model.state_dict()), best)
    positions = "weight_mask" if storage == "mask" else "weight_positions"
    assert any(not torch.equal(best[name], last[name]) for name in best if positions in name)
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert same(dict(dense.state_dict()), dict(itop_prune.dense_state_dict(model)))


def test_the_dense_copy_has_the_tokenizer_and_a_module_without_save_pretrained_one_file(
    tmp_path: Path,
) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    run = trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS), model=Wrapper, save_strategy="no")
    run.processing_class = run.callback_handler.processing_class = SimpleNamespace(
        save_pretrained=lambda folder: (Path(folder) / "tokenizer.json").touch()
    )
    run.train()
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    Wrapper().load_state_dict(torch.load(tmp_path / "dense" / "pytorch_model.bin"), strict=True)


# --- bad input -----------------------------------------------------------------------------------


def test_a_model_without_masks_and_without_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no masks, and the callback no arguments"):
        trainer(tmp_path, SparseTrainingCallback(every=2))


@pytest.mark.parametrize("second", [ARGUMENTS, {"every": 2}])
def test_two_callbacks_in_one_trainer_are_refused(second: dict, tmp_path: Path) -> None:
    first = SparseTrainingCallback(**ARGUMENTS)
    with pytest.raises(ValueError, match="two SparseTrainingCallbacks; give one"):
        trainer(tmp_path, first, SparseTrainingCallback(**second))

    run = trainer(tmp_path, SparseTrainingCallback(**ARGUMENTS))
    run.add_callback(SparseTrainingCallback(**second))
    with pytest.raises(ValueError, match="two SparseTrainingCallbacks; give one"):
        run.train()


def test_a_callback_that_comes_after_the_trainer_was_built_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.add_callback(SparseTrainingCallback(**ARGUMENTS))
    with pytest.raises(ValueError, match=r"has no masks.*added later.*itop_prune\.apply"):
        run.train()


@pytest.mark.slow
def test_a_model_made_anew_by_model_init_takes_its_masks_there(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )

    def build(make: Callable[[], nn.Module], callback: TrainerCallback) -> Trainer:
        data = rows(bert())
        return Trainer(args=arguments, model_init=make, train_dataset=data, callbacks=[callback])

    with pytest.raises(ValueError, match=r"made anew.*itop_prune\.apply where the model is"):
        build(bert, SparseTrainingCallback(**ARGUMENTS)).train()

    def sparse() -> nn.Module:
        model = bert()
        itop_prune.apply(model, 0.8)
        return model

    callback = SparseTrainingCallback(every=2)
    build(sparse, callback).train()
    assert callback.scheduler.updates == 1


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("deepspeed_plugin", SimpleNamespace(zero_stage=3), "DeepSpeed"),
        ("fsdp_plugin_args", {"fsdp_version": 1}, "FSDP1"),
    ],
)
def test_what_flattens_parameters_is_refused_before_masks_are_placed(
    name: str, value: object, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = trainer(tmp_path), bert()
    monkeypatch.setattr(run.args, name, value)
    callback = SparseTrainingCallback(**ARGUMENTS)
    with pytest.raises(ValueError, match=f"uses {found}, which flattens parameters.*use DDP"):
        callback.on_init_end(run.args, run.state, run.control, model=model)
    assert itop_prune.find_masks(model) == {}


def test_an_optimizer_from_before_the_masks_is_refused_in_sparse_storage(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    run = Trainer(
        model,
        arguments,
        train_dataset=rows(model),
        callbacks=[SparseTrainingCallback(**ARGUMENTS, storage="sparse")],
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="the optimizer does not hold"):
        run.train()


# --- without the callback ------------------------------------------------------------------------


def test_save_pretrained_takes_the_dense_weights(tmp_path: Path) -> None:
    model = llama()
    itop_prune.apply(model, 0.8, exclude="lm_head")
    model.save_pretrained(tmp_path, state_dict=itop_prune.dense_state_dict(model))
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(dict(again.state_dict()), dict(itop_prune.dense_state_dict(model)))
