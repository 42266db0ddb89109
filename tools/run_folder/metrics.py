"""The numbers of a run: files of a JSON object a line, added to whole, read as far as they are, cut on a resume."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .folder import RunError


def _is_test(line: Mapping[str, Any]) -> bool:
    return "test_top1" in line


class Metrics:
    """metrics.jsonl, or another file of the run that has one JSON object a line, each with `epoch` and `step`."""

    def __init__(self, folder: Path, name: str = "metrics.jsonl") -> None:
        self.path = folder / name

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines, all of them or nothing.

        Raises:
            RunError: They can't be written, on a full disk for one; the lines before them stay.
        """
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        try:
            with self.path.open(
                "ab", buffering=0
            ) as file:  # or closing it would try to write the rest again
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
        """Return all lines before the first that is damaged, or was cut off while writing."""
        lines: list[dict[str, Any]] = []
        for text in self._texts():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict) or not all(
                isinstance(line.get(key), int) for key in ("epoch", "step")
            ):
                break
            lines.append(line)
        return lines

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of finished epochs."""
        return [line for line in self.read() if not _is_test(line)]

    @property
    def test(self) -> dict[str, Any] | None:
        """The line of the test set, which a run writes when all its steps are done; None before."""
        return next((line for line in reversed(self.read()) if _is_test(line)), None)

    def cut(self, epoch: int) -> list[dict[str, Any]]:
        """Drop the lines past an epoch, of which a resumed run writes its own; return those that stay.

        Raises: RunError: One that must stay is damaged, or the rest can't be written; the file is
            as it was.
        """
        return self.keep(
            lambda line: line["epoch"] <= epoch and not _is_test(line),
            lambda lines: (lines[-1]["epoch"] if lines else 0) >= epoch,
            f"epoch {epoch}",
        )

    def keep(
        self,
        stays: Callable[[dict[str, Any]], bool],
        is_whole: Callable[[list[dict[str, Any]]], bool],
        last: str,
    ) -> list[dict[str, Any]]:
        """Drop the lines that do not stay; return the others.

        Args:
            stays: Whether a line does.
            is_whole: Whether those that stay are all there; asked where a line is damaged.
            last: After what the run goes on, for the message.

        Raises:
            RunError: As `cut`.
        """
        found = self.read()
        lines = [line for line in found if stays(line)]
        if len(found) < self.count() and not is_whole(lines):
            raise RunError(
                f"{self.path} is damaged in line {len(found) + 1}, and the run goes on after {last}; put the "
                "line right, or remove the file to go on without what it holds"
            )
        unfinished = self.path.with_suffix(".unfinished")
        try:
            unfinished.write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
            )
            unfinished.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise self._not_written(error) from None
        return lines

    def count(self) -> int:
        """Return how many lines there are, damaged ones too."""
        return len(self._texts())

    def _texts(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path.exists() else []

    def _not_written(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} could not be written: {error}; once it can be, go on with --resume"
        )
