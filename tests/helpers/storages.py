"""Which storages a test asks for. Without one of these a test knows none, and masks are dense."""

from collections.abc import Callable

import pytest

both_storages = pytest.mark.usefixtures("storage")


def _each(*storages: object) -> Callable[[Callable], Callable]:
    chosen = pytest.mark.parametrize("storage", storages, indirect=True)
    return lambda test: both_storages(chosen(test))


masks_alone = _each("mask")
"""For what is about the format of torch's own pruning."""
sparse_alone = _each("sparse")
sparse_if_slow = _each("mask", pytest.param("sparse", marks=pytest.mark.slow))
"""For what another test of the fast tier shows for sparse storage too."""
