"""Metrics as text: one order, a format for each, and nothing for what is missing."""

import math

from itop_prune_tools.run_folder.labels import summary_line


def test_a_line_has_one_order_and_rounded_numbers() -> None:
    metrics = {
        "images_per_second": 12345.6,
        "exploration_rate": 0.31,
        "lr": 0.1,
        "val_top1": 88.124,
        "seconds": 3.0,
        "rate": None,
        "train_loss": 0.51234,
        "train_flops": 0.05,
    }
    expected = "loss 0.5123  val top-1 88.12 %  lr 0.1  R_s 0.3100  train FLOPs 0.0500 × dense"
    assert summary_line(metrics) == f"{expected}  images/s 12,346"


def test_a_loss_that_is_not_finite_is_shown() -> None:
    assert summary_line({"train_loss": math.nan}) == "loss nan"
