"""Two and four processes under DistributedDataParallel hold the same numbers, bit for bit."""

import contextlib
import datetime
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.toys import convnet, mlp
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import itop_prune
from itop_prune import distributed as ranks
from itop_prune.methods import saliency

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

STEPS = 8
EVERY = 2


# --- what runs in each process: module-level functions, for a spawned process imports them by name


def work(rank: int, ranks: int, folder: str) -> None:
    """Do every task of the table: starting the processes takes longer than all of them."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the warnings of this package are tested in one process
    file, patience = f"file://{folder}/init", datetime.timedelta(minutes=2)
    distributed.init_process_group(
        "gloo", init_method=file, rank=rank, world_size=ranks, timeout=patience
    )
    try:
        results = {name: task(rank, **arguments) for name, (task, arguments) in TASKS.items()}
        torch.save(results, f"{folder}/rank{rank}")
    finally:
        distributed.destroy_process_group()


def numbers(
    masks: dict[str, itop_prune.ITOP], model: nn.Module, optimizer: Any, regrow: Any
) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"mask of {name}": itop.mask.clone() for name, itop in masks.items()}
    found |= {f"weight of {name}": itop.weight for name, itop in masks.items()}
    found |= {f"explored of {name}": tensor.clone() for name, tensor in regrow.explored.items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {
            f"{key} of {index}": value.clone()
            for key, value in state.items()
            if torch.is_tensor(value)
        }
    return found | {"counts": torch.tensor([regrow.updates, regrow.skipped])}


def data(step: int, rank: int, micro: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    return torch.randn(8, *shape, generator=generator), torch.randint(4, (8,), generator=generator)


def train_on_a_rank(
    rank: int,
    build: str,
    micro_batches: int = 1,
    spoiled: dict[int, int] | None = None,
    storage: str = "mask",
    **rules: Any,
) -> dict[str, Any]:
    """Train with data and global seeds of the rank's own; `spoiled`: a NaN at a step on a rank."""
    model, shape = (mlp(seed=rank), (20,)) if build == "mlp" else (convnet(seed=rank), (3, 8, 8))
    masks = itop_prune.apply(model, 0.7, storage=storage)
    torch.manual_seed(50 + rank)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=40, every=EVERY, **rules)
    moved, history = [], []
    for step in range(STEPS):
        torch.rand(rank + 1)  # the global generators of the ranks drift apart
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                x, y = data(step, rank, micro, shape)
                (F.cross_entropy(wrapped(x), y) / micro_batches).backward()
        optimizer.step()
        if (spoiled or {}).get(step) == rank:
            next(iter(masks.values())).parameter.grad.fill_(math.nan)
        moved.append(regrow.step())
        history.append(numbers(masks, model, optimizer, regrow))
        optimizer.zero_grad()
    return {"moved": moved, "history": history}


def change_a_mask_on_one_rank(rank: int, storage: str) -> dict[str, Any]:
    model = mlp()
    masks = itop_prune.apply(model, 0.7, storage=storage)
    model.register_buffer("sent", torch.zeros(1))
    wrapped = DistributedDataParallel(model)
    if rank == 1:
        model.sent.fill_(1.0)
        for itop in masks.values():
            itop.write_mask(itop.mask, itop.mask.flip(0))
    wrapped(torch.randn(2, 20)).sum().backward()
    return {
        "masks": {name: itop.mask.clone() for name, itop in masks.items()},
        "sent": model.sent.clone(),
    }


def masks_by_magnitude_of_other_weights(rank: int) -> dict[str, Any]:
    """Weights that differ when the masks are placed: DDP sends the weights, and not the masks."""
    model = mlp(seed=rank)
    try:
        masks = itop_prune.apply(model, 0.7, scores="magnitude")
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)
        x, y = data(0, rank, 0, (20,))
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        regrow.step()
    except (ValueError, RuntimeError) as refused:
        return {"refused": str(refused)}
    return {"refused": "", "numbers": numbers(masks, model, optimizer, regrow)}


