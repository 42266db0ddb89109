"""When masks move: `MaskScheduler` counts optimizer steps, prunes and regrows when it is time, and measures R_s.

`step` says when, `_update` what happens then, `_move` what it does to weights and optimizer
statistics.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from itop_prune import distributed as ranks
from itop_prune.layers.handle import ITOP, active_weights
from itop_prune.layers.sharding import zero_off_mask
from itop_prune.methods.criteria import Criterion
from itop_prune.methods.distributions import Distribution
from itop_prune.methods.lookup import describe
from itop_prune.methods.patterns import check_held
from itop_prune.methods.redistribution import Redistribution
from itop_prune.methods.schedules import Schedule, find
from itop_prune.methods.validation import checked_seed
from itop_prune.update.density import Density
from itop_prune.update.diagnostics import Notices, deaf, odd_layers
from itop_prune.update.exploration import Exploration
from itop_prune.update.gradients import DenseGradients
from itop_prune.update.new_masks import Layer, Rules, alike, check_counts, exchange
from itop_prune.update.optimizer_state import (
    check_holds,
    check_statistics,
    has_any_gradient,
    statistics,
)
from itop_prune.update.timetable import Plan
from itop_prune.update.turnover import check_floor, counts

ORDER = "The order is loss.backward(), optimizer.step(), step() of the MaskScheduler, and only then optimizer.zero_grad()"

SAVED = (
    "step",
    "updates",
    "skipped",
    "due",
    "without_gradient",
    "first_counts",
    "dense",
    "explored",
)
"""What a state dict must have to be loaded."""


class MaskScheduler:
    """Moves masks while training: call `step()` once after every optimizer step, before gradients are cleared.

    Every `every` steps, in each layer, the `ceil(rate * active)` weights that `prune` scores lowest
    leave the mask and as many enter it that `grow` scores highest; while the density falls, more
    leave than enter. Weights that enter start at 0, and so does every optimizer statistic of
    theirs. A weight just pruned may grow again at once (as in the ITOP authors' code and RigL's)
    and was never out then. The count is rounded up (RigL's code rounds it down), and an update at
    the very step of `stop` is made. A layer without a gradient at an update stays as it is.

    The rate falls as `min_rate + (rate - min_rate) * schedule(min(1, step / (stop *
    total_steps)))`, step counted from 1. With `final_sparsity` the density goes from what it is to
    that, as `density` says, exact at the last update.

    A mask with a pattern N:M keeps it exactly: the same weights leave, and in each group of M as
    many enter as it lost, those that `grow` scores highest in it.

    Args: masks: What `itop_prune.apply` returned, or a part of it: only what is passed moves.
        optimizer: It must hold the masked parameters; wrapped by Accelerate or not. It is never
        changed, only its statistics of weights that left or entered a mask are set to 0.
        total_steps: Optimizer steps of the whole training, at least 1. every: Steps between
        updates, at least 1 (the paper: 1500 for random growth and 4000 for growth by gradient on
        CIFAR-10). Large enough for new weights to be trained, small enough for many updates. stop:
        The last update, as a share of `total_steps`, in (0, 1]. rate: Share of the active weights
        exchanged at an update, at the beginning; in (0, 1], or 0 with `final_sparsity`. min_rate:
        The same at the end; in [0, rate]. schedule: Of the rate: a key of
        `itop_prune.schedules.SCHEDULES` or a function of progress in [0, 1]. prune: A key of
        `itop_prune.criteria.PRUNE`, or a function of some of `itop_prune.criteria.OFFERED`. grow: A
        key of its `GROW`, or a function likewise. One that asks for `grad` gets the dense gradient
        of the step. redistribute: Which layers get what grows: "none", each what it has pruned; a
        key of `itop_prune.redistribution.REDISTRIBUTIONS`, or a function of some of its `OFFERED`.
        scope: "layer", each prunes its own share; or "global", the lowest scores of all layers
        together leave, and where there is no redistribution each grows what it lost. On the way to
        a final sparsity they are the lowest that the density lets go; then each layer exchanges its
        share of what it has left (GraNet: Liu et al., 2021, arXiv 2106.10404). The scores of all
        active weights are held at once: 12 bytes for each. floor: With the scope "global", the
        least density of a layer, in [0, 1). One weight stays in any case; a layer that is down to
        it seldom comes back. density: How the density goes to the last one: "cubic", "alternating"
        or another schedule. final_sparsity: Share of zeros after the last update, in [0, 1), over
        all masks passed; None: as it is. final_method: How the last active weights are shared out
        with the scope "layer": a key of `itop_prune.distributions.DISTRIBUTIONS` or a function
        `(shapes, density) -> densities`. gradient_steps: Over how many steps `grad` is summed up,
        those before an update; 1 to `every`. survival: Whether to count which of the weights that
        grew survive the update after; a byte per weight. seed: Of random criteria and ties.
        check_ranks: Whether a checksum of masks and weights is compared over the ranks at every
        update, and a run that has diverged is stopped. Masks are compared once, here, in any case.

    Raises: ValueError: A value is out of range, a name unknown, the optimizer does not hold a
        masked parameter, or it keeps its statistics where they can't be reached; or a mask with a
        pattern does not hold it, or would have to change its count. RuntimeError: Ranks hold
        different masks; in `step()`, with `check_ranks`, different masks or weights.

    Under torch.distributed all ranks must train the same model: the dense gradient is averaged over
    them.

    Reference: Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, arXiv
    2102.02887.
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
        redistribute: str | Redistribution = "none",
        scope: Literal["layer", "global"] = "layer",
        floor: float = 0.0,
        density: str | Schedule = "constant",
        final_sparsity: float | None = None,
        final_method: str | Distribution = "ERK",
        gradient_steps: int = 1,
        survival: bool = False,
        seed: int = 0,
        check_ranks: bool = False,
    ) -> None:
        curve = find(schedule, "schedule")
        self._plan = Plan(
            total_steps, every, stop, rate, min_rate, curve, may_rest=final_sparsity is not None
        )
        if not isinstance(masks, Mapping) or not masks:
            raise ValueError(
                f"masks is {type(masks).__name__}; allowed is what itop_prune.apply returned, or a part of it"
            )
        for itop in masks.values():
            itop.check_drawn()
        self._masks, self._optimizer = dict(masks), optimizer
        self._seed, self._check_ranks = checked_seed(seed), check_ranks
        self._rules = Rules.of(prune, grow, redistribute, scope, floor)
        self._density = Density(
            self._masks, density, final_sparsity, final_method, self._rules.shares_layers
        )
        patterned = {name: itop.pattern for name, itop in masks.items() if itop.pattern is not None}
        if patterned and (self._rules.redistribute or self._density.moves):
            name, (n, m) = next(iter(patterned.items()))
            raise ValueError(
                f"{name} keeps {n} of every {m} weights, and redistribute and final_sparsity would change how many; "
                "leave them out, or place masks without a pattern"
            )
        check_held({name: itop.mask for name, itop in masks.items()}, patterned)
        weights = {name: itop.mask.numel() for name, itop in masks.items()}
        check_floor(self._rules, weights, self._density.least)
        if self._density.moves and not self.update_steps():
            raise ValueError(
                f"every is {every} and the last update could be at step {stop * total_steps:g}: none is made, and "
                "final_sparsity never reached; lower every"
            )
        check_holds(optimizer, masks)
        check_statistics(optimizer, masks)
        ranks.check_equal_masks({name: itop.mask for name, itop in masks.items()})

        self._step, self._due = 0, False
        self.updates = self.skipped = 0
        self._dense = DenseGradients(self._masks, self._rules.needs, gradient_steps, every)
        self._exploration = Exploration(self._masks, survival)
        self._without_gradient = set(
            self._movable()
        )  # names of those that had none since the last update
        self._notices = Notices()
        self._prepare_next_step()

    @property
    def explored(self) -> Mapping[str, Tensor]:
        """By name, bool: was active at least once. Its share is R_s."""
        return self._exploration.explored

    @property
    def rate(self) -> float:
        """The share of active weights that an update now exchanges."""
        return self._plan.rate_at(self._step)

    @property
    def listens(self) -> bool:
        """Whether the next step computes the dense gradient of the weights, as growth by gradient asks for."""
        return self._dense.listens

    def update_steps(self) -> range:
        """Return the plan: the steps, counted from 1, after which the masks move."""
        return self._plan.updates()

    def exploration_rate(self) -> float:
        """Return R_s: the share of the masked weights that were active at least once (Liu et al., 2021)."""
        return self._exploration.rate()

    def entered(self) -> dict[str, int]:
        """Return, by layer, how many weights entered its mask at the last update: active now, and not before it.

        Over how many are active that is the share of the mask that changed: of a layer that keeps
        its density at most what was exchanged, `ceil(rate * active)`; less where pruned weights
        grew again. Empty before the first update.
        """
        return self._exploration.entered()

    def survival_rates(self) -> dict[str, float]:
        """Return, by layer, what share of the weights grown at the last update but one survived the last.

        Layers where nothing grew are left out; {} without `survival=True`.
        """
        return self._exploration.survival_rates()

    def survival_rate(self) -> float:
        """Return the same for all layers together; NaN before the second update, and without `survival=True`."""
        return self._exploration.survival_rate()

    def step(self) -> bool:
        """Count one optimizer step, and prune and regrow when it is time.

        Call it after every optimizer step that happened, before gradients are cleared: not in the
        middle of an accumulation, not where a gradient scaler skipped the step. After the last
        update it only counts, unless an update is still due. When a criterion fails or gives NaN
        some masks may have moved: go back to a checkpoint.

        Returns:
            True when an update was made.

        Raises: RuntimeError: No masked parameter has a gradient at the first step or a due one:
            they were cleared before, and the step is not counted; a criterion failed, or ranks have
            diverged. ValueError: A criterion or redistribution gave something else than numbers,
            such as NaN, or the masked parameters are no longer those that the optimizer holds.
        """
        step = self._step + 1
        due = self._due or step in self.update_steps()
        # Gradients are looked at to move masks, to hear the dense ones, and to tell of layers that have had none yet.
        looks_at_gradients = due or self._dense.listens or self._without_gradient or step == 1
        masks = self._movable() if looks_at_gradients else {}
        with_gradient = [name for name, itop in masks.items() if itop.parameter.grad is not None]
        if (due or step == 1) and masks and not with_gradient:
            raise RuntimeError(f"no masked parameter has a gradient. {ORDER}")
        self._step, self._due = step, due
        if not looks_at_gradients:
            self._prepare_next_step()
            return False
        self._without_gradient.difference_update(with_gradient)
        heard = self._dense.collect(masks)
        moved = self._due and bool(masks) and self._update(masks, heard)
        self._due = self._due and not moved
        self._prepare_next_step()
        self._notices.give()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and what was explored; the masks and weights are in the model's own state dict."""
        return {
            "step": self._step,
            "updates": self.updates,
            "skipped": self.skipped,
            "due": self._due,
            "without_gradient": sorted(self._without_gradient),
            "first_counts": dict(self._density.first),
            "dense": self._dense.state_dict(),
            **self._exploration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's and the optimizer's state dicts as well.

        Raises:
            ValueError: It is no such state, or one of other masks; nothing is changed then.
        """
        if missing := [key for key in SAVED if key not in state]:
            raise ValueError(
                f"the state lacks {', '.join(missing)}; give what a MaskScheduler's state_dict() returned"
            )
        self._exploration.load_state_dict(state)
        self._step, self._due = state["step"], state["due"]
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._without_gradient = set(state["without_gradient"])
        self._density.first = dict(state["first_counts"])
        self._dense.load_state_dict(state["dense"])
        self._prepare_next_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_next_step()  # copies of masks do not listen

    def __repr__(self) -> str:
        active = sum(active_weights(self._masks).values())
        total = sum(itop.mask.numel() for itop in self._masks.values())
        coming = "now" if self._due else self._plan.next_update(self._step)
        return (
            f"MaskScheduler({len(self._masks)} masks, {active:,} of {total:,} active, "
            f"prune={describe(self._rules.prune.function)}, grow={describe(self._rules.grow.function)}, "
            f"rate={self.rate:.4f}, step {self._step} of {self._plan.total_steps}, updates={self.updates}, "
            f"next={coming})"
        )

    def _movable(self) -> dict[str, ITOP]:
        return {name: itop for name, itop in self._masks.items() if itop.parameter.requires_grad}

    def _prepare_next_step(self) -> None:
        """Listen for the dense gradient while the next step is computed, if an update will ask for it."""
        coming = self._step + 1 if self._due else self._plan.next_update(self._step)
        needed = self._dense.plan_next(None if coming is None else coming - self._step)
        if needed:  # during a step FSDP2 swaps the parameters, and those have the gradients of one rank alone
            check_holds(self._optimizer, self._movable())
        self._dense.listen(self._movable() if needed else ())

    @torch.no_grad()
    def _update(self, masks: Mapping[str, ITOP], heard: Mapping[str, Tensor | None]) -> bool:
        state = self._look(masks, heard)
        if (
            state is None
        ):  # a number is not finite, on some rank, or nothing was heard: it stays due
            return False
        layers = {
            name: Layer(
                name,
                itop,
                self._exploration.of(name, itop.mask),
                self._dense,
                (self._seed, self.updates),
            )
            for name, itop in masks.items()
            if state.has_gradient[name]
        }
        self._density.begin(self._masks)
        active = {name: state.active[name] for name in layers}
        target = self._density.targets(active, self._plan.progress(self._step))
        leaving, entering = counts(
            self._rules, layers, active, target, self.rate, self._density.moves
        )
        remaining: dict[str, Tensor] = {}
        self._exploration.begin()
        for group in alike(layers, leaving, entering):
            first = group[0].name
            exchanged = exchange(self._rules, group, leaving[first], entering[first])
            for layer, (new, kept) in zip(group, exchanged, strict=True):
                self._exploration.note(layer.name, layer.itop.mask, new)
                self._move(layer.itop, new)
                self._dense.forget(layer.name)
                remaining[layer.name] = kept
        for name, itop in masks.items():
            if name not in remaining:
                self._exploration.note(name, itop.mask, itop.mask)
        self._dense.forget_all()
        check_counts(
            self._rules,
            {name: masks[name].mask for name in remaining},
            remaining,
            active,
            leaving,
            entering,
        )
        self.updates += 1
        self._without_gradient = set(masks)
        return True

    def _look(
        self, masks: Mapping[str, ITOP], heard: Mapping[str, Tensor | None]
    ) -> ranks.State | None:
        """Return what all ranks hold, once it is checked; None where the update must wait."""
        check_holds(self._optimizer, masks)
        tensors = {name: itop.mask for name, itop in masks.items()}
        parameters = {name: itop.parameter for name, itop in masks.items()}
        state = ranks.examine(parameters, tensors, heard if self._dense.wanted else None)
        if not state.finite:
            self.skipped += 1
            where = f"at step {self._step}"
            self._notices.add(
                "not finite", f"a gradient or masked weight is not finite {where}: the update waits"
            )
            return None
        if not state.any_gradient and not has_any_gradient(self._optimizer):
            self._notices.add(
                "zero",
                f"every gradient is 0 at step {self._step}: were they cleared before? {ORDER}",
            )
        heard_none = not any(state.has_gradient.values())
        # Once is no sign: who is built between backward and step has not listened yet.
        if self._notices.in_a_row("deaf", heard_none and self._dense.listens) > 1:
            self._notices.add("deaf", deaf(self._step))
        if heard_none:
            return None
        if self._check_ranks:
            held = {f"mask of {name}": mask for name, mask in tensors.items()}
            held |= parameters
            ranks.check_equal(
                held,
                f"the run has diverged by step {self._step}: go back to a checkpoint before it",
            )
        if self.updates == 0:
            check_statistics(self._optimizer, masks)
        ends = self._density.moves and self._plan.next_update(self._step) is None
        missed = self._notices.missed(state.has_gradient)
        odd = odd_layers(
            state, masks, self._without_gradient, missed, self._dense.wanted, self._step, ends
        )
        for key, message in odd:
            self._notices.add(key, message)
        return state

    def _move(self, itop: ITOP, mask: Tensor) -> None:
        """Write a new mask. Value and statistics stay where a weight is active before and after, and are 0 elsewhere.

        So one that grows starts at 0, and one that was pruned and grew again at once was never out.
        """
        stayed = itop.mask.bitwise_and_(mask)  # for now it is the mask itself
        itop.keep(stayed)
        for tensor in statistics(self._optimizer, itop.parameter).values():
            zero_off_mask(tensor, stayed)
        itop.mask.copy_(mask)
