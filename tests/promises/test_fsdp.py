"""FSDP2 on two processes: the numbers of one process with the whole model, and equal masks."""

import datetime
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from itop_prune_tools.benchmarks.measure import peak_bytes
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import itop_prune

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]

RANKS, STEPS, EVERY = 2, 6, 2
WHOLE = StateDictOptions(full_state_dict=True)


def model(seed: int = 0) -> nn.Sequential:
    """Rows that do not divide by two, so that the ranks hold parts of different sizes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def standardized(seed: int = 0) -> nn.Sequential:
    from timm.layers import StdConv2d

    torch.manual_seed(seed)
    return nn.Sequential(StdConv2d(5, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(112, 3))


class Narrow(nn.Sequential):
    """A layer with one row, of which the second rank holds nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 1))

    def forward(self, x: Tensor) -> Tensor:
        score = super().forward(x)
        return torch.cat([score, -score, 0.5 * score], 1)


BUILDS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (model, (20,)),
    "standardized": (standardized, (5, 4, 4)),
    "narrow": (Narrow, (20,)),
}


def data(step: int, micro: int, part: int | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The whole batch of a micro-batch, or a rank's half of it."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x, y = torch.randn(8, *shape, generator=generator), torch.randint(3, (8,), generator=generator)
    return (x, y) if part is None else (x.chunk(RANKS)[part], y.chunk(RANKS)[part])


POLICIES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "offload": lambda: {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bf16": lambda: {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
}


def shard(network: nn.Sequential, policy: str = "plain") -> nn.Sequential:
    arguments = {"mesh": init_device_mesh("cpu", (RANKS,)), **POLICIES[policy]()}
    for layer in list(network)[:-1]:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fully_shard(layer, **arguments)
    return fully_shard(network, **arguments)


def train(
    part: int | None,
    build: str,
    grow: str,
    optimizer_of: str = "AdamW",
    micro_batches: int = 1,
    sync_last: bool = False,
    cleared: bool = False,
    policy: str = "plain",
    scaled: bool = False,
    **placing: Any,
) -> dict[str, Any]:
    """Train on a rank's half of the data, or with `part` None on all of it without ranks.

    With `sync_last` gradients are exchanged after the last micro-batch alone; with `cleared` those
    of the others are cleared. With `scaled` the ranks have a scale that doubles at each step. All
    tensors of the history are whole.
    """
    make, shape = BUILDS[build]
    network = make()
    masks = itop_prune.apply(network, **{"sparsity": 0.6, "method": "uniform", **placing})
    if part is not None:
        shard(network, policy)
    optimizer = getattr(torch.optim, optimizer_of)(network.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=1024.0, growth_interval=1, enabled=scaled and part is not None
    )
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=40, every=EVERY, grow=grow, check_ranks=True, scaler=scaler
    )
    history = []
    for step in range(STEPS):
        for micro in range(micro_batches):
            x, y = data(step, micro, part, shape)
            if cleared:
                network.zero_grad()
            if part is not None and sync_last:
                network.set_requires_gradient_sync(micro == micro_batches - 1)
            scaler.scale(F.cross_entropy(network(x), y) / micro_batches).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        moved = regrow.step()
        optimizer.zero_grad()
        history.append(
            {"norm": whole(norm), "moved": torch.tensor(moved), **numbers(masks, optimizer, regrow)}
        )
    return {
        "history": history,
        "dense": {k: v.clone() for k, v in itop_prune.dense_state_dict(network).items()},
    }


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def numbers(
    masks: dict[str, itop_prune.ITOP], optimizer: Any, regrow: itop_prune.MaskScheduler
) -> dict[str, Tensor]:
    found = {f"mask of {name}": itop.mask.clone() for name, itop in masks.items()}
    found |= {f"explored of {name}": explored.clone() for name, explored in regrow.explored.items()}
    for name, itop in masks.items():
        found[name] = whole(itop.parameter)
        found |= {
            f"{k} of {name}": whole(v)
            for k, v in optimizer.state[itop.parameter].items()
            if torch.is_tensor(v)
        }
    return found


