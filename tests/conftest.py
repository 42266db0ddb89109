"""One thread and no GPU, so that tests do the same everywhere; runs end without their report.

The models of the tests are small: threads that wait for each other cost more than they bring.
`ITOP_GPU=1` lets `tests/promises/test_gpu.py` see the GPU.
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
    """Leave out the report of runs in this process, except where reports are tested."""
    runner = sys.modules.get("itop_prune_tools.training.loop")
    if runner and not request.node.get_closest_marker("reports"):
        message = "no report of {}: this is a test".format
        monkeypatch.setattr(runner, "attempt", message)
