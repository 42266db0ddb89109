"""What a run shows: a live display on a terminal, one plain line an epoch everywhere else, nothing on other ranks."""

import io
import math
import re
import sys

import pytest
from helpers import toys
from itop_prune_tools.training.display import Display, draws, in_words, layers, line, sparkline
from rich.console import Console

import itop_prune

METRICS = {
    "epoch": 2,
    "step": 20,
    "train_loss": 0.51234,
    "lr": 0.1,
    "rate": 0.25,
    "sparsity": 0.98,
    "exploration_rate": 0.31,
    "images_per_second": 12345.6,
    "seconds": 3.0,
    "val_loss": 0.7,
    "val_top1": 88.124,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that nobody calls a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "20")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that counts as a terminal of 120 columns."""
    monkeypatch.setattr("itop_prune_tools.training.display.draws", lambda console: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm-256color")


def plain(text: str) -> str:
    """Return what a terminal shows of a text with control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def summary() -> itop_prune.Summary:
    model = toys.mlp()
    itop_prune.apply(model, 0.75)
    return itop_prune.summarize(model)


# In words


def test_metrics_in_words_are_in_one_order_whatever_theirs() -> None:
    labels = [label for label, _ in in_words(dict(reversed(METRICS.items())))]
    assert labels == ["loss", "val loss", "val top-1", "lr", "rate", "sparsity", "R_s", "images/s"]


def test_a_line_rounds_to_what_can_be_read() -> None:
    assert line(METRICS) == (
        "loss 0.5123  val loss 0.7000  val top-1 88.12 %  lr 0.1  "
        "rate 0.2500  sparsity 0.9800  R_s 0.3100  images/s 12,346"
    )


def test_what_is_not_there_is_left_out() -> None:
    assert line({"train_loss": 0.5, "rate": None}) == "loss 0.5000"


def test_a_loss_of_nan_is_shown() -> None:
    assert line({"train_loss": math.nan}) == "loss nan"


