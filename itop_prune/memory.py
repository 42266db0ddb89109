"""How much memory a device has, so that what can't fit is refused before it is tried."""

import os

import torch

GIB = 1 << 30


def total_memory(device: torch.device) -> int:
    """Look up the bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_gib(count: int) -> str:
    """Print a number of bytes.

    >>> in_gib(3 << 29)
    '1.5 GiB'
    """
    return f"{count / GIB:,.1f} GiB"
