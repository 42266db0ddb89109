"""The storage of masked weights, for which the promises hold alike.

Tests ask for it with the marks of `helpers.storages`, and use what `helpers.sparse_run` offers.
"""

import pytest


@pytest.fixture(params=["mask", "sparse"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `apply` and `sparse` of `helpers.sparse_run` take this storage."""
    monkeypatch.setattr("helpers.sparse_run.STORAGE", request.param)
    return request.param


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers compute with their dense weight, which rounds as masks do."""
    monkeypatch.setattr("itop_prune.kernels.runtime.uses_kernels", lambda shape, active: False)
