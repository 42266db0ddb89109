"""Lock a run folder, so that one process at a time writes into it.

The lock ends with the process that holds it, however that ends. On NFS, Linux 2.6.12 and later
emulate it by a lock on the server. NFS that is mounted with `nolock` or `local_lock` locks only
within one machine. On Windows nothing is locked.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The locked file; it stays when the lock ends."""

_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, as a context.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The file of the lock can't be opened or locked.
    """
    # Open for writing: NFS needs that for an exclusive lock.
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _held.remove(handle)
        os.close(handle)


def _close_in_child() -> None:
    """Close what a forked process inherits: a data worker may outlive a run that was killed."""
    while _held:
        os.close(_held.pop())


if fcntl:
    os.register_at_fork(after_in_child=_close_in_child)
