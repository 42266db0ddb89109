"""What goes wrong on a rank or the disk: all ranks end, one line says why, files are whole."""

import math
import re
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.processes import (
    QUICKSTART,
    SETTINGS,
    assert_same_end,
    changed_runner,
    gloo,
    metrics,
    of_photos,
    on_ranks,
    output_of,
    photos,
    whole_checkpoints,
    without_last_checkpoint,
)
from itop_prune_tools.run_folder.folder import RunError
from itop_prune_tools.run_folder.lock import locked
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import command as train
from itop_prune_tools.training.stop import StopRequest

from itop_prune.files.state_dicts import read_state

FULL = OSError(28, "No space left on device")


def run(folder: Path, *arguments: str) -> int:
    return train.main([QUICKSTART, *SETTINGS, "epochs=3", *arguments, "--out", str(folder)])


def one_error(text: str) -> str:
    """The one line that says what is wrong, where no rank said more."""
    assert (
        "]: Traceback" not in text
    )  # as torch marks that of a rank; torchrun writes one of its own
    errors = re.findall(r"^(?:rank \d+: )?error: .*$", text, re.MULTILINE)
    assert len(errors) == 1, text
    return errors[0]


def failed(tmp_path: Path, change: str, *arguments: str) -> str:
    """Let two ranks run into a change, and return the one line that says what is wrong."""
    runner = changed_runner(tmp_path / "changed.py", change)
    process = on_ranks(*arguments, "--out", str(tmp_path / "run"), runner=runner)
    output = output_of(process)
    assert process.returncode == 1
    return one_error(output)


# --- two ranks -----------------------------------------------------------------------------------

OTHER_WEIGHTS_AT_THE_START = """
build = train.build
def other(*arguments):
    run = build(*arguments)
    if rank == 1:
        run.unwrapped_model.head.bias.data += 1.0
    return run
train.build = other
"""
OTHER_WEIGHTS_LATER = """
step = itop_prune.MaskScheduler.step
def other(self):
    moved = step(self)
    if rank == 1 and moved:
        masks[0].parameter.data.mul_(1.0 + 1e-6)
    return moved
build = train.build
def keep(*arguments):
    run = build(*arguments)
    masks.extend(itop_prune.find_masks(run.unwrapped_model).values())
    return run
masks, train.build, itop_prune.MaskScheduler.step = [], keep, other
"""


@gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            OTHER_WEIGHTS_AT_THE_START,
            "error: ranks hold different head.bias of the model; before the first step",
        ),
        (
            OTHER_WEIGHTS_LATER,
            "error: ranks hold different layers.0.weight; the run has diverged by step 14",
        ),
    ],
    ids=["at the start", "between updates"],
)
def test_ranks_that_hold_different_weights_are_one_line(
    tmp_path: Path, change: str, message: str
) -> None:
    assert failed(tmp_path, change, "epochs=1").startswith(message)


SECOND_CHECKPOINT = """
import torch
save, saved = torch.save, []
def full(*arguments, **options):
    saved.append(1)
    if len(saved) == 2:
        raise OSError(28, "No space left on device")
    save(*arguments, **options)
torch.save = full
"""
SECOND_LINE = """
from itop_prune_tools.run_folder import json_lines
lines = []
class FullDisk:
    strerror = os.strerror
    @staticmethod
    def fsync(handle):
        lines.append(1)
        if len(lines) == 3:  # an epoch writes a line here and the updates into layers.jsonl
            raise OSError(28, "No space left on device")
json_lines.os = FullDisk
"""


@gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message", "lines"),
    [
        (
            SECOND_CHECKPOINT,
            "step-000000076 could not be written: [Errno 28] No space left on device; ",
            2,
        ),
        (
            SECOND_LINE,
            "metrics.jsonl could not be written: [Errno 28] No space left on device; ",
            1,
        ),
    ],
    ids=["checkpoint", "metrics"],
)
def test_a_full_disk_ends_both_ranks_with_one_line_and_leaves_the_checkpoint_before(
    tmp_path: Path, change: str, message: str, lines: int
) -> None:
    assert message in failed(tmp_path, change, "epochs=3", "data.batch_size=16")
    assert [folder.name for folder in whole_checkpoints(tmp_path / "run")] == ["step-000000038"]
    assert len(metrics(tmp_path / "run")) == lines


