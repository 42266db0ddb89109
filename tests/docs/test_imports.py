"""What importing the package brings in, what it offers, and what its sources never do."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import itop_prune

PACKAGE = Path(itop_prune.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def imported_by(statement: str) -> set[str]:
    """Return the top-level names in sys.modules after a statement, in a fresh interpreter."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print('MODULES', *sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    names = next(line for line in found.stdout.splitlines() if line.startswith("MODULES")).split()[
        1:
    ]
    return {name.partition(".")[0] for name in names}


def test_importing_the_package_imports_nothing_beyond_torch() -> None:
    found = imported_by("import itop_prune")
    assert "itop_prune" in found
    beyond = found - imported_by("import torch, torch.nn.utils.prune") - {"itop_prune"}
    assert {name for name in beyond if name not in sys.stdlib_module_names} == set()


def test_importing_the_package_does_not_import_the_recipes() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import itop_prune; print(*sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "itop_prune.layers.handle" in found.stdout.split()
    assert "itop_prune_tools.config.recipe" not in found.stdout.split()


def test_the_package_imports_without_what_the_runner_needs() -> None:
    absent = ["accelerate", "timm", "rich", "yaml", "torchvision", "safetensors", "matplotlib"]
    statement = (
        f"sys.modules.update(dict.fromkeys({absent}))"  # None in sys.modules: the import fails
    )
    assert "itop_prune" in imported_by(f"{statement}; import itop_prune")


def test_importing_the_package_prints_and_warns_nothing() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, torch.nn.utils.prune; import itop_prune"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True
    )
    assert (found.stdout, found.stderr) == ("", "")


@pytest.mark.parametrize("name", itop_prune.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert hasattr(itop_prune, name)


def test_the_public_names_are_named_once() -> None:
    assert len(itop_prune.__all__) == len(set(itop_prune.__all__))  # their order is ruff's


def test_the_names_of_the_design_are_public() -> None:
    names = {
        "apply",
        "find_masks",
        "remove",
        "ITOP",
        "MaskScheduler",
        "summarize",
        "dense_state_dict",
        "load",
    }
    menus = {"criteria", "distributions", "schedules", "topology"}
    assert names | menus <= set(itop_prune.__all__)


def test_the_version_is_one_that_packaging_understands() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", itop_prune.__version__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_there_are_sources_to_look_at() -> None:
    assert len(SOURCES) > 5


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_package_neither_prints_nor_logs(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")), (
                node.lineno
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert "logging" not in {name.partition(".")[0] for name in names}, node.lineno


def imports_inside() -> dict[str, set[str]]:
    """Return, by module of the package, the modules of the package that it imports."""
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
    }
    known, imports = set(names.values()), {}
    for source, name in names.items():
        imports[name] = set[str]()
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imports[name] |= inner & known or {node.module}
    return imports


def test_imports_inside_the_package_make_no_circle() -> None:
    imports = imports_inside()
    assert any(imports.values())
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_what_trains_knows_nothing_of_what_comes_before_and_after() -> None:
    imports = imports_inside()
    outer = {
        name for name in imports if name.startswith(("itop_prune.files", "itop_prune.inference"))
    }
    assert outer
    assert {
        name: used
        for name in imports.keys() - outer - {"itop_prune"}
        if (used := imports[name] & outer)
    } == {}


def test_there_are_tools_to_look_at() -> None:
    assert TOOLS


def test_no_tool_is_named_like_a_module_of_the_standard_library() -> None:
    assert [path.name for path in TOOLS if path.stem in sys.stdlib_module_names] == []


def test_the_package_never_imports_a_tool() -> None:
    tools = {path.stem for path in TOOLS}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert not tools & {name.partition(".")[0] for name in names}, (
                    f"{source.name}:{node.lineno}"
                )
