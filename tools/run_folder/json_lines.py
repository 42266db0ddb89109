"""Files of one JSON object per line: append whole lines, read the undamaged ones, cut on resume."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itop_prune.files.writing import replacing

from .folder import RunError


class JsonLines:
    """A file of a run with one JSON object per line, each with `epoch` and `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines, all of them or none.

        Raises:
            RunError: They can't be written, for example on a full disk; earlier lines stay.
        """
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        try:
            # Unbuffered: closing a buffered file would try to write the rest again.
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(text) < len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())  # before the checkpoint that counts on the line
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise self._not_written(error) from None

    def read(self) -> list[dict[str, Any]]:
        """Read all lines before the first that is damaged or half written."""
        lines: list[dict[str, Any]] = []
        for text in self._texts():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            if not isinstance(line.get("epoch"), int) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
        return lines

    def keep(
        self,
        stays: Callable[[dict[str, Any]], bool],
        is_whole: Callable[[list[dict[str, Any]]], bool],
        last: str,
    ) -> list[dict[str, Any]]:
        """Drop some lines, and return the others.

        Args:
            stays: Tells whether a line stays.
            is_whole: Tells whether all lines that must stay are there; asked if one is damaged.
            last: The point at which the run goes on, for the message.

        Raises:
            RunError: A line that must stay is damaged, or the rest can't be written. The file
                is as it was.
        """
        found = self.read()
        lines = [line for line in found if stays(line)]
        if len(found) < self.count() and not is_whole(lines):
            raise RunError(
                f"{self.path} is damaged in line {len(found) + 1}, and the run goes on after "
                f"{last}; put the line right, or remove the file to go on without it"
            )

        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with replacing(self.path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._not_written(error) from None
        return lines

    def count(self) -> int:
        """Count the lines, damaged ones too."""
        return len(self._texts())

    def _texts(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path.exists() else []

    def _not_written(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} could not be written: {error}; once it can be, go on with --resume"
        )
