"""N:M patterns: placed as asked, exact at every update, kept by copies and files, else refused."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ids import as_text
from helpers.toys import batch, convnet, mlp, train
from hypothesis import given, settings
from hypothesis import strategies as st
from itop_prune_tools.benchmarks.measure import peak_bytes
from timm.layers import CondConv2d
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler, patterns
from itop_prune.patterns import best_of_groups, grow_in_groups, holds, parse


def bits(text: str) -> Tensor:
    return torch.tensor([[character == "1" for character in text.replace(" ", "")]])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def groups(tensor: Tensor, m: int) -> Tensor:
    """One group of a weight a row; written otherwise than in the package."""
    flat = tensor.reshape(*tensor.shape[:2], -1).transpose(1, 2)
    return flat.reshape(-1, m)


def per_group(mask: Tensor, m: int) -> set[int]:
    return set(groups(mask, m).sum(1).tolist())


def simple(kept: Tensor, scores: Tensor, n: int, m: int) -> Tensor:
    """Grow the best inactive positions, one group after another; ties go in index order."""
    rows = groups(kept, m).clone()
    for row, values in zip(rows, groups(scores, m), strict=True):
        inactive = [i for i in range(m) if not row[i]]
        best = sorted(inactive, key=lambda i, values=values: (-float(values[i]), i))
        row[best[: n - int(row.sum())]] = True
    back = rows.reshape(kept.shape[0], -1, kept.shape[1]).transpose(1, 2)
    return back.reshape(kept.shape)


# --- what is chosen ------------------------------------------------------------------------------


def test_the_best_of_each_group_of_eight_numbers() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2, 9.0, 7.0, 8.0, 6.0]])
    assert torch.equal(best_of_groups(scores, 2, 4), bits("0110 1010"))
    assert torch.equal(best_of_groups(scores, 1, 2), bits("01 10 10 10"))
    assert torch.equal(best_of_groups(scores, 3, 8), bits("00001110"))


def test_a_group_grows_what_it_lost_and_what_was_pruned_may_come_back() -> None:
    kept, scores = bits("1000 1100 0000"), torch.arange(12.0).view(1, 12).flip(1)
    assert torch.equal(grow_in_groups(kept, scores, 2, 4), bits("1100 1100 1100"))
    assert torch.equal(kept, bits("1000 1100 0000"))


def test_groups_of_a_convolution_are_of_its_input_channels() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = best_of_groups(scores, 2, 4)
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


@settings(deadline=None)
@given(
    part=st.sampled_from([1, 20, patterns.AT_ONCE]),
    numbers=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5), (7, 16)]),
    shape=st.sampled_from([(3, 2), (1, 1), (2, 3, 2, 3), (4, 1, 1, 1), (3, 2, 5)]),
    channels_last=st.booleans(),
    levels=st.sampled_from([1, 2, 5, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_the_same_grow_as_group_by_group(
    part: int,
    numbers: tuple[int, int],
    shape: tuple[int, ...],
    channels_last: bool,
    levels: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    (n, m), draw = numbers, rng(seed)
    shape = (shape[0], shape[1] * m, *shape[2:])
    scores = torch.randint(levels, shape, generator=draw).to(dtype)
    kept = best_of_groups(torch.rand(shape, generator=draw), n, m)
    kept &= torch.rand(shape, generator=draw) < 0.5
    if channels_last and len(shape) == 4:
        scores = scores.contiguous(memory_format=torch.channels_last)
        kept = kept.contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "AT_ONCE", part)
        expected = simple(kept, scores, n, m)
        assert torch.equal(grow_in_groups(kept, scores, n, m), expected)
        drawn = grow_in_groups(kept, scores, n, m, rng(seed))
    assert per_group(drawn, m) == {n}
    assert (drawn & kept).sum() == kept.sum()
    # Whatever was drawn among ties, the scores are those of the best.
    best, found = (groups(scores.double() * (x & ~kept), m).sum(1) for x in (expected, drawn))
    assert torch.equal(best, found)


def test_scores_that_are_minus_infinity_grow_where_nothing_else_is_open() -> None:
    kept, scores = bits("1000 0100"), torch.full((1, 8), -math.inf)
    assert torch.equal(grow_in_groups(kept, scores, 3, 4), bits("1110 1110"))
    drawn = grow_in_groups(kept, scores, 3, 4, rng())
    assert per_group(drawn, 4) == {3}
    assert (drawn & kept).sum() == 2


def test_ties_are_drawn_for_every_group_and_every_place_has_the_same_chance() -> None:
    mask = best_of_groups(torch.zeros(1000, 40), 2, 4, rng())
    assert per_group(mask, 4) == {2}
    # 5000 in each of four places: the standard error is sqrt(10000 / 4) = 50.
    assert groups(mask, 4).sum(0).tolist() == pytest.approx([5000] * 4, abs=300)
    pairs = groups(mask, 4).int() @ torch.tensor([1, 2, 4, 8], dtype=torch.int32)
    counts = pairs.bincount(minlength=16)[[3, 5, 6, 9, 10, 12]].tolist()
    assert counts == pytest.approx([1667] * 6, abs=230)


def test_nan_is_an_error_unless_it_is_of_a_weight_that_stays() -> None:
    kept, scores = bits("1000 1100"), torch.ones(1, 8)
    scores[0, 0] = torch.nan
    assert torch.equal(grow_in_groups(kept, scores, 2, 4), bits("1100 1100"))
    scores[0, 7] = torch.nan
    for choose in (
        lambda: grow_in_groups(kept, scores, 2, 4),
        lambda: best_of_groups(scores, 2, 4),
    ):
        with pytest.raises(ValueError, match="scores hold NaN"):
            choose()


@pytest.mark.parametrize(
    ("shape", "n", "m", "message"),
    [
        ((2, 6), 2, 4, r"groups of 4 can't be formed along dimension 1 of \(2, 6\)"),
        ((8,), 2, 4, r"groups of 4 can't be formed along dimension 1 of \(8,\)"),
        ((2, 6), 1, 0, "groups of 0 can't be formed"),
        ((2, 8), 5, 4, "asked for 5 of every 4 positions; allowed are 0 to 4"),
        ((2, 8), -1, 4, "asked for -1 of every 4"),
    ],
)
def test_groups_that_can_not_be_are_refused(
    shape: tuple[int, ...], n: int, m: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_groups(torch.zeros(shape), n, m)


def test_a_group_that_has_more_than_it_may_is_refused() -> None:
    message = "a group of 4 has 3 active positions; allowed are 0 to 2"
    with pytest.raises(ValueError, match=message):
        grow_in_groups(bits("1000 1110"), torch.zeros(1, 8), 2, 4)


def test_nothing_and_everything_can_be_chosen() -> None:
    assert best_of_groups(torch.zeros(0, 8), 2, 4).shape == (0, 8)
    assert not best_of_groups(torch.zeros(3, 8), 0, 4).any()
    assert best_of_groups(torch.zeros(3, 8), 4, 4).all()


def test_a_large_layer_is_looked_at_in_parts() -> None:
    size = 4 * patterns.AT_ONCE
    scores = torch.rand(1024, size // 1024, generator=rng())
    mask = best_of_groups(scores, 2, 4)
    peak = peak_bytes(lambda: grow_in_groups(mask & (scores < 0.7), scores, 2, 4, rng()))
    assert peak < 12 * size  # bytes; all at once it would be 24 of them


def test_a_mask_holds_a_pattern_or_not() -> None:
    assert holds(bits("1100 0101"), 2, 4)
    assert not holds(bits("1100 0111"), 2, 4)
    assert not holds(bits("1110 0010"), 2, 4)  # as many in all
    assert not holds(bits("110011"), 2, 4)
    assert not holds(torch.ones(4, dtype=torch.bool), 2, 4)
    conv = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    conv[:, ::2] = True
    assert holds(conv, 2, 4)
    assert holds(conv.contiguous(memory_format=torch.channels_last), 1, 2)


# --- where masks start ---------------------------------------------------------------------------


def net(seed: int = 0) -> nn.Sequential:
    """Two convolutions and a classifier for images of 8×8×8; all inputs are multiples of 8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


