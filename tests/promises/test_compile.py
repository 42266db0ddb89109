"""torch.compile: as many graphs as the dense model, no break, no recompile, and the same growth."""

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from helpers.sparse_run import apply
from helpers.storages import both_storages, sparse_if_slow
from helpers.toys import batch, mlp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import itop_prune

# torch and timm use parts of torch that torch deprecates while it compiles; nothing of ours warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch.*",
    "ignore::FutureWarning:torch.*",
    "ignore::DeprecationWarning:timm.*",
)

STEPS = 6  # with an update after every second step: three updates


@dataclass
class Trained:
    """What a run left: graphs compiled so far after each step, the masks, updates done."""

    graphs: list[int]
    masks: dict[str, Tensor]
    updates: int


def images(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, 3, 32, 32, size=2)


def rows(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, 20)


def small(name: str, checkpointing: bool = False, **keywords: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **keywords)
    if checkpointing:
        model.set_grad_checkpointing()
    return model


VIT = functools.partial(small, "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48)
SWIN = functools.partial(
    small,
    "swin_tiny_patch4_window7_224",
    img_size=32,
    window_size=4,
    depths=(2, 2),
    embed_dim=24,
    num_heads=(2, 4),
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "vit_tiny": VIT,
    "resnet18": functools.partial(
        small, "resnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40)
    ),
    "convnext_atto": functools.partial(
        small, "convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)
    ),
    "swin_tiny": SWIN,
    "efficientnet": functools.partial(small, "test_efficientnet"),
    "nfnet, standardized": functools.partial(small, "test_nfnet"),
    "vit_tiny, checkpointing": functools.partial(VIT, checkpointing=True),
    "swin_tiny, checkpointing": functools.partial(SWIN, checkpointing=True),
    "efficientnet, checkpointing": functools.partial(
        small, "test_efficientnet", checkpointing=True
    ),
}
FAST = {("mlp", "mask"), ("mlp", "sparse"), ("vit_tiny", "mask")}
SPARSE = ("mlp", "resnet18", "swin_tiny", "nfnet, standardized", "vit_tiny, checkpointing")
"""Models in sparse storage: one of each way in which a weight is read."""


def models(test: Callable) -> Callable:
    cases = [*itertools.product(MODELS, ["mask"]), *itertools.product(SPARSE, ["sparse"])]
    chosen = [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in cases]
    each = pytest.mark.parametrize(("name", "storage"), chosen, indirect=["storage"])
    return both_storages(each(test))


def train(
    name: str,
    grow: str | None,
    *,
    backend: str | None = "aot_eager",
    micro_batches: int = 1,
    steps: int = STEPS,
) -> Trained:
    """Train dense without `grow`, not compiled without `backend`; a graph break raises."""
    torch.compiler.reset()
    model, data = MODELS[name](), rows if name == "mlp" else images
    masks = apply(model, 0.8) if grow else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    regrow = None
    if grow:
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=100, every=2, grow=grow)
    counter = CompileCounterWithBackend(backend or "eager")
    called = torch.compile(model, backend=counter, fullgraph=True) if backend else model
    graphs = []
    for step in range(steps):
        for micro in range(micro_batches):
            x, y = data(10 * step + micro)
            F.cross_entropy(called(x), y).backward()
        optimizer.step()
        if regrow:
            regrow.step()
        optimizer.zero_grad()
        graphs.append(counter.frame_count)
    positions = {key: itop.mask for key, itop in masks.items()}
    return Trained(graphs, positions, regrow.updates if regrow else 0)


@functools.cache
def dense_graphs(name: str) -> int:
    graphs = train(name, None, steps=2).graphs[-1]
    assert graphs >= 1
    return graphs


def assert_same_growth(compiled: Trained, eager: Trained) -> None:
    assert compiled.updates == eager.updates
    assert all(torch.equal(mask, eager.masks[key]) for key, mask in compiled.masks.items())


@models
def test_random_growth_compiles_the_graphs_of_the_dense_model_and_none_when_masks_move(
    name: str,
) -> None:
    run = train(name, "random")
    assert run.updates == 3
    assert run.graphs == [dense_graphs(name)] * STEPS
    assert_same_growth(run, train(name, "random", backend=None))


@models
def test_gradient_growth_adds_one_graph_at_the_first_step_that_needs_it_and_none_after(
    name: str,
) -> None:
    run = train(name, "gradient")
    assert run.updates == 3
    assert run.graphs == [dense_graphs(name)] + [dense_graphs(name) + 1] * (STEPS - 1)
    assert_same_growth(run, train(name, "gradient", backend=None))


@sparse_if_slow
def test_micro_batches_grow_what_they_grow_in_an_eager_run() -> None:
    compiled, eager = (
        train("mlp", "gradient", micro_batches=2, backend=backend)
        for backend in ("aot_eager", None)
    )
    assert_same_growth(compiled, eager)


@sparse_if_slow
def test_the_mask_moves_in_what_was_compiled_before() -> None:
    torch.compiler.reset()
    model, x = mlp(), batch(0, 20)[0]
    masks = apply(model, 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    for itop in masks.values():
        itop.write_mask(itop.mask, itop.mask.flip(0))
        torch.nn.init.normal_(itop.parameter)
    assert torch.equal(compiled(x), model(x))


@sparse_if_slow
def test_a_model_evaluated_between_updates_compiles_as_often_as_the_dense_one() -> None:
    counts = []
    for grow in (None, "random"):
        torch.compiler.reset()
        model = mlp()
        masks = apply(model, 0.8) if grow else {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regrow = None
        if grow:
            regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=20, every=1, grow=grow)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for step in range(6):
            x, y = rows(step)
            F.cross_entropy(compiled.train()(x), y).backward()
            optimizer.step()
            if regrow:
                assert regrow.step()
            optimizer.zero_grad()
            with torch.no_grad():
                compiled.eval()(x)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@sparse_if_slow
def test_apply_and_remove_after_compiling_are_seen() -> None:
    torch.compiler.reset()
    model, x = mlp(), batch(0, 20)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    dense = compiled(x)
    apply(model, 0.5)
    sparse = compiled(x)
    assert torch.equal(sparse, model(x))
    assert not torch.equal(sparse, dense)
    itop_prune.remove(model)
    torch.nn.init.ones_(model[0].weight)
    assert torch.equal(compiled(x), model(x))


@both_storages
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor compiles for the CPU with g++, which is not here"
)
def test_a_run_compiled_by_inductor_grows_what_an_eager_run_grows() -> None:
    compiled, eager = (train("mlp", "gradient", backend=backend) for backend in ("inductor", None))
    assert compiled.graphs == [1, 2, 2, 2, 2, 2]
    assert_same_growth(compiled, eager)
