"""The command `itop-prune`: its subcommands, recipes by name, and one clear line for what lacks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import ROOT
from itop_prune_tools.config.packaged import packaged_recipes
from itop_prune_tools.config.recipe import read_recipe
from itop_prune_tools.console.command import COMMANDS, main

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, and put back the name that `main` gives the program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["itop-prune"])


# --- subcommands ---------------------------------------------------------------------------------


def test_without_arguments_it_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert not ended.value.code
    printed = capsys.readouterr().out
    for name in ("train", "dry-run", "evaluate", "compare", "report", "export", "recipes"):
        assert re.search(rf"^ +{name} +\w", printed, flags=re.MULTILINE)


def test_an_unknown_command_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian", "quickstart"])
    assert ended.value.code == 2
    assert "dry-run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_name_and_speaks_of_no_clone_alone(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: itop-prune {command} ")
    assert "python tools/" not in printed


def test_a_dry_run_of_a_packaged_recipe_prints_its_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dry-run", "quickstart", "epochs=2"]) == 0
    assert "2 epochs of 38 steps, 76 in all" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_evaluate_needs_no_recipe_for_a_run_and_takes_a_folder_of_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quickstart", "epochs=1", "--seeds", "2"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "runs/quickstart-epochs=1/seed1"]) == 0
    one = capsys.readouterr().out
    assert re.fullmatch(r"test_loss [\d.]+ +test_top1 [\d.]+\n", one)

    assert main(["evaluate", "runs/quickstart-epochs=1"]) == 0
    both = capsys.readouterr().out
    assert both.count("test_top1") == 2
    assert one in both

    assert main(["evaluate", "nowhere"]) == 1
    assert "nowhere does not exist; give a run folder" in capsys.readouterr().err

    weights = (tmp_path / "runs/quickstart-epochs=1/seed1/model.safetensors").rename(
        "w.safetensors"
    )
    assert main(["evaluate", str(weights)]) == 1
    assert "--recipe" in capsys.readouterr().err
    assert main(["evaluate", str(weights), "--recipe", "quickstart"]) == 0
    assert capsys.readouterr().out == one


# --- recipes -------------------------------------------------------------------------------------


def test_the_list_has_a_line_for_each_recipe_with_what_it_trains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == "quickstart"
    assert sorted(name for name, _ in lines) == RECIPES
    for name, trains in lines:
        if name.startswith("fashion_mnist"):
            assert "FashionMNIST" in trains
        assert len(trains) < 80


def test_a_copied_recipe_is_the_packaged_one_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "quickstart"]) == 0
    copied = tmp_path / "my.yaml"
    copied.write_text(capsys.readouterr().out, encoding="utf-8")
    assert copied.read_bytes() == packaged_recipes()["quickstart"].read_bytes()
    assert read_recipe(copied) == read_recipe(packaged_recipes()["quickstart"])


def test_a_file_comes_before_a_packaged_recipe_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = packaged_recipes()["quickstart"].read_text(encoding="utf-8")
    (tmp_path / "quickstart").write_text(text.replace("epochs: 100", "epochs: 3"), encoding="utf-8")
    assert main(["dry-run", "quickstart"]) == 0
    assert "3 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "dry-run", "recipes"])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("quikstart", "(nearest: quickstart)"),
        ("granet", "(nearest: fashion_mnist_lenet300_global98_granet, "),
        ("recipes/quickstart.yaml", "the packaged recipe is called quickstart"),
        ("xyz", "itop-prune recipes lists them"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest_names(
    command: str, name: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert nearest in line


def test_an_unknown_recipe_of_an_export_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.safetensors").touch()
    assert main(["export", "w.safetensors", "w.onnx", "--to", "onnx", "--recipe", "quikstart"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "(nearest: quickstart)" in line


# --- what lacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "recipes"])
def test_without_the_extra_it_says_in_one_line_what_to_install(command: str) -> None:
    absent = ["accelerate", "timm", "rich", "yaml", "torchvision", "safetensors", "matplotlib"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "  # an import of None fails
        f"from itop_prune_tools.console.command import main; sys.exit(main([{command!r}, 'x']))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert "pip install 'itop_prune[train]'" in line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write")
def test_a_folder_that_can_not_be_written_is_one_line_that_offers_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    assert main(["train", "quickstart", "epochs=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be written" in line
    assert "--out FOLDER" in line


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback() -> None:
    command = [sys.executable, "-m", "itop_prune_tools", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
