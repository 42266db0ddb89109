"""The display of a run: live on a terminal, plain lines elsewhere, nothing on other ranks."""

import io
import math
import re
import sys

import pytest
from helpers import toys
from itop_prune_tools.run_folder.labels import summary_line
from itop_prune_tools.training.display import Display, is_terminal, sparkline
from rich.console import Console
from torch import nn

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
    """Make the output no terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "20")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the output a terminal of 120 columns."""
    display = "itop_prune_tools.training.display"
    monkeypatch.setattr(f"{display}.is_terminal", lambda console: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm-256color")


def plain(text: str) -> str:
    """Remove the control codes of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def summary() -> itop_prune.Summary:
    model = toys.mlp()
    itop_prune.apply(model, 0.75)
    return itop_prune.summarize(model)


# In a pipe


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_an_epoch_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("runs/x", epochs=3, total_steps=30) as display:
        assert not display.is_due()
        display.step(5, METRICS)
        for epoch in (1, 2, 3):
            display.epoch({**METRICS, "epoch": epoch})
        display.finish({"test_loss": 0.4, "test_top1": 87.5}, seconds=61.4)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        *(f"epoch {epoch}/3  {summary_line(METRICS)}" for epoch in (1, 2, 3)),
        "test loss 0.4000  test top-1 87.50 %  in 61 s; runs/x",
    ]
    assert not CONTROL.search(out)
    assert err == ""


@pytest.mark.usefixtures("pipe")
def test_in_a_pipe_text_and_tables_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display("runs/x", epochs=3, total_steps=30)
    display.table(summary(), "elsewhere")
    display.say("a [bold]b[/bold] [/c] :smile:")
    assert capsys.readouterr().out == f"{summary()}\na [bold]b[/bold] [/c] :smile:\n"


def test_a_log_has_plain_lines_even_with_forced_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.epoch(METRICS)
        display.step(25, {"epoch": 3})
    assert capsys.readouterr().out.startswith("epoch 2/3  loss 0.5123")


@pytest.mark.parametrize(("terminal_name", "expected"), [("xterm-256color", True), ("dumb", False)])
def test_only_a_terminal_that_can_be_drawn_on_is_one(
    monkeypatch: pytest.MonkeyPatch, terminal_name: str, expected: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", terminal_name)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert is_terminal(Console(file=Terminal())) == expected
    assert not is_terminal(Console(file=io.StringIO(), force_terminal=True))
    assert not is_terminal(Console(file=Terminal(), force_terminal=False))


def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    Display("runs/x", epochs=3, total_steps=30).say("4×8 ▁█")
    sys.stdout.flush()
    assert written.getvalue().split() == [b"4?8", b"??"]


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_a_dense_model_has_no_table(
    where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    Display("runs/x", epochs=3, total_steps=30).table(itop_prune.summarize(toys.mlp()), "")
    assert plain(capsys.readouterr().out) == "no masked layers: a dense model\n"


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_a_disabled_display_prints_nothing(
    where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    with Display("runs/x", epochs=3, total_steps=30, enabled=False) as display:
        assert not display.is_due()
        display.step(5, METRICS)
        display.epoch(METRICS)
        display.say("something")
        display.table(summary(), "")
        display.finish(METRICS, 3.0)
    assert capsys.readouterr() == ("", "")


# On a terminal


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_display_shows_the_step_over_the_last_epoch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = {"epoch": 3, "train_loss": 0.25, "lr": 0.01, "rate": 0.125, "sparsity": 0.98}
    with Display("runs/[x]/[/y]", epochs=3, total_steps=30) as display:
        display.epoch(METRICS)
        assert capsys.readouterr().out.count("epoch 2/3") == 0
        display.step(25, numbers)
    out = plain(capsys.readouterr().out)
    of_the_step = ["runs/[x]/[/y]", "epoch 3/3", "loss 0.2500", "lr 0.01", "rate 0.1250", "25/30"]
    of_the_epoch = ["val top-1 88.12 %", "R_s 0.3100", "images/s 12,346", "sparsity 0.9800"]
    assert [text for text in of_the_step + of_the_epoch if text not in out] == []


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_epochs_draw_curves_those_from_before_a_resume_too(
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
def test_on_a_terminal_a_run_with_losses_that_are_not_finite_is_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display("runs/x", epochs=5, total_steps=30) as display:
        for loss in (2.0, 1.0, math.nan, math.inf):
            display.epoch({**METRICS, "train_loss": loss})
        display.step(25, METRICS)
    out = plain(capsys.readouterr().out)
    assert "epoch 2/5" in out
    assert sparkline([2.0, 1.0, math.nan, math.inf]) in out


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_live_display_is_erased_at_the_end(
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
    Display("runs/x", epochs=3, total_steps=30).table(summary(), "elsewhere")
    out = plain(capsys.readouterr().out)
    assert "sparsity 0.7500" in out
    assert all(row.name in out for row in summary().rows)
    assert "elsewhere" not in out


@pytest.mark.usefixtures("terminal")
def test_a_table_that_is_higher_than_the_terminal_is_shown_in_groups_that_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))) for _ in range(4)))
    itop_prune.apply(model, 0.75)
    found = itop_prune.summarize(model)
    display = Display("runs/x", epochs=3, total_steps=30)
    display.table(found, "runs/x/report.html has a row for each")
    out = plain(capsys.readouterr().out)
    lines = out.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "36 layers in 4 rows; runs/x/report.html has a row for each"
    assert f"{found.active}" in lines[-2]

    monkeypatch.setenv("LINES", "60")
    Display("runs/x", epochs=3, total_steps=30).table(found, "elsewhere")
    out = plain(capsys.readouterr().out)
    assert all(row.name in out for row in found.rows)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_live_display_leaves_room_for_what_a_terminal_writes_at_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Otherwise ^C begins a new line, and the border above is not erased."""
    monkeypatch.setenv("COLUMNS", f"{columns}")
    numbers = {**METRICS, "survival": 0.5, "train_flops": 0.05}
    with Display("runs/x", epochs=3, total_steps=30) as display:
        display.step(1, numbers)
    lines = plain(capsys.readouterr().out).splitlines()
    assert any("train FLOPs 0.0500 × dense" in line for line in lines)
    assert max(map(len, lines)) == columns - len("^C^C")


# Sparklines


def test_a_sparkline_runs_from_the_lowest_to_the_highest() -> None:
    assert sparkline([1.0, 0.0, 3.5, 7.0]) == "▂▁▅█"
    assert sparkline([3.0, 3.0, 3.0]) == "▁▁▁"
    assert sparkline([0.0, 7.0, math.nan]) == "▁█×"


@pytest.mark.parametrize("count", [1, 39, 40, 41, 42, 80, 81, 1000])
def test_a_sparkline_is_no_wider_than_asked_and_ends_with_the_newest(count: int) -> None:
    drawn = sparkline([0.0] * (count - 1) + [1.0])
    assert min(count, 20) <= len(drawn) <= 40
    assert drawn.endswith("▁" if count == 1 else "▁█")
