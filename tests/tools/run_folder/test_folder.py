"""The folder of a run: named by what it is, never written over; and the wish to stop."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.run_folder.folder import (
    FREE,
    FREE_SECTIONS,
    RunError,
    StopRequest,
    check_same_recipe,
    run_folder,
    start,
)

RECIPE = Recipe(
    model={"model_name": "lenet300"},
    data={"name": "digits", "batch_size": 8},
    optimizer={"lr": 0.1},
    epochs=3,
)
OTHER = Recipe(
    model=RECIPE.model, data=RECIPE.data, optimizer={"lr": 0.2}, epochs=3, masks={"sparsity": 0.9}
)


# Names


@pytest.mark.parametrize(
    ("overrides", "seed", "name"),
    [
        ([], 0, "runs/quickstart/seed0"),
        ([], 3, "runs/quickstart/seed3"),
        (["seed=3"], 3, "runs/quickstart/seed3"),
        (["data.root=/data"], 0, "runs/quickstart/seed0"),
        (["masks.sparsity=0.98"], 0, "runs/quickstart-masks.sparsity=0.98/seed0"),
        (["epochs=3", "multiplier=2"], 1, "runs/quickstart-epochs=3-multiplier=2/seed1"),
        (["seeds=3"], 0, "runs/quickstart-seeds=3/seed0"),
        (["init=/a/../b.pt"], 0, "runs/quickstart-init=_a_.._b.pt/seed0"),
        (["regrow={every: 5}"], 0, "runs/quickstart-regrow={every__5}/seed0"),
        (["data.batch_size=4"], 0, "runs/quickstart-data.batch_size=4/seed0"),
        (["data={name: digits}"], 0, "runs/quickstart-data={name__digits}/seed0"),
        (
            ["accelerator={log_with: wandb, mixed_precision: bf16}"],
            0,
            "runs/quickstart-accelerator={log_with__wandb,_mixed_precision__bf16}/seed0",
        ),
        (["accelerator=null"], 0, "runs/quickstart-accelerator=null/seed0"),
    ],
    ids=str,
)
def test_a_run_is_named_by_recipe_overrides_and_seed(
    overrides: list[str], seed: int, name: str
) -> None:
    assert run_folder(Path("some/where/quickstart.yaml"), overrides, seed) == Path(name)


@pytest.mark.parametrize(
    "override",
    [
        *(f"{section}.{name}=x" for section, names in FREE.items() for name in names),
        *(f"{section}=5" for section in FREE_SECTIONS),
        "checkpoint.every=2",
        "checkpoint={keep: 7}",
        "accelerator={log_with: [tensorboard, wandb], cpu: true}",
    ],
)
def test_what_does_not_change_the_numbers_is_no_part_of_the_name(override: str) -> None:
    assert run_folder(Path("quickstart.yaml"), ["epochs=3", override], 0) == Path(
        "runs/quickstart-epochs=3/seed0"
    )


@pytest.mark.parametrize("override", ["init=../../../x", "a=/etc", "x=a\\b", "x=a b;rm *", "x=\n"])
def test_no_override_leads_out_of_the_folder_of_runs(override: str) -> None:
    folder = run_folder(Path("q.yaml"), [override], 0)
    assert len(folder.parts) == 3
    assert not set(folder.parts[1]) & set("/\\ ;*\n")


# A new run


def test_a_new_run_holds_its_recipe(tmp_path: Path) -> None:
    start(tmp_path / "a" / "b", RECIPE)
    assert (tmp_path / "a" / "b" / "recipe.yaml").read_text(encoding="utf-8") == RECIPE.as_yaml()


def test_an_empty_folder_can_be_started_in(tmp_path: Path) -> None:
    start(tmp_path, RECIPE)
    assert (tmp_path / "recipe.yaml").exists()


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    start(tmp_path / "run", RECIPE)
    with pytest.raises(
        RunError,
        match="exists; continue that run with --resume, or write elsewhere with --out FOLDER",
    ):
        start(tmp_path / "run", OTHER)
    assert (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8") == RECIPE.as_yaml()


def test_a_file_is_no_folder_to_write_into_or_to_resume(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for act in (start, check_same_recipe):
        with pytest.raises(RunError, match="file is no folder; write elsewhere with --out FOLDER"):
            act(tmp_path / "file", RECIPE)


@pytest.mark.parametrize("hidden", [".unfinished", "notes.txt"])
def test_a_folder_that_holds_anything_is_not_written_into(tmp_path: Path, hidden: str) -> None:
    (tmp_path / hidden).write_text("mine")
    with pytest.raises(RunError, match="--resume"):
        start(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [hidden]


def test_a_file_in_place_of_the_folder_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(RunError, match="--out"):
        start(path, RECIPE)
    assert path.read_text() == "mine"


def test_a_folder_that_can_not_be_made_offers_another_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"can't be written: .*; write elsewhere with --out FOLDER"):
        start(tmp_path / "file" / "run", RECIPE)


def test_a_name_too_long_for_the_disk_offers_another_place(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--out FOLDER"):
        start(tmp_path / ("x" * 300) / "seed0", RECIPE)


# Resuming


def test_the_same_recipe_may_go_on(tmp_path: Path) -> None:
    start(tmp_path / "run", RECIPE)
    check_same_recipe(tmp_path / "run", RECIPE)
    assert (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8") == RECIPE.as_yaml()


def test_another_recipe_may_not_and_every_difference_is_shown(tmp_path: Path) -> None:
    start(tmp_path / "run", RECIPE)
    with pytest.raises(RunError) as caught:
        check_same_recipe(tmp_path / "run", OTHER)
    first, *rest = str(caught.value).splitlines()
    assert (
        first
        == f"{tmp_path / 'run'} began with another recipe; give the same, or --out for a new run"
    )
    assert rest == [
        "  optimizer: was {'lr': 0.1}, is {'lr': 0.2}",
        "  masks: was None, is {'sparsity': 0.9}",
    ]


def test_a_section_that_was_taken_out_is_a_difference(tmp_path: Path) -> None:
    start(tmp_path / "run", OTHER)
    with pytest.raises(RunError, match=r"masks: was \{'sparsity': 0.9\}, is None"):
        check_same_recipe(tmp_path / "run", RECIPE)


@pytest.mark.parametrize("exists", [False, True])
def test_where_no_run_is_nothing_can_be_resumed(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "nothing"
    with pytest.raises(RunError, match="holds no run to resume; start it without --resume"):
        check_same_recipe(folder, RECIPE)


@pytest.mark.parametrize(
    "text", ["", "model: {", "- 1\n", "data: 3\n", "data: [1]\n", "accelerator: x\n"], ids=repr
)
def test_a_damaged_recipe_of_a_run_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match=str(tmp_path)):
        check_same_recipe(tmp_path, RECIPE)


# Stopping


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in StopRequest.SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_without_a_signal_nothing_stops() -> None:
    with StopRequest() as stop:
        assert not stop.wanted()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_wish_to_stop_after_the_step(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.wanted()
        assert stop.wanted()


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_kill_what_is_being_written() -> None:
    """A launcher and who stops it may both send one."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("received", [False, True])