NAMES = ("0.weight", "3.weight", "7.weight")


def placed(pattern: str = "2:4", seed: int = 0) -> tuple[nn.Sequential, dict[str, itop_prune.ITOP]]:
    network, (n, m) = net(seed), map(int, pattern.split(":"))
    return network, itop_prune.apply(network, 1 - n / m, pattern=pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2", "3:8"])
def test_every_layer_gets_the_pattern_exactly(pattern: str) -> None:
    (n, m) = map(int, pattern.split(":"))
    _, masks = placed(pattern)
    assert tuple(masks) == NAMES
    for itop in masks.values():
        assert per_group(itop.mask, m) == {n}
        assert itop.active == itop.mask.numel() * n // m
        assert itop.pattern == (n, m)
        assert not itop.parameter[~itop.mask].any()
    expected = f"ITOP(Linear.weight, {64 * n // m} of 64 active in {pattern})"
    assert repr(masks["7.weight"]) == expected


def test_other_layers_with_inputs_along_dimension_1_get_it_too() -> None:
    layers = [nn.MultiheadAttention(8, 2), nn.LSTM(8, 4), nn.Conv1d(4, 6, 5), nn.Conv3d(4, 6, 2)]
    masks = itop_prune.apply(nn.ModuleList(layers), 0.5, pattern="2:4")
    assert [per_group(itop.mask, 4) for itop in masks.values()] == [{2}] * 6


def test_positions_are_drawn_by_the_seed_and_the_same_in_every_memory_format() -> None:
    _, one = placed()
    other = itop_prune.apply(net(), 0.5, pattern="2:4", seed=1)
    last = itop_prune.apply(net().to(memory_format=torch.channels_last), 0.5, pattern="2:4")
    for name in one:
        assert torch.equal(one[name].mask, last[name].mask)
        assert not torch.equal(one[name].mask, other[name].mask)


def test_scores_choose_the_best_of_each_group() -> None:
    network, nothing = net(), {}
    weights = {name: network.get_parameter(name).detach().clone() for name in NAMES}
    nothing = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks = itop_prune.apply(network, 0.5, pattern="2:4", scores="magnitude")
    scores = {name: -weight for name, weight in weights.items()}
    given = itop_prune.apply(net(), 0.75, pattern="1:4", scores=scores)
    for name, weight in weights.items():
        assert torch.equal(masks[name].mask, simple(nothing[name], weight.abs(), 2, 4))
        assert torch.equal(given[name].mask, simple(nothing[name], -weight, 1, 4))

    network, scores = net(), {name: torch.full_like(w, math.nan) for name, w in weights.items()}
    with pytest.raises(ValueError, match=r"scores for 0\.weight hold NaN"):
        itop_prune.apply(network, 0.5, pattern="2:4", scores=scores)
    assert not itop_prune.find_masks(network)


def test_a_layer_that_the_pattern_does_not_divide_is_left_out_and_listed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(6, 4, 3),
        CondConv2d(4, 8, 3, num_experts=4),
        nn.Conv2d(4, 4, 1),
    )
    before = [parameter.detach().clone() for parameter in model[:4].parameters()]
    with pytest.warns(UserWarning, match="2:4 does not divide, so these stay dense") as caught:
        masks = itop_prune.apply(model, 0.5, pattern="2:4")
    assert str(caught[0].message).splitlines()[1:] == [
        "  0.weight: dimension 1 of (8, 3, 3, 3) is no multiple of 4",
        "  1.weight: dimension 1 of (8, 1, 3, 3) is no multiple of 4",
        "  2.weight: dimension 0 of (6, 4, 3, 3) is no multiple of 4",
        "  3.weight: dimension 1 of (4, 288) is not its inputs",
    ]
    assert caught[0].filename == __file__
    assert list(masks) == list(itop_prune.find_masks(model)) == ["4.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, model[:4].parameters(), strict=True))


def test_with_strict_it_is_an_error_that_says_what_to_exclude() -> None:
    model = convnet()
    message = r"(?s)the pattern 2:4 does not divide\n  0\.weight: .*exclude=\['0\.weight'\]$"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, pattern="2:4", strict=True)
    assert not itop_prune.find_masks(model)
    masks = itop_prune.apply(model, 0.5, pattern="2:4", strict=True, exclude=["0.weight"])
    assert list(masks) == ["3.weight", "7.weight"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_pattern_that_divides_nothing_is_an_error(strict: bool) -> None:
    message = r"3:7 divides no weight, and nothing is left to mask; give another\n  0\.weig"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(mlp(), 1 - 3 / 7, pattern="3:7", strict=strict)


@pytest.mark.parametrize(
    "pattern", ["4:2", "4:4", "0:4", "2:4:8", "ERK", "a:b", "2:", "-1:4", " 2:4", "2.5:4", "", True]
)
def test_a_pattern_that_can_not_be_says_what_can(pattern: Any) -> None:
    message = f"pattern is {pattern!r}; allowed is text N:M with whole numbers"
    with pytest.raises(ValueError, match=re.escape(message)):
        itop_prune.apply(mlp(), 0.5, pattern=pattern)


def test_a_number_is_what_yaml_makes_of_a_pattern_without_quotes() -> None:
    with pytest.raises(ValueError, match=r'pattern is 124, a number; .* so write pattern: "2:4"'):
        itop_prune.apply(mlp(), 0.5, pattern=124)  # type: ignore[arg-type]


def test_no_pattern_is_none() -> None:
    assert (parse(None), parse("2:4"), parse("1:16")) == (None, (2, 4), (1, 16))


@pytest.mark.parametrize("place", [itop_prune.apply, itop_prune.count_active])
def test_a_pattern_given_as_method_is_an_error_that_names_the_argument(place: Callable) -> None:
    message = r"method is '2:4'; a pattern N:M has an argument of its own: write pattern=\"2:4\""
    with pytest.raises(ValueError, match=message):
        place(mlp(), 0.5, "2:4")


@pytest.mark.parametrize(
    ("sparsity", "pattern", "options", "message"),
    [
        (0.9, "2:4", {}, r"sparsity is 0\.9, and the pattern 2:4 keeps 2 of 4; allowed is 0\.5"),
        (0.5, "1:4", {}, r"sparsity is 0\.5, and the pattern 1:4 keeps 1 of 4; allowed is 0\.75"),
        (0.5002, "2:4", {}, r"sparsity is 0\.5002, and"),
        (0.5, "2:4", {"densities": {"*": 1.0}}, "densities is .* gives every layer the same"),
        (0.5, "2:4", {"method": "ERK+"}, r"method is 'ERK\+', and the pattern 2:4 gives every"),
        (0.5, "2:4", {"method": "magnitude"}, "method is 'magnitude', and the pattern 2:4 gives"),
    ],
)
def test_what_does_not_go_with_a_pattern_is_refused(
    sparsity: float, pattern: str, options: dict[str, Any], message: str
) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, sparsity, pattern=pattern, **options)
    assert not itop_prune.find_masks(model)


