"""`MaskScheduler` counts optimizer steps, prunes and regrows when it is time, and measures R_s.

`step` decides when, `_update` makes an update: inspect, plan the changes, write the new masks.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from itop_prune import bits, distributed
from itop_prune.distributed import UpdateInputs, world_size
from itop_prune.layers.handle import ITOP, active_weights
from itop_prune.layers.sparse_handle import SparseITOP
from itop_prune.messages import listed
from itop_prune.methods import schedules
from itop_prune.methods.criteria import Criterion
from itop_prune.methods.distributions import Distribution
from itop_prune.methods.redistribution import Redistribution
from itop_prune.methods.schedules import Schedule
from itop_prune.methods.validation import checked_seed
from itop_prune.patterns import check_held
from itop_prune.update.counts import Counts, check_floor, plan_changes
from itop_prune.update.density import DensityTargets
from itop_prune.update.diagnostics import PendingWarnings, layer_warnings, no_dense_gradient
from itop_prune.update.exploration import BUDGET, Exploration, Explored
from itop_prune.update.gradients import DenseGradients
from itop_prune.update.layer_update import LayerUpdate
from itop_prune.update.optimizer_state import (
    check_holds_parameters,
    check_statistics,
    has_any_gradient,
    may_write_nan,
    pad_to,
    statistics,
    zero_statistics,
)
from itop_prune.update.rules import Rules, check_dense_tensors_fit
from itop_prune.update.saved_state import check_state
from itop_prune.update.timetable import Timetable

ORDER = (
    "The order is loss.backward(), optimizer.step(), step() of the MaskScheduler, and only then "
    "optimizer.zero_grad()"
)


class MaskScheduler:
    """Moves masks during training: call `step()` after every optimizer step.

    Gradients must not be cleared before it.

    Every `every` steps, in each layer, the `ceil(rate * active)` weights with the lowest `prune`
    scores leave the mask, and as many with the highest `grow` scores enter it. While the density
    falls, more leave than enter. Weights that enter start at 0, and so does every optimizer
    statistic of theirs. A weight just pruned may grow again at once, as in the ITOP authors' code
    and RigL's, and then keeps its value. The count is rounded up (RigL's code rounds it down). The
    step `stop * total_steps` itself still gets its update. A layer without a gradient at an update
    stays as it is.

    The rate at a step (counted from 1) is `min_rate + (rate - min_rate) * schedule(min(1, step /
    (stop * total_steps)))`. With `final_sparsity` the density follows `density` from its present
    value to the final one, exact at the last update.

    A mask with a pattern N:M keeps it exactly. The same weights leave, and each group of M regrows
    as many as it lost, by its highest `grow` scores.

    Args:
        masks: What `itop_prune.apply` returned, or a part of it. Only these masks move. A new
            scheduler may take over from an old one, but the two can't take turns.
        optimizer: It must hold the masked parameters; wrapped by Accelerate or not. The scheduler
            sets its statistics to 0 for weights that leave or enter a mask, and changes nothing
            else of it.
        total_steps: Optimizer steps of the whole training, at least 1.
        every: Steps between updates, at least 1. The paper takes 1500 for random growth and 4000
            for growth by gradient on CIFAR-10. Choose it large enough to train new weights, and
            small enough for many updates. If it leaves room for none, a warning says so.
        stop: The last update, as a share of `total_steps`, in (0, 1]. What grows then has only the
            steps left to train. With 1.0 the default rate has fallen to `min_rate` by then. Where
            the rate stays high, take a lower one, such as RigL's 0.75.
        rate: Share of the active weights exchanged at an update, at the beginning; in (0, 1], or 0
            with `final_sparsity`.
        min_rate: The same share at the end; in [0, rate].
        schedule: Of the rate: a key of `itop_prune.schedules.SCHEDULES`, {"power": 1.5}, or a
            function of progress in [0, 1].
        prune: A key of `itop_prune.criteria.PRUNE`, or a function of some of
            `itop_prune.criteria.OFFERED`.
        grow: A key of `itop_prune.criteria.GROW`, or a function likewise. A function that asks for
            `grad` gets the dense gradient of the step.
        redistribute: Which layers get the weights that grow. "none": each gets what it pruned. Else
            a key of `itop_prune.redistribution.REDISTRIBUTIONS`, or a function of some of its
            `OFFERED`.
        scope: "layer": each layer prunes its own share. "global": the lowest scores of all layers
            together leave, and without redistribution each layer grows what it lost. On the way to
            a final sparsity only the cut is global. Each layer then exchanges its share of what it
            has left (GraNet: Liu et al., 2021, arXiv 2106.10404). "global" holds the scores of all
            active weights at once, 12 bytes each.
        floor: With the scope "global", the least density of a layer, in [0, 1). One weight stays in
            any case, but a layer with one weight seldom recovers. Where weights grow by chance and
            the density falls, a warning asks for a floor.
        density: How the density goes to the final one: "cubic", {"power": 1.5}, "alternating" or
            another schedule.
        final_sparsity: Share of zeros after the last update, in [0, 1), over all masks passed.
            None: the sparsity stays.
        final_method: How the final active weights are shared out with the scope "layer": a key of
            `itop_prune.distributions.DISTRIBUTIONS`, or a function `(shapes, density) ->
            densities`.
        gradient_steps: How many steps before an update `grad` sums up; 1 to `every`.
        survival: Whether to count which new weights survive the next update; 8 bytes for each of
            them.
        explored_bytes: Memory for R_s, at least 1. R_s is exact if a bit of every weight fits in.
            If not, layers of more than a million weights are sampled.
        seed: Of random criteria and ties.
        check_ranks: Whether ranks compare a checksum of masks and weights at every update, and stop
            a run that has diverged. Masks are compared once, here, in any case.
        scaler: The gradient scaler of the loop. Each backward's dense gradient is divided by the
            scale of that backward. An optimizer wrapped by Accelerate brings its own.
        one_backward: Whether every step has one backward: no gradients accumulate. Before an update
            by "gradient" sparse storage then keeps of each layer only the gradients that may grow,
            16 bytes for each active weight. Else it keeps them all, 4 bytes for every weight. It
            does so in any case with several ranks, gradient_steps, redistribution, a pattern or a
            density that moves. A second backward is an error.

    Raises:
        ValueError: A value is out of range, a name is unknown, the optimizer does not hold a masked
            parameter or keeps its statistics out of reach, or a mask breaks its pattern or would
            have to change its count.
        RuntimeError: Ranks hold different masks; in `step()`, with `check_ranks`, different masks
            or weights.

    Under torch.distributed all ranks must train the same model, since the dense gradient is
    averaged over them.

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
        schedule: str | Schedule | Mapping[str, float] = "cosine",
        prune: str | Criterion = "magnitude",
        grow: str | Criterion = "random",
        redistribute: str | Redistribution = "none",
        scope: Literal["layer", "global"] = "layer",
        floor: float = 0.0,
        density: str | Schedule | Mapping[str, float] = "constant",
        final_sparsity: float | None = None,
        final_method: str | Distribution = "ERK",
        gradient_steps: int = 1,
        survival: bool = False,
        explored_bytes: int = BUDGET,
        seed: int = 0,
        check_ranks: bool = False,
        scaler: GradScaler | None = None,
        one_backward: bool = False,
    ) -> None:
        self._timetable = Timetable(
            total_steps,
            every,
            stop,
            rate,
            min_rate,
            schedules.find(schedule, "schedule"),
            rate_may_be_zero=final_sparsity is not None,
        )
        if not isinstance(masks, Mapping) or not masks:
            raise ValueError(
                f"masks is {type(masks).__name__}; allowed is what itop_prune.apply returned, or a "
                "part of it"
            )
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(
                f"optimizer is {type(optimizer).__name__}; allowed is one torch optimizer; of "
                "several each takes a MaskScheduler of its own, with the masks that it holds"
            )
        self._masks, self._optimizer = dict(masks), optimizer
        self._seed, self._check_ranks = checked_seed(seed), check_ranks
        self._rules = Rules.of(prune, grow, redistribute, scope, floor)
        self._density = DensityTargets(
            self._masks, density, final_sparsity, final_method, self._rules.shares_layers
        )
        self._check_fit()

        self._step, self._due = 0, False
        self.updates = self.skipped = 0
        self._token: object | None = None  # stands for this scheduler in the masks that it moves
        if scaler is None:
            scaler = getattr(optimizer, "scaler", None)  # of Accelerate's wrapper
        self._gradients = DenseGradients(
            self._masks,
            self._rules.needs,
            gradient_steps,
            every,
            scaler,
            one_backward and self._rules.largest_gradients_suffice and not self._density.moves,
        )
        self._exploration = Exploration(self._masks, survival, explored_bytes)
        self._without_gradient = set(self._movable())  # layers without one since the last update
        self._warnings = PendingWarnings()
        # Of sparse storage, as bits with their shape: slots with another owner than at the last
        # call of `clean_average`.
        self._moved: dict[str, tuple[Tensor, torch.Size]] = {}
        self._prepare_next_step()

    def _check_fit(self) -> None:
        """Refuse masks, rules and optimizer that do not fit together."""
        patterns = {
            name: itop.pattern for name, itop in self._masks.items() if itop.pattern is not None
        }
        if patterns and (self._rules.redistribute or self._density.moves):
            name, (n, m) = next(iter(patterns.items()))
            raise ValueError(
                f"{name} keeps {n} of every {m} weights, and redistribute and final_sparsity would "
                "change how many; leave them out, or place masks without a pattern"
            )
        dims = {name: self._masks[name].input_dim for name in patterns}
        check_held({name: self._masks[name].mask for name in patterns}, patterns, dims)

        check_dense_tensors_fit(self._rules, self._masks)
        weights = {name: itop.size for name, itop in self._masks.items()}
        check_floor(self._rules, weights, self._density.smallest)
        if self._starves_layers() and distributed.is_first():
            warnings.warn(
                f"grow is {self._rules.grow.name}, and weights that grow by chance are small: on "
                "the way to final_sparsity scope='global' prunes them first, and some layers "
                "starve. Take grow='gradient' or 'sampled_gradient', scope='layer', or a floor, "
                "such as half of the final density",
                stacklevel=3,
            )
        if not self.update_steps():
            table = self._timetable
            last = table.stop * table.total_steps
            found = f"every is {table.every} and the last update could be at step {last:g}: none is"
            if self._density.moves:
                raise ValueError(f"{found} made, and final_sparsity never reached; lower every")
            if distributed.is_first():
                advice = "lower every, or leave the MaskScheduler out to train with static masks"
                warnings.warn(f"{found} made, the masks never move; {advice}", stacklevel=3)

        check_holds_parameters(self._optimizer, self._masks)
        check_statistics(self._optimizer, self._masks)
        distributed.check_equal_masks({name: itop.buffer for name, itop in self._masks.items()})

    def _starves_layers(self) -> bool:
        """Tell whether the cut over all layers meets weights that grow by chance."""
        rules = self._rules
        by_chance = not {"grad", "momentum"} & set(rules.grow.needs)
        cut_freely = rules.across_layers and not rules.redistribute and not rules.floor
        return by_chance and cut_freely and self._density.falls and self._timetable.rate > 0.0

    @property
    def explored(self) -> Explored:
        """By name, bool: was active at least once. Its share is R_s."""
        return self._exploration.explored

    @property
    def rate(self) -> float:
        """The share of active weights that an update now exchanges."""
        return self._timetable.rate_at(self._step)

    @property
    def listens(self) -> bool:
        """Whether the next step computes the dense gradient of the weights."""
        return self._gradients.collecting

    def update_steps(self) -> range:
        """List the steps, counted from 1, after which the masks move."""
        return self._timetable.updates()

    def exploration_rate(self) -> float:
        """Compute R_s: the share of masked weights that were active at least once.

        It is exact if a bit of every weight fits in `explored_bytes`. If not, it is an estimate
        from a sample of the weights.
        """
        return self._exploration.rate()

    def exploration_error(self) -> float:
        """Compute the standard error of `exploration_rate`; 0 unless that is an estimate."""
        return self._exploration.error()

    def entered(self) -> dict[str, int]:
        """Count, by layer, the weights that entered its mask at the last update.

        They are active now and were not before it. A layer that keeps its density gets at most
        `ceil(rate * active)`, and fewer if pruned weights grew again. Empty before the first
        update.
        """
        return self._exploration.entered()

    def survival_rates(self) -> dict[str, float]:
        """Compute, by layer, the share of new weights that survived the last update.

        They are the weights that grew at the update before it. Layers in which nothing grew
        are left out. Empty without `survival=True`.
        """
        return self._exploration.survival_rates()

    def survival_rate(self) -> float:
        """Compute the survival rate over all layers; NaN before the second update."""
        return self._exploration.survival_rate()

    @torch.no_grad()
    def clean_average(self, *averages: Mapping[str, ITOP]) -> None:
        """Set weights of averages to 0 that are not active in the model any more.

        An average (timm's `ModelEmaV3`) remembers them, and they may grow again. Call this after
        every update of the averages, or at least in every step in which masks moved; give it all
        averages at once.

        Layers in sparse storage may gain weights by redistribution, the scope "global", or a
        density that rises. Then call it also before the averages' update, if `step` returned True.
        It makes their parameters as long as the model's.

        Averages of buffers (`ModelEmaV2`, `AveragedModel(use_buffers=True)`) can't be right, since
        masks and positions are not to be averaged.

        Args:
            averages: What `itop_prune.find_masks` finds in each.
        """
        for masks in averages:
            for name in masks.keys() & self._masks.keys():
                moved = bits.unpack(*self._moved[name]) if name in self._moved else None
                masks[name].follow(self._masks[name], moved)
        self._moved.clear()

    def step(self) -> bool:
        """Count one optimizer step, and prune and regrow when it is time.

        Call it after every optimizer step that was not skipped, before gradients are cleared. Do
        not call it in the middle of an accumulation, nor if a gradient scaler skipped the step.
        After the last update it only counts, unless an update is still due. If a criterion fails or
        gives NaN, some masks may have moved: go back to a checkpoint.

        Returns:
            True when an update was made.

        Raises:
            RuntimeError: No masked parameter has a gradient at the first step or at a due update.
                They were cleared before, and the step is not counted. Or another MaskScheduler
                moves the same masks, a criterion failed, or ranks have diverged.
            ValueError: A criterion or redistribution did not give numbers, or the masked parameters
                are no longer those that the optimizer holds.
        """
        self._take_over()
        if may_write_nan(self._optimizer):
            for itop in self._masks.values():
                itop.zero_off_mask()

        step = self._step + 1
        due = self._due or step in self.update_steps()
        needs_gradients = due or self.listens or self._without_gradient or step == 1
        if not needs_gradients:
            self._step = step
            self._prepare_next_step()
            return False

        masks = self._movable()
        with_gradient = [name for name, itop in masks.items() if itop.parameter.grad is not None]
        if (due or step == 1) and masks and not with_gradient:
            raise RuntimeError(f"no masked parameter has a gradient. {ORDER}")
        self._step, self._due = step, due
        self._without_gradient.difference_update(with_gradient)

        self._gradients.end_step(masks)
        moved = due and bool(masks) and self._update(masks)
        self._due = due and not moved
        self._prepare_next_step()
        self._warnings.issue()
        return moved

    def _take_over(self) -> None:
        """Take the masks over from any scheduler before; refuse if one has taken them since."""
        if self._token is None:
            self._token = object()
            for itop in self._masks.values():
                itop._moved_by = self._token

        lost = [name for name, itop in self._masks.items() if itop._moved_by is not self._token]
        if lost:
            raise RuntimeError(
                f"another MaskScheduler has stepped with {listed(lost)} since this one did; a mask "
                "has one at a time: step only one of them, or give each its own masks"
            )

    @torch.no_grad()
    def _update(self, masks: Mapping[str, ITOP]) -> bool:
        """Make an update, unless it must wait; return whether it was made."""
        inputs = self._inspect(masks)
        if inputs is None:
            return False

        layers = {
            name: LayerUpdate(
                name,
                itop,
                self.explored,
                self._gradients,
                (self._seed, self.updates),
            )
            for name, itop in masks.items()
            if inputs.has_gradient[name]
        }
        self._density.begin(self._masks)
        active = {name: inputs.active[name] for name in layers}
        target = self._density.targets(active, self._timetable.progress(self._step))
        changes = plan_changes(self._rules, layers, active, target, self.rate, self._density.moves)

        self._check_slots(changes, active)

        self._exploration.begin_update()
        for name in masks:
            n_prune, n_grow = changes.get(name, (0, 0))
            layer = layers.get(name)
            if layer is not None and layer.needs_no_mask(self._rules):
                self._exchange(layer, n_prune, n_grow)
                continue

            mask = after = masks[name].mask
            if layer is not None and (n_prune or n_grow):
                after = layer.new_mask(self._rules, mask, n_prune, n_grow)
            self._write(name, mask, after)
        self._gradients.end_update()
        self.updates += 1
        self._without_gradient = set(masks)
        return True

    def _inspect(self, masks: Mapping[str, ITOP]) -> UpdateInputs | None:
        """Inspect all layers on all ranks, and collect warnings; None if the update must wait."""
        check_holds_parameters(self._optimizer, masks)
        counts = {name: itop.count() for name, itop in masks.items()}
        parameters = {name: itop.parameter for name, itop in masks.items()}
        dense = self._gradients.collected if self._gradients.needed else None
        inputs = distributed.inspect(parameters, counts, dense)

        if not inputs.finite:
            self.skipped += 1
            self._warnings.add(
                "not finite",
                f"a gradient or masked weight is not finite at step {self._step}: the update waits",
            )
            return None
        if not inputs.any_gradient and not has_any_gradient(self._optimizer):
            self._warnings.add(
                "zero",
                f"every gradient is 0 at step {self._step}: were they cleared before? {ORDER}",
            )

        # Ignore the first miss: a scheduler created between `backward()` and `step()` has not
        # registered its hooks yet.
        nothing = not any(inputs.has_gradient.values())
        if self._warnings.streak("no dense gradient", nothing and self.listens) > 1:
            self._warnings.add("no dense gradient", no_dense_gradient(self._step))
        if nothing:
            return None

        if self._check_ranks:
            held = {f"mask of {name}": itop.buffer for name, itop in masks.items()}
            held |= parameters
            advice = f"the run has diverged by step {self._step}: go back to a checkpoint before it"
            distributed.check_equal(held, advice)
        if self.updates == 0:
            check_statistics(self._optimizer, masks)

        problems = layer_warnings(
            inputs,
            masks,
            self._without_gradient,
            self._warnings.often_without_gradient(inputs.has_gradient),
            self._gradients.needed,
            self._step,
            self._density.moves and self._timetable.next_update(self._step) is None,
            self._rules.across_layers,
        )
        for key, message in problems:
            self._warnings.add(key, message)
        return inputs

    def _write(self, name: str, before: Tensor, after: Tensor) -> None:
        """Record a layer's mask after an update, and write it unless it is the present one."""
        self._exploration.record(name, before, after)
        if after is not before:
            self._move(name, lambda: self._masks[name].write_mask(before, after))

    def _exchange(self, layer: LayerUpdate, n_prune: int, n_grow: int) -> None:
        """Do the same for a layer whose update needs no mask."""
        itop = cast(SparseITOP, layer.itop)
        before = itop.active_positions()
        stayed, entered = layer.exchange(n_prune, n_grow)
        after = torch.cat([itop.positions.masked_select(stayed), entered])
        self._exploration.record_positions(layer.name, before, after, entered)
        if n_prune or n_grow:
            self._move(layer.name, lambda: itop.write_positions(stayed, entered))

    def _move(self, name: str, write: Callable[[], Tensor]) -> None:
        """Move weights; set values and statistics of those that left or entered to 0.

        So a weight that grows starts at 0. A weight pruned and grown again at once keeps both.
        """
        itop = self._masks[name]
        found = statistics(self._optimizer, itop.parameter)
        stayed = write()
        zero_statistics(self._optimizer, itop.parameter, found, stayed)

        if itop.storage == "sparse":
            moved, earlier = ~stayed, self._moved.get(name)
            if earlier is not None:
                moved |= pad_to(bits.unpack(*earlier), stayed.shape)
            self._moved[name] = bits.pack(moved), moved.shape
        self._gradients.forget(name)

    def _check_slots(self, changes: Mapping[str, tuple[int, int]], active: Counts) -> None:
        """Refuse an update that makes a parameter longer while ranks exchange its gradients."""
        for name, (n_prune, n_grow) in changes.items():
            itop, needed = self._masks[name], active[name] - n_prune + n_grow
            if itop.storage == "sparse" and needed > itop.parameter.numel() and world_size() > 1:
                raise RuntimeError(
                    f"{name} is to have {needed:,} active weights, and its parameter holds "
                    f"{itop.parameter.numel():,}: ranks can't change its length in training. Start "
                    'with more active weights, keep each layer\'s count (scope="layer", '
                    'redistribute="none"), or take storage="mask"'
                )

    def _movable(self) -> dict[str, ITOP]:
        """List the masks whose parameters can be trained."""
        return {name: itop for name, itop in self._masks.items() if itop.parameter.requires_grad}

    def _prepare_next_step(self) -> None:
        """Collect the dense gradient during the next step, if an update will ask for it."""
        coming = self._step + 1 if self._due else self._timetable.next_update(self._step)
        steps_left = None if coming is None else coming - self._step
        if not self._gradients.plan_next_step(steps_left):
            self._gradients.collect_from(())
            return

        masks = self._movable()
        # In a step FSDP2 swaps the parameters for others, which have the gradients of one rank
        # alone.
        check_holds_parameters(self._optimizer, masks)
        self._gradients.collect_from(masks)

    def state_dict(self) -> dict[str, Any]:
        """Copy counts and exploration; masks and weights are in the model's own state dict."""
        return {
            "step": self._step,
            "updates": self.updates,
            "skipped": self.skipped,
            "due": self._due,
            "without_gradient": sorted(self._without_gradient),
            "first_counts": dict(self._density.first),
            "dense": self._gradients.state_dict(),
            **self._exploration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; load the model's and the optimizer's state dicts as well.

        Raises:
            ValueError: It is no state of a MaskScheduler, or was saved for other masks; nothing is
                changed then.
        """
        check_state(state, self.explored)
        self._exploration.load_state_dict(state)
        self._step, self._due = state["step"], state["due"]
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._without_gradient = set(state["without_gradient"])
        self._density.first = dict(state["first_counts"])
        self._gradients.load_state_dict(state["dense"])
        self._token = None  # it may take over again
        self._prepare_next_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._token = None  # masks that are copied belong to no scheduler
        self._prepare_next_step()  # hooks are not copied

    def __repr__(self) -> str:
        active = sum(active_weights(self._masks).values())
        total = sum(itop.size for itop in self._masks.values())
        coming = "now" if self._due else self._timetable.next_update(self._step)
        return (
            f"MaskScheduler({len(self._masks)} masks, {active:,} of {total:,} active, "
            f"prune={self._rules.prune.name}, grow={self._rules.grow.name}, rate={self.rate:.4f}, "
            f"step {self._step} of {self._timetable.total_steps}, updates={self.updates}, "
            f"next={coming})"
        )
