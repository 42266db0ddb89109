"""The benchmark of sparse training: its rows, turns and figure, and other libraries."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from itop_prune_tools.benchmarks import (
    command,
    convolutions,
    peers,
    sparse_figure,
    sparse_training,
)
from itop_prune_tools.benchmarks.command import Row
from itop_prune_tools.benchmarks.measure import Measured, Settings
from itop_prune_tools.benchmarks.memory import mlp
from itop_prune_tools.benchmarks.sparse_training import (
    CASES,
    MLP,
    VIT,
    Case,
    Layer,
    Network,
    Step,
    compare,
    sparse,
    title,
    turn,
)
from matplotlib.figure import Figure
from torch import nn

import itop_prune

QUICK = Settings(quick=True, device=torch.device("cpu"))
TARGETS = {0.9: 2.0, 0.98: 3.0}
SMALL = {
    "net": Case(Network(lambda: mlp(20, 16, 10), (3, 20), torch.optim.AdamW), {1: TARGETS}),
    "layer": Case(Layer(20, 16, 3), {1: {0.9: 2.0}, 2: {0.9: 4.0}}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sparse_training, "CASES", SMALL)
    monkeypatch.setattr(sparse_training, "AT_LEAST", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str, int]]:
    """What `apply` was asked for: sparsity, storage, and the threads at that time."""
    calls: list[tuple[float, str, int]] = []
    real = itop_prune.apply

    def apply(
        model: nn.Module, sparsity: float, method: str = "ERK", storage: str = "mask"
    ) -> object:
        calls.append((sparsity, storage, torch.get_num_threads()))
        return real(model, sparsity)  # masks, so that no kernel is compiled

    monkeypatch.setattr(itop_prune, "apply", apply)
    return calls


def test_a_turn_warms_up_and_takes_two_steps_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_training, "AT_LEAST", 10.0)
    long, short = iter([99.0, 20.0, 30.0, 99.0]), iter([99.0, *[3.0] * 9])
    assert turn(lambda: next(long))() == 25.0
    assert turn(lambda: next(short))() == 3.0
    assert len(list(short)) == 5  # four steps were needed


def test_each_sparsity_is_a_row_with_all_three_versions(applied: list[object]) -> None:
    torch.set_num_threads(3)
    rows = list(sparse(QUICK))
    assert [(row.name, row.target) for row in rows] == [
        ("net, 90 %, cores: 1", 2.0),
        ("net, 98 %, cores: 1", 3.0),
        ("layer, 90 %, cores: 1", 2.0),
        ("layer, 90 %, cores: 2", 4.0),
    ]
    for row in rows:
        assert row.faster
        assert row.unit == "ms"
        assert len(row.ours) == len(row.other) == len(row.masked) == QUICK.rounds(Case.rounds)
    storages = ("mask", "sparse")
    asked = [(0.9, 1), (0.98, 1), (0.9, 1), (0.9, 2)]
    assert applied == [(share, one, cores) for share, cores in asked for one in storages]
    assert torch.get_num_threads() == 3


class Known(Layer):
    """Steps of known seconds."""

    def step(self, sparsity: float | None, storage: str, settings: Settings) -> Step:
        dense = 0.1
        return lambda: dense if sparsity is None else sparsity * (2 if storage == "mask" else 1)


def test_a_row_holds_the_milliseconds_of_its_sparsity() -> None:
    case = Case(Known(1, 1, 1), {1: TARGETS})
    for row, sparsity in zip(compare("known", case, 1, QUICK), TARGETS, strict=True):
        assert (row.ours[0], row.masked[0]) == (1000 * sparsity, 2000 * sparsity)
        assert row.other[0] == pytest.approx(100.0)


def test_cores_that_torch_may_not_use_are_left_out(applied: list[object]) -> None:
    torch.set_num_threads(1)
    assert [row.name for row in sparse(QUICK)][-1] == "layer, 90 %, cores: 1"


@pytest.mark.usefixtures("applied")
def test_quick_leaves_out_the_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_training, "CASES", {VIT: SMALL["net"], "layer": SMALL["layer"]})
    assert {row.name.split(",")[0] for row in sparse(QUICK)} == {"layer"}


def test_the_step_of_a_layer_computes_three_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[object] = []
    kept = nn.Linear(20, 16)
    monkeypatch.setattr(nn, "Linear", lambda inputs, outputs: kept)
    monkeypatch.setattr(
        kept,
        "zero_grad",
        lambda: gradients.extend(each.grad for each in (kept.weight, kept.bias)),
    )
    seen: list[torch.Tensor] = []
    kept.register_full_backward_hook(lambda _, inputs, outputs: seen.extend(inputs))
    assert Layer(20, 16, 3).step(None, "mask", QUICK)() > 0.0
    assert [tuple(each.shape) for each in (*gradients, *seen)] == [(16, 20), (16,), (3, 20)]


def rows_of_the_figure() -> list[Row]:
    rows = []
    for case, dense in ((MLP, 30.0), (VIT, 2000.0)):
        for sparsity, ratio in ((0.9, 5.0), (0.95, 10.0), (0.98, 20.0)):
            name = title(case, sparsity, 1)
            rows.append(Row(name, dense / ratio, dense, "ms", ratio, "≥ 1", True, 1.1 * dense))
    return rows


def test_the_figure_has_a_bar_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    other = Row("update", 1.0, 2.0, "s", 2.0, "≥ 1", True)
    sparse_figure.draw([other, *rows_of_the_figure()], Path("x.svg"))
    left, right = drawn[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in left.containers]
    assert heights == [[30.0] * 3, [pytest.approx(33.0)] * 3, [6.0, 3.0, 1.5]]
    assert [text.get_text() for text in left.texts] == ["5 ×", "10 ×", "20 ×"]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == (MLP, VIT)


def test_the_command_writes_masks_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(settings: Settings) -> Iterator[Measured]:
        for row in rows_of_the_figure():
            assert row.other
            assert row.masked
            yield Measured(
                row.name, 2.0, True, "ms", [row.ours] * 2, [row.other] * 2, [row.masked] * 2
            )

    monkeypatch.setattr(command, "BENCHMARKS", {"sparse": found, "update": found})
    file, picture = tmp_path / "rows.json", tmp_path / "steps.svg"
    assert command.main(["--only", "sparse", "--json", str(file), "--picture", str(picture)]) == 0
    assert {row["masked"] for row in json.loads(file.read_text())["rows"]} == {33.0, 2200.0}
    assert "with" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml")

    for arguments in (["--only", "update"], ["--quick"]):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--picture", str(picture)])
        assert "--picture draws the full rows of sparse" in capsys.readouterr().err


def test_the_figure_draws_what_is_measured() -> None:
    assert CASES[MLP].targets[1].keys() == CASES[VIT].targets[1].keys()


def test_the_machine_is_described_with_its_vectors_and_numba() -> None:
    found = command.describe(torch.device("cpu"))
    assert "AVX-512" in found
    assert "numba" in found
    assert f"torch {torch.__version__}" in found


# --- other libraries ------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SIZES", (20, 16, 10))
    monkeypatch.setattr(peers, "BATCH", 3)
    case = convolutions.Case(convolutions.Single(4, 5, batch=2), {}, rounds=1)
    monkeypatch.setattr(peers, "CASES", {"conv": case})


@pytest.mark.usefixtures("few", "applied")
def test_a_library_that_is_not_there_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> peers.Replace:
        raise ImportError("libgone.so")

    def there() -> peers.Replace:
        return lambda layer: nn.Linear(layer.in_features, layer.out_features)

    libraries: dict[str, Callable[[], peers.Replace]] = {
        "torch": there,
        "timm": broken,
        "library-of-nobody": there,
    }
    monkeypatch.setattr(peers, "PEERS", libraries)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert peers.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "timm is left out: libgone.so" in out
    assert "library-of-nobody is left out: " in out
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [tuple(cells[:3]) for cells in table[2:]] == [
        *(
            ("| MLP", name, sparsity)
            for sparsity in ("90 %", "98 %")
            for name in ("dense", "itop_prune", f"torch {version('torch')}")
        ),
        *(
            ("| conv", name, sparsity)
            for sparsity in ("90 %", "95 %", "98 %")
            for name in ("dense, contiguous", "dense, channels last", "itop_prune")
        ),
    ]


@pytest.mark.usefixtures("few")
def test_sparseprop_s_convolution_gets_masks_of_the_same_density(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeros: list[float] = []

    def from_dense(layer: nn.Conv2d, vectorizing_over_on: bool) -> nn.Module:
        zeros.append(float((layer.weight == 0).float().mean()))
        return layer

    library = SimpleNamespace(SparseConv2d=SimpleNamespace(from_dense=from_dense))
    monkeypatch.setitem(sys.modules, "sparseprop.modules.conv2d", library)
    found = peers.compare_single(convolutions.Single(10, 5, batch=2), 0.9, QUICK)
    assert list(found)[-2:] == ["sparseprop, over pixels", "sparseprop, over images"]
    assert zeros == [pytest.approx(0.9)] * 2


@pytest.mark.usefixtures("few", "applied")
def test_a_library_gets_our_masks() -> None:
    zeros: list[int] = []

    def replace(layer: nn.Linear) -> nn.Module:
        zeros.append(int((layer.weight == 0).sum()))
        return layer

    found = peers.compare(0.9, {"theirs": replace}, QUICK)
    assert list(found) == ["dense", "itop_prune", "theirs"]
    assert len(zeros) == 2
    assert sum(zeros) == round(0.9 * (20 * 16 + 16 * 10))


def test_sparselab_draws_layers_of_the_same_density(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(SparseLinear=lambda *sizes, sparsity: (sizes, sparsity))
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: library)
    layer = nn.Linear(20, 16)
    with torch.no_grad():
        layer.weight[:4] = 0.0
    assert peers.sparselab()(layer) == ((20, 16), 0.25)