def test_a_sparsity_may_be_rounded_to_four_digits() -> None:
    assert itop_prune.apply(nn.Linear(9, 5), 0.6667, pattern="1:3")["weight"].active == 15


def test_a_mask_of_ones_own_must_hold_the_pattern_that_it_is_said_to_have() -> None:
    layer, apply = nn.Linear(8, 1), itop_prune.ITOP.apply
    message = r"the mask of weight, \(1, 8\), does not hold the pattern 2:4"
    with pytest.raises(ValueError, match=message):
        apply(layer, "weight", bits("1110 1000"), pattern=(2, 4))
    assert not itop_prune.find_masks(layer)
    assert apply(layer, "weight", bits("1110 1000").float()).pattern is None
    itop_prune.remove(layer)
    assert apply(layer, "weight", bits("1010 1001").float(), pattern=(2, 4)).pattern == (2, 4)


# --- updates -------------------------------------------------------------------------------------


def scheduler(masks: Any, model: nn.Module, **options: Any) -> MaskScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return MaskScheduler(masks, optimizer, **{"total_steps": 40, "every": 1, **options})


RULES: list[dict[str, Any]] = [
    {"grow": "random"},
    {"grow": "gradient"},
    {"grow": "momentum"},
    {"grow": "gradient", "scope": "global"},
    {"grow": "random", "scope": "global", "floor": 0.1},
    {"grow": "gradient+random", "rate": 1.0, "min_rate": 1.0},
    {"grow": "gradient", "gradient_steps": 2, "every": 2},
]
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda network: network,
    "channels_last": lambda network: network.to(memory_format=torch.channels_last),
    "bf16": lambda network: network.to(torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:.*so growth there is by chance")  # at a rate of 1
@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "kind"), [("2:4", "plain"), ("1:8", "channels_last"), ("2:4", "bf16")]
)
def test_every_update_keeps_the_pattern_exactly_and_counts_what_was_explored(
    pattern: str, kind: str, options: dict[str, Any]
) -> None:
    (n, m), network = map(int, pattern.split(":")), KINDS[kind](net())
    masks = itop_prune.apply(network, 1 - n / m, pattern=pattern)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    regrow = MaskScheduler(masks, optimizer, **{"total_steps": 12, "every": 1, **options})
    union = {name: itop.mask.clone() for name, itop in masks.items()}
    changed, moved = 0, 0
    for step in range(12):
        x, y = batch(step, 8, 8, 8)
        nn.functional.cross_entropy(network(x.to(network[0].weight.dtype)), y).backward()
        optimizer.step()
        before = {name: itop.mask.clone() for name, itop in masks.items()}
        moved += regrow.step()
        optimizer.zero_grad()
        for name, itop in masks.items():
            assert per_group(itop.mask, m) == {n}
            assert not itop.parameter[~itop.mask].any()
            assert not optimizer.state[itop.parameter]["momentum_buffer"][~itop.mask].any()
            union[name] |= itop.mask
            changed += int((before[name] ^ itop.mask).sum())
            left = (before[name] & ~itop.mask).sum()
            assert options.get("scope") or left <= math.ceil(regrow.rate * itop.active)
    assert moved == 12 // options.get("every", 1)
    assert changed
    total, seen = (sum(int(f(x)) for x in union.values()) for f in (torch.numel, torch.sum))
    assert regrow.exploration_rate() == seen / total > n / m


