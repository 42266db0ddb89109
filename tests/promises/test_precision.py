"""fp32, tf32, bf16, fp16 with a scaler: exact sparsity; skipped steps do not count."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.processes import QUICKSTART, finished, metrics, start
from helpers.sparse_run import apply, dense
from helpers.storages import both_storages, masks_alone, sparse_if_slow
from helpers.toys import batch, convnet, mlp
from itop_prune_tools.training import command as train
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older torch says that there is a newer way
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        yield
        torch.set_float32_matmul_precision(before)


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=dtype)


# By name: what the forward runs in, the type of the weights, whether a scaler is needed.
PRECISIONS: dict[
    str, tuple[Callable[[], contextlib.AbstractContextManager[None]], torch.dtype, bool]
] = {
    "fp32": (contextlib.nullcontext, torch.float32, False),
    "tf32": (tf32, torch.float32, False),
    "bf16 autocast": (lambda: autocast(torch.bfloat16), torch.float32, False),
    "bf16 weights": (contextlib.nullcontext, torch.bfloat16, False),
    "fp16 autocast, scaler": (lambda: autocast(torch.float16), torch.float32, True),
}


class Run:
    """The loop of the README, with a scaler where the precision wants one."""

    def __init__(
        self,
        precision: str,
        grow: str | Callable = "gradient",
        every: int = 3,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        self.context, dtype, scaled = PRECISIONS[precision]
        self.model = convnet().to(dtype)
        self.masks = apply(self.model, 0.6)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if scaler is None:
            scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        self.scaler = scaler
        options = {"total_steps": 60, "every": every, "grow": grow, "scaler": scaler, **options}
        self.regrow = itop_prune.MaskScheduler(self.masks, self.optimizer, **options)
        self.dtype = dtype

    def step(self, number: int, factor: float = 1.0, micro_batches: int = 1) -> bool | None:
        """Take a step; return what `MaskScheduler.step` said, None where the scaler skipped it."""
        for part in range(micro_batches):
            x, y = batch(100 * part + number, 3, 8, 8)
            with self.context():
                loss = F.cross_entropy(self.model(x.to(self.dtype)).float(), y) * factor
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        moved = self.regrow.step() if self.scaler.get_scale() >= before else None
        self.optimizer.zero_grad()
        return moved

    def positions(self) -> dict[str, Tensor]:
        return {name: itop.mask.clone() for name, itop in self.masks.items()}


@both_storages
@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_in_any_precision_ends_with_exact_sparsity(precision: str, grow: str) -> None:
    run = Run(precision, grow)
    before = run.positions()
    for number in range(12):
        run.step(number)
    assert run.regrow.updates == 4
    assert itop_prune.summarize(run.model).active == round(
        (1.0 - 0.6) * sum(m.numel() for m in before.values())
    )
    assert any(not torch.equal(itop.mask, before[name]) for name, itop in run.masks.items())
    for name, itop in run.masks.items():
        assert itop.active == before[name].sum()
        for tensor in (itop.parameter, *run.optimizer.state[itop.parameter].values()):
            if tensor.shape == itop.used.shape:
                assert not dense(itop, tensor)[~itop.mask].any()
                assert tensor.isfinite().all()


@sparse_if_slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_criteria_see_float32_in_any_precision(precision: str) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def grow(weight: Tensor, grad: Tensor) -> Tensor:
        seen.add((weight.dtype, grad.dtype))
        return grad.abs()

    run = Run(precision, grow)
    for number in range(3):
        run.step(number)
    assert seen == {(torch.float32, torch.float32)}


@both_storages
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping_on_an_update_step_sees_the_sparse_gradient(precision: str) -> None:
    dense, sparse = Run(precision, "gradient", every=1), Run(precision, "random", every=50)
    for run in (dense, sparse):
        run.step(0)
    assert dense.regrow.updates == 1
    assert torch.equal(dense.norm, sparse.norm)


@both_storages
def test_a_step_that_the_scaler_skips_moves_nothing_and_a_due_update_waits() -> None:
    run = Run("fp16 autocast, scaler")
    moved = [run.step(0), run.step(1)]
    before, explored = (
        run.positions(),
        {name: seen.clone() for name, seen in run.regrow.explored.items()},
    )
    moved.append(run.step(2, factor=1e30))  # an update would be due
    assert moved == [False, False, None]
    assert all(torch.equal(itop.mask, before[name]) for name, itop in run.masks.items())
    assert all(torch.equal(run.regrow.explored[name], seen) for name, seen in explored.items())
    assert run.regrow.state_dict()["step"] == 2
    assert run.regrow.skipped == 0
    assert run.step(3) is True


@sparse_if_slow
def test_what_the_skipped_step_left_is_not_in_the_gradient_that_grows() -> None:
    seen: list[Tensor] = []

    def grow(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    skipping, plain = Run("fp16 autocast, scaler", grow), Run("fp16 autocast, scaler", grow)
    for run in (skipping, plain):
        run.step(0)
        run.step(1)
    skipping.step(2, factor=1e30)
    for run in (skipping, plain):
        assert run.step(3)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(second) > 0
    assert skipping.scaler.get_scale() < plain.scaler.get_scale()
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


# By name: settings that add up gradients of several steps, which may have several scales.
SUMS: dict[str, dict[str, Any]] = {
    "gradients of three steps": {"gradient_steps": 3},
    "growth by momentum": {"grow": "momentum"},
    "shared out by momentum": {"grow": "momentum", "redistribute": "momentum"},
}


def changing_scaler() -> torch.amp.GradScaler:
    """A scaler whose scale doubles every second step."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def assert_same(run: Run, other: Run) -> None:
    """Masks, weights and R_s are the same, bit for bit."""
    assert run.regrow.updates == other.regrow.updates > 1
    for name, itop in run.masks.items():
        assert torch.equal(itop.mask, other.masks[name].mask), name
        assert torch.equal(itop.parameter, other.masks[name].parameter), name
        assert torch.equal(run.regrow.explored[name], other.regrow.explored[name]), name