# In a pipe


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_an_epoch_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        for epoch in (1, 2, 3):
            display.epoch({**METRICS, "epoch": epoch})
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"epoch {epoch}/3  {line(METRICS)}" for epoch in (1, 2, 3)]
    assert not CONTROL.search(out)
    assert err == ""


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_steps_are_not_shown_and_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        assert not display.is_due()
        display.step(5, METRICS)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_the_end_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.finish({"test_loss": 0.4, "test_top1": 87.5}, seconds=61.4)
    assert capsys.readouterr().out == "test loss 0.4000  test top-1 87.50 %  in 61 s; runs/x\n"


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_the_table_of_layers_is_that_of_the_library(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Display("runs/x", epochs=3, total_steps=30).table(summary())
    out = capsys.readouterr().out
    assert out == f"{summary()}\n"
    assert not CONTROL.search(out)


@pytest.mark.usefixtures("pipe")
def test_what_is_said_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Display("runs/x", epochs=3, total_steps=30).say("a [bold]b[/bold] [/c] :smile:")
    assert capsys.readouterr().out == "a [bold]b[/bold] [/c] :smile:\n"


def test_a_log_has_plain_lines_whatever_forces_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.epoch(METRICS)
        display.step(25, {"epoch": 3})
    assert capsys.readouterr().out.startswith("epoch 2/3  loss 0.5123")


@pytest.mark.parametrize(("terminal_name", "expected"), [("xterm-256color", True), ("dumb", False)])
def test_a_terminal_is_drawn_on_if_it_can_be(
    monkeypatch: pytest.MonkeyPatch, terminal_name: str, expected: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", terminal_name)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert draws(Console(file=Terminal())) == expected
    assert not draws(Console(file=io.StringIO(), force_terminal=True))
    assert not draws(
        Console(file=Terminal(), force_terminal=False)
    )  # of which rich is told that it is none


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    Display("runs/x", epochs=3, total_steps=30).say("4×8 ▁█")
    sys.stdout.flush()
    assert written.getvalue().split() == [b"4?8", b"??"]


@pytest.mark.usefixtures("pipe")
def test_an_epoch_of_before_a_resume_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("runs/x", epochs=3, total_steps=30, done=10) as display:
        display.remember(METRICS)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_a_dense_model_has_no_table(
    where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    Display("runs/x", epochs=3, total_steps=30).table(itop_prune.summarize(toys.mlp()))
    assert plain(capsys.readouterr().out) == "no masked layers: a dense model\n"


# Only the main rank speaks


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_a_display_that_does_not_speak_is_silent(
    where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    with Display("runs/x", epochs=3, total_steps=30, speaks=False) as display:
        assert not display.is_due()
        display.step(5, METRICS)
        display.epoch(METRICS)
        display.say("something")
        display.table(summary())
        display.finish(METRICS, 3.0)
    assert capsys.readouterr() == ("", "")


# On a terminal


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_display_shows_where_the_run_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.epoch(METRICS)
        display.step(
            25, {"epoch": 3, "train_loss": 0.25, "lr": 0.01, "rate": 0.125, "sparsity": 0.98}
        )
    out = plain(capsys.readouterr().out)
    shown = [
        "runs/x",
        "epoch 3/3",
        "loss 0.2500",
        "lr 0.01",
        "rate 0.1250",
        "sparsity 0.9800",
        "25/30",
        "left",
    ]
    assert [text for text in shown if text not in out] == []


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_accuracy_and_speed_of_the_last_epoch_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.epoch(METRICS)
        display.step(25, {"epoch": 3, "train_loss": 0.25})
    out = plain(capsys.readouterr().out)
    assert [
        text for text in ("val top-1 88.12 %", "R_s 0.3100", "images/s 12,346") if text not in out
    ] == []


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_epochs_are_not_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("runs/x", epochs=3, total_steps=30)
    display.epoch(METRICS)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_epochs_draw_curves_those_of_before_a_resume_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=3, total_steps=30, done=20) as display:
        for epoch, loss in ((1, 2.0), (2, 1.0)):
            display.remember({**METRICS, "epoch": epoch, "train_loss": loss})
        display.step(21, {"epoch": 3})
    assert sparkline([2.0, 1.0]) in plain(capsys.readouterr().out)


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_drawing_is_due_at_first_and_not_at_once_again() -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        assert display.is_due()
        display.step(1, METRICS)
        assert not display.is_due()


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_a_run_whose_loss_is_not_finite_is_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=5, total_steps=30) as display:
        for loss in (2.0, 1.0, math.nan, math.inf):
            display.epoch({**METRICS, "train_loss": loss})
        display.step(25, METRICS)
    assert "epoch 2/5" in plain(capsys.readouterr().out)


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_a_folder_with_brackets_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/[x]/[/y]", epochs=3, total_steps=30) as display:
        display.step(1, METRICS)
    assert "runs/[x]/[/y]" in plain(capsys.readouterr().out)


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_live_display_is_gone_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.step(1, METRICS)
        capsys.readouterr()
    out = capsys.readouterr().out
    assert "\x1b[2K" in out  # its lines are erased
    assert "\x1b[?25h" in out  # the cursor is back


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_table_of_layers_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    Display("runs/x", epochs=3, total_steps=30).table(summary())
    out = plain(capsys.readouterr().out)
    assert "sparsity 0.7500" in out
    assert all(row.name in out for row in summary().rows)


# The table of layers


def test_the_table_of_layers_holds_every_cell_of_the_summary(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console(width=100, no_color=True, force_terminal=False).print(layers(summary()))
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    for cells in summary().cells():
        assert [cell for cell in cells if cell] in rows


def test_the_table_of_layers_shows_what_was_explored() -> None:
    model = toys.mlp()
    masks = itop_prune.apply(model, 0.75)
    explored = {name: itop.mask for name, itop in masks.items()}
    table = layers(itop_prune.summarize(model, explored))
    assert [column.header for column in table.columns][-1] == "R_s"
    assert table.columns[-1].footer == "0.2500"
    assert table.row_count == 3


# Sparklines


def test_a_sparkline_runs_from_the_lowest_to_the_highest() -> None:
    assert sparkline([1.0, 0.0, 3.5, 7.0]) == "▂▁▅█"


def test_a_sparkline_of_one_value_or_of_equal_ones_is_flat() -> None:
    assert sparkline([3.0]) == "▁"
    assert sparkline([3.0, 3.0, 3.0]) == "▁▁▁"


@pytest.mark.parametrize("count", [1, 39, 40, 41, 80, 81, 1000])
def test_a_sparkline_is_no_wider_than_asked(count: int) -> None:
    drawn = sparkline([float(i) for i in range(count)])
    assert min(count, 20) <= len(drawn) <= 40
    assert drawn[0] == "▁"


@pytest.mark.parametrize("count", [40, 41, 42, 81, 1000])
def test_a_sparkline_ends_with_the_newest(count: int) -> None:
    assert sparkline([0.0] * (count - 1) + [1.0]).endswith("▁█")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_sparkline_has_a_place_for_what_is_not_finite(odd: float) -> None:
    drawn = sparkline([0.0, 7.0, odd])
    assert len(drawn) == 3
    assert drawn[:2] == "▁█"