@pytest.mark.parametrize("convolution", [False, True])
def test_an_update_prunes_the_lowest_of_the_layer_and_grows_the_best_of_each_group(
    convolution: bool,
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, 3, bias=False) if convolution else nn.Linear(8, 6, bias=False)
    masks = itop_prune.apply(layer, 0.5, pattern="2:4")
    itop = masks["weight"]
    gradient = torch.randn(itop.mask.shape)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rates = {"rate": 0.3, "min_rate": 0.3}
    regrow = MaskScheduler(masks, optimizer, total_steps=9, every=1, grow="gradient", **rates)
    before = itop.mask.clone()
    (layer.weight * gradient).sum().backward()
    optimizer.step()
    weight = itop.weight.clone()
    assert regrow.step()

    places = sorted(before.nonzero().tolist(), key=lambda place: abs(float(weight[tuple(place)])))
    kept = before.clone()
    for place in places[: math.ceil(0.3 * len(places))]:
        kept[tuple(place)] = False
    assert torch.equal(itop.mask, simple(kept, gradient.abs(), 2, 4))
    assert per_group(kept, 4) != {2}
    assert not torch.equal(itop.mask, before)


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_where_all_scores_tie_the_pattern_holds(rate: float) -> None:
    def nothing(weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    network, masks = placed()
    regrow = scheduler(masks, network, rate=rate, min_rate=rate, prune=nothing, grow=nothing)
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    train(network, optimizer, regrow, steps=range(5), shape=(8, 8, 8))
    assert regrow.updates == 5
    assert all(per_group(itop.mask, 4) == {2} for itop in masks.values())
    assert any(not torch.equal(before[name], itop.mask) for name, itop in masks.items())


@pytest.mark.parametrize("role", ["prune", "grow"])
def test_a_criterion_that_gives_nan_is_named_with_the_layer(role: str) -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight * math.nan

    network, masks = placed()
    options: dict[str, Any] = {role: broken}
    regrow = scheduler(masks, network, **options)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"broken gave NaN for 0\.weight; scores must be numbers"):
        train(network, optimizer, regrow, steps=range(1), shape=(8, 8, 8))


