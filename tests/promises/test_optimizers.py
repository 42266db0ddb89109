"""Any optimizer: exact counts, zeros off the masks, groups that apply does not disturb."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import timm
import timm.optim
import torch
from helpers.sparse_run import Run, apply, dense
from helpers.storages import both_storages, sparse_alone, sparse_if_slow
from helpers.toys import mlp, train
from torch import Tensor, nn

import itop_prune

# --- the table: optimizers by name, with every variant that their signatures offer ---------------

TORCH: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "SGD Nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.005}),
    "RMSprop momentum centered": (
        torch.optim.RMSprop,
        {"lr": 0.002, "momentum": 0.9, "centered": True},
    ),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
TIMM = {"lion": 0.002, "lamb": 0.02, "madgrad": 0.02}
TIMM |= dict.fromkeys(("nadamw", "adabelief", "adan", "adopt", "laprop", "mars"), 0.01)
"""Name and learning rate."""

Factory = Callable[[nn.Module], torch.optim.Optimizer]


def variants(accepts: type[torch.optim.Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the implementations that an optimizer offers: foreach or not, fused."""
    offered = inspect.signature(accepts).parameters
    if "foreach" not in offered:
        yield "", {}
        return
    for foreach in (False, True):
        yield f" foreach={foreach}", {"foreach": foreach}
    if "fused" in offered:
        yield " fused", {"fused": True}


def of_torch(model: nn.Module, kind: type[torch.optim.Optimizer], **options: Any) -> Any:
    return kind(model.parameters(), **options)


def table() -> dict[str, Factory]:
    found: dict[str, Factory] = {}
    for decay in (0.0, 0.05):
        for name, (kind, keywords) in TORCH.items():
            for variant, choice in variants(kind):
                options = {"kind": kind, **keywords, **choice, "weight_decay": decay}
                found[f"{name}{variant} decay={decay}"] = functools.partial(of_torch, **options)
        for name, lr in TIMM.items():
            for variant, choice in variants(timm.optim.get_optimizer_info(name).opt_class):
                options = {"opt": name, "lr": lr, "weight_decay": decay, **choice}
                create = functools.partial(timm.optim.create_optimizer_v2, **options)
                found[f"{name}{variant} decay={decay}"] = create
    return found


TABLE = table()
STEPS = 24


def test_the_table_has_every_optimizer_in_every_variant() -> None:
    names = {name.split()[0] for name in TABLE}
    assert names == {*TIMM, *(name.split()[0] for name in TORCH)}
    assert sum("fused" in name for name in TABLE) >= 10
    assert sum("foreach=True" in name for name in TABLE) >= 20


