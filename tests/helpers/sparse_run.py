"""A sparse model in training: all that its training depends on, and its states."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune.layers.sparse_storage import Layout
from itop_prune.layers.sparse_storage import dense as dense_weight

from .toys import batch, mlp, train

STORAGE = "mask"
"""Of `apply` and `sparse`. The fixture `storage` in tests/promises/conftest.py sets it."""


def apply(model: nn.Module, *arguments: Any, **options: Any) -> dict[str, itop_prune.ITOP]:
    return itop_prune.apply(model, *arguments, **{"storage": STORAGE, **options})


def dense(itop: itop_prune.ITOP, tensor: Tensor) -> Tensor:
    """A copy of a tensor of the parameter's shape, in the shape of the weight."""
    tensor = tensor.detach().clone()
    if itop.storage == "mask":
        return tensor
    return dense_weight(tensor, itop.positions, Layout(itop.shape))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


@dataclass
class Run:
    """A sparse model in training."""

    model: nn.Module
    masks: dict[str, itop_prune.ITOP]
    optimizer: torch.optim.Optimizer
    regrow: itop_prune.MaskScheduler
    shape: tuple[int, ...]

    def train(self, steps: range, after: Callable[[int], None] = lambda step: None) -> list[float]:
        return train(
            self.model, self.optimizer, self.regrow, steps=steps, shape=self.shape, after=after
        )

    def backward(self, step: int) -> None:
        x, y = batch(step, *self.shape)
        F.cross_entropy(self.model(x), y).backward()

    def positions(self) -> dict[str, Tensor]:
        return {name: itop.mask.clone() for name, itop in self.masks.items()}

    def counts(self) -> dict[str, int]:
        return {name: itop.active for name, itop in self.masks.items()}

    def statistics(self, name: str) -> list[Tensor]:
        """What the optimizer holds of the shape of a masked weight."""
        parameter = self.masks[name].parameter
        tensors = filter(torch.is_tensor, self.optimizer.state[parameter].values())
        return [value for value in tensors if value.shape == parameter.shape]

    def numbers(self) -> dict[str, Tensor]:
        """Everything that training depends on, copied."""
        found = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, tensor in self.regrow.explored.items():
            found[f"explored of {name}"] = tensor.clone()
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if torch.is_tensor(value):
                    found[f"{key} of {index}"] = value.clone()
        regrow = self.regrow
        counts = [regrow.rate, regrow.updates, regrow.skipped, regrow.exploration_rate()]
        return found | {"counts": torch.tensor(counts, dtype=torch.float64)}

    def saved(self) -> bytes:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.regrow)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def restore(self, states: bytes) -> None:
        loaded = torch.load(io.BytesIO(states), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.regrow), loaded, strict=True):
            part.load_state_dict(state)


def sparse(
    build: Callable[[], nn.Module] = mlp,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    *,
    sparsity: float = 0.7,
    method: object = "ERK",
    seed: int = 0,
    **rules: object,
) -> Run:
    """A run with an update after every second of 40 steps, if the rules say nothing else."""
    model = build()
    masks = apply(model, sparsity, method, seed=seed)
    built = optimizer(model)
    rules = {"total_steps": 40, "every": 2, **rules}
    regrow = itop_prune.MaskScheduler(masks, built, **rules)
    images = any(isinstance(layer, nn.Conv2d) for layer in model.modules())
    return Run(model, masks, built, regrow, (3, 8, 8) if images else (20,))


def other_start(**rules: object) -> Run:
    """A run from other weights and other masks: whatever a resume does not restore shows."""
    return sparse(lambda: mlp(seed=7), momentum, seed=7, **rules)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
