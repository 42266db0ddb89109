"""Run random cases in a process of their own: a crash or a hang is a failure of its case.

A case is a function of its seed alone. It raises `Broken` if a promise does not hold. Whatever else
it raises is a failure too.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

Case = Callable[[int], None]
PATIENCE = 300.0
"""Seconds that a case may take."""
LEAVE = 10.0
"""Seconds that a process may take to end after its last case."""


class Broken(AssertionError):
    """A promise that does not hold; the message says what was seen."""


def require(holds: bool, problem: str) -> None:
    """Raise `Broken` unless something holds.

    Raises:
        Broken: It does not.
    """
    if not holds:
        raise Broken(problem)


class Outcome(NamedTuple):
    """What came of a case."""

    seed: int
    problem: str
    """In words; "" if all promises hold."""


def run_cases(
    case: Case,
    seeds: Iterable[int],
    deadline: float = math.inf,
    patience: float = PATIENCE,
) -> Iterator[Outcome]:
    """Run cases one after the other, and yield what came of each.

    Args:
        case: A function of a module, which the other process imports.
        seeds: Of the cases.
        deadline: Time of `time.monotonic()` after which no case begins.
        patience: Seconds that a case may take.
    """
    worker: _Worker | None = None
    try:
        for seed in seeds:
            if time.monotonic() > deadline:
                return
            worker = worker or _Worker(case)
            problem, alive = worker.try_case(seed, patience)
            if not alive:
                worker = None
            yield Outcome(seed, problem)
    finally:
        if worker:
            worker.end()


class _Worker:
    """A process that runs the cases whose seeds it is sent."""

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(case, theirs))
        self.process.start()
        theirs.close()

    def try_case(self, seed: int, patience: float) -> tuple[str, bool]:
        """Run a case; return the problem, and whether the process is still there."""
        self.connection.send(seed)
        if not self.connection.poll(patience):
            self.kill()
            return f"still running after {patience:.0f} s", False
        try:
            return self.connection.recv(), True
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            self.kill()
            return f"the process died: {name}", False

    def end(self) -> None:
        """Let the process end by itself, so that it removes its files."""
        self.connection.close()
        self.process.join(LEAVE)
        self.kill()

    def kill(self) -> None:
        """Kill the process, and those that it has started."""
        if self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(case: Case, connection: Connection) -> None:
    os.setsid()  # so that its processes can be ended with it
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(problem_of(case, connection.recv()))


def problem_of(case: Case, seed: int) -> str:
    """Run a case in this process, and describe what is wrong in one line; "" if nothing is."""
    try:
        case(seed)
    except Broken as broken:
        return " ".join(str(broken).split())
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return f"unexpected {told} ({os.path.basename(place.filename)}:{place.lineno})"
    return ""
