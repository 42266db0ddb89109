"""Runs that are killed, that race for a folder, or whose disk is full, as processes of their own.

The processes are forked from one that has imported the runner, so that a run begins at once. Their
disk is slow: a flush takes some hundredths of a second longer, so that many kills hit a write.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..training import command, loop
from ..training.checkpoint import Checkpoints, damage
from .fuzz_runner import require
from .kill_and_resume import (
    RECIPE,
    Lost,
    check_checkpoints,
    check_same_end,
    checkpoints,
    free_port,
)

SETTINGS = (
    "epochs=3",
    "checkpoint={every: 1, keep: 2}",
    "ema={decay: 0.9}",
    "regrow={every: 7, grow: gradient, redistribute: magnitude}",
)
TWO_RANKS = (*SETTINGS[:3], "regrow={every: 7, grow: gradient}", "data.batch_size=16")
PATIENCE = 240.0
SLOWEST = 0.04
"""Seconds that a flush takes longer at most."""
STOPPED = 130
"""The exit status after Ctrl-C or SIGTERM."""
NEW_MOUNTS, PRIVATE = 0x20000, 0x4000 | 1 << 18
"""CLONE_NEWNS of Linux; MS_REC and MS_PRIVATE."""
REMOUNT = 32

Prepare = Callable[[], None]
"""What a process does before it runs."""


def kills(seed: int) -> None:
    """Kill or stop a run at a random moment, resume it, and compare its end."""
    draw = random.Random(seed)
    ranks = 2 if draw.random() < 0.15 else 1
    settings = (*(TWO_RANKS if ranks == 2 else SETTINGS), f"masks.storage={draw_storage(draw)}")
    alone, duration = left_alone(settings, ranks)
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    moment = draw.uniform(0.0, duration)

    with tempfile.TemporaryDirectory() as folder, reported_losses():
        run = Path(folder) / "run"
        with Group(run, settings, ranks, draw_slowness(draw)) as group:
            group.wait(moment)
            group.send(number)
            codes = group.codes()
        told = group.output()
        allowed = {-number, 0} if number == signal.SIGKILL else {-number, 0, STOPPED, 1}
        require(set(codes) <= allowed, f"after {number.name} the exit statuses are {codes}: {told}")
        # A rank whose partner has ended may say so in torch's words; one alone has no excuse.
        require(ranks == 2 or "Traceback" not in told, f"after {number.name}: {told}")
        check_checkpoints(run, 1)

        if not (run / "model.safetensors").exists() or any(codes):
            resume = (run / "recipe.yaml").exists()
            with Group(run, settings, ranks, 0.0, resume) as group:
                codes = group.codes()
            require(not any(codes), f"it did not go on after {number.name}: {group.output()}")
        check_same_end(alone, run)


def races(seed: int) -> None:
    """Start two runs on one folder: one trains, the other is told so or finds a finished run."""
    draw = random.Random(seed)
    settings = (*SETTINGS, f"masks.storage={draw_storage(draw)}")
    race(draw, settings, nothing)


def race(draw: random.Random, settings: Sequence[str], prepare: Prepare) -> None:
    """Let two runs race; both do something before."""
    alone, duration = left_alone(tuple(settings), 1)
    resume = draw.random() < 0.5
    delay = draw.choice([0.0, draw.uniform(0.0, 0.05), draw.uniform(0.0, duration)])
    slowness = draw_slowness(draw)

    with tempfile.TemporaryDirectory() as folder, reported_losses():
        run = Path(folder) / "run"
        if resume:
            shutil.copytree(alone, run)
            (run / "model.safetensors").unlink()
            for checkpoint in Checkpoints(run / "checkpoints", 2).all()[1:]:
                shutil.rmtree(checkpoint)
        with contextlib.ExitStack() as groups:
            both = []
            for number in range(2):
                both.append(Group(run, settings, 1, slowness, resume, f"{number}-", prepare))
                groups.enter_context(both[-1])
                if not number:
                    both[0].wait(delay)
            codes = [group.codes()[0] for group in both]

        told = [group.output() for group in both]
        trained = sum("epoch 3/3" in text for text in told)
        is_one = trained == 1 and (sorted(codes) == [0, 1] or (resume and not any(codes)))
        require(is_one, f"{trained} trained to the end, with the exit statuses {codes}: {told}")
        for code, text in zip(codes, told, strict=True):
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            is_clear = "Traceback" not in text and len(lines) == (code == 1)
            require(is_clear, f"a run ended with {code} and said: {text}")
            told_why = not (code and resume) or "is in use by another run" in text
            require(told_why, f"a run was refused for another reason: {text}")
        check_same_end(alone, run)


def full_disks(seed: int) -> None:
    """Let a run meet a full disk, give it room, resume it, and compare its end.

    The process must be allowed to mount a disk.
    """
    draw = random.Random(seed)
    settings = (*SETTINGS, f"masks.storage={draw_storage(draw)}")
    alone, _ = left_alone(settings, 1)
    size = sum(path.stat().st_size for path in alone.rglob("*") if path.is_file())
    room = draw.randint(4096, size)

    with tempfile.TemporaryDirectory() as folder:
        process = context().Process(target=on_full_disk, args=(alone, Path(folder), settings, room))
        process.start()
        process.join(PATIENCE)
        told = (Path(folder) / "problem").read_text() if process.exitcode else ""
        require(process.exitcode == 0, f"with {room:,} bytes of {size:,}: {told}")


def on_full_disk(alone: Path, folder: Path, settings: Sequence[str], room: int) -> None:
    """Train on a disk of so many bytes, and again with enough; the exit status says how it went."""
    disk = folder / "disk"
    disk.mkdir()
    mount(disk, room)
    run, problem = disk / "run", ""
    code, told = trained_here(run, settings, folder / "first")
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    if (code, len(lines)) not in ((1, 1), (0, 0)) or "Traceback" in told:
        problem = f"exit status {code}: {told}"
    damaged = [text for path in checkpoints(run) if (text := damage(path))]
    if damaged:
        problem = f"{damaged} after: {told}"

    mount(disk, 1 << 26, REMOUNT)
    if code and not problem:
        resume = ("--resume",) if (run / "recipe.yaml").exists() else ()
        code, told = trained_here(run, (*settings, *resume), folder / "second")
        problem = f"it did not go on: {told}" if code else ""
    if not problem:
        try:
            check_same_end(alone, run)
        except Lost as lost:
            problem = str(lost)
    (folder / "problem").write_text(problem)
    sys.exit(bool(problem))


def mount(folder: Path, size: int, flags: int = 0) -> None:
    """Mount memory as a disk that only this process sees.

    Raises:
        OSError: This process may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    place, options = str(folder).encode(), f"size={size}".encode()
    failed = not flags and (libc.unshare(NEW_MOUNTS) or libc.mount(None, b"/", None, PRIVATE, None))
    if failed or libc.mount(b"tmpfs", place, b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def trained_here(run: Path, settings: Sequence[str], output: Path) -> tuple[int, str]:
    """Train in a fork of this process; return the exit status and what was printed."""
    process = context("fork").Process(
        target=train, args=([*settings, "--out", str(run)], output, 0, 1, 0, 0.0, nothing)
    )
    process.start()
    process.join(PATIENCE)
    return process.exitcode or 0, output.read_text()


def nothing() -> None:
    """Prepare nothing."""


# --- runs as groups of processes -----------------------------------------------------------------


class Group:
    """The processes of a run, one for each rank, as a context that ends them."""

    def __init__(
        self,
        run: Path,
        settings: Sequence[str],
        ranks: int,
        slowness: float,
        resume: bool = False,
        prefix: str = "",
        prepare: Prepare = nothing,
    ) -> None:
        arguments = [*settings, "--out", str(run), *(["--resume"] if resume else [])]
        port = free_port() if ranks > 1 else 0
        self.outputs = [
            run.with_name(f"{prefix}{'resumed' if resume else 'begun'}{rank}")
            for rank in range(ranks)
        ]
        self.processes = [
            context().Process(
                target=train, args=(arguments, output, rank, ranks, port, slowness, prepare)
            )
            for rank, output in enumerate(self.outputs)
        ]

    def __enter__(self) -> "Group":
        """Start the processes, and wait until they are about to train."""
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + PATIENCE
        while not all(output.exists() for output in self.outputs):
            require(time.monotonic() < deadline, "a process did not start")
            time.sleep(0.002)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the run has ended."""
        self.processes[0].join(seconds)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes, as a terminal or a launcher does."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def codes(self) -> list[int]:
        """Wait for the processes to end, and return their exit statuses."""
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            require(not process.is_alive(), f"still running after {PATIENCE} s: {self.output()}")
        return [process.exitcode or 0 for process in self.processes]

    def output(self) -> str:
        """Read what the processes have printed."""
        return "\n".join(output.read_text(errors="replace") for output in self.outputs)


def train(
    arguments: Sequence[str],
    output: Path,
    rank: int,
    ranks: int,
    port: int,
    slowness: float,
    prepare: Prepare,
) -> None:
    """Train in this process, as tools/train.py does, on a slow disk; output goes into a file.

    There is no report at the end, whose pictures take longer than the training.
    """
    loop.attempt = "no report of {}: this is a check".format
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    prepare()
    flush = os.fsync

    def slow_flush(handle: Any) -> None:
        time.sleep(slowness)
        flush(handle)

    os.fsync = slow_flush  # type: ignore[assignment]
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        sys.exit(command.main([str(RECIPE), *arguments]))
    except KeyboardInterrupt:  # before it becomes a request to stop
        sys.exit(STOPPED)


@functools.cache
def context(method: str = "forkserver") -> Any:
    """Make the context that starts processes."""
    found = multiprocessing.get_context(method)
    if method == "forkserver":
        found.set_forkserver_preload([__name__])
    return found


FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Of runs left alone; they stay until this process ends."""


@functools.cache
def left_alone(settings: tuple[str, ...], ranks: int) -> tuple[Path, float]:
    """Train a run that nobody disturbs; return its folder, and how many seconds it took."""
    FOLDERS.append(tempfile.TemporaryDirectory())
    run = Path(FOLDERS[-1].name) / "alone"
    with Group(run, settings, ranks, SLOWEST / 2) as group:
        began = time.monotonic()
        codes = group.codes()
    require(not any(codes), f"the run that was left alone did not end: {group.output()}")
    return run, time.monotonic() - began


def draw_storage(draw: random.Random) -> str:
    """Draw the storage of masked weights."""
    return draw.choice(["mask", "sparse"])


def draw_slowness(draw: random.Random) -> float:
    """Draw the seconds that a flush takes longer."""
    return draw.choice([0.0, draw.uniform(0.0, SLOWEST)])


@contextlib.contextmanager
def reported_losses() -> Iterator[None]:
    """Report what kill_and_resume finds lost as a broken promise, as a context."""
    try:
        yield
    except Lost as lost:
        require(False, str(lost))
