"""What an update of the masks costs in time, against the same update by full sorts.

The timed part is the update alone; gradients and the optimizer step before it are not in it.
"""

import gc
import math
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune import topology
from itop_prune.layers.sparse_handle import Storage

from .measure import Measured, Settings, seconds


class Updates:
    """Updates of a masked model by magnitude and gradient; the gradients are drawn once."""

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        device: torch.device,
        storage: Storage = "mask",
        grow: str = "gradient",
    ) -> None:
        self.device = device
        self.model = model.to(device)
        self.masks = itop_prune.apply(self.model, sparsity, storage=storage)
        self.gradients = {
            name: torch.randn(itop.shape, device=device) for name, itop in self.masks.items()
        }
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9)
        self.regrow = itop_prune.MaskScheduler(
            self.masks,
            self.optimizer,
            total_steps=10**6,
            every=1,
            schedule="constant",
            grow=grow,
        )

    def prepare(self) -> None:
        """Give every weight its gradient, the dense one for growth too, and step."""
        for name, gradient in self.gradients.items():
            owner, _, tensor = name.rpartition(".")
            weight = getattr(self.model.get_submodule(owner), tensor)
            (weight * gradient).sum().backward()
        self.optimizer.step()

    def update(self) -> float:
        """Measure the seconds of one update."""
        self.prepare()
        taken = seconds(self.regrow.step, self.device)
        self.optimizer.zero_grad()
        return taken


class SortedUpdates:
    """The same updates as published code makes them: float masks and full sorts, layer by layer."""

    def __init__(self, ours: Updates) -> None:
        self.device = ours.device
        self.gradients = ours.gradients
        self.weights = {name: itop.weight.clone() for name, itop in ours.masks.items()}
        self.masks = {name: itop.mask.float() for name, itop in ours.masks.items()}
        self.momenta = {name: torch.randn_like(weight) for name, weight in self.weights.items()}

    def update(self) -> float:
        """Measure the seconds of one update."""
        return seconds(self._update_all, self.device)

    def _update_all(self) -> None:
        for name, weight in self.weights.items():
            mask = update_by_sorting(self.masks[name], weight, self.gradients[name], rate=0.5)
            self.masks[name] = mask
            weight *= mask
            self.momenta[name] *= mask


def update_by_sorting(mask: Tensor, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Compute a float mask after an update by full sorts, with a host read for every count."""
    active = mask.sum().item()
    count = math.ceil(rate * active)
    new = mask.clone()

    _, order = torch.sort(torch.where(mask == 0, torch.inf, weight.abs()).flatten())
    new.view(-1)[order[:count]] = 0.0

    _, order = torch.sort(torch.where(new == 0, gradient.abs(), -1.0).flatten(), descending=True)
    missing = int(mask.sum().item() - new.sum().item())
    new.view(-1)[order[:missing]] = 1.0
    return new


def update(settings: Settings) -> Iterator[Measured]:
    """Measure an update of a ResNet-50 at 90 %: all of it, and the choice of positions alone."""
    name = "resnet18" if settings.quick else "resnet50"
    rounds = settings.rounds(5)
    # A GPU sorts a layer faster than the host can start the sort.
    on_cpu = settings.device.type == "cpu"

    ours = Updates(timm.create_model(name), 0.9, settings.device)
    by_sorts = SortedUpdates(ours)
    whole = Measured(f"update, {name}, 90 %", 10.0 if on_cpu else 1.0, faster=True)
    yield whole.take(rounds, ours.update, by_sorts.update)

    for grow in ("random", "gradient"):
        masked = Updates(timm.create_model(name), 0.9, settings.device, "mask", grow)
        sparse = Updates(timm.create_model(name), 0.9, settings.device, "sparse", grow)
        title = f"update, {name}, 90 %, {grow} growth, sparse storage against masks"
        yield Measured(title, 1.0).take(settings.rounds(15), sparse.update, masked.update)

    layers = []
    for layer, itop in ours.masks.items():
        count = math.ceil(0.5 * itop.active)
        layers.append((itop.mask, itop.weight.abs(), ours.gradients[layer].abs(), count))
    floats = [(mask.float(), weight, gradient) for mask, weight, gradient, _ in layers]

    def choose() -> None:
        for mask, weight, gradient, count in layers:
            topology.prune_and_regrow(mask, weight, gradient, count, count)

    def choose_by_sorting() -> None:
        for mask, weight, gradient in floats:
            update_by_sorting(mask, weight, gradient, rate=0.5)

    choice = Measured(f"prune_and_regrow, {name}, 90 %", 15.0 if on_cpu else 1.0, faster=True)
    yield choice.take(
        rounds,
        lambda: seconds(choose, settings.device),
        lambda: seconds(choose_by_sorting, settings.device),
    )


def scaling(settings: Settings) -> Iterator[Measured]:
    """Measure updates of up to 500 million weights: the time may grow in proportion at most."""
    for millions in (1, 10) if settings.quick else (1, 10, 100, 500):
        width = 100 * min(millions, 100)
        layers = [nn.Linear(10_000, width, bias=False) for _ in range(max(1, millions // 100))]
        ours = Updates(nn.Sequential(*layers), 0.9, settings.device)

        title = f"update of {millions} M weights, layers: {len(layers)}"
        yield Measured(title, 0.03 * millions).take(2, ours.update)

        del ours, layers
        gc.collect()
