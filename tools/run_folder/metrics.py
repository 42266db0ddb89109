"""Write and read metrics.jsonl: one line per epoch, and one for the test set at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_lines import JsonLines


class Metrics(JsonLines):
    """The numbers of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "metrics.jsonl")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of finished epochs."""
        return [line for line in self.read() if not _is_test(line)]

    @property
    def test(self) -> dict[str, Any] | None:
        """The line of the test set; None until all steps of the run are done."""
        return next((line for line in reversed(self.read()) if _is_test(line)), None)

    def cut(self, epoch: int) -> list[dict[str, Any]]:
        """Drop the lines past an epoch, which a resumed run writes again; return the others.

        Raises:
            RunError: A line that must stay is damaged, or the rest can't be written. The file
                is as it was.
        """
        return self.keep(
            lambda line: line["epoch"] <= epoch and not _is_test(line),
            lambda lines: (lines[-1]["epoch"] if lines else 0) >= epoch,
            f"epoch {epoch}",
        )


def _is_test(line: Mapping[str, Any]) -> bool:
    return "test_top1" in line
