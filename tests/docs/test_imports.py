"""What importing brings in, which way imports point, and what is public."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import itop_prune_tools
import pytest

import itop_prune

PACKAGE = Path(itop_prune.__file__).parent
ROOT = PACKAGE.parent
TOOLS, TESTS = ROOT / "tools", ROOT / "tests"

# Each part may import those of the rows below it, and of its own row those that need no circle.
MAP = (PACKAGE / "README.md").read_text(encoding="utf-8").partition("## Imports")[2]
PACKAGE_ORDER = [set(line.split(", ")) for line in MAP.split("```")[1].split("\n") if line][::-1]
TOOLS_ORDER = [
    {"config", "data", "models"},
    {"run_folder", "training", "reports"},
    {"benchmarks", "checks", "console"},
]


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert len(found) > 20
    return found


def module(source: Path) -> str:
    """The dotted name under which a source is imported."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    parts = ("itop_prune_tools", *parts[1:]) if parts[0] == "tools" else parts
    return ".".join(parts).removesuffix(".__init__")


def imports(source: Path) -> Iterator[tuple[str, str]]:
    """Yield what a source imports: the full name of a module, and a name of it or nothing."""
    inside = module(source).split(".")
    package = inside if source.stem == "__init__" else inside[:-1]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*above, node.module] if node.module else above)
            yield from ((name, alias.name) for alias in node.names)


def graph(folder: Path) -> dict[str, set[str]]:
    """By module of a folder, the modules of the folder that it imports."""
    known = {module(source) for source in sources(folder)}
    found: dict[str, set[str]] = {}
    for source in sources(folder):
        used = found.setdefault(module(source), set())
        for name, member in imports(source):
            inner = f"{name}.{member}"
            used |= {inner if inner in known else name} & known
    return found


# --- what importing brings in --------------------------------------------------------------------


def in_fresh_interpreter(statement: str) -> str:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}"
    command = [sys.executable, "-W", "error", "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stderr == ""
    return found.stdout


def test_importing_the_package_brings_in_nothing_beyond_torch_and_prints_nothing() -> None:
    found = in_fresh_interpreter(
        "import torch, torch.nn.utils.prune; before = set(sys.modules); "
        "import itop_prune; print(*sys.modules.keys() - before)"
    )
    assert found.count("\n") == 1
    names = {name.partition(".")[0] for name in found.split()}
    assert {name for name in names if name not in sys.stdlib_module_names} == {"itop_prune"}


def test_the_package_imports_without_what_the_runner_needs() -> None:
    absent = ["accelerate", "timm", "rich", "yaml", "torchvision", "safetensors", "matplotlib"]
    blocked = f"sys.modules.update(dict.fromkeys({absent}))"  # an import of None fails
    assert in_fresh_interpreter(f"{blocked}; import itop_prune; print('done')") == "done\n"


@pytest.mark.parametrize("absent", ["safetensors", "numpy"])
def test_small_files_say_what_to_install(absent: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    program = f"""
import torch
sys.modules[{absent!r}] = None  # an import of None fails
import itop_prune
layer = torch.nn.Linear(8, 4)
itop_prune.apply(layer, 0.5)
for call in (itop_prune.save, itop_prune.load):
    try:
        call(layer, {str(path)!r})
    except ImportError as error:
        print(error)
"""
    lines = in_fresh_interpreter(program).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert absent in line.partition(";")[0]
        assert line.endswith("pip install safetensors numpy")
    assert path.read_bytes() == b""


# --- which way imports point ---------------------------------------------------------------------


def test_modules_of_the_package_import_each_other_in_no_circle() -> None:
    graphlib.TopologicalSorter(graph(PACKAGE)).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("folder", "order"),
    [(PACKAGE, PACKAGE_ORDER), (TOOLS, TOOLS_ORDER)],
    ids=["package", "tools"],
)
def test_imports_point_downwards(folder: Path, order: list[set[str]]) -> None:
    row = {part: number for number, parts in enumerate(order) for part in parts}
    modules = graph(folder)

    def part(name: str) -> str:
        return [*name.split("."), "itself"][1]

    # Commands of the tools and the package itself import anything; nothing imports them.
    tops = {part(name) for name in modules} - row.keys()
    commands = {source.stem for source in TOOLS.glob("*.py")} - {"__init__"}
    assert tops == ({"itself"} if folder == PACKAGE else {"itself", *commands})
    upwards = [
        f"{one} imports {other}"
        for one, used in modules.items()
        for other in used
        if part(one) in row and row.get(part(other), len(order)) > row[part(one)]
    ]
    assert upwards == []


def test_the_package_imports_no_tool_and_no_logging() -> None:
    commands = {source.stem for source in TOOLS.glob("*.py")}
    never = commands | {"itop_prune_tools", "tools", "logging"}
    for source in sources(PACKAGE):
        used = {name.partition(".")[0] for name, _ in imports(source)}
        assert used & never == set(), source


def test_tools_and_tests_use_no_private_name_of_the_package() -> None:
    private = [
        f"{source.relative_to(ROOT)}: {name} {member}"
        for source in (*sources(TOOLS), *sources(TESTS))
        for name, member in imports(source)
        if name.startswith("itop_prune") and re.search(r"(^|\.)_(?!_)", f"{name}.{member}")
    ]
    assert private == []


def test_no_test_imports_another_test() -> None:
    for source in sources(TESTS):
        used = {part for name, member in imports(source) for part in (*name.split("."), member)}
        assert {part for part in used if part.startswith("test_")} == set(), source


def test_no_command_is_named_like_a_module_of_the_standard_library() -> None:
    assert {source.stem for source in TOOLS.glob("*.py")} & sys.stdlib_module_names == set()


# --- what is public ------------------------------------------------------------------------------


def test_every_public_name_exists_once_and_those_of_the_design_are_public() -> None:
    public = itop_prune.__all__
    assert [name for name in public if not hasattr(itop_prune, name)] == []
    assert len(public) == len(set(public))
    functions = {"apply", "find_masks", "remove", "summarize", "flops", "deploy"}
    files = {"save", "load", "dense_state_dict"}
    menus = {"criteria", "distributions", "schedules", "redistribution", "saliency", "topology"}
    assert {"ITOP", "MaskScheduler", *functions, *files, *menus} <= set(public)


def test_the_package_is_typed_and_has_a_version_that_packaging_understands() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", itop_prune.__version__)


def test_the_tools_are_those_of_this_repository() -> None:
    assert Path(itop_prune_tools.__file__).parent.resolve() == TOOLS
