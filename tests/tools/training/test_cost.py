"""What a run costs, as the runner counts it step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import mlp
from itop_prune_tools.training import command as train
from itop_prune_tools.training.cost import Cost

import itop_prune

QUICKSTART = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")


def metrics(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    assert train.main([QUICKSTART, "epochs=2", *overrides, "--out", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:-1]


def test_shares_follow_the_masks() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5, "uniform")
    cost = Cost(model, (20,), torch.device("cpu"))
    assert cost.forward == cost.step(False) == 0.5
    assert cost.step(True) == pytest.approx((2 * 0.5 + 1.0) / 3)
    masks["4.weight"].mask[:] = True
    cost.measure(model)
    assert cost.forward == (280 + 24) / 560


def test_static_masks_cost_what_a_forward_costs(tmp_path: Path) -> None:
    *_, last = metrics(tmp_path / "run", "regrow=null")
    density = 1.0 - last["sparsity"]
    assert last["forward_flops"] == pytest.approx(density)  # a network of matrices
    assert last["train_flops"] == pytest.approx(density)


def test_a_dense_run_costs_all(tmp_path: Path) -> None:
    *_, last = metrics(tmp_path / "run", "regrow=null", "masks=null")
    assert (last["forward_flops"], last["train_flops"]) == (1.0, 1.0)


@pytest.mark.parametrize(("grow", "listened"), [("random", 0), ("gradient", 8), ("momentum", 80)])
def test_each_dense_gradient_is_counted_where_it_is_computed(
    tmp_path: Path, grow: str, listened: int
) -> None:
    """88 steps, an update at every tenth: momentum listens up to the last, at step 80."""
    first, last = metrics(
        tmp_path / "run", f"regrow={{every: 10, grow: {grow}}}", "data.validation=0"
    )
    assert last["step"] == 88
    share = last["forward_flops"]
    assert last["train_flops"] == pytest.approx(share + listened * (1 - share) / 3 / 88)
    assert first["forward_flops"] == share


def test_what_shrinks_costs_less_and_less(tmp_path: Path) -> None:
    regrow = "regrow={every: 10, rate: 0.0, min_rate: 0.0, density: cubic, final_sparsity: 0.95}"
    first, last = metrics(tmp_path / "run", "masks.sparsity=0.0", regrow)
    assert 1.0 > first["forward_flops"] > last["forward_flops"] == pytest.approx(0.05)
    assert first["train_flops"] > last["train_flops"] > last["forward_flops"]
