"""Time and memory of calls: rounds of two functions in alternation, and the bytes alive at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from itop_prune.inference.measurement import interleave

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and where."""

    quick: bool
    device: torch.device

    def rounds(self, full: int) -> int:
        """Compute the number of rounds to measure: a fifth of them under --quick."""
        return max(2, full // 5) if self.quick else full


@dataclass
class Measured:
    """The rounds of one comparison."""

    name: str
    target: float
    faster: bool = False
    """Whether the target says how many times as fast ours must be; else how many times as long."""
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    """Empty if the target is about our number alone."""
    masked: list[float] = field(default_factory=list)
    """The same with masks, where that is measured too."""

    def take(
        self, rounds: int, ours: Callable[[], float], other: Callable[[], float] | None = None
    ) -> "Measured":
        """Measure so many rounds of ours and, if given, of what it is compared with."""
        functions = {"ours": ours}
        if other:
            functions["other"] = other

        found = interleave(functions, rounds)
        self.ours += found["ours"]
        self.other += found.get("other", [])
        return self


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    ours: float
    """The median, in `unit`."""
    other: float | None
    """The median of what ours is compared with; None if the target is about ours alone."""
    unit: str
    ratio: float
    target: str
    met: bool
    masked: float | None = None
    """The median with masks, in `unit`, where that is measured too."""


def seconds(call: Callable[[], object], device: torch.device = CPU) -> float:
    """Measure the seconds of a call, until the device has finished its work."""
    began = clock(device)
    call()
    return clock(device) - began


def clock(device: torch.device) -> float:
    """Read the clock after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gpu_bytes(when: str) -> int:
    """Read the bytes that tensors on the GPU asked for, "current" or "peak"."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def peak_bytes(call: Callable[[], object], device: torch.device = CPU) -> int:
    """Measure the most bytes that a call holds at once, beside those allocated before it.

    On a CPU the profiler reports every allocation, those inside of an operation too.
    """
    if device.type == "cuda":
        before = gpu_bytes("current")
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return gpu_bytes("peak") - before

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()

    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
