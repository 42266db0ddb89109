"""The tour, a notebook: it runs from top to bottom, and is committed as it ran."""

import importlib.util
import json
import re
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "recipes" / "tour.ipynb"
TEXT = TOUR.read_text(encoding="utf-8")
CELLS = [cell for cell in nbformat.reads(TEXT, as_version=4).cells if cell.cell_type == "code"]


def printed(cells: list[Any]) -> str:
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(cells: list[Any]) -> int:
    outputs = [output for cell in cells for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_outputs(cells: list[Any]) -> None:
    """Each cell ran once, in order, without errors or warnings, and the model has learned."""
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
    assert pictures(cells) == 3

    text = printed(cells)
    accuracies = [float(number) for number in re.findall(r"test ([\d.]+) %", text)]
    trained, loaded, deployed = accuracies[-3:]
    assert trained > 90
    assert loaded == trained
    assert deployed == pytest.approx(trained, abs=0.3)  # one image may round to the other side
    assert "sparsity 0.9000" in text


def test_the_committed_tour_has_the_outputs_of_a_run() -> None:
    check_outputs(CELLS)


def test_the_committed_tour_is_small_and_names_no_machine() -> None:
    assert len(TEXT) < 250_000
    sources_and_texts = json.dumps(json.loads(TEXT))
    assert not re.search(r"/(?:home|root|work|tmp|usr|Users)/|\w:\\\\\\\\Users", sources_and_texts)
    assert nbformat.reads(TEXT, as_version=4).metadata.kernelspec.name == "python3"


def test_without_a_package_the_first_cell_says_in_one_line_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name in ("numba", "timm") else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(Exception, match="Not installed: timm, numba") as caught:
        exec(CELLS[0].source, {})
    (line,) = caught.value._render_traceback_()  # what Jupyter shows
    assert "%pip install 'itop_prune[train,sparse]'" in line
    assert "\n" not in line


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.reads(TEXT, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # Numbers may differ from the committed ones: CPUs round sums differently.
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    check_outputs([cell for cell in notebook.cells if cell.cell_type == "code"])
    assert list(tmp_path.iterdir()) == []  # a tour leaves nothing behind
