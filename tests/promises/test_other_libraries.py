"""Each line of the README's table "With X do Y" does what it says, in the library that it names."""

import re
from collections.abc import Callable
from pathlib import Path

import lightning
import onnxruntime
import peft
import pytest
import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import itop_prune
from itop_prune.integrations import huggingface
from itop_prune.integrations import lightning as for_lightning

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TRIALS: dict[str, Callable[[Path], None]] = {}
"""What tries a line of the table, by its first cell."""


def rows() -> dict[str, str]:
    lines = README[README.index("| with | do |") :].partition("\n\n")[0].splitlines()[2:]
    return dict([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)


def tries(line: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(trial: Callable[[Path], None]) -> Callable[[Path], None]:
        TRIALS[line] = trial
        return trial

    return add


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64))


def masked_mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    itop_prune.apply(model, 0.8)
    return model, torch.randn(4, 64)


def equal_states(model: nn.Module, sparse: nn.Module) -> bool:
    """Whether a dense model holds the weights of a sparse one."""
    wanted, found = itop_prune.dense_state_dict(sparse), model.state_dict()
    return wanted.keys() == found.keys() and all(map(torch.equal, wanted.values(), found.values()))


@tries("transformers' Trainer")
def _trainer(folder: Path) -> None:
    model, tokens = llama(), torch.randint(50, (8, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[huggingface.SparseTrainingCallback(sparsity=0.8, every=1)],
    ).train()
    assert itop_prune.summarize(model).sparsity == pytest.approx(0.8, abs=1e-4)
    assert equal_states(LlamaForCausalLM.from_pretrained(folder / "dense"), model)


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(20, 20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@tries("Lightning")
def _lightning(folder: Path) -> None:
    module = Regression()
    data = torch.utils.data.TensorDataset(torch.ones(4, 20))
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[for_lightning.SparseTrainingCallback(sparsity=0.8, every=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert itop_prune.summarize(module).sparsity == 0.8
    assert equal_states(Regression.load_from_checkpoint(folder / "dense.ckpt"), module)


@tries("`save_pretrained`")
def _save_pretrained(folder: Path) -> None:
    model = llama()
    itop_prune.apply(model, 0.8)
    model.save_pretrained(folder / "as it is")
    model.save_pretrained(folder / "dense", state_dict=itop_prune.dense_state_dict(model))
    assert equal_states(LlamaForCausalLM.from_pretrained(folder / "dense"), model)

    drawn = LlamaForCausalLM.from_pretrained(folder / "as it is").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert (drawn[name] == 0).float().mean() < 0.01


@tries("timm's `train.py`")
def _timm(folder: Path) -> None:
    """Its loop, with the parts of timm that it is made of: accumulation, NativeScaler, EMA."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4, layers=(1, 1, 1, 1), channels=(8,) * 4)
    masks = itop_prune.apply(model, 0.8)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    loss_scaler, average = NativeScaler(device="cpu"), ModelEmaV3(model)
    scaler = loss_scaler._scaler  # noqa: SLF001 - timm has no public name for it
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=4, every=2, grow="gradient", scaler=scaler
    )
    optimizer.zero_grad()
    for number in range(8):
        loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)) / 2
        need_update = number % 2 == 1
        parameters = model.parameters()
        loss_scaler(loss, optimizer, clip_grad=1.0, parameters=parameters, need_update=need_update)
        if not need_update:
            continue
        regrow.step()
        optimizer.zero_grad()
        average.update(model)
        regrow.clean_average(itop_prune.find_masks(average.module))
    assert regrow.updates == 2
    assert itop_prune.summarize(model).sparsity == pytest.approx(0.8, abs=1e-4)


@tries("torchvision detection")
def _detection(folder: Path) -> None:
    torch.manual_seed(0)
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = build(weights=None, weights_backbone=None, num_classes=3)
    frozen = next(name for name, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    before = model.get_parameter(frozen).abs().clone()
    masks = itop_prune.apply(model, 0.8, scores="magnitude")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=2, every=1)
    start = {name: itop.mask.clone() for name, itop in masks.items()}

    model.train()
    images = [torch.rand(3, 100, 100), torch.rand(3, 120, 90)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    for _ in range(2):
        sum(model(images, [target, target]).values()).backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()

    assert regrow.updates == 2
    moved = {name for name, itop in masks.items() if not itop.mask.equal(start[name])}
    assert len(moved) > 50
    assert frozen not in moved
    kept = start[frozen]
    assert before[kept].min() >= before[~kept].max()
    assert set(model.eval()(images)[0]) == {"boxes", "labels", "scores"}


@tries("PEFT")
def _peft(folder: Path) -> None:
    model, x = masked_mlp()
    with_lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    nn.init.ones_(with_lora.get_submodule("base_model.model.0.lora_B.default").weight)
    expected = with_lora(x)
    with pytest.raises(RuntimeError, match=r"itop_prune\.remove"):
        with_lora.merge_and_unload()

    itop_prune.remove(with_lora)
    torch.testing.assert_close(with_lora.merge_and_unload()(x), expected)


@tries("torchao")
def _torchao(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = masked_mlp()
    itop_prune.remove(model)
    expected, zeros = model(x), model[0].weight == 0
    quantize_(model, Int8WeightOnlyConfig())
    torch.testing.assert_close(model(x), expected, rtol=0.0, atol=0.01)
    assert type(model[0].weight) is not nn.Parameter
    assert (model[0].weight.dequantize()[zeros] == 0).all()


@tries("`quantize_dynamic` of torch.ao")
def _quantize_dynamic(folder: Path) -> None:
    model, x = masked_mlp()
    untouched = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert itop_prune.find_masks(untouched).keys() == itop_prune.find_masks(model).keys()

    itop_prune.remove(model)
    quantized = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    torch.testing.assert_close(quantized(x), model(x), rtol=0.0, atol=0.02)
    weight = quantized[0].weight().dequantize()
    assert (weight[model[0].weight == 0] == 0).all()


@tries("ONNX")
def _onnx(folder: Path) -> None:
    for removed in (False, True):
        model, x = masked_mlp()
        if removed:
            itop_prune.remove(model)
        path = folder / f"{removed}.onnx"
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(path)
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


@tries("`torch.export`")
def _export(folder: Path) -> None:
    model, x = masked_mlp()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    itop_prune.remove(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert set(program.state_dict) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_table_has_a_trial_for_each_of_its_lines() -> None:
    assert len(rows()) >= 8
    assert set(rows()) == set(TRIALS)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|timm|onnx).*")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated:UserWarning")
@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow if line == "ONNX" else ()) for line in rows()],
    ids=lambda line: re.sub(r"\W+", "_", line),
)
def test_a_line_of_the_table_is_true(line: str, tmp_path: Path) -> None:
    TRIALS[line](tmp_path)
