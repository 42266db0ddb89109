"""The README is true: its Python runs, its commands parse, and what it names exists."""

import concurrent.futures
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from itop_prune_tools.config.packaged import packaged_recipes
from itop_prune_tools.console.command import main as console
from torch import nn

import itop_prune
from itop_prune.methods.presets import PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("\n## ")[0]
RESULTS = ROOT / "recipes" / "results"


def blocks() -> list[tuple[str, str, str]]:
    """Collect heading, language and text of every fenced block."""
    found, heading, language, lines = [], "", None, []
    for line in README.splitlines():
        if language is None and line.startswith("```"):
            language, lines = line[3:], []
        elif line == "```":
            found.append((heading, language, "\n".join(lines) + "\n"))
            language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def in_language(language: str) -> list[tuple[str, str]]:
    return [(heading, text) for heading, name, text in blocks() if name == language]


def commands() -> list[list[str]]:
    """Split the bash blocks into commands, without comments."""
    lines = [line for _, text in in_language("bash") for line in text.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def tool_commands() -> list[list[str]]:
    """Collect every command of tools/ as the script and its arguments, each once."""
    found = []
    for command in commands():
        script = next(
            (place for place, word in enumerate(command) if word.startswith("tools/")), None
        )
        if script is not None and command[script:] not in found:
            found.append(command[script:])
    return found


def table(first_column: str) -> list[list[str]]:
    """Read the rows of the first table whose header begins with this cell."""
    lines = README[README.index(f"| {first_column} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# Python blocks

LIBRARIES = re.compile(r"^(?:import|from) (?:lightning|peft|transformers)", flags=re.MULTILINE)
"""A block with one of them takes long to import it."""


def test_there_are_python_blocks():
    assert len(in_language("python")) >= 5


def run_block(block: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "block.py").write_text(block, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-W", "default", "block.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess]:
    """Run the Python blocks without other libraries, two at a time."""
    root = tmp_path_factory.mktemp("blocks")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {
            block: pool.submit(run_block, block, root / str(number))
            for number, (_, block) in enumerate(in_language("python"))
            if not LIBRARIES.search(block)
        }
        return {block: job.result() for block, job in jobs.items()}


def with_libraries(wanted: bool) -> pytest.MarkDecorator:
    chosen = [
        pytest.param(block, id=heading)
        for heading, block in in_language("python")
        if bool(LIBRARIES.search(block)) == wanted
    ]
    return pytest.mark.parametrize("block", chosen)


def check_finished(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    warned = r"^.*(?:block\.py|itop_prune/).*Warning.*$"
    assert re.findall(warned, done.stderr, flags=re.MULTILINE) == []


@pytest.mark.slow
@with_libraries(True)
def test_a_python_block_with_another_library_runs_in_a_process_of_its_own(block, tmp_path):
    check_finished(run_block(block, tmp_path / "block"))


@with_libraries(False)
def test_a_python_block_runs_in_a_process_of_its_own(block, finished):
    done = finished[block]
    check_finished(done)
    if "sys.orig_argv" in block:  # the loop that goes on in a second process
        assert re.findall(r"stopped after step (\d+)", done.stdout) == ["200", "400"]
        assert "sparsity 0.9500" in done.stdout
        assert "updates=8" in done.stdout


# The first screen


def test_the_first_screen_has_the_diff_and_the_picture():
    assert len(re.findall(r"^\+ ", FIRST_SCREEN, flags=re.MULTILINE)) == 3
    assert "](recipes/results/accuracy_r_s.svg)" in FIRST_SCREEN
    assert len(FIRST_SCREEN.splitlines()) <= 60


def test_the_two_commands_are_those_that_the_ci_looks_for():
    wanted = re.findall(
        r"command_with \"([^\"]+)\"", (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    )
    assert len(wanted) == 2
    for pattern in wanted:
        of_screen = [
            line
            for line in FIRST_SCREEN.splitlines()
            if re.search(rf"^python3\.11 -m venv .*{pattern}", line)
        ]
        of_readme = re.findall(rf"^python3\.11 -m venv .*{pattern}.*$", README, flags=re.MULTILINE)
        assert len(of_screen) == 1
        assert of_readme == of_screen
    quickstart, tests = (text.strip() for _, text in in_language("bash")[:2])
    assert quickstart.endswith("tools/train.py recipes/quickstart.yaml")
    assert tests.endswith(".venv/bin/python -m pytest -n auto")


# Commands


def test_there_are_commands():
    assert len(tool_commands()) >= 10


@pytest.mark.parametrize("command", tool_commands(), ids=" ".join)
def test_a_command_of_tools_parses(command, capsys, monkeypatch, tmp_path):
    """The runner checks its recipe in a dry run; the other tools have the flags in their help."""
    tool, *arguments = command
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    if tool == "tools/train.py":
        monkeypatch.chdir(tmp_path)
        arguments = [str(ROOT / arguments[0]), *arguments[1:], "--dry-run"]
        flags = []
    else:
        flags = [word for word in arguments if word.startswith("--")]
        arguments = ["--help"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / tool), *arguments])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / tool), run_name="__main__")

    printed = capsys.readouterr()
    is_missing = "resnet50" in " ".join(command) and "train is not a folder; " in printed.err
    assert ended.value.code == is_missing or ended.value.code is None, printed.err
    assert [flag for flag in flags if flag not in printed.out] == []


def console_commands() -> list[list[str]]:
    """Collect every command of `itop-prune`, also behind a launcher, without redirections."""
    found = []
    for command in commands():
        for start in ("itop-prune", "itop_prune_tools"):
            if start in command:
                words = command[command.index(start) + 1 :]
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


def test_there_are_commands_of_the_console():
    assert {command[0] for command in console_commands()} >= {"train", "recipes", "evaluate"}


@pytest.mark.parametrize("command", console_commands(), ids=" ".join)
def test_a_command_of_the_console_has_its_recipe_and_its_flags(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["itop-prune"])
    name, *arguments = command
    if name == "train":
        assert arguments[0] in packaged_recipes()
    with pytest.raises(SystemExit) as ended:
        console([name, "--help"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert [word for word in arguments if word.startswith("--") and word not in printed] == []


# Names, links and pictures


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\b(?:recipes|tools|itop_prune|tests)/[\w./-]+\.\w+", README))
    links = set(re.findall(r"\]\((?!https?://|#)([^)]+)\)", README))
    pictures = set(re.findall(r"<img [^>]*src=\"([^\"]+)\"", README))
    assert named
    assert links
    assert [name for name in sorted(named | links | pictures) if not (ROOT / name).exists()] == []


def test_links_of_all_other_pages_lead_to_files():
    pages = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("itop_prune", "tools", "recipes", "recipes/results"):
        pages += (ROOT / folder).glob("*.md")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        for name in re.findall(r"recipes/results/[\w-]+\.md", recipe.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{recipe.name}: {name}"


def pictures() -> list[tuple[str, str]]:
    of_markdown = [(path, alt) for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)]
    of_html = [
        tuple(re.search(rf'{name}="([^"]*)"', tag)[1] for name in ("src", "alt"))
        for tag in re.findall(r"<img [^>]*>", README)
    ]
    return of_markdown + of_html


def test_pictures_are_small_and_their_alt_texts_say_what_is_seen():
    assert len(pictures()) >= 3
    for path, alt in pictures():
        assert (ROOT / path).stat().st_size <= 120_000, path
        assert len(alt) > 60, path
        assert re.search(r"\d", alt), path


def test_the_first_picture_shows_the_numbers_of_the_results_page():
    svg = (RESULTS / "accuracy_r_s.svg").read_text(encoding="utf-8")
    page = (RESULTS / "methods.md").read_text(encoding="utf-8")
    rows = page[page.index("| SET-ITOP, every |") :].partition("\n\n")[0].splitlines()[2:]
    expected = {}
    for row in rows:
        every, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
        for times, cell in zip("125", cells, strict=True):
            accuracy, explored, _ = cell.split(" / ")
            expected[times, every.replace(",", "")] = (explored, accuracy)
    place = r"translate\(([\d.]+) ([\d.]+)\)\">.*?"
    title = r"<title>(\d) × as long, every (\d+): R_s ([\d.]+), ([\d.]+) %"
    shown = re.findall(place + title, svg)

    assert {(times, every): numbers for _, _, times, every, *numbers in shown} == {
        key: list(numbers) for key, numbers in expected.items()
    }
    for x, y, _, _, explored, accuracy in shown:  # and each lies where it says
        assert float(x) == pytest.approx(66 + 664 * float(explored), abs=0.1)
        assert float(y) == pytest.approx(380 - 318 * (float(accuracy) - 86) / 4.5, abs=0.1)


# Menus and methods


def test_the_menus_name_every_built_in():
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


def methods() -> list[list[str]]:
    return [[cell.strip("`") for cell in row] for row in table("method")]


def arguments_of(text: str, **names: object) -> dict[str, object]:
    return eval(f"dict({text})", names)


def test_a_row_of_the_methods_is_the_preset_of_its_name_and_each_preset_has_one():
    rows = [row for row in methods() if row[2]]
    assert {row[0] for row in rows} == PRESETS.keys()
    for name, to_apply, every, to_regrow in rows:
        given = {} if to_regrow == "the defaults" else arguments_of(to_regrow)
        for_apply, for_scheduler = itop_prune.preset(name, sparsity=0.98, total_steps=12_000)
        assert for_apply == arguments_of(to_apply), name
        assert for_scheduler == {"every": int(every), **given}, name


@pytest.mark.parametrize("row", methods(), ids=lambda row: row[0])
def test_a_row_of_the_methods_can_be_built(row):
    _, to_apply, every, to_regrow = row
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    batches = [(torch.randn(32, 64), torch.arange(32) % 10)]
    found = itop_prune.saliency.snip(model, batches, nn.functional.cross_entropy)

    masks = itop_prune.apply(model, **arguments_of(to_apply, found=found))

    if every:
        given = {} if to_regrow == "the defaults" else arguments_of(to_regrow)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regrow = itop_prune.MaskScheduler(
            masks, optimizer, total_steps=12_000, every=int(every), **given
        )
        assert len(regrow.update_steps()) >= 8
    else:
        assert to_regrow == "no scheduler"


@pytest.mark.parametrize("row", [row for row in methods() if row[2]], ids=lambda row: row[0])
def test_a_row_of_the_methods_says_what_its_recipe_does(row):
    name, to_apply, every, to_regrow = row
    pattern = f"fashion_mnist_lenet300_*98_{name.lower().replace('/', '')}.yaml"
    path = min((ROOT / "recipes").glob(pattern))  # a tuned one is for names without another
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {} if to_regrow == "the defaults" else arguments_of(to_regrow)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(itop_prune.MaskScheduler).parameters.items()
    }

    assert {**defaults, **recipe["regrow"]} == {**defaults, "every": int(every), **given}
    masks = {key: value for key, value in recipe["masks"].items() if key != "storage"}
    assert {"method": "ERK", **masks} == {"method": "ERK", **arguments_of(to_apply)}
