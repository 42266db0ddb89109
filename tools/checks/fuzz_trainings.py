"""Random trainings: nets, optimizers, rules and loops, in both storages.

After every step the promises of an update are checked. Both storages must train the same in
float64. A training that is copied, pickled or restored from state dicts half-way must end as the
one left alone, bit for bit. What the package refuses must leave the model as it was.
"""

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm.optim
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune.inference.measurement import relative_error
from itop_prune.layers.sparse_handle import Storage
from itop_prune.layers.sparse_storage import gather
from itop_prune.update import layer_update

from .fuzz_runner import Broken, require

CLASSES = 4
STORAGES: tuple[Storage, ...] = ("mask", "sparse")
REFUSALS = (ValueError, RuntimeError)


class Experts(nn.Module):
    """Two matrices in one tensor, each for one half of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (batch, 12) to (batch, 10)."""
        halves = x.unflatten(1, (2, 6)).transpose(0, 1)
        return torch.bmm(halves, self.weight).transpose(0, 1).flatten(1)


itop_prune.MASKABLE[Experts] = {"weight": "experts in out"}


class Recurrent(nn.Module):
    """The output of a recurrent net, without its state."""

    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Run over (batch, time, features)."""
        return self.net(x)[0]


class Attention(nn.Module):
    """Self-attention, whose weights torch reads from outside of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (batch, time, features)."""
        return self.net(x, x, x, need_weights=False)[0]


Stem = tuple[Callable[[], nn.Module], tuple[int, ...]]
STEMS: dict[str, Stem] = {
    "linear": (lambda: nn.Linear(12, 14), (12,)),
    "linear of a sequence": (lambda: nn.Linear(6, 7, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 5, 5)),
    "strided": (lambda: nn.Conv2d(3, 6, 3, stride=2, bias=False), (3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 4, 4)),
    "dilated": (lambda: nn.Conv2d(3, 6, (3, 2), dilation=(1, 2)), (3, 6, 6)),
    "circular": (
        lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        (3, 4, 4),
    ),
    "1-d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)),
    "3-d": (lambda: nn.Conv3d(2, 5, 2), (2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 3, 3)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
    "standardized": (lambda: StdConv2d(3, 6, 3, padding=1), (3, 5, 5)),
    "scaled": (lambda: ScaledStdConv2d(3, 6, 3, padding=1), (3, 5, 5)),
    "attention": (Attention, (4, 8)),
    "recurrent": (lambda: Recurrent(nn.RNN(5, 6, batch_first=True)), (4, 5)),
    "LSTM": (lambda: Recurrent(nn.LSTM(5, 4, 2, batch_first=True)), (3, 5)),
    "GRU": (lambda: Recurrent(nn.GRU(5, 4, batch_first=True, bidirectional=True)), (3, 5)),
    "experts": (Experts, (12,)),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Lion": lambda p: timm.optim.Lion(p, lr=1e-4),
    "LAMB": lambda p: timm.optim.Lamb(p, lr=1e-3),
    "Adan": lambda p: timm.optim.Adan(p, lr=1e-3),
}


ADAPTIVE = frozenset(OPTIMIZERS) - {"SGD", "momentum", "Nesterov"}
"""They divide by the size of the gradients."""
NOISY = {"attention", "standardized", "scaled"}
"""Stems some of whose gradients are 0 but for rounding.

They are those of queries whose keys are all equal, and of a standardized filter with one active
weight.
"""


def differ_by_right(plan: "Plan") -> bool:
    """Tell whether rounding alone may give the storages other masks.

    Adaptive optimizers make whole steps of gradients that are rounding. Pruning by sign tells a
    weight of 1e-27 from one of -1e-27. Lion moves all weights by steps of one size, so scores of
    many weights are equal but for rounding.
    """
    by_noise = plan.optimizer in ADAPTIVE or plan.rules["prune"] == "set"
    return plan.optimizer == "Lion" or (plan.stem in NOISY and by_noise)


class Net(nn.Module):
    """A stem, a layer that may be called twice, and a head."""

    def __init__(self, stem: str, twice: bool) -> None:
        super().__init__()
        build, shape = STEMS[stem]
        self.stem, self.twice = build(), twice
        with torch.no_grad():
            features = self.stem(torch.zeros(1, *shape)).numel()
        self.inner = nn.Linear(features, features if twice else 16)
        self.head = nn.Linear(self.inner.out_features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch."""
        x = self.inner(torch.tanh(self.stem(x)).flatten(1))
        return self.head(F.relu(self.inner(x) if self.twice else x))


