"""What is published: wheel and sdist are complete, and the wheel alone trains the quickstart."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import itop_prune

ROOT = Path(__file__).parents[2]
for_pypi = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["for_pypi"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELATIVE = r"\]\((?!https?:|#)|<img src=\"(?!https?:)"


# --- the page for PyPI ---------------------------------------------------------------------------


@pytest.mark.parametrize("repository", [None, "https://host.example/itop_prune"])
def test_the_page_for_pypi_has_no_relative_link_and_the_code_as_it_is(
    repository: str | None,
) -> None:
    page = for_pypi(README, repository)
    code = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
    assert re.findall(RELATIVE, code.sub("", README))
    assert re.findall(RELATIVE, code.sub("", page)) == []
    assert code.findall(page) == code.findall(README)


def test_links_and_pictures_get_the_address_of_the_repository_or_become_text() -> None:
    text = (
        "See [the map](a/b.md), [web](https://x.example) and\n\n![Loss falls.](c.svg)\n\n"
        '<img src="d.png" width="9" alt="R_s">\n'
    )
    assert for_pypi(text, None) == (
        "See the map, [web](https://x.example) and\n\n*Picture: Loss falls.*\n\n*Picture: R_s*\n"
    )
    assert for_pypi(text, "https://h.example/r") == (
        "See [the map](https://h.example/r/blob/HEAD/a/b.md), [web](https://x.example) and\n\n"
        "![Loss falls.](https://h.example/r/raw/HEAD/c.svg)\n\n"
        "![R_s](https://h.example/r/raw/HEAD/d.png)\n"
    )


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == itop_prune.__version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2102.02887"


# --- wheel and sdist -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git would commit, so that nothing left over from other builds gets in."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    folder = tmp_path_factory.mktemp("sources")
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def files(sources: Path) -> set[str]:
    return {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dist(sources: Path, files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both, each in an environment of its own: the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_sdist_holds_every_file(dist: Path, files: set[str]) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files - held == set()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_recipe_and_no_results(
    dist: Path, files: set[str]
) -> None:
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < 1_000_000
    with zipfile.ZipFile(path) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}

    installed = {"tools": "itop_prune_tools", "recipes": "itop_prune_recipes"}
    needed = set()
    for name in files:
        top, _, rest = name.partition("/")
        is_code = top in ("itop_prune", *installed) and name.endswith(".py")
        if is_code or re.fullmatch(r"recipes/[^/]+\.yaml", name):
            needed.add(f"{installed.get(top, top)}/{rest}")
    assert needed - held == set()
    extra = {Path(name).name for name in held - needed}
    assert extra == {"py.typed", "digits.npz", "page.css"}


# --- a new user ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bin_folder(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment that sees the heavy packages, but no checkout.

    A path in a .pth file is searched last, and the .pth files within it are not read, such as that
    of an editable install.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    heavy = [path for path in sys.path if "site-packages" in path]
    (site / "heavy.pth").write_text("\n".join(heavy) + "\n")

    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_alone_trains_evaluates_compares_reports_and_exports(
    bin_folder: Path, tmp_path: Path
) -> None:
    hidden = {"PYTHONPATH", "PYTHONHOME"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(bin_folder / command[0]), *command[1:]],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout

    packages = "itop_prune, itop_prune_tools, itop_prune_recipes"
    places = run("python", "-c", f"import {packages}; print(*map(str, ({packages})))")
    assert places.count(str(bin_folder.parent)) == 3

    (tmp_path / "my.yaml").write_text(run("itop-prune", "recipes", "quickstart"))
    assert "test top-1" in run("itop-prune", "train", "quickstart", "epochs=2")
    run("itop-prune", "train", "my.yaml", "epochs=2", "masks.sparsity=0.9")

    one, other = "runs/quickstart-epochs=2", "runs/my-epochs=2-masks.sparsity=0.9"
    table = run("itop-prune", "compare", one, other, "--picture", "compare.png").splitlines()
    assert len(table) == 4
    assert (tmp_path / "compare.png").exists()
    (tmp_path / one / "seed0" / "report.html").unlink()
    assert run("itop-prune", "report", one) == f"{one}/seed0/report.html\n"
    assert "test_top1" in run("itop-prune", "evaluate", f"{one}/seed0")
    run("itop-prune", "export", f"{one}/seed0", "digits.onnx", "--to", "onnx")

    launch = ("-m", "accelerate.commands.launch", "--cpu", "-m", "itop_prune_tools")
    run("python", *launch, "train", "quickstart", "epochs=1", "--out", "launched")
    assert (tmp_path / "launched" / "model.safetensors").exists()
