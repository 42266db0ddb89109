"""The storage of masked weights, for which the promises hold alike.

A module asks for both with `pytestmark = pytest.mark.usefixtures("storage")`. The marks of
`helpers.storages` choose for one test.
"""

import pytest


@pytest.fixture(params=["mask", "sparse"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `apply` and `sparse` of `helpers.sparse_run` take this storage."""
    monkeypatch.setattr("helpers.sparse_run.STORAGE", request.param)
    return request.param
