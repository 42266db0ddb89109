"""Checkpoints: each appears whole or not at all; damaged or dangerous ones are refused."""

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
    check_weights,
    damage,
    load_checkpoint,
    save_result,
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


def test_weights_masks_and_the_rest_of_the_state_come_back(checkpoints: Checkpoints) -> None:
    model, other = sparse(0), sparse(1)
    assert not same(model, other)
    folder = checkpoints.save(7, {"model": model.state_dict()}, STATE)
    before = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    state = load_checkpoint(folder, {"model": other})
    assert same(model, other)
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == before
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
    folder = checkpoints.save(8, {"model": model.state_dict()}, state)
    back = load_checkpoint(folder, {"model": sparse(1)})
    for a, b in zip(flat(state), flat(back), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
    load_checkpoint(folder, models)
    assert same(models["model"], sparse(0))
    assert same(models["ema"], sparse(1))


def test_the_library_reads_the_model_of_a_checkpoint(checkpoints: Checkpoints) -> None:
    folder = checkpoints.save(7, {"model": sparse(0).state_dict()}, STATE)
    plain = toys.mlp(5)
    itop_prune.load(plain, folder / "model.safetensors")
    assert same(plain, sparse(0))


def test_a_model_in_channels_last_comes_back_equal(checkpoints: Checkpoints) -> None:
    model = toys.convnet(0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = toys.convnet(1)
    load_checkpoint(checkpoints.save(7, {"model": model.state_dict()}, STATE), {"model": other})
    assert same(model, other)


def test_a_module_under_two_names_can_be_saved_and_comes_back(checkpoints: Checkpoints) -> None:
    def twice(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"first": shared, "second": shared})

    other = twice(1)
    load_checkpoint(checkpoints.save(7, {"model": twice(0).state_dict()}, STATE), {"model": other})
    assert same(other, twice(0))


# Which are kept


def test_the_last_few_are_kept(checkpoints: Checkpoints) -> None:
    assert checkpoints.last() is None
    for step in (5, 9, 10, 100):
        checkpoints.save(step, {"model": sparse().state_dict()}, {"step": step})
    assert names(checkpoints.folder) == ["step-000000010", "step-000000100"]
    assert checkpoints.last() == checkpoints.all()[-1] == checkpoints.folder / "step-000000100"


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, {"model": sparse().state_dict()}, {"try": 1})
    folder = checkpoints.save(5, {"model": sparse().state_dict()}, {"try": 2})
    assert load_checkpoint(folder, {}) == {"try": 2}
    assert checkpoints.all() == [folder]


def test_the_best_is_kept_beside_the_last_few_until_a_better_one(checkpoints: Checkpoints) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False), (6, False)):
        state = {"step": step}
        checkpoints.save(step, {"model": sparse(step).state_dict()}, state, best=best)
    model = sparse()
    assert load_checkpoint(checkpoints.folder / "best", {"model": model}) == {"step": 3}
    assert same(model, sparse(3))
    assert damage(checkpoints.folder / "best") == ""
    assert names(checkpoints.folder) == ["best", "step-000000005", "step-000000006"]


@pytest.mark.parametrize("name", ["step-000000001-mine", "step-1", "step-00000000a", "step-old"])
def test_a_folder_of_another_name_is_no_checkpoint_and_stays(
    checkpoints: Checkpoints, name: str
) -> None:
    folders = [checkpoints.save(5, {"model": sparse().state_dict()}, {})]
    shutil.copytree(folders[0], checkpoints.folder / name)
    for step in (6, 7):
        folders.append(checkpoints.save(step, {"model": sparse().state_dict()}, {}))
    assert checkpoints.all() == folders[1:]
    assert checkpoints.last_before(4) is None
    assert damage(checkpoints.folder / name) == ""


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
def test_a_full_disk_leaves_the_checkpoints_before_it_whole_and_says_so(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
) -> None:
    before = checkpoints.save(5, {"model": sparse(0).state_dict()}, {"step": 5}, best=True)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(10, {"model": sparse(1).state_dict()}, {"step": 10}, best=True)
    message = str(caught.value)
    assert message.startswith(f"{checkpoints.folder / 'step-000000010'} could not be written: ")
    assert "No space left on device" in message
    assert message.endswith(f"; {before} is whole")

    assert names(checkpoints.folder) == ["best", "step-000000005"]
    assert [damage(checkpoints.folder / name) for name in names(checkpoints.folder)] == ["", ""]
    again = checkpoints.save(10, {"model": sparse(1).state_dict()}, {"step": 10}, best=True)
    assert load_checkpoint(again, {}) == {"step": 10}


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_torch_save(monkeypatch)
    with pytest.raises(CheckpointError, match="there is none before it"):
        checkpoints.save(10, {"model": sparse().state_dict()}, {})
    assert checkpoints.last() is None


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
    assert load_checkpoint(folder, {}) == {"step": 6}
    assert checkpoints.all() == [folder]


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
            load_checkpoint(folder, {"model": sparse()})
        assert not trace.exists()
    torch.load(folder_of_torch(Evil(), tmp_path), weights_only=False)
    assert trace.exists()  # it would have been


def dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def folder_of_torch(value: object, folder: Path) -> Path:
    torch.save(value, folder / "evil.pt")
    return folder / "evil.pt"


def test_a_flipped_byte_in_a_tensor_of_the_state_is_found_without_the_checksums_too(
    checkpoints: Checkpoints,
) -> None:
    tensor = torch.arange(50)
    folder = checkpoints.save(5, {"model": sparse().state_dict()}, {"tensor": tensor})
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content.replace(b"\x07" + bytes(7), b"\x87" + bytes(7)))
    with pytest.raises(CheckpointError, match=r"state\.pt can't be read: .* Bad CRC-32"):
        load_checkpoint(folder, {})


NOT_CHECKSUMS = {
    "[" * 3000: "can't be read: ",
    "{": "can't be read: ",
    '["model.safetensors", "state.pt"]': "is damaged: it holds no checksums by file name",
    '{"model.safetensors": 1, "state.pt": 2}': "is damaged: it holds no checksums by file name",
    '{"model.safetensors": ["0"], "state.pt": "0"}': "is damaged: it holds no checksums by file",
    "3": "is damaged: it holds no checksums by file name",
}


@pytest.mark.parametrize("text", NOT_CHECKSUMS, ids=lambda text: text[:10])
def test_checksums_of_another_form_are_one_error(checkpoints: Checkpoints, text: str) -> None:
    folder = checkpoints.save(5, {"model": sparse().state_dict()}, STATE)
    path = folder / "checksums.json"
    path.write_text(text)
    assert damage(folder).startswith(f"{path} {NOT_CHECKSUMS[text]}")
    with pytest.raises(CheckpointError) as caught:
        check_weights(folder / "model.safetensors")
    assert str(caught.value).startswith(f"{path} {NOT_CHECKSUMS[text]}")
    assert "take other weights, or remove it" in str(caught.value)


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
        load_checkpoint(folder, {"model": sparse()})
    assert str(caught.value).startswith(f"{path} can't be read: ")
    assert str(caught.value).endswith(f"; remove {folder} to use the one before")


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_file(
    checkpoints: Checkpoints,
) -> None:
    folder = checkpoints.save(5, {"model": toys.convnet().state_dict()}, {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        load_checkpoint(folder, {"model": sparse()})


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


def test_a_checkpoint_is_flushed_then_renamed_and_then_the_folder_of_all_is_flushed(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        events.append(os.fstat(handle).st_ino)

    def watched_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(target.name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "replace", watched_replace)
        folder = checkpoints.save(5, {"model": sparse().state_dict()}, {})
    assert set(events[:-2]) == {path.stat().st_ino for path in (*folder.iterdir(), folder)}
    assert events[-2:] == [folder.name, checkpoints.folder.stat().st_ino]


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


# The final weights


def test_final_weights_have_a_checksum_and_other_files_beside_them_need_none(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    save_result(sparse().state_dict(), path)
    assert names(tmp_path) == ["checksums.json", "model.safetensors", "sparse.safetensors"]
    for name in names(tmp_path):
        check_weights(tmp_path / name)

    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"^{path} is damaged; allowed are .* take other"):
        check_weights(path)

    path.with_name("checksums.json").unlink()
    check_weights(path)


@pytest.mark.parametrize("place", ["save_file", "checksum", "write_text"])
def test_a_kill_while_final_weights_are_written_leaves_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def kill(*arguments: object, **settings: object) -> None:
        if place == "write_text":
            Path(str(arguments[0])).write_bytes(b"half")
        raise Killed

    path = tmp_path / "model.safetensors"
    save_result(sparse(0).state_dict(), path)
    with monkeypatch.context() as patch:
        patch.setattr(Path if place == "write_text" else checkpoint, place, kill)
        with pytest.raises(Killed):
            save_result(sparse(1).state_dict(), path)

    check_weights(path)
    model = toys.mlp()
    itop_prune.load(model, path)
    assert same(model, sparse(0 if place == "save_file" else 1))

    save_result(sparse(2).state_dict(), path)
    check_weights(path)


def test_the_last_before_a_step_is_found(checkpoints: Checkpoints) -> None:
    folders = [checkpoints.save(step, {"model": sparse().state_dict()}, {}) for step in (3, 8)]
    found = [checkpoints.last_before(step) for step in (2, 3, 7, 8, 99)]
    assert found == [None, folders[0], folders[0], folders[1], folders[1]]