def test_layers_with_and_without_a_pattern_move_side_by_side() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5, pattern="2:4", include=["0", "2"])
    masks |= itop_prune.apply(model, 0.7, include=["4"])
    regrow = scheduler(masks, model, grow="gradient")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), regrow)
    assert [itop.pattern for itop in masks.values()] == [(2, 4), (2, 4), None]
    assert [per_group(itop.mask, 4) for itop in list(masks.values())[:2]] == [{2}, {2}]
    assert masks["4.weight"].active == round(0.3 * 48)


@pytest.mark.parametrize(
    "options",
    [
        {"redistribute": "momentum"},
        {"redistribute": lambda active: active},
        {"final_sparsity": 0.9, "density": "cubic"},
        {"redistribute": "nonzeros", "scope": "global"},
    ],
    ids=as_text,
)
def test_what_would_change_the_counts_is_refused(options: dict[str, Any]) -> None:
    network, masks = placed()
    message = r"0\.weight keeps 2 of every 4 weights, and redistribute and final_sparsity"
    with pytest.raises(ValueError, match=message):
        scheduler(masks, network, **options)


def test_masks_that_do_not_hold_their_pattern_are_all_named() -> None:
    network, masks = placed()
    for name in ("0.weight", "7.weight"):
        masks[name].mask[0, :4] = False
        masks[name].mask[0, 4:8] = True  # as many as before
    message = r"masks of 0\.weight \(2:4\), 7\.weight \(2:4\) do not hold their patterns"
    with pytest.raises(ValueError, match=message):
        scheduler(masks, network)
    scheduler({"3.weight": masks["3.weight"]}, network)