@dataclass(frozen=True)
class Plan:
    """All that decides a training, but for the storage."""

    seed: int
    stem: str
    twice: bool
    frozen: str
    """The layer whose parameters are frozen; "" for none."""
    dtype: torch.dtype
    optimizer: str
    placed: dict[str, Any]
    """Arguments of `apply`."""
    rules: dict[str, Any]
    """Arguments of `MaskScheduler`."""
    micro_batches: int
    clip: bool
    scaled: bool
    compiled: bool
    by_positions: bool
    """Whether updates of magnitude and chance are made without masks where they can be."""
    interruption: str
    """How the training is interrupted, a key of `INTERRUPTIONS`."""
    interrupted_after: int
    """The step."""

    @classmethod
    def draw(cls, seed: int) -> "Plan":
        """Draw a plan."""
        draw = random.Random(seed)
        steps = draw.randint(3, 10)
        rules: dict[str, Any] = {
            "total_steps": steps,
            "every": draw.randint(1, 3),
            "stop": draw.choice([1.0, 1.0, 0.75]),
            "rate": draw.choice([0.1, 0.3, 0.5, 0.9]),
            "schedule": draw.choice([*itop_prune.schedules.SCHEDULES, {"power": 1.5}]),
            "prune": draw.choice([*itop_prune.criteria.PRUNE]),
            "grow": draw.choice([*itop_prune.criteria.GROW, "gradient", "gradient"]),
            "seed": draw.randrange(1000),
            "survival": draw.random() < 0.3,
        }
        if draw.random() < 0.3:
            rules["scope"] = "global"
            rules["floor"] = draw.choice([0.0, 0.0, 0.1])
        if draw.random() < 0.3:
            rules["redistribute"] = draw.choice([*itop_prune.redistribution.REDISTRIBUTIONS])
        if draw.random() < 0.3:
            rules["final_sparsity"] = draw.choice([0.0, 0.4, 0.8, 0.95])
            rules["density"] = draw.choice(["cubic", "linear", "alternating"])
        if draw.random() < 0.2:
            rules["gradient_steps"] = draw.randint(1, 3)

        placed = {
            "sparsity": draw.choice([0.2, 0.5, 0.7, 0.8, 0.9]),
            "method": draw.choice([*itop_prune.distributions.DISTRIBUTIONS, "magnitude"]),
            "seed": draw.randrange(1000),
        }
        if draw.random() < 0.15:
            placed |= {"sparsity": 0.5, "method": "uniform", "pattern": draw.choice(["1:2", "2:4"])}
        if draw.random() < 0.15:
            placed["exclude"] = draw.choice(["stem*", "head", "inner"])
        return cls(
            seed=seed,
            stem=draw.choice([*STEMS]),
            twice=draw.random() < 0.2,
            frozen=draw.choice(["stem", "inner", *[""] * 6]),
            dtype=draw.choice([torch.float32, torch.bfloat16, *[torch.float64] * 4]),
            optimizer=draw.choice([*OPTIMIZERS]),
            placed=placed,
            rules=rules,
            micro_batches=draw.choice([1, 1, 1, 2, 3]),
            clip=draw.random() < 0.3,
            scaled=draw.random() < 0.2,
            compiled=draw.random() < 0.01,
            by_positions=seed % 3 == 0,
            interruption=draw.choice([*INTERRUPTIONS]),
            interrupted_after=draw.randint(1, steps),
        )


class Refused(Exception):
    """The package refuses a plan, and says why."""