def save_and_load(part: int) -> dict[str, Any]:
    """A small file out of a sharded model, and a whole state dict into another one."""
    one, other = model(), model(seed=1)
    masks = itop_prune.apply(one, 0.6)
    itop_prune.apply(other, 0.6, seed=1)
    for network in (one, other):
        shard(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        itop_prune.save(one, path)
        content = bytearray(path.read_bytes())
    state = get_model_state_dict(one, options=WHOLE)
    set_model_state_dict(other, state, options=WHOLE)
    x = data(0, 0, None, (20,))[0]
    return {
        "outputs": [network(x).detach() for network in (one, other)],
        "masks": [
            {n: i.mask.clone() for n, i in itop_prune.find_masks(net).items()}
            for net in (one, other)
        ],
        "names": list(state),
        "weight": whole(one[0].weight),
        "dense": {n: t.clone() for n, t in itop_prune.dense_state_dict(one).items()},
        "small file": torch.frombuffer(content, dtype=torch.uint8),
        "expected": whole(masks["0.weight"].parameter) * masks["0.weight"].mask,
    }


def refusals(part: int) -> dict[str, str]:
    """What is refused, and the words."""
    told, dense, masked, sparse = {}, shard(model()), model(), model()
    itop_prune.apply(masked, 0.6)
    masks = itop_prune.apply(sparse, 0.6, storage="sparse")
    shard(masked)
    shard(sparse)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for name, call in {
        "apply": lambda: itop_prune.apply(dense, 0.6),
        "remove": lambda: itop_prune.remove(masked),
        "sparse storage": lambda: itop_prune.MaskScheduler(
            masks, optimizer, total_steps=9, every=EVERY
        ),
    }.items():
        try:
            call()
        except (ValueError, RuntimeError) as refused:
            told[name] = str(refused)
    return told


def memory(part: int) -> dict[str, int]:
    """Bytes that a rank holds: of parameters and masks."""
    network = model()
    masks = itop_prune.apply(network, 0.6)
    shard(network)
    local = [itop.parameter.to_local() for itop in masks.values()]
    return {
        "weights": sum(itop.mask.numel() for itop in masks.values()),
        "parameters": sum(tensor.numel() * tensor.element_size() for tensor in local),
        "masks": sum(itop.mask.numel() * itop.mask.element_size() for itop in masks.values()),
    }


def forward_first(part: int) -> dict[str, Any]:
    """A forward leaves the outermost parameters whole, where the MaskScheduler needs parts."""
    network, told, moved = model(), [], []
    masks = itop_prune.apply(network, 0.6)
    shard(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ValueError as refused:
            told.append(str(refused))

    def build() -> itop_prune.MaskScheduler:
        return itop_prune.MaskScheduler(
            masks, optimizer, total_steps=9, every=EVERY, grow="gradient"
        )

    def backward_and_step(step: int) -> Tensor:
        x, y = data(step, 0, part, (20,))
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        return x

    network(data(0, 0, part, (20,))[0])
    attempt(build)
    network.reshard()
    regrow = build()
    for step in range(EVERY):
        backward_and_step(step)
        moved.append(regrow.step())
        optimizer.zero_grad()
    network(backward_and_step(EVERY))
    attempt(regrow.step)
    return {"told": told, "moved": moved}


def update(part: int, grow: str, layers: int) -> float:
    """What an update holds at once, in the bytes of the largest layer."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers)), nn.Linear(256, 3))
    masks = itop_prune.apply(network, 0.9)
    shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=9, every=1, grow=grow)
    peaks = []
    for step in range(6):
        x, y = data(step, 0, part, (256,))
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        peaks.append(peak_bytes(regrow.step))
        optimizer.zero_grad()
    return min(peaks) / (
        4 * 256 * 256
    )  # gloo's own threads free what they sent a little sooner or later


def hooks_of_others(part: int) -> dict[str, Any]:
    """What a hook of the user's sees on a step that listens; it was there before."""
    network = model()
    masks = itop_prune.apply(network, 0.6)
    shard(network)
    seen: list[Tensor] = []
    for itop in masks.values():
        itop.parameter.register_post_accumulate_grad_hook(
            lambda parameter: seen.append(whole(parameter.grad))
        )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=8, every=1, grow="gradient")
    x, y = data(0, 0, part, (20,))
    listens = regrow.listens
    F.cross_entropy(network(x), y).backward()
    by_shape = {tuple(itop.mask.shape): itop.mask for itop in masks.values()}
    return {
        "listens": listens,
        "off mask": [float(g[~by_shape[tuple(g.shape)]].abs().sum()) for g in seen],
    }


TRAININGS: dict[str, dict[str, Any]] = {
    "random growth": {"build": "mlp", "grow": "random"},
    "gradient growth": {"build": "mlp", "grow": "gradient"},
    "gradient growth, SGD": {"build": "mlp", "grow": "gradient", "optimizer_of": "SGD"},
    "gradient growth, accumulation": {"build": "mlp", "grow": "gradient", "micro_batches": 2},
    "gradient growth, cleared": {
        "build": "mlp",
        "grow": "gradient",
        "micro_batches": 2,
        "cleared": True,
    },
    "gradient growth, one exchange": {
        "build": "mlp",
        "grow": "gradient",
        "micro_batches": 3,
        "sync_last": True,
    },
    "gradient growth, on the CPU": {"build": "mlp", "grow": "gradient", "policy": "offload"},
    "momentum growth, scaled": {
        "build": "mlp",
        "grow": "momentum",
        "micro_batches": 2,
        "scaled": True,
    },
    "gradient growth, standardized": {"build": "standardized", "grow": "gradient"},
    "gradient growth, a rank without rows": {"build": "narrow", "grow": "gradient"},
    "gradient growth, 2:4": {
        "build": "mlp",
        "grow": "gradient",
        "sparsity": 0.5,
        "pattern": "2:4",
        "exclude": "2",
    },
}
BF16: dict[str, dict[str, Any]] = {
    "bf16": {"build": "mlp", "grow": "gradient", "policy": "bf16"},
    "bf16, one exchange": {
        "build": "mlp",
        "grow": "gradient",
        "policy": "bf16",
        "micro_batches": 2,
        "sync_last": True,
    },
    "bf16, standardized": {"build": "standardized", "grow": "gradient", "policy": "bf16"},
}
UPDATES = {
    f"update, {grow} growth, {n}": {"grow": grow, "layers": n}
    for grow in ("random", "gradient")
    for n in (1, 3)
}
TASKS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (train, arguments) for name, arguments in (TRAININGS | BF16).items()},
    **{name: (update, arguments) for name, arguments in UPDATES.items()},
    "forward first": (forward_first, {}),
    "save and load": (save_and_load, {}),
    "refusals": (refusals, {}),
    "memory": (memory, {}),
    "hooks of others": (hooks_of_others, {}),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    file, patience = f"file://{folder}/init", datetime.timedelta(minutes=2)
    distributed.init_process_group(
        "gloo", init_method=file, rank=rank, world_size=RANKS, timeout=patience
    )
    try:
        torch.save(
            {name: task(rank, **arguments) for name, (task, arguments) in TASKS.items()},
            f"{folder}/rank{rank}",
        )
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("fsdp")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("name", TRAININGS | BF16)
def test_ranks_hold_the_same_numbers_masks_move_and_counts_and_zeros_stay(
    name: str, results: list
) -> None:
    histories = [result[name]["history"] for result in results]
    for one, other in zip(*histories, strict=True):
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    moved = [bool(step["moved"]) for step in histories[0]]
    assert moved == [False, True] * (STEPS // 2)

    first, *_, last = histories[0]
    masks = {key: last[key] for key in last if key.startswith("mask of ")}
    assert any(not torch.equal(first[key], mask) for key, mask in masks.items())
    assert [int(first[key].sum()) for key in masks] == [int(mask.sum()) for mask in masks.values()]
    for key, tensor in last.items():
        mask = masks.get(f"mask of {key.rpartition(' of ')[2]}")
        if mask is not None and tensor.is_floating_point() and tensor.ndim:
            assert not tensor[~mask].any(), key


def test_hooks_of_others_see_the_sparse_gradient(results: list) -> None:
    for result in results:
        found = result["hooks of others"]
        assert found["listens"]
        assert found["off mask"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_sharded_run_is_the_whole_one(name: str, results: list) -> None:
    expected = train(None, **TRAININGS[name])
    assert [bool(numbers["moved"]) for numbers in expected["history"]] == [False, True] * (
        STEPS // 2
    )
    for found, whole_run in zip(results[0][name]["history"], expected["history"], strict=True):
        assert found.keys() == whole_run.keys()
        for key, tensor in found.items():
            if tensor.dtype == torch.bool:
                assert torch.equal(tensor, whole_run[key]), key
            else:
                torch.testing.assert_close(tensor, whole_run[key], atol=1e-5, rtol=1e-4)
    for key, tensor in results[0][name]["dense"].items():
        torch.testing.assert_close(tensor, expected["dense"][key], atol=1e-5, rtol=1e-4)


def test_a_pattern_is_kept_in_a_sharded_run(results: list) -> None:
    for step in results[0]["gradient growth, 2:4"]["history"]:
        masks = [tensor for key, tensor in step.items() if key.startswith("mask of ")]
        assert [mask.unflatten(1, (-1, 4)).sum(2).unique().tolist() for mask in masks] == [[2], [2]]


def test_bf16_is_computed_with_and_grows_nearly_what_float32_grows(results: list) -> None:
    bf16, float32 = (results[0][name]["history"] for name in ("bf16", "gradient growth"))
    one, other = bf16[0]["0.weight"], float32[0]["0.weight"]
    assert one.dtype == other.dtype == torch.float32
    assert not torch.equal(one, other)
    # Two steps of AdamW, one this way and one that.
    torch.testing.assert_close(one, other, atol=2.1e-2, rtol=0.0)

    key = "mask of 0.weight"
    start, one, other = bf16[0][key], bf16[1][key], float32[1][key]
    assert (one ^ other).sum() < 0.2 * (one ^ start).sum()


def test_after_a_forward_the_scheduler_asks_for_the_parts(results: list) -> None:
    for result in results:
        told = result["forward first"]["told"]
        assert len(told) == 2  # built after it; listening for the next update
        assert all(
            "hold 4.weight" in words and "call model.reshard() first" in words for words in told
        )
        assert result["forward first"]["moved"] == [False, True]


def test_an_update_holds_four_tensors_of_the_largest_layer_at_once_however_many_layers_there_are(
    results: list,
) -> None:
    for result in results:
        taken = {name: result[name] for name in UPDATES}
        assert min(taken.values()) > 2.0  # it is measured
        assert max(taken.values()) < 4.1


def test_a_whole_state_dict_goes_from_one_sharded_model_to_another(results: list) -> None:
    for result in results:
        found = result["save and load"]
        assert torch.equal(*found["outputs"])
        one, other = found["masks"]
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert {"0.weight_orig", "0.weight_mask", "0.bias"} <= set(found["names"])


def test_the_weight_of_a_sharded_layer_is_current_outside_of_a_forward(results: list) -> None:
    for result in results:
        assert torch.equal(result["save and load"]["weight"], result["save and load"]["expected"])


def test_the_small_file_of_a_sharded_model_is_whole_on_every_rank(
    results: list, tmp_path: Path
) -> None:
    for rank, result in enumerate(results):
        network, path = model(seed=2), tmp_path / f"{rank}.safetensors"
        path.write_bytes(bytes(result["save and load"]["small file"].tolist()))
        masks = itop_prune.load(network, path)
        assert all(
            torch.equal(itop.mask, result["save and load"]["masks"][0][name])
            for name, itop in masks.items()
        )
        for name, tensor in itop_prune.dense_state_dict(network).items():
            assert torch.equal(tensor, result["save and load"]["dense"][name]), name


def test_what_can_not_be_done_to_a_sharded_model_says_so(results: list) -> None:
    for result in results:
        assert "call itop_prune.apply before fully_shard" in result["refusals"]["apply"]
        assert "dense_state_dict" in result["refusals"]["remove"]
        assert "0.weight is in sparse storage, and FSDP2" in result["refusals"]["sparse storage"]
        assert 'take storage="mask", or DDP' in result["refusals"]["sparse storage"]


def test_masks_take_a_byte_per_weight_on_every_rank(results: list) -> None:
    for result in results:
        found = result["memory"]
        assert found["masks"] == found["weights"]
    assert (
        sum(result["memory"]["parameters"] for result in results)
        == 4 * results[0]["memory"]["weights"]
    )