def score_on_a_rank(rank: int) -> dict[str, Any]:
    """Scores before training, of other batches on each rank."""
    found = {}
    for name in ("snip", "grasp"):
        model = mlp()
        scores = saliency.SALIENCY[name](model, [data(0, rank, 0, (20,))], F.cross_entropy)
        masks = itop_prune.apply(model, 0.7, method=scores, scores=scores)
        found[name] = {"scores": scores, "masks": {key: itop.mask for key, itop in masks.items()}}
    return found


def score_without_a_batch_on_one_rank(rank: int) -> dict[str, str]:
    """What is raised where only the first rank has something to look at."""
    raised = {}
    for name in ("snip", "grasp"):
        batches = [data(0, rank, 0, (20,))] if rank == 0 else []
        try:
            saliency.SALIENCY[name](mlp(), batches, F.cross_entropy)
        except ValueError as refused:
            raised[name] = str(refused)
    return raised


def starve_a_layer(rank: int) -> list[str]:
    """What is warned of when a layer has fewer active weights than outputs."""
    model = mlp()
    masks = itop_prune.apply(model, 0.97, "uniform")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=9, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            x, y = data(step, rank, 0, (20,))
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            regrow.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


def use_a_layer_on_one_rank(rank: int) -> dict[str, Tensor]:
    """What growth sees of the dense gradient, asked for alone and beside its moving average."""
    seen: dict[str, Tensor] = {}
    for asks in ("grad", "grad and momentum"):
        model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        for layer in model:
            nn.init.ones_(layer.weight)
        masks = itop_prune.apply(model, 0.5, "uniform")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def grow(grad: Tensor) -> Tensor:
            seen[f"{asks} {sum(name.startswith(asks + ' ') for name in seen)}"] = grad.clone()  # noqa: B023
            return grad.abs()

        def prune(weight: Tensor, momentum: Tensor) -> Tensor:
            return weight.abs()

        other = {"prune": prune} if asks != "grad" else {}
        regrow = itop_prune.MaskScheduler(
            masks, optimizer, total_steps=9, every=1, grow=grow, **other
        )
        x = torch.arange(8.0)
        (model[0](x).sum() + (model[1](x).sum() if rank == 0 else 0.0)).backward()
        regrow.step()
    return seen


def diverge(rank: int, check_ranks: bool) -> dict[str, Any]:
    """A weight that is changed on one rank, between two updates."""
    model = mlp()
    masks = itop_prune.apply(model, 0.7)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=9, every=1, check_ranks=check_ranks
    )
    steps = 0
    try:
        for step in range(4):
            x, y = data(step, rank, 0, (20,))
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            regrow.step()
            optimizer.zero_grad()
            steps += 1
            if step == 1 and rank == 1:
                model[2].weight_orig.data.mul_(1.0 + 1e-6)
    except RuntimeError as stopped:
        return {"steps": steps, "stopped": str(stopped)}
    return {"steps": steps, "stopped": ""}


def send_gradients(rank: int) -> dict[str, int]:
    """How many numbers DDP sends of the gradients, and how many parameters are active."""
    model, sent = mlp(), []
    masks = itop_prune.apply(model, 0.9, storage="sparse")
    wrapped = DistributedDataParallel(model)

    def send(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, send)
    wrapped(torch.randn(2, 20)).sum().backward()
    biases = sum(layer.bias.numel() for layer in model if isinstance(layer, nn.Linear))
    return {"sent": sum(sent), "held": sum(itop.active for itop in masks.values()) + biases}


