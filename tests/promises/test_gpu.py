"""On a GPU: exact counts, the masks of the CPU, half precision, compiled steps, files, kernels.

ITOP_GPU=1 python -m pytest tests/promises/test_gpu.py
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import batch, convnet, mlp
from itop_prune_tools.benchmarks import memory as bench_memory
from itop_prune_tools.benchmarks.measure import Settings
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import MaskScheduler, topology
from itop_prune.inference.measurement import relative_error
from itop_prune.methods.criteria import GROW, PRUNE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and ITOP_GPU=1")
GPU = torch.device("cuda")
ROOT = Path(__file__).parents[2]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"redistribute": "magnitude"},
    {"scope": "global"},
    {"density": "cubic"},
]


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regrow: MaskScheduler | None,
    steps: int,
    *shape: int,
    called: Callable[..., Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train as the README does, under autocast for a half type and with a scaler for fp16."""
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16, init_scale=64.0)
    for step in range(steps):
        x, y = (tensor.to(GPU) for tensor in batch(step, *shape))
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy((called or model)(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if regrow is not None:
            regrow.step()
        optimizer.zero_grad()


def check_exact(model: nn.Module, optimizer: torch.optim.Optimizer, active: int) -> None:
    masks = itop_prune.find_masks(model)
    assert sum(itop.active for itop in masks.values()) == active
    for itop in masks.values():
        for tensor in (itop.parameter, *optimizer.state[itop.parameter].values()):
            if tensor.shape == itop.mask.shape:
                assert tensor.isfinite().all()
                assert not tensor[~itop.mask].any()


@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("grow", GROW)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_are_exact_by_every_criterion(
    prune: str, grow: str, options: dict[str, Any]
) -> None:
    model = convnet().to(GPU)
    masks = itop_prune.apply(model, 0.5)
    active = itop_prune.summarize(model).active
    if options.get("density"):
        options = {**options, "final_sparsity": 0.75}
        active = round(0.25 * sum(itop.mask.numel() for itop in masks.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regrow = MaskScheduler(
        masks, optimizer, total_steps=12, every=2, prune=prune, grow=grow, survival=True, **options
    )
    before = regrow.exploration_rate()
    take_steps(model, optimizer, regrow, 12, 3, 8, 8)
    assert regrow.updates >= 4
    assert regrow.exploration_rate() > before
    check_exact(model, optimizer, active)


def test_a_gpu_chooses_what_a_cpu_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (7, 1_000, 300_000):
        mask = torch.rand(size, generator=generator) < 0.3
        weight, gradient = (torch.randn(size, generator=generator) for _ in range(2))
        count = int(mask.sum()) // 2
        masks = [
            topology.prune_and_regrow(
                mask.to(on), weight.abs().to(on), gradient.abs().to(on), count, count
            ).cpu()
            for on in ("cpu", GPU)
        ]
        assert torch.equal(*masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_counts_exact(dtype: torch.dtype) -> None:
    model = convnet().to(GPU, memory_format=torch.channels_last)
    masks = itop_prune.apply(model, 0.6)
    active = itop_prune.summarize(model).active
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    regrow = MaskScheduler(masks, optimizer, total_steps=60, every=3, grow="gradient")
    take_steps(model, optimizer, regrow, 12, 3, 8, 8, dtype=dtype)
    assert regrow.updates == 4
    check_exact(model, optimizer, active)


@pytest.mark.filterwarnings("default")  # the compiler's own are not ours to mend
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_computes_with_the_masks_that_moved(mode: str | None) -> None:
    """Also where CUDA graphs are replayed: masks are written in place."""
    torch.compiler.reset()
    model = convnet().to(GPU)
    masks = itop_prune.apply(model, 0.6)
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = MaskScheduler(masks, optimizer, total_steps=60, every=3, grow="gradient")
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    take_steps(model, optimizer, regrow, 9, 3, 8, 8, called=compiled)
    assert regrow.updates == 3
    assert any(not torch.equal(itop.mask, before[name]) for name, itop in masks.items())
    check_exact(model, optimizer, sum(int(mask.sum()) for mask in before.values()))
    x = batch(99, 3, 8, 8)[0].to(GPU)
    model.eval()
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-3


def test_a_captured_step_computes_with_the_masks_that_moved() -> None:
    """A CUDA graph of forward and backward, captured once."""
    model, x = mlp().to(GPU), torch.randn(8, 20, device=GPU)
    masks = itop_prune.apply(model, 0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
        captured.sum().backward()
    with torch.no_grad():
        for itop in masks.values():
            itop.mask.copy_(itop.mask.roll(1, 1))
            itop.parameter.copy_(torch.randn_like(itop.parameter) * itop.mask)
    graph.replay()
    assert relative_error(captured.detach(), model(x).detach()) < 1e-6
    assert not any(itop.parameter.grad[~itop.mask].any() for itop in masks.values())  # type: ignore[index]


def test_a_run_that_is_resumed_on_a_gpu_goes_on_as_one_left_alone() -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, MaskScheduler]:
        model = mlp().to(GPU)
        masks = itop_prune.apply(model, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options: dict[str, Any] = {"grow": "momentum", "redistribute": "momentum"}
        return model, optimizer, MaskScheduler(masks, optimizer, total_steps=12, every=2, **options)

    whole, first, second = begun(), begun(), begun()
    take_steps(*whole, 6, 20)
    take_steps(*first, 6, 20)
    state = copy.deepcopy([part.state_dict() for part in first])
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    take_steps(*whole, 6, 20)
    take_steps(*second, 6, 20)
    for one, two in zip(
        whole[0].state_dict().values(), second[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)


def test_files_are_read_onto_a_gpu_as_they_were_written(tmp_path: Path) -> None:
    model, other = convnet().to(GPU), convnet(1).to(GPU)
    itop_prune.apply(model, 0.9)
    itop_prune.save(model, tmp_path / "sparse.safetensors")
    itop_prune.load(other, tmp_path / "sparse.safetensors")
    for (name, one), (_, two) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert two.is_cuda, name
        assert torch.equal(one, two), name


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_scores_before_training_choose_on_a_gpu(score: str) -> None:
    model = convnet().to(GPU)
    batches = [tuple(tensor.to(GPU) for tensor in batch(number, 3, 8, 8)) for number in range(2)]
    arguments = ((3, 8, 8), 0.25) if score == "synflow" else (batches, F.cross_entropy)
    found = getattr(itop_prune.saliency, score)(model, *arguments)
    masks = itop_prune.apply(model, 0.75, scores=found)
    total = sum(itop.mask.numel() for itop in masks.values())
    assert sum(itop.active for itop in masks.values()) == round(0.25 * total)
    assert all(itop.mask.is_cuda for itop in masks.values())


def test_a_model_on_a_gpu_is_deployed_on_the_cpu_alone() -> None:
    model = mlp().to(GPU).eval()
    itop_prune.apply(model, 0.9)
    with pytest.raises(ValueError, match=r"the model is on cuda:0; allowed is the CPU"):
        itop_prune.deploy(model, torch.zeros(5, 20, device=GPU))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_runner_trains_on_a_gpu(precision: str, tmp_path: Path) -> None:
    settings = f"accelerator={{mixed_precision: '{precision}'}}"
    command = [
        sys.executable,
        ROOT / "tools" / "train.py",
        ROOT / "recipes" / "quickstart.yaml",
        settings,
        "epochs=2",
    ]
    subprocess.run([*command, "--out", tmp_path / "run"], check=True)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len({line["sparsity"] for line in lines if "sparsity" in line}) == 1
    assert lines[-1]["test_top1"] > 20.0


def test_masks_hold_two_bytes_a_weight_and_an_update_three_tensors_of_its_largest_layer() -> None:
    between, during = bench_memory.memory(Settings(quick=True, device=GPU))
    assert between.ours[0] <= between.target == 2.0
    assert 1.0 < during.ours[0] <= during.target == 3.0