@sparse_if_slow
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16 weights"])
@pytest.mark.parametrize("settings", SUMS)
def test_masks_do_not_depend_on_a_scale_that_changes(
    settings: str, precision: str, micro_batches: int
) -> None:
    """Scales are powers of two, so nothing is rounded otherwise."""
    plain = Run(precision, **SUMS[settings])
    scaled = Run(precision, **SUMS[settings], scaler=changing_scaler())
    for run in (plain, scaled):
        for number in range(15):
            run.step(number, micro_batches=micro_batches)
    assert scaled.scaler.get_scale() == 1024.0 * 2**7
    assert_same(plain, scaled)


@both_storages
def test_sums_go_on_where_they_were_after_a_step_that_the_scaler_skipped() -> None:
    plain, skipping = (Run("fp32", gradient_steps=3, scaler=changing_scaler()) for _ in range(2))
    for number in range(15):
        if number in (1, 5, 6):
            assert skipping.step(number + 50, factor=float("inf")) is None
        for run in (plain, skipping):
            run.step(number)
    assert skipping.scaler.get_scale() < plain.scaler.get_scale()
    assert_same(plain, skipping)


def test_an_optimizer_wrapped_by_accelerate_brings_its_scaler() -> None:
    Accelerator(cpu=True)
    model, scaler, seen = mlp(), changing_scaler(), []

    def grow(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad

    masks = itop_prune.apply(model, 0.6)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), scaler=scaler)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1, grow=grow)
    x, y = batch(0, 20)
    for _ in range(4):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4096.0
    assert max(float(grad.abs().max()) for grad in seen) < 1.0


def test_what_is_no_scaler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scaler is float; allowed is a torch.amp.GradScaler"):
        Run("fp32", scaler=1024.0)  # type: ignore[arg-type]


# --- optimizers that divide 0 by 0 ---------------------------------------------------------------


