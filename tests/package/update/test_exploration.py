"""What the masks have been: R_s, what entered, what survived, by hand and as theory expects it."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers.sparse_run import sparse
from itop_prune_tools.models import registration  # noqa: F401  (registers the paper's models)
from itop_prune_tools.reports.expected_exploration import explored as in_expectation
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler, bits
from itop_prune.methods.distributions import DISTRIBUTIONS
from itop_prune.methods.schedules import cosine
from itop_prune.update.exploration import Exploration

# --- by hand -------------------------------------------------------------------------------------


def exploration(names: str, survival: bool = True) -> Exploration:
    """Layers of six weights, of which "xxx..." are active."""
    masks = {}
    for name in names:
        layer = nn.Linear(6, 1, bias=False)
        masks[name] = itop_prune.ITOP.apply(layer, "weight", mask("xxx..."))
    return Exploration(masks, survival)


def mask(positions: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in positions]])


def update(found: Exploration, **moved: tuple[str, str]) -> None:
    found.begin_update()
    for name, (before, after) in moved.items():
        found.record(name, mask(before), mask(after))


def test_two_layers_over_three_updates() -> None:
    found = exploration("ab")
    assert (found.rate(), found.entered()) == (0.5, {})
    update(found, a=("xxx...", "x..xx."), b=("xxx...", ".xxx.."))
    assert found.rate() == 9 / 12
    assert found.entered() == {"a": 2, "b": 1}
    assert math.isnan(found.survival_rate())

    # One of the two that grew in a is left, and the only one of b.
    update(found, a=("x..xx.", "x..x.x"), b=(".xxx..", ".xxx.."))
    assert found.rate() == 10 / 12
    assert found.entered() == {"a": 1, "b": 0}
    assert found.survival_rates() == {"a": 0.5, "b": 1.0}
    assert found.survival_rate() == 2 / 3

    # That of a is gone. What leaves b grew long before, and nothing grew there at the last update.
    update(found, a=("x..x.x", "xx.x.."), b=(".xxx..", ".xx.x."))
    assert found.entered() == {"a": 1, "b": 1}
    assert found.survival_rates() == {"a": 0.0}
    assert found.survival_rate() == 0.0


def test_a_layer_without_a_record_gained_nothing_and_has_no_survival_rate() -> None:
    found = exploration("ab")
    update(found, a=("xxx...", "x..xx."), b=("xxx...", ".xxx.."))
    update(found, b=(".xxx..", ".xxx.."))
    assert found.entered() == {"a": 0, "b": 0}
    assert found.survival_rates() == {"b": 1.0}


def test_a_mask_that_was_written_before_an_update_counts_as_explored() -> None:
    found = exploration("a")
    update(found, a=("...xxx", "xxx..."))
    assert found.rate() == 1.0


def test_a_copy_of_the_state_goes_on_and_is_independent() -> None:
    one, other = exploration("a"), exploration("a")
    update(one, a=("xxx...", ".xxx.."))
    state = one.state_dict()
    other.load_state_dict(state)
    for found in (one, other):
        update(found, a=(".xxx..", "..xxx."))
    assert one.survival_rates() == other.survival_rates() == {"a": 1.0}
    assert one.entered() == other.entered() == {"a": 1}
    assert bits.count(state["explored"]["a"]) == 4


# --- from a sample -------------------------------------------------------------------------------


def in_sparse_storage(size: int, active: int, budget: int) -> tuple[Exploration, itop_prune.ITOP]:
    """One layer of 2,000 inputs in sparse storage, whose explored weights share bits."""
    with torch.device("meta"):
        layer = nn.Linear(2000, size // 2000, bias=False)
    masks = itop_prune.apply(
        layer, 1 - active / size, method="uniform", storage="sparse", device="cpu"
    )
    return Exploration(masks, survival=True, budget=budget), masks["weight"]


def drawn(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size, (count,), generator=generator).unique()


@pytest.mark.parametrize("budget", [1 << 30, 1 << 17, 1 << 14])
def test_a_sample_estimates_what_all_bits_count_and_says_how_well(budget: int) -> None:
    size = 8_000_000
    found, itop = in_sparse_storage(size, 200_000, budget)
    seen = itop.active_positions().long()
    for seed in range(4):
        entered = drawn(size, 100_000, seed)
        found.begin_update()
        found.record_positions("weight", seen[:0], entered, entered)
        seen = torch.cat([seen, entered]).unique()
    true = len(seen) / size
    places = found.explored.places("weight")
    assert found.explored.exact == (budget == 1 << 30)
    assert found.explored.bits["weight"].nbytes <= budget
    expected = 0.0 if found.explored.exact else math.sqrt(true * (1 - true) / places)
    assert found.error() == pytest.approx(expected, rel=0.1)
    assert abs(found.rate() - true) <= 4 * expected
    assert found.explored.count("weight") == round(found.rate() * size)
    assert found.explored.holds("weight", seen)
    others = drawn(size, 100_000, 99)
    assert not found.explored.holds("weight", others)


def test_errors_of_samples_are_as_large_as_they_say() -> None:
    """Of 60 sets, each with another estimate: their deviations have the spread that is told."""
    size, deviations = 4_000_000, []
    for seed in range(60):
        found, _ = in_sparse_storage(size, 2000, 1 << 13)
        places = drawn(size, 400_000, seed)
        found.explored.bits["weight"].zero_()
        found.explored.add("weight", places)
        deviations.append((found.rate() - len(places) / size) / found.error())
    spread = torch.tensor(deviations).square().mean().sqrt()
    assert 0.7 < float(spread) < 1.35
    assert abs(sum(deviations)) / 60 < 0.6


def test_a_sample_is_of_no_column_of_the_weight() -> None:
    """A block is as long as a row. Of one column all weights are explored, of others none."""
    found, _ = in_sparse_storage(4_000_000, 2000, 250)
    assert found.explored.blocks["weight"] == 2000
    for column in (0, 1, 1999):
        found.explored.bits["weight"].zero_()
        found.explored.add("weight", torch.arange(2000) * 2000 + column)
        assert found.rate() < 0.005  # it is 0.0005


def test_masks_and_positions_are_sampled_alike() -> None:
    size = 4_000_000
    by_mask, itop = in_sparse_storage(size, 100_000, 1 << 14)
    by_positions, _ = in_sparse_storage(size, 100_000, 1 << 14)
    entered = drawn(size, 50_000, 1)
    before, after = itop.mask, itop.mask.flatten().index_fill(0, entered, True).view(itop.shape)
    new = entered[~before.flatten()[entered]]
    by_mask.begin_update()
    by_mask.record("weight", before, after)
    by_positions.begin_update()
    positions = itop.active_positions()
    by_positions.record_positions("weight", positions, torch.cat([positions, new]), new)
    assert by_mask.rate() == by_positions.rate()
    assert by_mask.entered() == by_positions.entered()
    for found in (by_mask, by_positions):
        found.begin_update()
    gone = torch.zeros(itop.shape, dtype=torch.bool)
    by_mask.record("weight", after, gone)
    by_positions.record_positions("weight", new[:0], new[:0], new[:0])
    assert by_mask.survival_rate() == by_positions.survival_rate() == 0.0


def test_a_layer_with_shared_bits_has_no_mask_of_what_is_explored() -> None:
    found, _ = in_sparse_storage(4_000_000, 2000, 1 << 13)
    with pytest.raises(ValueError, match="weight has 4,000,000 weights, and one of 62 is counted"):
        found.explored["weight"]


# --- in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_explored_is_the_union_of_all_masks_and_entered_what_is_new(grow: str) -> None:
    run = sparse(every=3, total_steps=9, grow=grow)
    union, entered = run.positions(), []
    for step in range(9):
        before = run.positions()
        run.train(range(step, step + 1))
        new = {name: itop.mask & ~before[name] for name, itop in run.masks.items()}
        for name in union:
            union[name] |= new[name]
        if step % 3 == 2:
            entered.append(run.regrow.entered())
            assert entered[-1] == {name: int(grown.sum()) for name, grown in new.items()}
    assert any(entered[-1].values())
    for name, explored in run.regrow.explored.items():
        assert torch.equal(explored, union[name])
    assert run.regrow.exploration_rate() == sum(int(x.sum()) for x in union.values()) / 560


def test_at_a_rate_of_0_nothing_enters() -> None:
    run = sparse(rate=0.5, min_rate=0.0, schedule="linear", total_steps=4)
    run.train(range(2))
    assert any(run.regrow.entered().values())
    run.train(range(2, 4))
    assert run.regrow.updates == 2
    assert run.regrow.entered() == dict.fromkeys(run.masks, 0)


def test_a_layer_that_an_update_leaves_alone_is_counted_too() -> None:
    """Global pruning takes nothing of the layers whose weights are large after the first update."""
    options: dict[str, Any] = {"scope": "global", "rate": 0.2, "schedule": "constant"}
    run = sparse(every=1, survival=True, **options)
    grown, positions = [], []
    for step in range(3):
        before = run.positions()
        run.backward(step)
        if step:
            with torch.no_grad():
                for name in ("2.weight", "4.weight"):
                    run.masks[name].parameter.add_(run.masks[name].mask.float(), alpha=100.0)
        run.regrow.step()
        positions.append(run.positions())
        grown.append({name: positions[-1][name] & ~before[name] for name in before})
    assert grown[0]["2.weight"].any()
    assert not grown[1]["2.weight"].any()
    assert torch.equal(positions[1]["2.weight"], positions[2]["2.weight"])
    new = grown[1]["0.weight"]
    left = int((new & positions[2]["0.weight"]).sum())
    assert run.regrow.survival_rates() == {"0.weight": left / int(new.sum())}


@pytest.mark.filterwarnings("ignore:0.weight got no gradient since the last update")
def test_a_layer_that_is_frozen_between_two_updates_is_left_out() -> None:
    run = sparse(
        every=1, survival=True, optimizer=lambda model: torch.optim.SGD(model.parameters())
    )
    frozen = run.masks["0.weight"].parameter
    names = []
    for step in range(5):
        frozen.requires_grad_(step != 2)
        run.train(range(step, step + 1))
        names.append(list(run.regrow.survival_rates()))
        if step == 2:
            assert run.regrow.entered()["0.weight"] == 0
    everything, rest = list(run.masks), ["2.weight", "4.weight"]
    # After step 3 what grew in the frozen layer had time for two updates.
    assert names == [[], everything, rest, rest, everything]


# --- as theory expects it ------------------------------------------------------------------------

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("cifar*set-itop.yaml"))
IMAGES = 50_000
Shapes = dict[str, tuple[int, ...]]


def explored(density: float, every: int, steps: int) -> float:
    """The share of one layer that random growth explores at the paper's rates."""
    rates = [0.005 + (0.5 - 0.005) * cosine(s / steps) for s in range(every, steps + 1, every)]
    return in_expectation(density, rates)