def exchange_at_updates(rank: int, grow: str) -> list[list[int]]:
    """How many numbers each exchange of each update takes."""
    model, exchanged = mlp(), []
    masks = itop_prune.apply(model, 0.9, storage="sparse")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1, grow=grow)
    all_reduce = distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
        exchanged[-1].append(tensor.numel())
        return all_reduce(tensor, *arguments, **more)

    for step in range(3):
        x, y = data(step, rank, 0, (20,))
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        exchanged.append([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "all_reduce", counting)
            assert regrow.step()
        optimizer.zero_grad()
    return exchanged


def grow_beyond_the_slots(rank: int) -> dict[str, Any]:
    """An update that gives a layer more weights than its parameter has slots."""
    model = mlp()
    masks = itop_prune.apply(model, 0.7, storage="sparse")
    before = {name: itop.mask for name, itop in masks.items()}
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=9, every=1, redistribute="magnitude", rate=1.0
    )
    x, y = data(0, rank, 0, (20,))
    F.cross_entropy(wrapped(x), y).backward()
    optimizer.step()
    try:
        regrow.step()
    except RuntimeError as refused:
        after = {name: itop.mask for name, itop in masks.items()}
        return {"refused": str(refused), "changed": differing(before, after)}
    return {"refused": "", "changed": []}


TRAININGS: dict[str, dict[str, Any]] = {
    "random growth": {"build": "convnet", "grow": "random"},
    "gradient growth": {"build": "convnet", "grow": "gradient"},
    "random growth, accumulation": {"build": "mlp", "grow": "random", "micro_batches": 2},
    "gradient growth, accumulation": {"build": "mlp", "grow": "gradient", "micro_batches": 2},
    "momentum, redistributed": {
        "build": "mlp",
        "grow": "momentum",
        "redistribute": "momentum",
        "micro_batches": 2,
    },
    "several gradients": {
        "build": "mlp",
        "grow": "sampled_gradient",
        "prune": "taylor",
        "gradient_steps": 2,
    },
    "global, to sparse": {
        "build": "mlp",
        "grow": "gradient",
        "scope": "global",
        "density": "cubic",
        "final_sparsity": 0.9,
    },
    "sparse storage": {"build": "convnet", "grow": "random", "storage": "sparse"},
    "sparse storage, gradient growth, accumulation": {
        "build": "mlp",
        "grow": "gradient",
        "micro_batches": 2,
        "storage": "sparse",
    },
    "sparse storage, GMP": {
        "build": "mlp",
        "rate": 0.0,
        "min_rate": 0.0,
        "density": "cubic",
        "final_sparsity": 0.9,
        "storage": "sparse",
    },
}
NANS: dict[str, dict[str, Any]] = {
    f"{grow} growth, NaN on rank {rank}": {"build": "mlp", "grow": grow, "spoiled": {3: rank}}
    for grow in ("random", "gradient")
    for rank in range(2)
}
NANS["sparse storage, NaN on rank 1"] = {"build": "mlp", "spoiled": {3: 1}, "storage": "sparse"}
TASKS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (train_on_a_rank, arguments) for name, arguments in (TRAININGS | NANS).items()},
    "a mask changed": (change_a_mask_on_one_rank, {"storage": "mask"}),
    "positions changed": (change_a_mask_on_one_rank, {"storage": "sparse"}),
    "gradients sent": (send_gradients, {}),
    "exchanges, random": (exchange_at_updates, {"grow": "random"}),
    "exchanges, gradient": (exchange_at_updates, {"grow": "gradient"}),
    "grown beyond the slots": (grow_beyond_the_slots, {}),
    "diverged": (diverge, {"check_ranks": True}),
    "diverged, not looked at": (diverge, {"check_ranks": False}),
    "saliency": (score_on_a_rank, {}),
    "no batch": (score_without_a_batch_on_one_rank, {}),
    "starved": (starve_a_layer, {}),
    "used on one rank": (use_a_layer_on_one_rank, {}),
    "magnitude": (masks_by_magnitude_of_other_weights, {}),
}


