"""The folder of a run: named by its recipe and seed, and never written over."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.run_folder import folder
from itop_prune_tools.run_folder.folder import (
    FREE,
    FREE_SECTIONS,
    RunError,
    check_same_recipe,
    opened,
    run_folder,
)
from itop_prune_tools.run_folder.lock import LOCK

RECIPE = Recipe(
    model={"model_name": "lenet300"},
    data={"name": "digits", "batch_size": 8},
    optimizer={"lr": 0.1},
    epochs=3,
)
OTHER = Recipe(
    model=RECIPE.model, data=RECIPE.data, optimizer={"lr": 0.2}, epochs=3, masks={"sparsity": 0.9}
)


def start(folder: Path, recipe: Recipe) -> None:
    with opened(folder, recipe, resume=False):
        pass


# Names


@pytest.mark.parametrize(
    ("overrides", "seed", "name"),
    [
        ([], 0, "runs/quickstart/seed0"),
        (["seed=3"], 3, "runs/quickstart/seed3"),
        (["masks.sparsity=0.98"], 0, "runs/quickstart-masks.sparsity=0.98/seed0"),
        (["epochs=3", "multiplier=2"], 1, "runs/quickstart-epochs=3-multiplier=2/seed1"),
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


def test_a_folder_that_can_not_be_made_offers_another_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"can't be written: .*; write elsewhere with --out FOLDER"):
        start(tmp_path / "file" / "run", RECIPE)


@pytest.mark.parametrize("left", [LOCK, "unfinished-0a1b2c3d-recipe.yaml"])
def test_a_folder_in_which_a_start_was_killed_is_free(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("")
    start(tmp_path, RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "recipe.yaml"]


# Two at once


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_keeps_others_out_of_its_folder(tmp_path: Path, resume: bool) -> None:
    if resume:
        start(tmp_path / "run", RECIPE)
    with opened(tmp_path / "run", RECIPE, resume):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunError) as caught, opened(tmp_path / "run", RECIPE, resume=True):
            pass
        assert sorted(tmp_path.rglob("*")) == before
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is in use by another run, and only one may write into it; wait until "
        "that one ends, or write elsewhere with --out FOLDER"
    )
    with opened(tmp_path / "run", RECIPE, resume=True):
        pass


def test_of_two_that_start_at_once_the_slower_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One starts and ends between the first look of the other and its lock."""
    locked = folder.locked

    def start_before(path: Path) -> AbstractContextManager[None]:
        monkeypatch.setattr(folder, "locked", locked)
        start(path, RECIPE)
        return locked(path)

    monkeypatch.setattr(folder, "locked", start_before)
    with pytest.raises(RunError, match="run exists; continue that run with --resume"):
        start(tmp_path / "run", OTHER)
    assert (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8") == RECIPE.as_yaml()


def test_only_a_run_that_holds_the_lock_removes_what_was_left_unfinished(tmp_path: Path) -> None:
    start(tmp_path, RECIPE)
    ours = [
        tmp_path / "unfinished-0a1b2c3d-model.safetensors",
        tmp_path / "checkpoints" / "unfinished-0a1b2c3d-step-000000005" / "state.pt",
    ]
    others = [tmp_path / "unfinished-0a1b2c3d-report.html", tmp_path / "unfinished-notes.txt"]
    with opened(tmp_path, RECIPE, resume=True):
        for path in (*ours, *others):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        with pytest.raises(RunError, match="in use"), opened(tmp_path, RECIPE, resume=True):
            pass
        assert all(path.exists() for path in (*ours, *others))

    with opened(tmp_path, RECIPE, resume=True):
        assert list((tmp_path / "checkpoints").iterdir()) == []
        assert not ours[0].exists()
        assert all(path.exists() for path in others)


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
