"""The numbers of a sparse model and their table."""

import importlib.util

import pytest
import torch
from helpers.toys import convnet, mlp
from torch import nn

import itop_prune
from itop_prune import summarize


def half_explored(masks: dict[str, itop_prune.ITOP]) -> dict[str, torch.Tensor]:
    """Explored: the first half of all positions in every layer."""
    return {
        name: (torch.arange(itop.mask.numel()) < itop.mask.numel() // 2).view_as(itop.mask)
        for name, itop in masks.items()
    }


def test_a_row_per_masked_weight() -> None:
    model = convnet()
    masks = itop_prune.apply(model, 0.6)
    rows = [(row.name, row.shape, row.weights, row.active) for row in summarize(model).rows]
    expected = [
        (n, tuple(i.mask.shape), i.mask.numel(), int(i.mask.sum())) for n, i in masks.items()
    ]
    assert rows == expected
    assert summarize(model).exploration_rate is None


def test_totals() -> None:
    model = mlp()
    itop_prune.apply(model, 0.75)
    summary = summarize(model)
    assert (summary.weights, summary.active, summary.parameters) == (560, 140, 592)
    assert (summary.density, summary.sparsity) == (0.25, 0.75)


def test_totals_are_of_what_is_masked() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="0")
    summary = summarize(model)
    assert (summary.weights, summary.active, summary.sparsity) == (320, 160, 0.5)


def test_a_line_says_which_share_of_all_matrices_is_masked() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="0")
    summary = summarize(model)
    assert (summary.matrix_weights, summary.masked_share) == (560, 320 / 560)
    assert summary.overall_sparsity == 160 / 560
    assert str(summary).splitlines()[-3:-1] == [
        "sparsity 0.5000; 272 other parameters are dense",
        "masked 0.5714 of the 560 weights of matrices, whose sparsity is 0.2857",
    ]


def test_matrices_of_unknown_classes_count_and_embeddings_do_not() -> None:
    model = nn.ModuleDict({"known": mlp(), "unknown": nn.Module(), "words": nn.Embedding(99, 4)})
    model["unknown"].kernel = nn.Parameter(torch.ones(7, 20))
    model["head"] = nn.Linear(4, 99, bias=False)
    model["head"].weight = model["words"].weight
    with torch.no_grad():
        model["words"].weight[:20] = 0  # as a row for padding is
    itop_prune.apply(model, 0.75, include="known.*")
    summary = summarize(model)
    assert (summary.matrix_weights, summary.masked_share) == (700, 560 / 700)
    assert (summary.overall_sparsity, summary.sparsity) == (420 / 700, 0.75)


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_without_dense_matrices_there_is_no_such_line(storage: str) -> None:
    model = convnet()
    assert "of matrices" not in str(summarize(model))
    itop_prune.apply(model, 0.75, storage=storage)
    summary = summarize(model)
    assert (summary.masked_share, summary.overall_sparsity) == (1.0, summary.sparsity)
    assert "of matrices" not in str(summary)


def test_masks_that_moved_are_counted_anew() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    masks["4.weight"].mask.fill_(True)
    assert summarize(model).rows[2].active == 48


def test_exploration_rate_of_rows_and_total() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.75)
    explored = half_explored(masks)
    explored["0.weight"].fill_(True)
    summary = summarize(model, explored)
    assert [row.exploration_rate for row in summary.rows] == [1.0, 0.5, 0.5]
    assert summary.exploration_rate == (320 + 96 + 24) / 560


def test_exploration_rate_agrees_with_the_scheduler() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.75)
    regrow = itop_prune.MaskScheduler(
        masks, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4, every=1
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(4):
        regrow.step()
    rate = summarize(model, regrow.explored).exploration_rate
    assert rate == regrow.exploration_rate() > 0.25


def test_if_only_some_are_recorded_there_is_no_total_exploration_rate() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.75)
    explored = half_explored(masks)
    del explored["0.weight"]
    summary = summarize(model, explored)
    assert [row.exploration_rate for row in summary.rows] == [None, 0.5, 0.5]
    assert summary.exploration_rate is None


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 10))
    itop_prune.apply(model, 0.75, "uniform")
    assert str(summarize(model)) == "\n".join(
        [
            "weight      shape  weights  active  density",
            "0.weight  8×3×3×3      216      54   0.2500",
            "2.weight   10×800    8,000   2,000   0.2500",
            "total                8,216   2,054   0.2500",
            "sparsity 0.7500; 18 other parameters are dense",
            "stored in 41,080 bytes, 1.2500 of the 32,864 dense",
        ]
    )


def test_the_table_with_exploration_rates() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.75, "uniform")
    lines = str(summarize(model, half_explored(masks))).splitlines()
    assert lines[0].split() == ["weight", "shape", "weights", "active", "density", "R_s"]
    assert [line.split()[-1] for line in lines[1:5]] == ["0.5000"] * 4


def test_the_columns_of_the_table_line_up() -> None:
    model = convnet()
    itop_prune.apply(model, 0.5)
    lines = str(summarize(model)).splitlines()[:-2]
    assert len({len(line) for line in lines}) == 1


