"""The README is true: its Python runs, its commands parse, its first screen has what a newcomer needs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from itop_prune_tools.training import loop as train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def runner_arguments() -> list[list[str]]:
    found = [command for command in commands() if "tools/train.py" in command]
    return [command[command.index("tools/train.py") + 1 :] for command in found]


def test_the_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "sparsity 0.95" in capsys.readouterr().out


def test_it_has_at_most_300_lines():
    assert len(README.splitlines()) <= 300


def test_the_first_screen_has_the_diff_and_the_two_commands():
    screen = "\n".join(README.splitlines()[:60])
    assert screen.count("\n+ ") + screen.count("\n+     ") >= 3
    setup = [line for line in screen.splitlines() if line.startswith("python3.11 -m venv")]
    assert len(setup) == 2
    assert "tools/train.py recipes/quickstart.yaml" in setup[0]
    assert "pytest" in setup[1]


@pytest.mark.parametrize("arguments", runner_arguments(), ids=" ".join)
def test_the_commands_of_the_runner_parse_and_their_recipes_are_sound(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = train.parse(arguments)
    train.read(args.recipe, args.overrides, data=train.open_data, augment=train.augmentation_of)


def other_tools() -> list[list[str]]:
    return [part for part in commands() if part[0] == "python" and part[1] != "tools/train.py"]


@pytest.mark.parametrize("command", other_tools(), ids=" ".join)
def test_the_flags_of_the_other_tools_are_in_their_help(command):
    done = subprocess.run(
        [sys.executable, command[1], "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [flag for flag in command[2:] if flag.startswith("--") and flag not in done.stdout] == []


def test_every_file_and_recipe_that_is_named_exists():
    named = set(re.findall(r"\b(?:recipes|tools|itop_prune|tests)/[\w./-]+\.\w+", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_menus_name_every_built_in():
    import itop_prune

    for menu in (
        itop_prune.criteria.PRUNE,
        itop_prune.criteria.GROW,
        itop_prune.distributions.DISTRIBUTIONS,
        itop_prune.schedules.SCHEDULES,
        itop_prune.redistribution.REDISTRIBUTIONS,
        itop_prune.saliency.SALIENCY,
    ):
        assert menu
        assert [name for name in menu if f"`{name}`" not in README] == []
