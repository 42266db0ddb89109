"""Checkpoints: each appears whole or not at all, and none is believed that is damaged or dangerous."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from itop_prune_tools.training import checkpoint
from itop_prune_tools.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    damage,
    load,
    save_model,
)
from safetensors import SafetensorError
from torch import nn

import itop_prune

FULL = OSError(28, "No space left on device")
STATE: dict[str, Any] = {
    "progress": {"epoch": 3, "loss_sums": [0.5, 1.5]},
    "tensor": torch.arange(3),
    "regrow": None,
}


def sparse(seed: int = 0) -> nn.Module:
    model = toys.mlp(seed)
    itop_prune.apply(model, 0.8, seed=seed)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


# Writing and reading


def test_weights_and_masks_come_back_bit_for_bit(checkpoints: Checkpoints) -> None:
    model, other = sparse(0), sparse(1)
    assert not same(model, other)
    load(checkpoints.save(7, {"model": model.state_dict()}, STATE), {"model": other})
    assert same(model, other)


def test_the_rest_of_the_state_comes_back(checkpoints: Checkpoints) -> None:
    state = load(checkpoints.save(7, {"model": sparse().state_dict()}, STATE), {"model": sparse()})
    assert state["progress"] == STATE["progress"]
    assert torch.equal(state["tensor"], STATE["tensor"])
    assert state["regrow"] is None


def test_the_state_of_optimizer_and_mask_scheduler_is_plain_enough_to_come_back(
    checkpoints: Checkpoints,
) -> None:
    model = toys.mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=20, every=3, grow="gradient")
    toys.train(model, optimizer, regrow, steps=range(8))
    state = {"optimizer": optimizer.state_dict(), "regrow": regrow.state_dict()}
    back = load(
        checkpoints.save(8, {"model": model.state_dict()}, state), {"model": toys_like(model)}
    )
    for a, b in zip(flat(state), flat(back), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def toys_like(model: nn.Module) -> nn.Module:
    other = toys.mlp(1)
    itop_prune.apply(other, 0.5)
    return other


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (key, *flat(inner))]
    return (
        [leaf for inner in value for leaf in flat(inner)]
        if isinstance(value, (list, tuple))
        else [value]
    )


def test_every_model_of_a_run_has_a_file_of_its_own(checkpoints: Checkpoints) -> None:
    folder = checkpoints.save(
        7, {"model": sparse(0).state_dict(), "ema": sparse(1).state_dict()}, STATE
    )
    assert names(folder) == ["checksums.json", "ema.safetensors", "model.safetensors", "state.pt"]
    models = {"model": sparse(2), "ema": sparse(3)}
    load(folder, models)
    assert same(models["model"], sparse(0))
    assert same(models["ema"], sparse(1))


def test_the_library_reads_the_model_of_a_checkpoint(checkpoints: Checkpoints) -> None:
    folder = checkpoints.save(7, {"model": sparse(0).state_dict()}, STATE)
    plain = toys.mlp(5)
    itop_prune.load(plain, folder / "model.safetensors")
    assert same(plain, sparse(0))


def test_loading_keeps_the_tensors_that_the_optimizer_holds(checkpoints: Checkpoints) -> None:
    folder, model = checkpoints.save(7, {"model": sparse(0).state_dict()}, STATE), sparse(1)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    load(folder, {"model": model})
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_model_in_channels_last_comes_back_equal(checkpoints: Checkpoints) -> None:
    model = toys.convnet(0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = toys.convnet(1)
    load(checkpoints.save(7, {"model": model.state_dict()}, STATE), {"model": other})
    assert same(model, other)


def test_a_module_under_two_names_can_be_saved_and_comes_back(checkpoints: Checkpoints) -> None:
    def twice(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"first": shared, "second": shared})

    other = twice(1)
    load(checkpoints.save(7, {"model": twice(0).state_dict()}, STATE), {"model": other})
    assert same(other, twice(0))


def test_a_model_can_be_saved_by_itself(tmp_path: Path) -> None:
    save_model(sparse().state_dict(), tmp_path / "model.safetensors")
    plain = toys.mlp(5)
    itop_prune.load(plain, tmp_path / "model.safetensors")
    assert same(plain, sparse())


# Which are kept


def test_a_new_run_has_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.all() == []
    assert checkpoints.last() is None


def test_the_last_few_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 15, 20):
        checkpoints.save(step, {"model": sparse().state_dict()}, {"step": step})
    assert [path.name for path in checkpoints.all()] == ["step-000000015", "step-000000020"]
    assert names(checkpoints.folder) == ["step-000000015", "step-000000020"]


def test_the_last_is_the_one_of_the_most_steps_and_not_the_first_in_the_alphabet(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (9, 10, 100):
        checkpoints.save(step, {"model": sparse().state_dict()}, {"step": step})
    last = checkpoints.last()
    assert last is not None
    assert load(last, {})["step"] == 100


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, {"model": sparse().state_dict()}, {"try": 1})
    folder = checkpoints.save(5, {"model": sparse().state_dict()}, {"try": 2})
    assert load(folder, {}) == {"try": 2}
    assert checkpoints.all() == [folder]


def test_the_best_is_kept_beside_the_last_few(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, {"model": sparse(1).state_dict()}, {"step": 1}, best=True)
    for step in (2, 3, 4):
        checkpoints.save(step, {"model": sparse().state_dict()}, {"step": step})
    model = sparse()
    assert load(checkpoints.folder / "best", {"model": model}) == {"step": 1}
    assert same(model, sparse(1))
    assert [path.name for path in checkpoints.all()] == ["step-000000003", "step-000000004"]


def test_a_better_one_takes_the_place_of_the_best(checkpoints: Checkpoints) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False)):
        checkpoints.save(step, {"model": sparse().state_dict()}, {"step": step}, best=best)
    assert load(checkpoints.folder / "best", {}) == {"step": 3}


# A full disk, a killed process


def fail_in_torch_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(torch, "save", save)


def fail_in_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", fsync)


def fail_in_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def fail_in_mkdir(monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, **settings: object) -> None:
        raise FULL

    monkeypatch.setattr(Path, "mkdir", mkdir)


FAILURES = [fail_in_torch_save, fail_in_fsync, fail_in_safetensors, fail_in_mkdir]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_full_disk_leaves_the_checkpoint_before_it_whole_and_says_so(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
) -> None:
    before = checkpoints.save(5, {"model": sparse(0).state_dict()}, {"step": 5})
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(10, {"model": sparse(1).state_dict()}, {"step": 10})
    message = str(caught.value)
    assert message.startswith(f"{checkpoints.folder / 'step-000000010'} could not be written: ")
    assert "No space left on device" in message
    assert message.endswith(f"; {before} is whole")
    model = sparse(2)
    assert load(before, {"model": model}) == {"step": 5}
    assert same(model, sparse(0))


@pytest.mark.parametrize("fail", FAILURES)
def test_nothing_half_written_has_a_final_name(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
) -> None:
    checkpoints.save(5, {"model": sparse().state_dict()}, {"step": 5}, best=True)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(CheckpointError):
            checkpoints.save(10, {"model": sparse().state_dict()}, {"step": 10}, best=True)
    assert names(checkpoints.folder) == ["best", "step-000000005"]
    assert load(checkpoints.folder / "best", {}) == {"step": 5}


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_torch_save(monkeypatch)
    with pytest.raises(CheckpointError, match="there is none before it"):
        checkpoints.save(10, {"model": sparse().state_dict()}, {})
    assert checkpoints.last() is None


def test_saving_goes_on_once_there_is_space_again(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in_torch_save(patch)
        with pytest.raises(CheckpointError):
            checkpoints.save(5, {"model": sparse().state_dict()}, {})
    assert load(checkpoints.save(6, {"model": sparse().state_dict()}, {"step": 6}), {}) == {
        "step": 6
    }


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def test_what_a_killed_process_left_is_no_checkpoint_and_not_in_the_way(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(Killed):
            checkpoints.save(5, {"model": sparse().state_dict()}, {})
    assert checkpoints.all() == []
    folder = checkpoints.save(6, {"model": sparse().state_dict()}, {"step": 6})
    assert load(folder, {}) == {"step": 6}
    assert names(checkpoints.folder) == [folder.name]


# What is not believed


def test_a_pickle_in_a_checkpoint_is_not_executed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    folder = checkpoints.save(5, {"model": sparse().state_dict()}, {})
    for write in (
        lambda: torch.save(Evil(), folder / "state.pt"),
        lambda: dump(Evil(), folder / "state.pt"),
    ):
        write()
        with pytest.raises(CheckpointError, match=r"state\.pt can't be read"):
            load(folder, {"model": sparse()})
        assert not trace.exists()
    torch.load(folder_of_torch(Evil(), tmp_path), weights_only=False)
    assert trace.exists()  # it would have been


def dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def folder_of_torch(value: object, folder: Path) -> Path:
    torch.save(value, folder / "evil.pt")
    return folder / "evil.pt"


@pytest.mark.parametrize("part", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated"])
def test_a_damaged_part_is_an_error_that_names_it_and_the_way_out(
    checkpoints: Checkpoints, part: str, how: str
) -> None:
    folder = checkpoints.save(5, {"model": sparse().state_dict()}, STATE)
    path = folder / part
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(whole[: len(whole) // 2] if how == "truncated" else b"")
    with pytest.raises(CheckpointError) as caught:
        load(folder, {"model": sparse()})
    assert str(caught.value).startswith(f"{path} can't be read: ")
    assert str(caught.value).endswith(f"; remove {folder} to use the one before")


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_file(
    checkpoints: Checkpoints,
) -> None:
    folder = checkpoints.save(5, {"model": toys.convnet().state_dict()}, {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        load(folder, {"model": sparse()})


def test_a_checkpoint_that_was_removed_gives_way_to_the_one_before(
    checkpoints: Checkpoints,
) -> None:
    before = checkpoints.save(5, {"model": sparse().state_dict()}, {"step": 5})
    shutil.rmtree(checkpoints.save(6, {"model": sparse().state_dict()}, {"step": 6}))
    assert checkpoints.last() == before


def test_the_best_is_in_place_before_the_checkpoint_that_knows_of_it(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[str] = []
    replace = checkpoint.replace_folder

    def replace_folder(source: Path, target: Path) -> None:
        placed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(checkpoint, "replace_folder", replace_folder)
    checkpoints.save(5, {"model": sparse().state_dict()}, {}, best=True)
    assert placed == ["best", "step-000000005"]
    assert (
        damage(checkpoints.folder / "best") == damage(checkpoints.folder / "step-000000005") == ""
    )


def test_a_disk_without_second_names_for_files_gets_a_copy(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints.save(5, {"model": sparse().state_dict()}, {}, best=True)
    assert damage(checkpoints.folder / "best") == ""


def test_a_folder_that_is_removed_never_keeps_its_name_in_part(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoints.save(step, {"model": sparse().state_dict()}, {})
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, ignore_errors: None
    )  # killed before anything is gone
    checkpoint.remove_folder(checkpoints.all()[0])
    assert [damage(folder) for folder in checkpoints.all()] == [""]


def test_the_last_before_a_step_is_found(checkpoints: Checkpoints) -> None:
    folders = [checkpoints.save(step, {"model": sparse().state_dict()}, {}) for step in (3, 8)]
    found = [checkpoints.last_before(step) for step in (2, 3, 7, 8, 99)]
    assert found == [None, folders[0], folders[0], folders[1], folders[1]]