class HalfRun:
    """A run without a scaler; the loss is large, so the squares of gradients are not 0."""

    def __init__(self, dtype: torch.dtype, eps: float, *, moving: bool) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
        self.model = nn.Sequential(*layers).to(dtype)
        self.masks = apply(self.model, 0.5, seed=3)  # no square of a gradient rounds to 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, eps=eps)
        self.regrow = None
        if moving:
            self.regrow = itop_prune.MaskScheduler(
                self.masks,
                self.optimizer,
                total_steps=12,
                every=3,
                grow="gradient",
                density="cubic",
                final_sparsity=0.6,
            )
        self.average, self.dtype = ModelEmaV3(self.model, decay=0.5), dtype

    def train(self) -> list[float]:
        losses = []
        for step in range(12):
            x, y = batch(step, 20)
            loss = 1000.0 * F.cross_entropy(self.model(x.to(self.dtype)).float(), y)
            loss.backward()
            losses.append(loss.item())
            self.optimizer.step()
            moved = self.regrow.step() if self.regrow else False
            self.average.update(self.model)
            if moved:
                self.regrow.clean_average(itop_prune.find_masks(self.average.module))
            self.optimizer.zero_grad()
        return losses


def assert_good(model: nn.Module, path: Path) -> None:
    """Weights in use are finite, 0 off their masks, and the same in files."""
    itop_prune.save(model, path)
    saved, dense = load_file(path), itop_prune.dense_state_dict(model)
    for name, itop in itop_prune.find_masks(model).items():
        assert itop.weight.isfinite().all(), name
        assert not itop.weight[~itop.mask].any(), name
        assert torch.equal(dense[name], itop.weight), name
        assert torch.equal(saved[f"{name}_orig"], itop.weight[itop.mask]), name


@masks_alone
def test_static_masks_in_float16_survive_an_optimizer_that_writes_nan(tmp_path: Path) -> None:
    """An eps of 1e-8 is 0 in float16."""
    run = HalfRun(torch.float16, 1e-8, moving=False)
    losses = run.train()
    assert any(itop.parameter.isnan().any() for itop in run.masks.values())
    assert min(losses) < 0.95 * losses[0]
    for model in (run.model, run.average.module):
        assert_good(model, tmp_path / "model.safetensors")


@both_storages
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float16, 1e-8), (torch.bfloat16, 0.0), (torch.float32, 0.0)]
)
def test_moving_masks_survive_an_optimizer_that_writes_nan(
    dtype: torch.dtype, eps: float, tmp_path: Path
) -> None:
    """The density falls, so that in sparse storage slots are free."""
    run = HalfRun(dtype, eps, moving=True)
    losses = run.train()
    assert run.regrow is not None
    assert (run.regrow.updates, run.regrow.skipped) == (4, 0)
    assert min(losses) < 0.95 * losses[0]
    for model in (run.model, run.average.module):
        assert_good(model, tmp_path / "model.safetensors")
        for itop in itop_prune.find_masks(model).values():
            assert itop.parameter.isfinite().all()


# --- the runner ----------------------------------------------------------------------------------

SETTINGS = (QUICKSTART, "epochs=2", "regrow={every: 7, grow: gradient}")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "no", "fp16"])
def test_the_runner_ends_with_exact_sparsity(tmp_path: Path, precision: str) -> None:
    """In a process of its own: Accelerate keeps one precision per process."""
    settings = [f"accelerator={{mixed_precision: {precision!r}}}", "--out", str(tmp_path / "run")]
    finished(start(["tools/train.py", *SETTINGS, *settings]))
    lines = metrics(tmp_path / "run")
    assert all(line["sparsity"] == (50_200 - 2_510) / 50_200 for line in lines[:-1])
    assert lines[1]["exploration_rate"] > lines[0]["exploration_rate"] > 0.05


def test_the_runner_does_not_count_steps_that_accelerate_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    assert train.main([*SETTINGS, "--out", str(tmp_path / "run")]) == 0
    assert [line["exploration_rate"] for line in metrics(tmp_path / "run")[:-1]] == [0.05, 0.05]