def test_the_handlers_of_before_come_back(fails: bool, received: bool) -> None:
    def mine(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    try:
        with StopRequest():
            assert all(signal.getsignal(number) not in before for number in StopRequest.SIGNALS)
            if received:
                os.kill(os.getpid(), signal.SIGINT)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


@pytest.mark.parametrize(
    ("this", "other"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_one_rank_asked_to_stop_stops_all(
    monkeypatch: pytest.MonkeyPatch, this: bool, other: bool
) -> None:
    def all_reduce(tensor: torch.Tensor, operation: object, group: object) -> None:
        assert group == "between hosts"
        tensor.clamp_(min=int(other))

    ended: list[object] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: "between hosts")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    with StopRequest(ranks=2) as stop:
        if this:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == (this or other)
    assert ended == ["between hosts"]


@pytest.mark.parametrize(
    "change",
    [
        {"data": {**RECIPE.data, "batch_size": 4}},
        {"data": {**RECIPE.data, "root": "elsewhere", "workers": 3}},
        {"accelerator": {"gradient_accumulation_steps": 2}},
        {"checkpoint": {"keep": 7}},
        {"stop_after_bad_losses": 5},
    ],
)
def test_what_does_not_change_the_numbers_may_be_another(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    start(tmp_path / "run", RECIPE)
    check_same_recipe(tmp_path / "run", dataclasses.replace(RECIPE, **change))


@pytest.mark.parametrize("text", ["model: {}\n", "data: null\n", "epochs: 3\n"], ids=repr)
def test_a_recipe_that_was_cut_off_is_another_one(tmp_path: Path, text: str) -> None:
    start(tmp_path / "run", RECIPE)
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match="began with another recipe"):
        check_same_recipe(tmp_path / "run", RECIPE)
