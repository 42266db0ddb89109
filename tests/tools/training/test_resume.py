"""A whole checkpoint is refused if no run of the recipe can have saved its state."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.processes import QUICKSTART
from itop_prune_tools.training import command as train
from itop_prune_tools.training.checkpoint import damage, write_checksums
from itop_prune_tools.training.resume import check_form, check_steps

State = dict[str, Any]
Change = Callable[[State], State]


def run(folder: Path, *arguments: str) -> int:
    return train.main(
        [QUICKSTART, "epochs=2", "checkpoint={keep: 1}", "--out", str(folder), *arguments]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 0
    return folder


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoints/step-*"))


def without(*keys: str) -> Change:
    """Take the last key out of the section that the others lead to."""

    def change(state: State) -> State:
        del section(state, keys)[keys[-1]]
        return state

    return change


def replaced(value: object, *keys: str) -> Change:
    def change(state: State) -> State:
        section(state, keys)[keys[-1]] = value
        return state

    return change


def section(state: State, keys: Sequence[str]) -> State:
    for key in keys[:-1]:
        state = state[key]
    return state


OF_OTHER_FORM = {
    "progress is missing or no dict": without("progress"),
    "images_per_step is missing or no int": without("images_per_step"),
    "optimizer is missing or no dict": without("optimizer"),
    "regrow is missing or no dict": without("regrow"),
    "progress.step is missing or no int": without("progress", "step"),
    "progress.epoch is missing or no int": replaced("2", "progress", "epoch"),
    "progress.best is missing or no float": replaced(None, "progress", "best"),
    "regrow.updates is missing or no int": replaced(True, "regrow", "updates"),
    "progress.step is -1; allowed after 2 epochs is 76 to 76": replaced(-1, "progress", "step"),
    "progress.step is 77; allowed after 2 epochs is 76 to 76": replaced(77, "progress", "step"),
    "progress.step is 76; allowed after 0 epochs is 0 to 38": replaced(0, "progress", "epoch"),
    "progress.epoch is 3; allowed is 0 to 2": replaced(3, "progress", "epoch"),
    "progress.epoch is -1; allowed is 0 to 2": replaced(-1, "progress", "epoch"),
    "regrow.step is 77; allowed is 0 to 76": replaced(77, "regrow", "step"),
    "regrow.step is -1; allowed is 0 to 76": replaced(-1, "regrow", "step"),
}


@pytest.mark.parametrize("problem", OF_OTHER_FORM)
def test_keys_types_and_steps_of_a_state_are_checked(finished: Path, problem: str) -> None:
    state = torch.load(last_checkpoint(finished) / "state.pt")
    run: Any = SimpleNamespace(regrow=True, epochs=2, steps_per_epoch=38, total_steps=76)
    check(state, run)
    with pytest.raises(ValueError, match=f"^{problem}"):
        check(OF_OTHER_FORM[problem](state), run)


def check(state: State, run: Any) -> None:
    check_form(state, run)
    check_steps(state, run)


OF_NO_RUN = {
    "the state is missing or no dict": lambda state: [1, 2],
    "progress.step is 1000000000; allowed after 2 epochs is 76 to 76; remove": replaced(
        10**9, "progress", "step"
    ),
    "progress.loss_sums: ": replaced(["0.5"], "progress", "loss_sums"),
    "optimizer: ": replaced([], "optimizer", "param_groups"),
    "regrow: the state lacks dense": without("regrow", "dense"),
    "regrow: ": replaced({"layers.0.weight": 1}, "regrow", "explored"),
}


@pytest.mark.parametrize("problem", OF_NO_RUN)
def test_a_state_that_no_run_saved_is_one_error_that_names_file_and_key(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    checkpoint = last_checkpoint(folder)
    path = checkpoint / "state.pt"
    torch.save(OF_NO_RUN[problem](torch.load(path)), path)
    write_checksums([*checkpoint.glob("*.safetensors"), path], checkpoint / "checksums.json")
    assert damage(checkpoint) == ""

    assert run(folder, "--resume") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} can't be used: {problem}")
    assert line.endswith(f"; remove {checkpoint} to use the one before")
