"""When masks move: the steps of the updates, and the share of active weights exchanged."""

import math
import sys
from dataclasses import dataclass

from itop_prune.methods.schedules import Schedule, factor
from itop_prune.methods.validation import is_count, is_number


@dataclass(frozen=True)
class Timetable:
    """Arguments of `MaskScheduler` that are numbers of steps and shares. Steps are counted from 1.

    Raises:
        ValueError: A number is out of range.

    >>> from itop_prune.methods.schedules import cosine
    >>> table = Timetable(100, every=30, stop=1.0, rate=0.5, min_rate=0.0, schedule=cosine)
    >>> list(table.updates()), table.next_update(60), table.next_update(90), table.rate_at(50)
    ([30, 60, 90], 90, None, 0.25)
    """

    total_steps: int
    every: int
    stop: float
    rate: float
    min_rate: float
    schedule: Schedule
    rate_may_be_zero: bool = False
    """Whether the rate may be 0, since the density moves."""

    def __post_init__(self) -> None:
        for name, steps in {"total_steps": self.total_steps, "every": self.every}.items():
            if not is_count(steps) or steps > sys.maxsize:
                raise ValueError(
                    f"{name} is {steps!r}; allowed are whole numbers from 1 to 2^63 - 1: it counts "
                    "optimizer steps"
                )
        if not is_number(self.stop) or not 0.0 < self.stop <= 1.0:
            raise ValueError(f"stop is {self.stop!r}; allowed is a number in (0, 1]")
        positive = is_number(self.rate) and 0.0 < self.rate <= 1.0
        zero = is_number(self.rate) and self.rate == 0.0 and self.rate_may_be_zero
        if not (positive or zero):
            raise ValueError(
                f"rate is {self.rate!r}; allowed is a number in (0, 1], or 0 with final_sparsity"
            )
        if not is_number(self.min_rate) or not 0.0 <= self.min_rate <= self.rate:
            raise ValueError(
                f"min_rate is {self.min_rate!r}; allowed is a number in [0, rate], and rate is "
                f"{self.rate}"
            )

    def updates(self) -> range:
        """List the steps after which the masks move."""
        last = math.floor(self.stop * self.total_steps + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return range(self.every, last + 1, self.every)

    def next_update(self, step: int) -> int | None:
        """Find the first update after a step, or None."""
        coming = (step // self.every + 1) * self.every
        return coming if coming in self.updates() else None

    def rate_at(self, step: int) -> float:
        """Compute the share of active weights that an update at a step exchanges."""
        progress = min(1.0, step / (self.stop * self.total_steps))
        span = self.rate - self.min_rate
        return float(self.min_rate + span * factor(self.schedule, progress))

    def progress(self, step: int) -> float:
        """Compute the share of the way to the last update, in [0, 1]."""
        updates = self.updates()
        last = updates[-1] if updates else step
        return min(1.0, step / last)
