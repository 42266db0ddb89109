"""The benchmark of deployed models: its lines, their floors, the models it compares with."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.toys import convnet, mlp
from itop_prune_tools.benchmarks import command, deployed
from itop_prune_tools.benchmarks.deployed import (
    HEADINGS,
    MODELS,
    TARGETS,
    Line,
    compile_or_none,
    measure,
    seconds_per_call,
    table,
    without_layers,
)
from itop_prune_tools.benchmarks.measure import Settings
from torch import nn

import itop_prune

QUICK = Settings(quick=True, device=torch.device("cpu"))
LINE = Line(
    model="MLP",
    sparsity=0.98,
    dense=0.010,
    compiled=0.008,
    folded=0.009,
    deployed=0.002,
    rest=0.0005,
    difference=1e-7,
    target=4.0,
    dense_operations=7_000_000,
    operations=140_000.0,
    dense_bytes=14_000_000,
    bytes=560_000,
)


def always_faster(models: Any, layers: list[str], _: object) -> dict[str, dict[str, float]]:
    """Let all that is dense take longer."""
    seconds = {name: 2.0 if name == "dense" else 1.0 for name in models}
    return dict.fromkeys(layers, seconds)


def test_a_line_holds_ratios_and_floors() -> None:
    assert dict(zip(HEADINGS, LINE.cells(), strict=True)) == {
        "model": "MLP",
        "sparsity": "98 %",
        "dense, ms": "10",
        "compiled, ms": "8",
        "deployed, ms": "2",
        "× dense": "5.00",
        "× compiled": "4.00",
        "× folded": "4.50",
        "target": "≥ 4",
        "the rest, ms": "0.5",
        "operations, M": "7 → 0.14",
        "weights, MB": "14 → 0.56",
        "difference": "1e-07",
    }


@pytest.mark.parametrize(
    ("dense", "compiled", "met"),
    [(0.010, 0.008, True), (0.0079, 0.1, False), (0.1, 0.0079, False), (0.008, None, True)],
)
def test_a_target_is_met_when_it_is_against_both(
    dense: float, compiled: float | None, met: bool
) -> None:
    line = dataclasses.replace(LINE, dense=dense, compiled=compiled)
    assert line.met is met
    assert ("missed" in line.cells()[HEADINGS.index("target")]) is not met


def test_the_table_is_markdown() -> None:
    rows = table([LINE, dataclasses.replace(LINE, compiled=None)]).splitlines()
    assert len(rows) == 4
    assert {row.count("|") for row in rows} == {len(HEADINGS) + 1}
    assert "| – | 2 | 5.00 | – | 4.50 |" in rows[3]


def test_targets_are_of_models_that_are_measured() -> None:
    for targets in TARGETS.values():
        assert targets.keys() <= MODELS.keys()


def test_a_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "compile_or_none", lambda model, x: None)
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    active = sum(itop.active for itop in masks.values())
    line = measure("mlp", model, torch.randn(1, 20), 0.5, QUICK)
    assert line.difference <= 1e-5
    assert 0.0 < line.rest < math.inf
    assert (line.compiled, line.target) == (None, deployed.NO_SLOWER)
    assert (line.dense_operations, line.operations) == (2 * 560, 2 * active)
    assert (line.dense_bytes, line.bytes) == (4 * 560, 8 * active + 4 * 32)
    assert itop_prune.find_masks(model) == masks


def test_the_folded_model_is_dense_without_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, nn.Module] = {}

    def take(functions: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
        timed.update(functions)
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(deployed, "compile_or_none", lambda model, x: None)
    monkeypatch.setattr(deployed, "seconds_per_call", take)
    monkeypatch.setattr("itop_prune.inference.deployment.layer_seconds", always_faster)
    model = convnet()
    itop_prune.apply(model, 0.9)
    measure("convnet", model, torch.randn(1, 3, 8, 8), 0.9, QUICK)
    kinds = {name: {type(layer) for layer in model.modules()} for name, model in timed.items()}
    assert nn.BatchNorm2d in kinds["dense"]
    assert not any(nn.BatchNorm2d in kinds[name] for name in ("folded", "deployed", "rest"))


def test_the_rest_is_the_model_without_its_masked_layers() -> None:
    model, x = convnet().eval(), torch.randn(1, 3, 8, 8)
    masks = itop_prune.apply(model, 0.5)
    rest = without_layers(model, masks, x)
    assert torch.equal(rest(x), model(x))
    assert torch.equal(rest(x + 1.0), model(x))  # nothing of the input gets past the first layer
    assert not torch.equal(model(x + 1.0), model(x))


def test_seconds_are_of_one_call() -> None:
    calls = {"fast": 0, "slow": 0}

    def count(name: str) -> None:
        calls[name] += 1
        if name == "slow":
            torch.randn(300, 300) @ torch.randn(300, 300)

    functions = {name: (lambda x, name=name: count(name)) for name in calls}
    found = seconds_per_call(functions, torch.zeros(1), 2)
    # Two calls before, one round that does not count, two that do.
    assert calls["fast"] > calls["slow"] >= 5
    assert 0.0 < found["fast"] < found["slow"]


def test_without_a_compiler_there_is_nothing_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_(model: nn.Module) -> object:
        def call(x: object) -> None:
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    assert compile_or_none(mlp(), torch.zeros(1, 20)) is None
    assert "no compiled model to compare with" in capsys.readouterr().out


@pytest.mark.parametrize("target", [4.0, 4.1])
def test_the_command_prints_the_table_and_fails_where_a_target_is_missed(
    target: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = dataclasses.replace(LINE, target=target)
    monkeypatch.setattr(deployed, "lines", lambda settings: [line])
    assert command.main(["--deploy"]) == (target > 4.0)
    assert table([line]) in capsys.readouterr().out
