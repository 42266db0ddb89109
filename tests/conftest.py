"""One thread: the models of the tests are small, and threads that wait for each other cost more than they bring.

And no GPU: the tests do the same everywhere, and ranks need not share one. `test_gpu.py` gets it
with ITOP_GPU=1.
"""

import os
import sys

if os.environ.get("ITOP_GPU", "0") in ("", "0"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs in this process end without a report, which takes longer than they do, but where reports are tested."""
    loop = sys.modules.get("itop_prune_tools.training.loop")
    if loop and not request.node.get_closest_marker("reports"):
        monkeypatch.setattr(
            loop, "attempt", lambda folder: f"no report of {folder}: this is a test"
        )
