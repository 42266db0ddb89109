"""How much memory a device has, so that what can't fit is refused before it is tried."""

import os

import torch


def total_memory(device: torch.device) -> int:
    """Look up the bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_bytes(count: int) -> str:
    """Print a number of bytes in the largest unit that leaves three digits.

    >>> in_bytes(1064800), in_bytes(999), in_bytes(4 * 10**12)
    ('1.06 MB', '999 B', '4 TB')
    """
    power = min(4, max(0, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
