"""Redistribution: numbers by layer, and what an update makes of two layers of 100 weights."""

import pytest
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.methods import redistribution
from itop_prune.methods.lookup import needed_arguments
from itop_prune.methods.redistribution import REDISTRIBUTIONS


class Pair(nn.Module):
    """Two layers side by side; the dense gradient of each weight is what its layer is told."""

    def __init__(self, sizes: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(10, 10, bias=False) for _ in range(2))
        with torch.no_grad():
            for layer, size in zip((self.a, self.b), sizes, strict=True):
                layer.weight.fill_(size)

    def forward(self, gradients: tuple[float, float]) -> Tensor:
        ones = torch.ones(1, 10, dtype=self.a.weight.dtype)
        return gradients[0] * self.a(ones).sum() + gradients[1] * self.b(ones).sum()


def active_after(
    model: Pair,
    redistribute: str,
    *,
    active: tuple[float, float] = (50, 50),
    gradients: tuple[float, float] = (1.0, 1.0),
    scope: str = "layer",
) -> list[int]:
    """How many weights of each layer are active after an update that exchanges a fifth of them."""
    densities = {"a.weight": active[0] / 100, "b.weight": active[1] / 100}
    masks = itop_prune.apply(model, 1.0 - sum(active) / 200, method=lambda *_: densities)
    regrow = itop_prune.MaskScheduler(
        masks,
        torch.optim.SGD(model.parameters(), lr=0.0),
        total_steps=2,
        every=2,
        rate=0.2,
        schedule="constant",
        redistribute=redistribute,
        scope=scope,
    )
    for _ in range(2):
        model(gradients).backward()
        regrow.step()
        model.zero_grad()
    assert regrow.updates == 1
    return [itop.active for itop in masks.values()]


def test_a_redistribution_asks_for_one_statistic_and_gives_it_as_it_is() -> None:
    asked = {}
    for name, function in REDISTRIBUTIONS.items():
        assert function({"a": 3.0, "b": 1.0}) == {"a": 3.0, "b": 1.0}
        asked[name] = needed_arguments(function, redistribution.OFFERED, "redistribution")
    expected = {"momentum": ("momentum",), "magnitude": ("magnitude",), "nonzeros": ("active",)}
    assert asked == expected


def test_without_redistribution_each_layer_grows_what_it_lost() -> None:
    assert active_after(Pair(sizes=(1.0, 3.0)), "none", gradients=(1.0, 3.0)) == [50, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_and_momentum_share_what_grows_by_mean_sizes(dtype: torch.dtype) -> None:
    """Each loses 10 of 50; of the 20 that grow a quarter goes to sizes of 1, the rest to 3."""
    assert active_after(Pair(sizes=(1.0, 3.0)).to(dtype), "magnitude") == [45, 55]
    assert active_after(Pair().to(dtype), "momentum", gradients=(-3.0, 1.0)) == [55, 45]


def test_nonzeros_shares_by_the_number_of_active_weights_before_the_update() -> None:
    """16 of 80 leave, all of them the small ones of a; of 16 that grow 20/80 go to a."""
    pair = Pair(sizes=(1.0, 3.0))
    assert active_after(pair, "nonzeros", active=(20, 60), scope="global") == [8, 72]


def test_where_the_statistic_is_0_everywhere_the_room_decides() -> None:
    """4 of 20 and 12 of 60 leave; 84 and 52 places are free for 16: 9.9 and 6.1 of them."""
    assert active_after(Pair(sizes=(0.0, 0.0)), "magnitude", active=(20, 60)) == [26, 54]


def test_a_layer_that_is_full_leaves_the_rest_to_the_others() -> None:
    """14 of 70 and 19 of 95 leave. Of 33 that grow b has room for 24; the other 9 go to a."""
    assert active_after(Pair(sizes=(0.01, 0.99)), "magnitude", active=(70, 95)) == [65, 100]