@gloo
@pytest.mark.slow
def test_an_image_that_is_gone_on_one_rank_ends_both_and_is_named(tmp_path: Path) -> None:
    change = """
open_for = train.open_for
def gone(*arguments):
    data = open_for(*arguments)
    data.train.files[:] = [file + ".gone" if rank == 1 else file for file in data.train.files]
    return data
train.open_for = gone
"""
    runner = changed_runner(tmp_path / "changed.py", change)
    settings = (*of_photos(photos(tmp_path / "photos")), "epochs=1", "--out", str(tmp_path / "run"))
    process = on_ranks(*settings, runner=runner)
    output = output_of(process)
    assert process.returncode == 1
    assert re.search(
        r"rank 1: error: .*png\.gone can't be read as an image: .*No such file", output
    )


@gloo
@pytest.mark.slow
def test_bad_losses_of_one_rank_and_one_micro_batch_stop_both_and_leave_the_checkpoint_before_them(
    tmp_path: Path,
) -> None:
    """Five epochs of bad losses, of whose checkpoints one would be kept."""
    change = """
import torch
class Bad(torch.nn.CrossEntropyLoss):
    calls = 0
    def forward(self, *arguments):
        self.calls += 1
        bad = rank == 1 and self.calls > 14 and self.calls % 2
        return super().forward(*arguments) + (float("nan") if bad else 0.0)
torch.nn.CrossEntropyLoss = Bad
"""
    settings = ("epochs=9", "data.batch_size=80", "accelerator={gradient_accumulation_steps: 2}")
    settings += ("stop_after_bad_losses=12", "checkpoint={every: 1, keep: 1}")
    message = failed(tmp_path, change, *settings)
    last = tmp_path / "run" / "checkpoints" / "step-000000006"
    assert message.endswith(
        f"the loss was not finite for 17 steps, at step 24; last good checkpoint: {last}"
    )
    assert whole_checkpoints(tmp_path / "run") == [last]


@gloo
@pytest.mark.slow
def test_a_folder_in_use_ends_both_ranks_with_one_line(copy: Path) -> None:
    with locked(copy):
        process = on_ranks("epochs=3", "--out", str(copy), "--resume")
        output = output_of(process)
    assert process.returncode == 1
    assert one_error(output).startswith(f"error: {copy} is in use by another run, and only one ")


# --- bad losses ----------------------------------------------------------------------------------