def of_all(shapes: Shapes, rates: Mapping[str, float]) -> float:
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(weights[name] * rates[name] for name in shapes) / sum(weights.values())


def expected(model_name: str, num_classes: int, sparsity: float, every: int, steps: int) -> float:
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=num_classes)
    shapes = {n: tuple(model.get_parameter(n).shape) for n in itop_prune.count_active(model, 0.5)}
    densities = DISTRIBUTIONS["ERK"](shapes, 1 - sparsity)
    rates = {name: explored(density, every, steps) for name, density in densities.items()}
    return of_all(shapes, rates)


@pytest.mark.parametrize(
    ("model", "classes", "sparsity", "every", "steps_per_epoch", "normal", "extended"),
    [
        ("cifar_vgg_c", 10, 0.95, 1500, 352, 0.436, 0.864),  # 45,000 images, a small last batch
        ("cifar_vgg_c", 10, 0.95, 4000, 352, 0.243, 0.598),
        ("cifar_resnet34", 100, 0.98, 1500, 391, 0.262, 0.718),  # 50,000 images
        ("cifar_mlp", 10, 0.95, 1500, 352, 0.530, 0.965),
    ],
)
def test_our_models_explore_what_is_known_of_the_paper(
    model: str,
    classes: int,
    sparsity: float,
    every: int,
    steps_per_epoch: int,
    normal: float,
    extended: float,
) -> None:
    for epochs, known in ((250, normal), (1250, extended)):
        steps = epochs * steps_per_epoch
        found = expected(model, classes, sparsity, every, steps)
        assert found == pytest.approx(known, abs=0.0005)


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_the_scheduler_explores_what_is_expected(density: float) -> None:
    """What trains between updates decides which weights leave, and not how many new ones enter."""
    layer = nn.Linear(600, 500, bias=False)
    masks = itop_prune.apply(layer, 1.0 - density)
    itop = masks["weight"]
    itop.parameter.grad = itop.parameter.detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regrow = MaskScheduler(masks, optimizer, total_steps=60, every=1)
    for _ in range(60):
        regrow.step()
    found, known = regrow.exploration_rate(), explored(density, 1, 60)
    assert known > 2 * density
    assert found == pytest.approx(known, rel=0.01)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_explores(path: Path) -> None:
    text = path.read_text()
    recipe = yaml.safe_load(text)
    model, data, every = recipe["model"], recipe["data"], recipe["regrow"]["every"]

    def found(multiplier: int, validation: int) -> tuple[str, str]:
        batches = (IMAGES - validation) // data["batch_size"]
        steps = batches * recipe["epochs"] * multiplier
        sparsity = recipe["masks"]["sparsity"]
        rate = expected(model["model_name"], model["num_classes"], sparsity, every, steps)
        return f"{rate:.3f}".removeprefix("0"), str(steps // every)

    pattern = r"Expected R_s (\.\d+) after (\d+) updates, and (\.\d+) with multiplier=5"
    stated = re.search(pattern, text)
    assert stated is not None
    assert stated.groups() == (*found(1, data["validation"]), found(5, data["validation"])[0])
    if whole := re.search(r"\(data\.validation=0\) (\.\d+) after (\d+)", text):
        assert whole.groups() == found(1, 0)
