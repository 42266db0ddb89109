"""Compute small models on a CPU with few threads."""

import contextlib
from collections.abc import Iterator

import torch

OPERATIONS = 10**8
"""Operations of a forward that occupy one thread for milliseconds, much longer than a wait."""


@contextlib.contextmanager
def limited_threads(operations: float) -> Iterator[None]:
    """Take one of torch's threads for each `OPERATIONS` of a forward, as a context; at least one.

    Threads wait for each other after every product. Where other programs share the cores such a
    wait takes milliseconds, longer than the whole forward of a small model.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, int(operations / OPERATIONS))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
