"""The runner under Accelerate's FSDP2: two ranks of a CPU, where Accelerate leaves the plugin off, so it is put in.

This file is also the script that the ranks run: several runs one after another, for starting them
takes longest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from itop_prune_tools.run_folder import folder as runs
from itop_prune_tools.training import build, sharded
from itop_prune_tools.training import loop as train
from itop_prune_tools.training.checkpoint import Checkpoints
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.torch_version import TorchVersion

import itop_prune
from itop_prune.sharding import is_sharded

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SETTINGS = (
    "epochs=4",
    "regrow={every: 7, grow: gradient}",
    "optimizer={opt: adamw, lr: 0.003, weight_decay: 0.05}",
    "clip_grad_norm=0.5",
    "accelerator={gradient_accumulation_steps: 2}",
    "data.batch_size=16",
    "data.eval_batch_size=179",  # of 359 test images the first rank has 180: one batch more than the second
    "checkpoint={every: 1, keep: 9}",
)
STOP_AT = 31  # of 76; not at the end of an epoch
Job = tuple[
    bool, str, int, bool
]  # whether sharded, folder, step to stop at or 0, whether to resume
JOBS: list[Job] = [
    (False, "whole", 0, False),
    (True, "sharded", 0, False),
    (True, "stopped", STOP_AT, False),
    (True, "stopped", 0, True),
    (False, "to-sharded", STOP_AT, False),
    (True, "to-sharded", 0, True),
    (True, "to-whole", STOP_AT, False),
    (False, "to-whole", 0, True),
]

gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def work(folder: str, jobs: list[Job]) -> None:
    """What every rank does."""
    for is_shard, name, stop_at, resume in jobs:
        built: list[build.Run] = []

        def make_accelerator(recipe: Any, is_shard: bool = is_shard) -> Accelerator:
            accelerator = build.make_accelerator(recipe)
            if is_shard:
                accelerator.state.distributed_type = DistributedType.FSDP
                accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    auto_wrap_policy="transformer_based_wrap",
                    transformer_cls_names_to_wrap=["Linear"],
                    cpu_ram_efficient_loading=True,  # as accelerate launch has it
                )
                sharded.check(recipe, accelerator)
            return accelerator

        def wanted(self: Any, stop_at: int = stop_at, built: list[build.Run] = built) -> bool:
            return built[0].progress.step == stop_at

        def built_run(*arguments: Any, built: list[build.Run] = built) -> build.Run:
            built.append(build.build(*arguments))
            return built[-1]

        train.make_accelerator, train.build, runs.StopRequest.wanted = (
            make_accelerator,
            built_run,
            wanted,
        )
        arguments = [
            QUICKSTART,
            *SETTINGS,
            "--out",
            f"{folder}/{name}",
            *(["--resume"] if resume else []),
        ]
        status = train.main(arguments)
        if status != (130 if stop_at else 0):
            sys.exit(f"{name} ended with {status}")
        check_parts(built[0], is_shard)
        Accelerator().state.distributed_type = DistributedType.MULTI_CPU


def check_parts(run: build.Run, is_shard: bool) -> None:
    """Weights and their statistics lie in parts, none of which holds the memory of the whole; or all are whole."""
    tensors = [*run.bare.parameters()]
    tensors += [
        run.optimizer.state[p][key]
        for p in run.bare.parameters()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    assert {is_sharded(tensor) for tensor in tensors} == {is_shard}
    for tensor in tensors if is_shard else ():
        part = tensor.to_local()
        assert part.untyped_storage().nbytes() <= 4 * (
            part.numel() + tensor[0].numel()
        )  # a padded row


if __name__ == "__main__":
    work(sys.argv[1], [tuple(job) for job in json.loads(sys.argv[2])])
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs of all jobs."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}",
    }
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *ranks, __file__, str(folder), json.dumps(JOBS)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")}
        for line in lines
    ]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a run ends with: its weights and masks, the statistics and what was explored."""
    last = Checkpoints(folder / "checkpoints", 9).last()
    assert last
    state = torch.load(last / "state.pt")
    found = {
        f"saved {name}": tensor for name, tensor in load_file(last / "model.safetensors").items()
    }
    found |= load_file(folder / "model.safetensors")
    found |= {f"explored {name}": tensor for name, tensor in state["regrow"]["explored"].items()}
    for index, values in state["optimizer"]["state"].items():
        found |= {f"{key} of {index}": value for key, value in values.items()}
    return found


