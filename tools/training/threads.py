"""Compute small models on a CPU with few threads."""

import torch

OPERATIONS = 10**8
"""Operations of a forward that occupy one thread for milliseconds, much longer than a wait."""


def limit_threads(operations: float) -> None:
    """Take one of torch's threads for each `OPERATIONS` of a forward, and at least one.

    The threads wait for each other after every product. On cores that also do other work that takes
    milliseconds, so a step of a small model would be many times as long as with one thread.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), int(operations / OPERATIONS))))
