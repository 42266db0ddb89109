"""Stop a run between two steps when a signal asks for it."""

import signal
from types import FrameType
from typing import Any

import torch


class StopRequest:
    """Turn SIGINT (Ctrl-C) and SIGTERM into a question asked between steps.

    A second Ctrl-C interrupts at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ranks: int = 1) -> None:
        self._received = False

        # The ranks agree over gloo on the CPU: one byte a step, and no device waits for it.
        self._group: Any = torch.distributed.new_group(backend="gloo") if ranks > 1 else None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        # SIGTERM may come twice, from a launcher and from the user.
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def wanted(self) -> bool:
        """Answer whether to stop here, equally on all ranks; all must ask equally often."""
        if self._group is None:
            return self._received

        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)