# --- copies, files, resume -----------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "ModelEmaV3": lambda model: ModelEmaV3(model).module,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_keeps_the_pattern(name: str) -> None:
    network, masks = placed("1:4")
    again = itop_prune.find_masks(COPIES[name](network))
    assert {key: itop.pattern for key, itop in again.items()} == dict.fromkeys(masks, (1, 4))


def test_remove_takes_the_pattern_away() -> None:
    network, _ = placed()
    itop_prune.remove(network)
    masks = itop_prune.apply(network, 0.5, "uniform")
    assert {itop.pattern for itop in masks.values()} == {None}


def test_a_state_dict_has_the_keys_of_torchs_own_pruning_and_no_others() -> None:
    other = net()
    itop_prune.apply(other, 0.5, "uniform")
    assert list(placed()[0].state_dict()) == list(other.state_dict())


@pytest.fixture(params=["dict", "small"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], Any]:
    """Save a model as something that `load` takes."""

    def saved(model: nn.Module) -> Any:
        if request.param == "dict":
            return model.state_dict()
        itop_prune.save(model, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return saved


def test_load_into_a_dense_model_gives_masks_without_a_pattern(
    source: Callable[[nn.Module], Any],
) -> None:
    masks = itop_prune.load(net(1), source(placed()[0]))
    assert {itop.pattern for itop in masks.values()} == {None}


def test_load_into_a_model_with_a_pattern_keeps_it(source: Callable[[nn.Module], Any]) -> None:
    saved, masks = placed()
    into, present = placed(seed=1)
    for name, itop in itop_prune.load(into, source(saved)).items():
        assert itop is present[name]
        assert itop.pattern == (2, 4)
        assert torch.equal(itop.mask, masks[name].mask)
    assert scheduler(present, into).exploration_rate() == 0.5


def test_load_refuses_masks_that_do_not_hold_it_and_leaves_the_model(
    source: Callable[[nn.Module], Any],
) -> None:
    other = net(1)
    itop_prune.apply(other, 0.5, pattern="2:4", include=["7"])
    itop_prune.apply(other, 0.5, "uniform", include=["0", "3"])
    network, _ = placed()
    before = copy.deepcopy(network.state_dict())
    message = r"^0\.weight, 3\.weight: the mask in the source does not hold the N:M pattern"
    with pytest.raises(ValueError, match=message):
        itop_prune.load(network, source(other))
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_load_state_dict_refuses_them_too_and_leaves_the_layer() -> None:
    other = net(1)
    itop_prune.apply(other, 0.5, "uniform")
    network, masks = placed()
    before = {name: (itop.mask.clone(), itop.weight.clone()) for name, itop in masks.items()}
    message = "the mask in the source does not hold the N:M pattern of the model's"
    with pytest.raises(RuntimeError, match=message):
        network.load_state_dict(other.state_dict())
    for name, (mask, weight) in before.items():
        assert torch.equal(masks[name].mask, mask)
        assert torch.equal(masks[name].weight, weight)

    network.load_state_dict(net(2).state_dict())  # dense weights into the masks as they are
    assert all(torch.equal(masks[name].mask, mask) for name, (mask, _) in before.items())
    wrong = {**network.state_dict(), "7.weight_mask": torch.ones(4, 4)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 7\.weight"):
        network.load_state_dict(wrong, strict=False)


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_resumed_run_gives_every_later_number_bit_for_bit(grow: str, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, MaskScheduler]:
        network, masks = placed(seed=seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        regrow = MaskScheduler(masks, optimizer, total_steps=20, every=3, grow=grow)
        return network, optimizer, regrow

    whole, again = start(0), start(1)
    train(*whole, steps=range(10), shape=(8, 8, 8))
    torch.save([part.state_dict() for part in whole], tmp_path / "state")
    losses = train(*whole, steps=range(10, 20), shape=(8, 8, 8))
    for part, state in zip(again, torch.load(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    assert train(*again, steps=range(10, 20), shape=(8, 8, 8)) == losses
    for key, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[key]), key
    assert whole[2].exploration_rate() == again[2].exploration_rate() > 0.5
