"""The table of layers on a terminal: every cell of the summary, or groups with the same sums."""

import pytest
from helpers import toys
from itop_prune_tools.training.layer_table import grouped, layer_table
from rich.console import Console

import itop_prune
from itop_prune import Summary
from itop_prune.analysis.summary import Row


def summary_of(*names: str, explored: int | None = 4) -> Summary:
    return Summary(tuple(Row(name, (3, 3), 9, 2, explored) for name in names), 9 * len(names))


BLOCKS = [
    f"layer{stage}.{block}.conv{number}.weight"
    for stage in (1, 2)
    for block in (0, 1, 2)
    for number in (1, 2)
]
DEEP = summary_of("stem.weight", *BLOCKS, "fc.weight")


def names(summary: Summary) -> list[str]:
    return [row.name for row in summary.rows]


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_of_layers_holds_every_cell_of_the_summary(
    capsys: pytest.CaptureFixture[str], width: int
) -> None:
    model = toys.mlp()
    itop_prune.apply(model, 0.75)
    summary = itop_prune.summarize(model)
    Console(width=width, no_color=True, force_terminal=False).print(layer_table(summary))
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    for cells in summary.cells():
        assert [cell for cell in cells if cell] in rows


def test_numbers_are_whole_where_names_are_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("a_long_name_of_a_layer." * 3, (2048, 512, 3, 3), 9_437_184, 1_234_567, 2_000_000)
    table = layer_table(Summary((row,), 9_437_184))
    Console(width=60, no_color=True, force_terminal=False).print(table)
    out = capsys.readouterr().out
    assert "2048×512×3×3" in out
    assert out.count("9,437,184") == out.count("1,234,567") == 2


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (14, names(DEEP)),
        (
            13,
            [
                "stem.weight",
                *(f"layer{s}.{b}.* (2)" for s in (1, 2) for b in range(3)),
                "fc.weight",
            ],
        ),
        (
            8,
            [
                "stem.weight",
                *(f"layer{s}.{b}.* (2)" for s in (1, 2) for b in range(3)),
                "fc.weight",
            ],
        ),
        (7, ["stem.weight", "layer1.* (6)", "layer2.* (6)", "fc.weight"]),
        (3, ["stem.weight", "layer1.* (6)", "others (2)"]),
    ],
)
def test_layers_are_joined_by_the_smallest_blocks_that_fit(most: int, expected: list[str]) -> None:
    assert names(grouped(DEEP, most)) == expected


def test_the_first_layers_of_a_model_without_blocks_keep_their_rows() -> None:
    shown = grouped(summary_of(*(f"{number}.weight" for number in range(60))), 10)
    assert names(shown) == [*(f"{number}.weight" for number in range(9)), "others (51)"]


@pytest.mark.parametrize("most", [1, 3, 8, 14])
def test_groups_have_the_sums_of_their_layers(most: int) -> None:
    shown = grouped(DEEP, most)
    assert len(shown.rows) <= max(2, most)
    assert shown.cells()[-1] == DEEP.cells()[-1]
    assert shown.exploration_rate == DEEP.exploration_rate == 4 / 9


def test_a_group_says_no_r_s_that_was_not_recorded_and_both_ways_to_compute() -> None:
    rows = (
        Row("block.0.weight", (2, 2), 4, 2, None, computes="kernel"),
        Row("block.1.weight", (2, 2), 4, 2, None, computes="dense"),
        Row("block.2.weight", (2, 2), 4, 3, None, masked=False),
        Row("head.weight", (2, 2), 4, 2, None, computes="dense"),
    )
    joined, unmasked, _ = grouped(Summary(rows, 16), 3).rows
    assert (joined.name, joined.explored, joined.computes) == ("block.* (2)", None, "both")
    assert unmasked == rows[2]
