"""When masks move: `MaskScheduler` counts optimizer steps, prunes and regrows when it is time, and knows R_s."""

import math
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from itop_prune import criteria, ranks, topology
from itop_prune.criteria import Criterion
from itop_prune.layer import zero_off_mask
from itop_prune.mask import ITOP
from itop_prune.menu import choose
from itop_prune.optimizer import check_holds, check_statistics, has_any_gradient, statistics
from itop_prune.schedules import SCHEDULES, Schedule
from itop_prune.sharding import whole

ORDER = (
    "The order is loss.backward(), optimizer.step(), step() of the MaskScheduler, and only then optimizer.zero_grad()"
)


class MaskScheduler:
    """Moves masks while training: call `step()` once after every optimizer step, before gradients are cleared.

    Every `every` steps, in each layer, the `ceil(rate * active)` weights that `prune` scores lowest leave the mask and
    as many enter it that `grow` scores highest. Weights that enter start at 0, and so does every optimizer statistic
    of theirs.

    The rate falls as `min_rate + (rate - min_rate) * schedule(min(1, step / (stop * total_steps)))`, step counted from
    1.

    Args:
        masks: What `itop_prune.apply` returned, or a part of it: only what is passed moves.
        optimizer: It must hold the masked parameters; wrapped by Accelerate or not. It is never changed, only its
            statistics of weights that left or entered a mask are set to 0.
        total_steps: Optimizer steps of the whole training, at least 1.
        every: Steps between updates, at least 1 (the paper: 1500 for random growth and 4000 for growth by gradient on
            CIFAR-10). Large enough for new weights to be trained, small enough for many updates.
        stop: The last update, as a share of `total_steps`, in (0, 1].
        rate: Share of the active weights exchanged at an update, at the beginning; in (0, 1].
        min_rate: The same at the end; in [0, rate].
        schedule: "cosine", "linear", "constant" or a function of progress in [0, 1].
        prune: "magnitude", "gradient", "random" or a function of some of `itop_prune.criteria.OFFERED`.
        grow: The same menu. A criterion that asks for `grad` gets the dense gradient of the update step.
        seed: Of random criteria and ties.
        check_ranks: Whether a checksum of masks and weights is compared over the ranks at every update, and a run that
            has diverged is stopped. Masks are compared once, here, in any case.

    Raises:
        ValueError: A value is out of range, a name unknown, the optimizer does not hold a masked parameter, or it
            keeps its statistics where they can't be reached.
        RuntimeError: Ranks hold different masks; in `step()`, with `check_ranks`, different masks or weights.

    Under torch.distributed all ranks must train the same model: the dense gradient is averaged over them.

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv 2102.02887.
    """

    updates: int
    """Updates done."""
    skipped: int
    """Steps at which an update was due and numbers were not finite."""

    def __init__(
        self,
        masks: Mapping[str, ITOP],
        optimizer: Optimizer,
        *,
        total_steps: int,
        every: int,
        stop: float = 1.0,
        rate: float = 0.5,
        min_rate: float = 0.005,
        schedule: str | Schedule = "cosine",
        prune: str | Criterion = "magnitude",
        grow: str | Criterion = "random",
        seed: int = 0,
        check_ranks: bool = False,
    ) -> None:
        _check_numbers(total_steps, every, stop, rate, min_rate)
        self._schedule = choose(schedule, SCHEDULES, "schedule")
        if not isinstance(masks, Mapping) or not masks:
            raise ValueError(
                f"masks is {type(masks).__name__}; allowed is what itop_prune.apply returned, or a part of it"
            )
        for itop in masks.values():
            itop.check_drawn()
        self._prune, self._prune_needs = criteria.find(prune, "prune")
        self._grow, self._grow_needs = criteria.find(grow, "grow")
        self._needs_gradient = "grad" in (*self._prune_needs, *self._grow_needs)
        check_holds(optimizer, masks)
        check_statistics(optimizer, masks)
        ranks.check_equal_masks({name: itop.mask for name, itop in masks.items()})

        self._masks, self._optimizer = dict(masks), optimizer
        self._total_steps, self._every, self._stop, self._seed = total_steps, every, stop, seed
        self._first_rate, self._last_rate, self._check_ranks = rate, min_rate, check_ranks
        self._step, self._due = 0, False
        self.updates = self.skipped = 0
        self._explored = {name: itop.mask.clone() for name, itop in masks.items()}
        self._without_gradient = set(self._movable())
        self._warned: set[str] = set()
        self._prepare_next_step()

    @property
    def explored(self) -> Mapping[str, Tensor]:
        """By name, bool: was active at least once. Its share is R_s."""
        return self._explored

    @property
    def rate(self) -> float:
        """The share of active weights that an update now exchanges."""
        progress = min(1.0, self._step / (self._stop * self._total_steps))
        return self._last_rate + (self._first_rate - self._last_rate) * self._schedule(progress)

    def update_steps(self) -> range:
        """Return the plan: the steps, counted from 1, after which the masks move."""
        last = math.floor(self._stop * self._total_steps + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return range(self._every, last + 1, self._every)

    def exploration_rate(self) -> float:
        """Return R_s: the share of the masked weights that were active at least once (Liu et al., 2021)."""
        total = sum(explored.numel() for explored in self.explored.values())
        return sum(int(explored.sum()) for explored in self.explored.values()) / total

    def step(self) -> bool:
        """Count one optimizer step, and prune and regrow when it is time.

        Call it once for every optimizer step that happened: not in the middle of an accumulation, not where a gradient
        scaler skipped the step. Past the last update it does nothing.

        Returns:
            True when an update was made.

        Raises:
            RuntimeError: There are no gradients: they were cleared before.
            ValueError: The masked parameters are not, or no longer, those that the optimizer holds.
        """
        self._step += 1
        self._due = self._due or self._step in self.update_steps()
        masks = self._movable()
        with_gradient = [name for name, itop in masks.items() if itop.parameter.grad is not None]
        if (self._due or self._step == 1) and masks and not with_gradient:
            raise RuntimeError(f"no masked parameter has a gradient. {ORDER}")
        self._without_gradient.difference_update(with_gradient)
        moved = self._due and bool(masks) and self._update(masks)
        self._due = self._due and not moved
        self._prepare_next_step()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and what was explored; the masks and weights are in the model's own state dict."""
        return {
            "step": self._step,
            "updates": self.updates,
            "skipped": self.skipped,
            "due": self._due,
            "without_gradient": sorted(self._without_gradient),
            "explored": {name: explored.clone() for name, explored in self.explored.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's and the optimizer's state dicts as well.

        Raises:
            ValueError: The state is of other masks.
        """
        saved, own = ({name: tuple(t.shape) for name, t in e.items()} for e in (state["explored"], self.explored))
        if saved != own:
            differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
            raise ValueError(f"the state was saved for other masks; different are: {', '.join(differing)}")
        for name, explored in self.explored.items():
            explored.copy_(state["explored"][name])
        self._step, self._due = state["step"], state["due"]
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._without_gradient = set(state["without_gradient"])
        self._prepare_next_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_next_step()  # copies of masks do not listen

    def __repr__(self) -> str:
        active = sum(itop.active for itop in self._masks.values())
        total = sum(itop.mask.numel() for itop in self._masks.values())
        coming = "now" if self._due else next((step for step in self.update_steps() if step > self._step), None)
        return (
            f"MaskScheduler({len(self._masks)} masks, {active:,} of {total:,} active, "
            f"prune={criteria.describe(self._prune)}, grow={criteria.describe(self._grow)}, rate={self.rate:.4f}, "
            f"step {self._step} of {self._total_steps}, updates={self.updates}, next={coming})"
        )

    def _movable(self) -> dict[str, ITOP]:
        return {name: itop for name, itop in self._masks.items() if itop.parameter.requires_grad}

    def _prepare_next_step(self) -> None:
        """Listen for the dense gradient while the next step is computed, if an update is due after it."""
        if not self._needs_gradient:
            return
        wanted = self._due or self._step + 1 in self.update_steps()
        if wanted:  # after a forward FSDP2 shows other parameters, whose gradients are of one rank and micro-batch
            check_holds(self._optimizer, self._movable())
        for itop in self._movable().values() if wanted else self._masks.values():
            itop.listen() if wanted else itop.take_gradient()

    @torch.no_grad()
    def _update(self, masks: Mapping[str, ITOP]) -> bool:
        gradients = {name: itop.take_gradient() for name, itop in masks.items()}
        check_holds(self._optimizer, masks)
        tensors = {name: itop.mask for name, itop in masks.items()}
        parameters = {name: itop.parameter for name, itop in masks.items()}
        state = ranks.examine(parameters, tensors, gradients if self._needs_gradient else None)
        if not state.finite:
            self.skipped += 1
            self._warn(
                "not finite", f"a gradient or masked weight is not finite at step {self._step}: the update waits"
            )
            return False
        if not state.any_gradient and not has_any_gradient(self._optimizer):
            self._warn("zero", f"every gradient is 0 at step {self._step}: were they cleared before? {ORDER}")
        if not any(state.has_gradient.values()):  # nobody listened: the backward pass was before the MaskScheduler
            return False
        if self._check_ranks:
            held = {f"mask of {name}": mask for name, mask in tensors.items()}
            held |= parameters
            ranks.check_equal(held, f"the run has diverged by step {self._step}: go back to a checkpoint before it")
        if self.updates == 0:
            check_statistics(self._optimizer, masks)
        for name in sorted(self._without_gradient):
            self._warn(
                name,
                f"{name} got no gradient since the last update: is its layer still used by the model? Where another "
                "took its place (reset_classifier, set_input_size), mask that one by apply(model, ..., include=[...]), "
                "then build optimizer and MaskScheduler anew with find_masks(model)",
            )
        for name in state.silent if self._needs_gradient and state.any_gradient else ():
            self._warn(
                f"silent {name}",
                f"the dense gradient of {name} is 0 everywhere at step {self._step}, so growth there is by chance: is "
                "a layer near it so sparse that nothing passes, or a scale behind it still 0?",
            )
        for name, itop in masks.items():
            if state.active[name] < itop.outputs:
                self._warn(
                    f"few {name}",
                    f"{name} has {state.active[name]} active weights for {itop.outputs} outputs, so some have none: "
                    "lower the sparsity, or take a method that gives small layers more (ERK)",
                )
            gradient = gradients.pop(name)
            if state.has_gradient[name] and state.active[name] < itop.mask.numel():
                self._move(name, itop, state.active[name], gradient)
        self.updates += 1
        self._without_gradient = set(masks)
        return True

    def _move(self, name: str, itop: ITOP, active: int, gradient: Tensor | None) -> None:
        """Prune and regrow one layer; zero weight and statistics of whatever was not active before and after."""
        parameter, mask = itop.parameter, itop.mask
        explored = self._explored[name] = self._explored[name].to(mask.device)  # the model may have been moved
        offered: dict[str, Any] = {
            "weight": whole(itop.weight).float(),
            "mask": mask,
            "grad": ranks.mean(gradient, mask) if self._needs_gradient else None,
            "explored": explored,
            "generator": topology.seeded(mask.device, self._seed, self.updates, name),
        }
        prune, grow = (
            _score(name, criterion, {need: offered[need] for need in needs}, mask)
            for criterion, needs in ((self._prune, self._prune_needs), (self._grow, self._grow_needs))
        )
        count = math.ceil(self.rate * active)
        moved = topology.prune_and_regrow(mask, prune, grow, count, count, offered["generator"])
        stayed = mask & moved
        itop.keep(stayed)
        for tensor in statistics(self._optimizer, parameter).values():
            zero_off_mask(tensor, stayed)
        explored |= mask | moved
        mask.copy_(moved)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=5)


def _score(name: str, criterion: Criterion, arguments: Mapping[str, Any], mask: Tensor) -> Tensor:
    scores = criterion(**arguments)
    if not isinstance(scores, Tensor) or scores.shape != mask.shape or scores.device != mask.device:
        seen = f"{tuple(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(
            f"{criteria.describe(criterion)} gave {seen} for {name}; it must give one score per weight, "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    return scores


def _check_numbers(total_steps: int, every: int, stop: float, rate: float, min_rate: float) -> None:
    for name, steps in {"total_steps": total_steps, "every": every}.items():
        if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"{name} is {steps!r}; allowed are whole numbers from 1: it counts optimizer steps")
    for name, share in {"stop": stop, "rate": rate}.items():
        if not _is_number(share) or not 0.0 < share <= 1.0:
            raise ValueError(f"{name} is {share!r}; allowed is a number in (0, 1]")
    if not _is_number(min_rate) or not 0.0 <= min_rate <= rate:
        raise ValueError(f"min_rate is {min_rate!r}; allowed is a number in [0, rate], and rate is {rate}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
