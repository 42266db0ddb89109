"""Write files that appear under their names whole, and are still there after a power failure."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


def unfinished_name(path: Path) -> Path:
    """Name a file or folder beside a path, as no other process or rank does."""
    return path.with_name(f"unfinished-{os.urandom(4).hex()}-{path.name}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; at the end of the context it replaces `path`.

    If an error ends the context, what was at `path` stays.
    """
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows opens no folders

    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network disks flush no folders.
        if not is_folder or error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
