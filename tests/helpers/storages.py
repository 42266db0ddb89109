"""Marks of a test that does not ask for both storages each time, or that is about one."""

import pytest

slow_sparse = pytest.param("sparse", marks=pytest.mark.slow)
masks_alone = pytest.mark.parametrize("storage", ["mask"], indirect=True)
"""For what is about the format of torch's own pruning."""
sparse_alone = pytest.mark.parametrize("storage", ["sparse"], indirect=True)
sparse_if_slow = pytest.mark.parametrize("storage", ["mask", slow_sparse], indirect=True)
"""For what one other test of the fast tier shows for sparse storage too."""