def test_cells_are_the_table_before_it_is_laid_out() -> None:
    model = nn.Linear(8, 4)
    itop_prune.apply(model, 0.75)
    assert summarize(model).cells() == [
        ("weight", "shape", "weights", "active", "density"),
        ("weight", "4×8", "32", "8", "0.2500"),
        ("total", "", "32", "8", "0.2500"),
    ]


def test_a_model_without_masks() -> None:
    summary = summarize(mlp())
    assert [(row.active, row.masked) for row in summary.rows] == [
        (320, False),
        (192, False),
        (48, False),
    ]
    assert (summary.weights, summary.active, summary.sparsity, summary.exploration_rate) == (
        560,
        560,
        0.0,
        None,
    )
    assert str(summary).splitlines()[-1] == "sparsity 0.0000; 32 other parameters are dense"


def ways(model: nn.Module) -> list[str]:
    return [row.computes for row in summarize(model).rows]


def test_layers_in_sparse_storage_say_how_they_compute() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 10), nn.Linear(10, 100))
    itop_prune.apply(model, 0.7, storage="sparse", method="uniform")
    summary = summarize(model, half_explored(itop_prune.find_masks(model)))
    assert [line[-2:] for line in summary.cells()] == [
        ("R_s", "computes"),
        ("0.5000", "dense"),
        ("0.5000", "kernel"),
        ("0.5000", "kernel"),
        ("0.5000", ""),
    ]
    lines = str(summary).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[1].endswith("  0.5000     dense")
    assert lines[4].endswith("  0.5000")


def test_dense_layers_large_enough_and_other_types_compute_with_the_dense_weight() -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 10))
    itop_prune.apply(model, 0.5, storage="sparse", method="uniform")
    assert ways(model) == ["dense", "kernel"]  # 20,000 active weights, 1,000
    assert ways(model.double()) == ["dense", "kernel"]
    assert ways(model.bfloat16()) == ["dense", "dense"]


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


def test_layers_with_a_forward_of_their_own_compute_with_the_dense_weight() -> None:
    model = nn.Sequential(Scaled(20, 20), nn.LSTM(20, 20))
    itop_prune.apply(model, 0.9, storage="sparse")
    assert ways(model) == ["dense"] * 3


def test_without_numba_all_compute_with_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    itop_prune.apply(model, 0.9, storage="sparse")
    assert ways(model) == ["kernel"] * 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ways(model) == ["dense"] * 3


def test_with_masks_there_is_no_such_column() -> None:
    model = mlp()
    itop_prune.apply(model, 0.9)
    assert ways(model) == [""] * 3
    assert "computes" not in str(summarize(model))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapped_model_gives_the_same_table(wrap) -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    assert str(summarize(wrap(model))) == str(summarize(model))


def test_a_weight_without_a_mask_is_listed_where_part_of_it_is_zero_and_marked() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="0", scores="magnitude")
    with torch.no_grad():
        model[2].weight[:3] = 0.0  # 3 of 12 rows of 16
        model[4].weight.zero_()  # a head that starts at 0 is no pruned one
    rows = summarize(model).rows
    assert [(row.name, row.active, row.masked) for row in rows] == [
        ("0.weight", 160, True),
        ("2.weight", 144, False),
    ]
    assert "2.weight (no mask)  12×16      192     144   0.7500" in str(summarize(model))


def test_removed_masks_are_counted_by_their_zeros() -> None:
    model = mlp()
    itop_prune.apply(model, 0.75)
    before = summarize(model)
    itop_prune.remove(model)
    after = summarize(model)
    assert [(row.name, row.active) for row in after.rows] == [
        (row.name, row.active) for row in before.rows
    ]
    assert after.sparsity == before.sparsity
    assert not any(row.masked for row in after.rows)


def test_exploration_is_of_masked_weights_alone() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5, include="0")
    with torch.no_grad():
        model[2].weight[:3] = 0.0
    summary = summarize(model, half_explored(masks))
    assert summary.exploration_rate == 0.5
    assert summary.rows[1].exploration_rate is None
    assert [line.split()[-1] for line in str(summary).splitlines()[:4]] == [
        "R_s",
        "0.5000",
        "0.7500",
        "0.5000",
    ]


def test_a_zero_by_chance_in_a_dense_weight_is_no_sparsity() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    itop_prune.apply(model, 0.5, include="0")
    with torch.no_grad():
        model[1].weight[0, :3] = 0.0  # below 1 %
    assert [row.name for row in summarize(model).rows] == ["0.weight"]
    assert summarize(model).sparsity == 0.5


def test_with_example_inputs_the_cost_of_a_forward_is_told() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, "uniform")
    summary = itop_prune.summarize(model, example_inputs=torch.zeros(1, 20))
    assert summary.flops == itop_prune.flops(model, torch.zeros(1, 20))
    assert (
        str(summary).splitlines()[-1] == "forward 560 FLOPs, 0.5000 of the 1120 of the dense model"
    )