def bad_from(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Change the losses: from their number, counted from 1, the logits and the loss."""

    class Bad(torch.nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            Bad.calls += 1
            return spoil(Bad.calls, logits, super().forward(logits, labels))

    monkeypatch.setattr(torch.nn, "CrossEntropyLoss", Bad)


def test_a_run_stopped_among_bad_losses_goes_on_from_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "whole", "stop_after_bad_losses=20") == 0
    with monkeypatch.context() as patch:
        bad_from(patch, lambda call, logits, loss: loss + (math.nan if call > 45 else 0.0))
        patch.setattr(StopRequest, "wanted", lambda self: next(asked) == 50)
        asked = iter(range(1, 99))
        assert run(tmp_path / "run", "stop_after_bad_losses=20") == 130
    assert (
        "goes on from " + str(tmp_path / "run" / "checkpoints" / "step-000000038")
        in capsys.readouterr().out
    )
    assert run(tmp_path / "run", "stop_after_bad_losses=20", "--resume") == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_weights_spoiled_in_the_last_step_of_an_epoch_push_out_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is finite with gradients that are not: the next one shows it."""
    bad_from(
        monkeypatch,
        lambda call, logits, loss: loss + (logits * 0).sqrt().sum() if call == 76 else loss,
    )
    settings = ("stop_after_bad_losses=10", "checkpoint={every: 1, keep: 1}", "regrow=null")
    assert run(tmp_path / "run", *settings) == 1
    last = tmp_path / "run" / "checkpoints" / "step-000000038"
    assert one_error(capsys.readouterr().err).endswith(f"last good checkpoint: {last}")
    assert whole_checkpoints(tmp_path / "run") == [last]


# --- the disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures") / "whole"
    assert run(folder) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A run that could be resumed after its second epoch."""
    return without_last_checkpoint(whole, tmp_path / "run")


def refuse_to_write(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def write_text(path: Path, text: str, **settings: object) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise error

    monkeypatch.setattr(Path, "write_text", write_text)


def test_metrics_that_can_not_be_cut_are_one_line_and_stay(
    whole: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "metrics.jsonl"
    with monkeypatch.context() as patch:
        refuse_to_write(patch, FULL)
        assert run(copy, "--resume") == 1
    message = f"error: {path} could not be written: {FULL}; once it can be, go on with --resume"
    assert one_error(capsys.readouterr().err) == message
    assert metrics(copy) == metrics(whole)
    assert not list(copy.glob("unfinished-*"))
    assert run(copy, "--resume") == 0
    assert_same_end(whole, copy)


def test_a_full_disk_at_a_line_of_metrics_is_one_line_and_the_run_can_go_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(handle: int) -> None:
        raise FULL

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "itop_prune_tools.run_folder.json_lines.os", types.SimpleNamespace(fsync=fsync)
        )
        assert run(folder) == 1
    message = f"error: {folder / 'metrics.jsonl'} could not be written: "
    assert one_error(capsys.readouterr().err).startswith(message)
    assert run(folder, "--resume") == 0
    assert_same_end(whole, folder)


@pytest.mark.parametrize("name", ["sparse.safetensors", "model.safetensors"])
def test_a_full_disk_at_the_last_weights_is_one_line_and_the_run_can_be_ended(
    name: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, replace = tmp_path / "run", Path.replace

    def full(path: Path, target: Path) -> Path:
        if target == folder / name:
            raise FULL
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert run(folder) == 1
    message = f"error: {folder / name} could not be written: "
    assert one_error(capsys.readouterr().err).startswith(message)
    assert not list(folder.glob("unfinished-*"))
    assert not (folder / "model.safetensors").exists()  # with which a run counts as done
    assert run(folder, "--resume") == 0
    assert_same_end(whole, folder)
    small, full_size = (folder / f"{kind}.safetensors" for kind in ("sparse", "model"))
    assert read_state(small).keys() == read_state(full_size).keys()


def test_a_read_only_place_is_one_line_that_offers_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_to_write(monkeypatch, OSError(30, "Read-only file system"))
    assert run(tmp_path / "run") == 1
    message = one_error(capsys.readouterr().err)
    assert "Read-only file system" in message
    assert message.endswith("write elsewhere with --out FOLDER")


def test_a_file_in_the_place_of_the_checkpoints_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path / "file") == 1
    assert "--out" in one_error(capsys.readouterr().err)
    assert run(tmp_path / "file" / "run") == 1
    assert "--out" in one_error(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_recipe_of_a_run_is_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "recipe.yaml"
    broken = (b"", b"\x00\xff\xfe", b"model: {", b"- 1\n", b"model: !!python/name:os.system\n")
    for content in broken:
        path.write_bytes(content)
        assert run(copy, "--resume") == 1
        message = f"error: {path} is damaged; start a new run with --out FOLDER"
        assert one_error(capsys.readouterr().err) == message


def replace_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, b"\x00\xff\xfe\n"),
        (2, b'{"epoch": 1, "st\n'),
        (1, b"5\n"),
        (2, b'{"epoch": "one", "step": 38}\n'),
        (2, b"\n"),
    ],
    ids=repr,
)
def test_damaged_metrics_that_must_stay_are_one_line_that_names_the_place(
    copy: Path, capsys: pytest.CaptureFixture[str], number: int, line: bytes
) -> None:
    path = copy / "metrics.jsonl"
    replace_line(path, number, line)
    before = path.read_bytes()
    assert run(copy, "--resume") == 1
    message = f"error: {path} is damaged in line {number}, and the run goes on after"
    assert one_error(capsys.readouterr().err).startswith(message)
    assert path.read_bytes() == before
    path.unlink()
    assert run(copy, "--resume") == 0
    assert [line["epoch"] for line in metrics(copy)] == [3, 3]


@pytest.mark.parametrize("line", [b"\x00\x00\x00\x00", b"\xff\n", b'{"epoch": 3, "st'], ids=repr)
def test_damaged_metrics_that_a_resumed_run_writes_again_do_no_harm(
    whole: Path, copy: Path, line: bytes
) -> None:
    replace_line(copy / "metrics.jsonl", 3, line)
    assert run(copy, "--resume") == 0
    assert_same_end(whole, copy)


def test_a_line_for_which_there_is_no_room_leaves_no_half(tmp_path: Path) -> None:
    """With a real limit, that lets a part through."""
    resource = pytest.importorskip("resource")
    found = Metrics(tmp_path)
    found.append({"epoch": 1, "step": 10})
    before, limits = found.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(
            RunError,
            match=r"metrics\.jsonl could not be written: .*; once it can be, go on with",
        ):
            found.append({"epoch": 2, "step": 20})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.path.read_bytes() == before