# --- what is expected of them --------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4)],
    ids="{} ranks".format,
)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """By rank and task, what the processes gave."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}") for rank in range(request.param)]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name for name in one if not torch.equal(one[name].nan_to_num(), other[name].nan_to_num())
    ]


def off_batch_norm(names: list[str]) -> list[str]:
    """Leave out running statistics: each rank has its own until a forward sends those of rank 0."""
    return [name for name in names if "running" not in name]


@pytest.mark.parametrize("name", TRAININGS)
def test_ranks_hold_the_same_weights_masks_optimizer_state_and_explored(
    name: str, results: list
) -> None:
    first, *others = (result[name] for result in results)
    for other in others:
        assert (
            first["moved"] == other["moved"] == [step % EVERY == EVERY - 1 for step in range(STEPS)]
        )
        for one, another in zip(first["history"], other["history"], strict=True):
            assert off_batch_norm(differing(one, another)) == []
    assert any(
        word.startswith("mask of ") for word in differing(first["history"][0], first["history"][-1])
    )


@pytest.mark.parametrize(
    "name", [name for name, arguments in TRAININGS.items() if arguments["build"] == "mlp"]
)
def test_ranks_with_a_part_of_the_batch_each_are_one_rank_with_all_of_it(
    name: str, results: list
) -> None:
    micro_batches = TRAININGS[name].get("micro_batches", 1)
    model = mlp(seed=0)  # DDP starts from the weights of rank 0
    storage = TRAININGS[name].get("storage", "mask")
    masks = itop_prune.apply(model, 0.7, storage=storage)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rules = {
        key: value
        for key, value in TRAININGS[name].items()
        if key not in ("build", "micro_batches", "storage")
    }
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=40, every=EVERY, **rules)
    for step in range(STEPS):
        for micro in range(micro_batches):
            parts = [data(step, rank, micro, (20,)) for rank in range(len(results))]
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            (F.cross_entropy(model(x), y) / micro_batches).backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
        for key, itop in masks.items():
            found = results[0][name]["history"][step]
            assert torch.equal(itop.mask, found[f"mask of {key}"])
            weight = found[f"weight of {key}"]
            torch.testing.assert_close(itop.weight, weight, atol=1e-4, rtol=1e-3)
    assert regrow.updates == STEPS // EVERY


@pytest.mark.parametrize("what", ["a mask", "positions"])
def test_ddp_does_not_send_the_masks_with_a_forward(what: str, results: list) -> None:
    first, second = (result[f"{what} changed"] for result in results[:2])
    assert torch.equal(first["sent"], second["sent"])  # other buffers are sent
    for name, mask in first["masks"].items():
        assert not torch.equal(mask, mask.flip(0))
        assert torch.equal(mask, second["masks"][name].flip(0))


def test_ddp_sends_gradients_of_values_alone(results: list) -> None:
    for result in results:
        assert result["gradients sent"]["sent"] == result["gradients sent"]["held"]


def test_an_update_exchanges_counts_and_for_gradient_growth_one_layer_at_a_time(
    results: list,
) -> None:
    """Three layers of 320, 192 and 48 weights: two facts, and three numbers for each of them."""
    for result in results:
        assert result["exchanges, random"] == [[11]] * 3
        assert result["exchanges, gradient"] == [[11, 320, 192, 48]] * 3


def test_a_layer_that_would_outgrow_its_slots_is_refused_on_all_ranks(results: list) -> None:
    for result in results:
        found = result["grown beyond the slots"]
        assert "ranks can't change its length in training. Start with more" in found["refused"]
        assert found["changed"] == []


@pytest.mark.parametrize("name", NANS)
def test_a_nan_on_one_rank_lets_no_rank_move_and_all_hold_the_same_numbers_after(
    name: str, results: list
) -> None:
    for result in results:
        assert result[name]["moved"] == [False, True, False, False, True, True, False, True]
        assert result[name]["history"][-1]["counts"].tolist() == [4, 1]
        changed = differing(*result[name]["history"][2:4])
        assert [word for word in changed if word.startswith(("mask", "explored"))] == []
    for one, *others in zip(*(result[name]["history"] for result in results), strict=True):
        assert all(differing(one, other) == [] for other in others)


def test_masks_by_magnitude_of_weights_that_differ_between_ranks_are_made_equal_or_refused(
    results: list,
) -> None:
    first, *others = (result["magnitude"] for result in results)
    for other in others:
        assert bool(first["refused"]) == bool(other["refused"])
        assert first["refused"] or differing(first["numbers"], other["numbers"]) == []


def test_a_warning_is_given_once_for_all_ranks(results: list) -> None:
    first, *others = (result["starved"] for result in results)
    assert len(first) == 3
    assert all("so some have none" in message for message in first)
    assert others == [[]] * len(others)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scores_before_training_are_of_the_batches_of_all_ranks(name: str, results: list) -> None:
    first, *others = (result["saliency"][name] for result in results)
    for other in others:
        assert differing(first["scores"], other["scores"]) == []
        assert differing(first["masks"], other["masks"]) == []
    together = [data(0, rank, 0, (20,)) for rank in range(len(results))]
    for key, expected in saliency.SALIENCY[name](mlp(), together, F.cross_entropy).items():
        torch.testing.assert_close(first["scores"][key], expected, rtol=1e-4, atol=1e-7)


def test_a_rank_without_a_batch_is_told_to_all_and_none_waits(results: list) -> None:
    for result in results:
        assert result["no batch"].keys() == {"snip", "grasp"}
        assert all(
            "no batch, here or on another rank" in message
            for message in result["no batch"].values()
        )


def test_a_run_that_diverged_is_stopped_at_the_next_update_on_all_ranks_with_the_name_of_the_layer(
    results: list,
) -> None:
    for result in results:
        assert result["diverged"]["steps"] == 2
        assert (
            "ranks hold different 2.weight; the run has diverged by step 3"
            in result["diverged"]["stopped"]
        )


def test_divergence_is_looked_for_on_request_alone(results: list) -> None:
    for result in results:
        assert result["diverged, not looked at"] == {"steps": 4, "stopped": ""}


def test_a_checksum_tells_masks_with_as_many_active_weights_apart() -> None:
    def checksum(positions: list[int], length: int = 512) -> int:
        mask = torch.zeros(length, dtype=torch.bool)
        mask[positions] = True
        return int(ranks.checksum(mask))

    assert checksum([0, 3]) != checksum([1, 2])
    assert checksum([10, 500]) != checksum([11, 499])
    generator = torch.Generator().manual_seed(0)
    drawn = {
        tuple(sorted(torch.randperm(64, generator=generator)[:8].tolist())) for _ in range(2000)
    }
    assert len({checksum(list(positions), 64) for positions in drawn}) == len(drawn)


def test_a_checksum_tells_neighbouring_floats_apart_and_does_not_depend_on_the_layout() -> None:
    tensor = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[:3] += torch.tensor([1, -2, 1], dtype=torch.int32)
    assert ranks.checksum(bits.view(torch.float32)) != ranks.checksum(tensor)
    assert ranks.checksum(tensor.contiguous(memory_format=torch.channels_last)) == ranks.checksum(
        tensor
    )


def test_the_mean_over_ranks_is_taken_once_whatever_else_is_asked_for(results: list) -> None:
    everywhere = torch.arange(8.0).expand(8, 8)
    for result in results:
        seen = result["used on one rank"]
        for asks in ("grad", "grad and momentum"):
            assert torch.equal(seen[f"{asks} 0"], everywhere)
            assert torch.equal(seen[f"{asks} 1"], everywhere / len(results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update_tells_what_is_not_finite_from_numbers_of_any_size(dtype: torch.dtype) -> None:
    """The square of 1e30 is no float32, and that of 1e-30 is 0."""
    for value in (1e30, 1e-30, 1.0, math.inf, -math.inf, math.nan):
        layer = nn.Conv2d(4, 3, 2, dtype=dtype).to(memory_format=torch.channels_last)
        masks = itop_prune.apply(layer, 0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=9, every=1)
        layer.weight_orig.grad = torch.zeros_like(layer.weight_orig)
        layer.weight_orig.grad[tuple(masks["weight"].mask.nonzero()[3])] = value
        warned = contextlib.nullcontext()
        if not math.isfinite(value):
            warned = pytest.warns(UserWarning, match="not finite")
        with warned:
            assert regrow.step() == math.isfinite(value)