def each(names: Iterable[str], always: Callable[[str], bool]) -> list[Any]:
    """Parameters of a test: all names, of which some are asked by the slow tests alone."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if always(name) else slow) for name in names]


# --- sparse training under each of them ----------------------------------------------------------


class Watch:
    """Trains under an optimizer of the table, and collects what is wrong after each step."""

    def __init__(self, name: str, *, before_apply: bool) -> None:
        model = mlp()
        self.before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = TABLE[name](model) if before_apply else None
        masks = apply(model, 0.7)
        optimizer = optimizer or TABLE[name](model)
        rules = {"total_steps": STEPS, "every": 3, "grow": "gradient"}
        regrow = itop_prune.MaskScheduler(masks, optimizer, **rules)
        self.run = Run(model, masks, optimizer, regrow, (20,))
        self.counts, self.old = self.run.counts(), self.run.positions()
        self.wrong: list[str] = []
        self.grown = 0
        optimizer.register_step_post_hook(lambda *_: self.look("optimizer's step"))
        self.losses = self.run.train(range(STEPS), self.after)

    def look(self, moment: str) -> None:
        if self.run.counts() != self.counts:
            self.wrong.append(f"{moment}: other numbers of active weights")
        for key, itop in self.run.masks.items():
            if itop.parameter[~itop.used].any():
                self.wrong.append(f"{moment}: {key} is not 0 off its mask")
            if not itop.parameter.isfinite().all():
                self.wrong.append(f"{moment}: {key} is not finite")

    def after(self, step: int) -> None:
        self.look(f"step {step}")
        if step + 1 not in self.run.regrow.update_steps():
            return
        for key, itop in self.run.masks.items():
            grown = itop.mask & ~self.old[key]
            self.grown += int(grown.sum())
            for value in (itop.parameter, *self.run.statistics(key)):
                if value[~itop.used].any():
                    self.wrong.append(f"step {step}: a value of {key} is not 0 off the mask")
                if dense(itop, value)[grown].any():
                    self.wrong.append(f"step {step}: a value of {key} is not 0 where it grew")
        self.old = self.run.positions()


def plain(name: str) -> bool:
    return name.endswith("decay=0.05") and "foreach=True" not in name and "fused" not in name


def assert_good(watch: Watch) -> None:
    assert watch.wrong == []
    assert watch.run.regrow.updates == STEPS // 3
    assert watch.grown > 0
    for old, new in zip(watch.before, watch.run.model.parameters(), strict=True):
        assert not torch.equal(old, new)


@sparse_if_slow
@pytest.mark.parametrize("name", each(TABLE, plain))
def test_an_optimizer_keeps_counts_and_zeros_and_trains(name: str) -> None:
    assert_good(Watch(name, before_apply=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_an_optimizer_built_before_apply_does_so_too(name: str) -> None:
    assert_good(Watch(name, before_apply=True))


@sparse_alone
@pytest.mark.parametrize("name", each(TABLE, plain))
def test_an_optimizer_leaves_free_slots_at_zero(name: str) -> None:
    model = mlp()
    masks = apply(model, 0.5)
    optimizer = TABLE[name](model)
    rules = {"total_steps": STEPS, "every": 3, "density": "cubic", "final_sparsity": 0.9}
    regrow = itop_prune.MaskScheduler(masks, optimizer, **rules)
    found: list[Tensor] = []

    def look(*_: object) -> None:
        found.extend(itop.parameter.detach()[~itop.used] for itop in masks.values())

    optimizer.register_step_post_hook(look)
    train(model, optimizer, regrow, steps=range(STEPS), after=look)
    values = torch.cat(found)
    assert len(values) > 0
    assert not values.any()


@both_storages
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if name.endswith("decay=0.0")])
def test_an_optimizer_fits_one_batch_sparsely(name: str) -> None:
    model = mlp()
    masks = apply(model, 0.5)
    optimizer = TABLE[name](model)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=60, every=10)
    torch.manual_seed(0)
    x, y = torch.randn(8, 20), torch.randint(4, (8,))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_optimizer_built_before_apply_trains_as_one_built_after() -> None:
    name = "Adam foreach=True decay=0.05"
    one, other = (Watch(name, before_apply=before) for before in (True, False))
    assert one.losses == other.losses


MOVING: dict[str, Factory] = {
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
    **{
        name: lambda model, name=name: timm.optim.create_optimizer_v2(model, opt=name, lr=0.01)
        for name in ("kron", "muon", "adamuon", "nadamuon")
    },
}
"""Optimizers that mix weights, and so move those off the mask."""


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", each(MOVING, lambda name: name in ("LBFGS", "muon")))
def test_what_an_optimizer_moves_off_the_mask_is_not_seen_and_gone_at_an_update(name: str) -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.7)
    optimizer = MOVING[name](model)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=12, every=3, grow="gradient")
    first = {key: int(itop.mask.sum()) for key, itop in masks.items()}
    x, y = torch.randn(8, 20), torch.arange(8) % 4

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    off = False
    for _ in range(12):
        optimizer.step(closure)
        off = off or any(bool(itop.parameter[~itop.mask].any()) for itop in masks.values())
        old = {key: itop.mask.clone() for key, itop in masks.items()}
        moved = regrow.step()
        for key, itop in masks.items():
            assert not itop.weight[~itop.mask].any()
            assert int(itop.mask.sum()) == first[key]
            if moved:
                assert not itop.parameter[~(itop.mask & old[key])].any()
    assert regrow.updates == 4
    assert off, "it belongs into the table above"


# --- groups of parameters ------------------------------------------------------------------------


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=4)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4)


GROUPINGS: dict[str, Callable[[nn.Module], list[dict[str, Any]]]] = {
    "weight decay": lambda model: timm.optim.param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=["pos_embed"]
    ),
    "layer decay": lambda model: timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.75),
    "create_optimizer_v2": lambda model: (
        timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05).param_groups
    ),
    "create_optimizer_v2, layer_decay": lambda model: (
        timm.optim.create_optimizer_v2(
            model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.75
        ).param_groups
    ),
}


def described(groups: list[dict[str, Any]], names: dict[int, str]) -> list[dict[str, Any]]:
    """Return the groups with parameters as the names that they had before apply."""
    told = []
    for group in groups:
        options = {
            key: value for key, value in group.items() if key not in ("params", "param_names")
        }
        told.append({**options, "params": [names[id(parameter)] for parameter in group["params"]]})
    return told


@pytest.mark.parametrize("build", [resnet, vit])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_of_timm_hold_the_same_parameters_with_the_same_options_before_and_after_apply(
    grouping: str, build: Callable[[], nn.Module]
) -> None:
    model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    before = described(GROUPINGS[grouping](model), names)
    itop_prune.apply(model, 0.9)
    after = described(GROUPINGS[grouping](model), names)
    assert len(before) > 1
    assert after == before


# --- optimizers that keep their state elsewhere --------------------------------------------------


def test_lookahead_of_timm_is_refused_with_the_reason() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.7)
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_sgd", lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"(?s)Lookahead.*statistics.*state"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=1)


class Elsewhere(torch.optim.SGD):
    """Keeps a copy of every weight in a dict of its own, from its first step on."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        if not hasattr(self, "slow"):
            self.slow = {p: p.clone() for group in self.param_groups for p in group["params"]}
        super().step()


def test_state_kept_elsewhere_from_the_first_step_on_is_refused_at_the_first_update() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.7)
    optimizer = Elsewhere(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=2)
    train(model, optimizer, regrow, steps=range(1))
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    with pytest.raises(ValueError, match=r"(?s)Elsewhere.*slow"):
        train(model, optimizer, regrow, steps=range(1, 2))
    assert all(torch.equal(itop.mask, before[name]) for name, itop in masks.items())