def assert_close(one: Path, other: Path) -> None:
    """Assert that masks are equal, bit for bit, and numbers to float tolerance."""
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3)
    for line, as_expected in zip(metrics(one), metrics(other), strict=True):
        assert line == pytest.approx(as_expected, rel=1e-4)


@gloo
def test_two_ranks_that_shard_train_as_two_that_do_not(folder: Path) -> None:
    assert_close(folder / "sharded", folder / "whole")


@gloo
def test_a_sharded_run_stopped_and_resumed_is_the_run_that_never_stopped(folder: Path) -> None:
    assert metrics(folder / "stopped") == metrics(folder / "sharded")
    found, expected = tensors(folder / "stopped"), tensors(folder / "sharded")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@gloo
@pytest.mark.parametrize("name", ["to-sharded", "to-whole"])
def test_a_run_goes_on_sharded_or_not_as_it_was_not_or_was(folder: Path, name: str) -> None:
    assert_close(folder / name, folder / "whole")


@gloo
def test_what_a_sharded_run_wrote_loads_and_is_exactly_sparse(folder: Path) -> None:
    recipe = train.read(QUICKSTART, data=train.open_data, augment=train.augmentation_of)
    for path in ("sharded", "sharded/model.safetensors", f"stopped/checkpoints/step-{STOP_AT:09d}"):
        model = build.build_model(recipe, None, torch.device("cpu"))
        masks = itop_prune.load(model, folder / path)
        assert sum(itop.active for itop in masks.values()) == round(0.05 * 50_200)
        assert all(not itop.parameter[~itop.mask].any() for itop in masks.values())
    assert [line["sparsity"] for line in metrics(folder / "sharded")[:-1]] == [0.95] * 4


# --- what is refused at start ----------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def check(*overrides: str, kind: str = "FSDP", **plugin: Any) -> None:
    recipe = train.read(QUICKSTART, overrides, data=train.open_data, augment=train.augmentation_of)
    state = SimpleNamespace(
        fsdp_plugin=FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
    )
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType[kind], state=state)
    sharded.check(recipe, accelerator)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "DEEPSPEED"}, "DEEPSPEED is not supported here"),
        ({"kind": "MEGATRON_LM"}, "MEGATRON_LM is not supported here"),
        ({"fsdp_version": 1}, "FSDP version 1 flattens parameters.*--fsdp_version 2"),
        ({"cpu_offload": True}, "^fsdp_offload_params can't be had with FSDP2"),
        ({"activation_checkpointing": True}, "^fsdp_activation_checkpointing can't"),
    ],
)
def test_what_shards_otherwise_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(runs.RunError, match=words):
        check(**arguments)


def test_what_a_sharded_model_can_not_have_is_refused_all_at_once() -> None:
    with pytest.raises(runs.RunError, match=r"^ema, channels_last can't be had with FSDP2"):
        check("ema={decay: 0.9}", "channels_last=true")


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adafactorbv", r"\(it shards exp_avg_sq_r of shape \(256, 1\) for \(256, 256\)\)"),
        ("cadamw", "RuntimeError: .*in-place"),
        ("adafactor", "RuntimeError: .*mixed torch.Tensor and DTensor"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_an_optimizer_that_does_not_work_on_sharded_weights_is_refused(
    optimizer: str, words: str
) -> None:
    with pytest.raises(
        runs.RunError, match=f"^optimizer: {optimizer} does not work with FSDP2 .*{words}"
    ):
        check(f"optimizer={{opt: {optimizer}, lr: 0.01}}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw, layer_decay: 0.7", "lamb", "muon"])
@pytest.mark.usefixtures("one_rank")
def test_others_are_not(optimizer: str) -> None:
    if optimizer == "muon" and TorchVersion(torch.__version__) < (2, 11):
        pytest.skip(
            "torch 2.10 does not clamp a norm of sharded weights in place, as timm's Muon does; 2.11 does"
        )
    check(f"optimizer={{opt: {optimizer}, lr: 0.01}}")


def test_the_runner_asks_before_it_builds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED)
    )
    assert train.main([QUICKSTART, "--out", str(tmp_path / "run")]) == 1
    assert "error: accelerator: DEEPSPEED is not supported here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
