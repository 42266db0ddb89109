"""Every update is that of SET or RigL in plain loops, in both storages."""

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.oracle import Layer, cosine
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune

STEPS, EVERY, SHARE, LR, MOMENTUM = 60, 5, 0.4, 0.05, 0.9


class Beside:
    """A sparse model that the package trains, and its layers as the oracle trains them."""

    def __init__(self, storage: str, prune: str, grow: str) -> None:
        torch.manual_seed(0)
        net = (
            nn.Conv2d(2, 6, 3, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, 5, bias=False),
        )
        self.model = nn.Sequential(*net).double()
        self.twin = copy.deepcopy(self.model)
        self.masks = itop_prune.apply(self.model, 0.7, storage=storage)
        self.layers = {
            name: Layer(self.weight(name).flatten().tolist(), itop.mask.flatten().tolist())
            for name, itop in self.masks.items()
        }
        optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        self.regrow = itop_prune.MaskScheduler(
            self.masks,
            optimizer,
            total_steps=STEPS,
            every=EVERY,
            rate=SHARE,
            min_rate=0.0,
            prune=prune,
            grow=grow,
        )
        self.optimizer = optimizer

    def weight(self, name: str) -> Tensor:
        return self.model.get_submodule(name.rpartition(".")[0]).weight.detach()

    def steps(self) -> Iterator[tuple[int, dict[str, list[float]]]]:
        """Take all steps; after each give its number and the dense gradients of the oracle."""
        for step in range(1, STEPS + 1):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(7, 2, 5, 5, generator=generator, dtype=torch.float64)
            y = torch.randint(5, (7,), generator=generator)
            gradients = self.gradients(x, y)
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.regrow.step()
            self.optimizer.zero_grad()
            for name, layer in self.layers.items():
                layer.train(gradients[name], LR, MOMENTUM)
            yield step, gradients
            for name, layer in self.layers.items():
                weight = torch.tensor(layer.weights, dtype=torch.float64)
                assert torch.allclose(self.weight(name).flatten(), weight, rtol=1e-9, atol=1e-12)

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, list[float]]:
        """Of a dense model that has the oracle's weights."""
        named = {name: self.twin.get_parameter(name) for name in self.layers}
        with torch.no_grad():
            for name, weight in named.items():
                values = torch.tensor(self.layers[name].weights, dtype=torch.float64)
                weight.copy_(values.view_as(weight))
        found = torch.autograd.grad(F.cross_entropy(self.twin(x), y), list(named.values()))
        return {name: g.flatten().tolist() for name, g in zip(named, found, strict=True)}

    def active(self, name: str) -> list[bool]:
        return self.masks[name].mask.flatten().tolist()


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_rigl_is_that_of_plain_loops(storage: str) -> None:
    both = Beside(storage, "magnitude", "gradient")
    for step, gradients in both.steps():
        for name, layer in both.layers.items():
            if step % EVERY == 0:
                layer.rigl(gradients[name], cosine(SHARE, step, STEPS))
            assert both.active(name) == layer.active, (step, name)
    assert both.regrow.updates == STEPS // EVERY


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_set_drops_what_plain_loops_drop_and_grows_as_many(storage: str) -> None:
    """What grows is chance, so the loops take it over."""
    both = Beside(storage, "set", "random")
    for step, _ in both.steps():
        for name, layer in both.layers.items():
            before, after = layer.active, both.active(name)
            gone = {i for i, on in enumerate(before) if on and not after[i]}
            grown = {i for i, on in enumerate(after) if on and not before[i]}
            assert sum(after) == sum(before)
            if step % EVERY:
                assert not grown
                continue
            must, may = layer.set_drops(cosine(SHARE, step, STEPS))
            assert gone <= may, (step, name)
            again = must - gone  # dropped, and drawn again at once: these keep their value
            assert all(after[i] for i in again)
            layer.exchange(gone, grown)
    assert both.regrow.updates == STEPS // EVERY