class Training:
    """A net in training, in one storage, whose promises are checked at every step."""

    def __init__(self, plan: Plan, storage: Storage, seed: int) -> None:
        torch.manual_seed(seed)
        self.plan = plan
        self.model: nn.Module = Net(plan.stem, plan.twice).to(plan.dtype)
        if plan.frozen:
            self.model.get_submodule(plan.frozen).requires_grad_(False)
        placed = {**plan.placed, "storage": storage}
        if seed != plan.seed:
            placed["seed"] = seed
        self.masks = self.attempt(lambda: itop_prune.apply(self.model, **placed))
        trained = [part for part in self.model.parameters() if part.requires_grad]
        self.optimizer = OPTIMIZERS[plan.optimizer](trained)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=plan.scaled)
        moving = {name: itop for name, itop in self.masks.items() if itop.parameter.requires_grad}
        rules = {**plan.rules, "scaler": self.scaler}
        self.regrow = self.attempt(
            lambda: itop_prune.MaskScheduler(moving, self.optimizer, **rules)
        )

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Call the package; a refusal leaves the model as it was."""
        before, names = copy.deepcopy(self.model.state_dict()), list(self.model.state_dict())
        try:
            return call()
        except REFUSALS as error:
            after = self.model.state_dict()
            require(len(str(error)) > 20, f"a refusal says no more than {error!r}")
            require(names == list(after), f"refused by {error}, the model has other entries")
            differing = [name for name in names if not same(after[name], before[name])]
            require(not differing, f"refused by {error}, the model has other {differing}")
            raise Refused(str(error)) from None

    def train(self, steps: range) -> None:
        """Take steps, and check each of them."""
        forward = self.model
        if self.plan.compiled:
            torch.compiler.reset()
            forward = torch.compile(self.model, backend="eager")  # type: ignore[assignment]
        for step in steps:
            self.backward(forward, step)
            before = {name: itop.mask.clone() for name, itop in self.masks.items()}
            explored = {name: tensor.clone() for name, tensor in self.regrow.explored.items()}
            self.check_gradients(step)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            moved = self.regrow.step()
            require(moved == (step in self.regrow.update_steps()), f"step {step}: moved is {moved}")
            self.check_update(step, before, explored)
            self.optimizer.zero_grad()
        if self.plan.dtype == torch.float64:
            self.check_export()

    def backward(self, forward: nn.Module, step: int) -> None:
        """Collect the gradients of a step's batch."""
        generator = torch.Generator().manual_seed(step)
        shape = STEMS[self.plan.stem][1]
        for _ in range(self.plan.micro_batches):
            x = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
            y = torch.randint(CLASSES, (6,), generator=generator)
            loss = F.cross_entropy(forward(x.to(self.plan.dtype)), y)
            self.scaler.scale(loss / self.plan.micro_batches).backward()
        if self.plan.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    def check_gradients(self, step: int) -> None:
        """Refuse gradients of weights that are not active."""
        for name, itop in self.masks.items():
            gradient = itop.parameter.grad
            if gradient is not None:
                require(gradient.shape == itop.parameter.shape, f"step {step}: {name}.grad's shape")
                require(not gradient[~itop.used].any(), f"step {step}: {name}.grad off the mask")

    def check_update(
        self, step: int, before: dict[str, Tensor], explored: dict[str, Tensor]
    ) -> None:
        """Refuse a step that breaks a promise about counts, weights, statistics or exploration."""
        rules = self.plan.rules
        for name, itop in self.masks.items():
            where, mask = f"step {step}, {name}", itop.mask
            grown = mask & ~before[name]
            require(not itop.weight[~mask].any(), f"{where}: weights off the mask")
            require(itop.active == int(mask.sum()), f"{where}: active is {itop.active}")
            changed = grown if itop.storage == "mask" else gather(grown, itop.buffer)
            off = ~itop.used if itop.storage == "sparse" else ~mask & before[name]
            zero = (changed | off.view_as(changed)).view_as(itop.parameter)
            for key, numbers in self.statistics(itop):
                require(not numbers[zero].any(), f"{where}: {key} of moved weights is not 0")
            if "redistribute" not in rules and rules.get("scope") != "global":
                moves = "final_sparsity" in rules and itop.parameter.requires_grad
                require(
                    moves or mask.sum() == before[name].sum(), f"{where}: the count has changed"
                )
            if name in explored:
                now = self.regrow.explored[name]
                require(bool((now | ~mask).all()), f"{where}: active weights are not explored")
                require(bool((now | ~explored[name]).all()), f"{where}: explored has shrunk")

        if "final_sparsity" not in rules:
            was = sum(int(mask.sum()) for mask in before.values())
            now = sum(itop.active for itop in self.masks.values())
            require(was == now, f"step {step}: {was} active weights became {now}")

    def check_export(self) -> None:
        """Refuse a dense copy that computes something else."""
        twin = Net(self.plan.stem, self.plan.twice).double()
        twin.load_state_dict(itop_prune.dense_state_dict(self.model))
        generator = torch.Generator().manual_seed(self.plan.seed)
        x = torch.randn(4, *STEMS[self.plan.stem][1], generator=generator, dtype=torch.float64)
        with torch.no_grad():
            error = relative_error(self.model(x), twin(x))
        require(error < 1e-9, f"the output of a dense copy differs by {error}")

    def statistics(self, itop: itop_prune.ITOP) -> Iterator[tuple[str, Tensor]]:
        """Yield a parameter, and what the optimizer holds of its shape."""
        yield "the parameter", itop.parameter
        for key, value in self.optimizer.state.get(itop.parameter, {}).items():
            if torch.is_tensor(value) and value.shape == itop.parameter.shape:
                yield key, value

    def numbers(self) -> dict[str, Any]:
        """List all numbers that training depends on."""
        found: dict[str, Any] = dict(self.model.state_dict())
        found |= {f"explored of {name}": part for name, part in self.regrow.explored.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{key} of {index}": value for key, value in state.items()}
        return found | {"updates": self.regrow.updates, "rate": self.regrow.rate}

    def interrupted(self) -> "Training":
        """Return a training that goes on from here."""
        return INTERRUPTIONS[self.plan.interruption](self)


def deep_copied(training: Training) -> Training:
    """Copy model, optimizer and scheduler together."""
    return copy.deepcopy(training)


def pickled(training: Training) -> Training:
    """Pickle them together."""
    return pickle.loads(pickle.dumps(training))


def restored(training: Training) -> Training:
    """Load their state dicts into a training that began elsewhere."""
    file = io.BytesIO()
    parts = ("model", "optimizer", "regrow", "scaler")
    torch.save({part: getattr(training, part).state_dict() for part in parts}, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    storage = next(iter(training.masks.values())).storage
    other = Training(training.plan, storage, training.plan.seed + 1)
    for part in parts:
        getattr(other, part).load_state_dict(states[part])
    return other


INTERRUPTIONS: dict[str, Callable[[Training], Training]] = {
    "deepcopy": deep_copied,
    "pickle": pickled,
    "state dicts": restored,
}


def case(seed: int) -> None:
    """Train a random plan, and check it at every step."""
    torch.set_num_threads(1)
    plan = Plan.draw(seed)
    least = 1.0 if plan.by_positions else layer_update.SPARSEST
    with mock.patch.object(layer_update, "SPARSEST", least):
        train_and_compare(plan)


def train_and_compare(plan: Plan) -> None:
    """Train a plan in both storages, one of them interrupted, and compare the ends."""
    trained: dict[str, Training] = {}
    for storage in STORAGES:
        try:
            trained[storage] = training = Training(plan, storage, plan.seed)
            if storage == STORAGES[plan.seed % 2]:
                train_interrupted(training)
            else:
                training.train(range(1, plan.rules["total_steps"] + 1))
        except Refused:
            continue
        except Broken as broken:
            raise Broken(f"{storage}, {plan}: {broken}") from None
    comparable = plan.dtype == torch.float64 and not differ_by_right(plan)
    if comparable and len(trained) == len(STORAGES):
        compare_storages(trained, plan)


def train_interrupted(training: Training) -> None:
    """Train with and without an interruption, and refuse any difference."""
    steps, half = training.plan.rules["total_steps"], training.plan.interrupted_after
    training.train(range(1, half + 1))
    other = training.interrupted()
    for one in (training, other):
        one.train(range(half + 1, steps + 1))
    found, expected = other.numbers(), training.numbers()
    require(found.keys() == expected.keys(), "an interrupted training has other entries")
    differing = [key for key in expected if not same(found[key], expected[key])]
    require(not differing, f"an interrupted training ended with other {differing}")


def compare_storages(trained: dict[str, Training], plan: Plan) -> None:
    """Refuse masks that differ, and weights that differ by more than rounding."""
    mask, sparse = (trained[storage] for storage in STORAGES)
    require(mask.regrow.updates == sparse.regrow.updates, f"{plan}: numbers of updates differ")
    for name, itop in mask.masks.items():
        other = sparse.masks[name]
        equal = torch.equal(itop.mask, other.mask)
        require(equal, f"{plan}: the storages have other masks of {name}")
        error = relative_error(itop.weight.detach(), other.weight.detach())
        # Standardizing a filter of small weights multiplies their rounding, at each step anew.
        most = 1e-4 if plan.stem in NOISY else 1e-7
        require(error < most, f"{plan}: weights {name} of the storages differ by {error}")


def same(one: Any, other: Any) -> bool:
    """Compare two values bit for bit."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return bool(one == other)
