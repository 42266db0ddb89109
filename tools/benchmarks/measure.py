"""What benchmarks are made of: rounds of two things in turns, timed when the device has done them."""

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    quick: bool
    device: torch.device

    def rounds(self, full: int) -> int:
        """Return how many rounds to take."""
        return max(2, full // 5) if self.quick else full


@dataclass
class Measured:
    """Rounds of one comparison."""

    name: str
    target: float
    faster: bool = False
    """Whether the target is how many times as fast ours is; else how many times as long it may take."""
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    """Empty where the target is a number of ours alone."""

    def take(
        self, rounds: int, ours: Callable[[], float], other: Callable[[], float] | None = None
    ) -> "Measured":
        """Take turns, after one of each that does not count."""
        for turn in range(rounds + 1):
            for function, kept in ((ours, self.ours), (other, self.other)):
                if function:
                    found = function()
                    if turn:
                        kept.append(found)
        return self


def clock(device: torch.device) -> float:
    """Return the time, when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def waits_for_gpu(call: Callable[[], object]) -> int:
    """Return how often the host waits for the GPU in a call, copies to it among them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


def on_gpu(when: str) -> int:
    """Return the bytes that tensors asked for on the GPU, "current" or "peak"; what it sets aside is more."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def highest(call: Callable[[], object], device: torch.device = CPU) -> int:
    """Return the bytes of tensors that a call holds at once, beside those of before."""
    if device.type == "cuda":
        before = on_gpu("current")
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return on_gpu("peak") - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    now = most = 0
    for event in sorted(
        (event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]
    ):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
