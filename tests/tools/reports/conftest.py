"""Finished runs of every kind, trained once, and a fast stand-in for drawing."""

import shutil
from pathlib import Path

import pytest
from helpers.reported_runs import KINDS, train
from itop_prune_tools.reports import report, style


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind, with its report."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {kind: folder / kind / "seed0" for kind in KINDS}
    for kind, overrides in KINDS.items():
        assert train(runs[kind], *overrides) == 0
        if not (runs[kind] / "report.html").exists():
            report.write(runs[kind])
    return runs


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    """The run whose masks move, to be damaged; without its report."""
    shutil.copytree(made["moving"], tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path / "run"


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the rendering of pictures, which takes most of the time of a report."""
    monkeypatch.setattr(style, "png", lambda figure: b"a picture")
