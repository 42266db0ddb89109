"""The plan of a training: after which steps the masks move, and what share of its weights an update exchanges."""

import math
from dataclasses import dataclass

from itop_prune.methods.schedules import Schedule, factor
from itop_prune.methods.validation import check_rates, check_steps


@dataclass(frozen=True)
class Plan:
    """Arguments of `MaskScheduler` that are numbers of steps and shares. Steps are counted from 1.

    >>> from itop_prune.methods.schedules import cosine
    >>> plan = Plan(total_steps=100, every=30, stop=1.0, rate=0.5, min_rate=0.0, schedule=cosine)
    >>> list(plan.updates()), plan.next_update(60), plan.next_update(90), plan.rate_at(50)
    ([30, 60, 90], 90, None, 0.25)
    """

    total_steps: int
    every: int
    stop: float
    rate: float
    min_rate: float
    schedule: Schedule
    may_rest: bool = False
    """Whether the rate may be 0, since the density moves."""

    def __post_init__(self) -> None:
        check_steps(self.total_steps, self.every)
        check_rates(self.stop, self.rate, self.min_rate, self.may_rest)

    def updates(self) -> range:
        """Return the steps after which the masks move."""
        last = math.floor(self.stop * self.total_steps + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return range(self.every, last + 1, self.every)

    def next_update(self, step: int) -> int | None:
        """Return the first of them after a step, None if there is none."""
        coming = (step // self.every + 1) * self.every
        return coming if coming in self.updates() else None

    def rate_at(self, step: int) -> float:
        """Return the share of active weights that an update at a step exchanges."""
        progress = min(1.0, step / (self.stop * self.total_steps))
        return float(self.min_rate + (self.rate - self.min_rate) * factor(self.schedule, progress))

    def progress(self, step: int) -> float:
        """Return the share of the way to the last update, in [0, 1]; 1 past it, where one may still be due."""
        last = (self.updates() or (step,))[-1]
        return min(1.0, step / last)
