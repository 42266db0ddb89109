"""Distributions: densities as published, counts that meet the budget exactly."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from itop_prune.methods.distributions import (
    DISTRIBUTIONS,
    active_counts,
    apportion,
    er,
    erk,
    erk_plus,
    scaled,
    uniform,
    uniform_plus,
    with_fixed,
)

Shapes = Mapping[str, tuple[int, ...]]

REFERENCE = json.loads(
    (Path(__file__).parents[2] / "reference" / "densities_resnet50.json").read_text()
)
SHAPES = {name: tuple(shape) for name, shape in REFERENCE["shapes"].items()}
CASES = {f"{case['distribution']} {case['sparsity']}": case for case in REFERENCE["cases"]}
SMALL = {"conv": (8, 4, 3, 3), "fc1": (30, 20), "fc2": (5, 30)}


def test_there_are_reference_cases() -> None:
    assert {case["distribution"] for case in CASES.values()} == {"ER", "ERK"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_densities_and_counts_of_resnet50(case: dict) -> None:
    method, density = case["distribution"], 1.0 - case["sparsity"]
    densities = DISTRIBUTIONS[method](SHAPES, density)
    assert densities == pytest.approx(case["density"], rel=0, abs=REFERENCE["tolerance"]["density"])
    dense = sorted(name for name, density in densities.items() if density == 1.0)
    assert dense == sorted(case["dense_layers"])

    # The reference rounds up in every layer: 26 weights above `round(density * total)`.
    expected = {name: share * math.prod(SHAPES[name]) for name, share in case["density"].items()}
    budget = sum(expected.values()) / REFERENCE["n_weights"]
    assert active_counts(SHAPES, budget, method) == pytest.approx(expected, rel=0, abs=2)
    total = sum(active_counts(SHAPES, density, method).values())
    assert total == round(density * REFERENCE["n_weights"])


# --- by hand -------------------------------------------------------------------------------------


def test_uniform_is_the_same_everywhere() -> None:
    assert uniform(SMALL, 0.3) == {"conv": 0.3, "fc1": 0.3, "fc2": 0.3}


def test_erk_counts_the_kernel_and_er_does_not() -> None:
    densities = er({"conv": (8, 4, 3, 3), "fc": (8, 4)}, 0.1)
    assert densities["conv"] == pytest.approx(densities["fc"])
    densities = erk({"conv": (8, 4, 3, 3), "fc": (40, 20)}, 0.1)
    assert densities["conv"] / densities["fc"] == pytest.approx((18 / 288) / (60 / 800))


def test_erk_to_the_power_of_zero_is_uniform_and_to_half_in_between() -> None:
    """Raw densities of (8, 8) and (2, 8): 1/4 and 5/8; their roots 1/2 and sqrt(5/8)."""
    shapes = {"a": (8, 8), "b": (2, 8)}
    assert erk(shapes, 0.2, power=0.0) == pytest.approx({"a": 0.2, "b": 0.2})
    for power, ratio in ((0.5, math.sqrt(2.5)), (1.0, 2.5)):
        densities = erk(shapes, 0.2, power=power)
        assert densities["b"] / densities["a"] == pytest.approx(ratio)


def test_uniform_plus_keeps_the_first_layer_dense_and_a_fifth_of_the_last() -> None:
    """Of 1,000 weights 150: 20 in the first, 0.2 * 80 in the last, 114 of 900 in the middle."""
    shapes = {"first": (2, 10), "middle": (30, 30), "last": (8, 10)}
    expected = {"first": 1.0, "middle": 114 / 900, "last": 0.2}
    assert uniform_plus(shapes, 0.15) == pytest.approx(expected)
    denser = {"first": 1.0, "middle": 480 / 980, "last": 480 / 980}
    assert uniform_plus(shapes, 0.5) == pytest.approx(denser)


def test_erk_plus_is_erk_of_the_others_beside_a_dense_last_layer() -> None:
    """Of 1,000 weights 200: 40 in the last; the 160 left are 1/6 of the others."""
    shapes = {"a": (30, 20), "b": (12, 30), "last": (4, 10)}
    expected = {**erk({"a": (30, 20), "b": (12, 30)}, 1 / 6), "last": 1.0}
    assert erk_plus(shapes, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("method", [uniform_plus, erk_plus])
def test_one_layer_alone_gets_the_budget(method: Callable) -> None:
    assert method({"only": (10, 10)}, 0.3) == pytest.approx({"only": 0.3})


# --- fixed densities -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", DISTRIBUTIONS)
def test_fixed_densities_count_in_the_budget_of_every_distribution(method: str) -> None:
    shapes = {"a": (30, 20), "b": (12, 30), "c": (20, 20), "head": (4, 10)}
    counts = active_counts(shapes, 0.5, with_fixed({"b": 0.25}, DISTRIBUTIONS[method]))
    assert counts["b"] == 90
    assert sum(counts.values()) == 700


@pytest.mark.parametrize(
    ("fixed", "kept"),
    [({"a": 1.0}, "100"), ({"a": 0.0, "b": 0.0}, "0"), ({"a": 0.5, "b": 0.5}, "100")],
)
def test_fixed_densities_that_miss_the_budget_are_refused_with_the_numbers(
    fixed: dict, kept: str
) -> None:
    message = rf"the fixed densities keep {kept} weights, and the budget is 20 of 200"
    with pytest.raises(ValueError, match=message):
        active_counts({"a": (10, 10), "b": (10, 10)}, 0.1, with_fixed(fixed, uniform))


def test_a_fixed_density_is_kept_exactly_where_tiny_layers_round_up() -> None:
    """The budget is round(0.03 * 10,124), 304."""
    tiny = {str(i): (2, 2) for i in range(6)}
    shapes = {"big": (100, 100), **tiny, "head": (10, 10)}
    counts = active_counts(shapes, 0.03, "uniform", fixed={"head": 1.0})
    assert counts == {"big": 198, **dict.fromkeys(tiny, 1), "head": 100}


def test_fixing_a_layer_does_not_make_another_one_the_first_or_the_last() -> None:
    shapes = {"first": (10, 10), "middle": (20, 20), "last": (4, 10)}
    assert with_fixed({"last": 1.0}, erk_plus)(shapes, 0.5) == erk_plus(shapes, 0.5)
    densities = with_fixed({"last": 0.1}, uniform_plus)(shapes, 0.5)
    expected = {"first": 1.0, "middle": (270 - 100 - 4) / 400, "last": 0.1}
    assert densities == pytest.approx(expected)
    densities = with_fixed({"first": 0.5}, uniform_plus)(shapes, 0.5)
    assert densities == pytest.approx({"first": 0.5, "middle": 0.5, "last": 0.5})


def test_all_layers_fixed_at_the_budget_are_no_error() -> None:
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert active_counts(shapes, 0.2, with_fixed({"a": 0.3, "b": 0.1}, erk)) == {"a": 30, "b": 10}


# --- sharing out ---------------------------------------------------------------------------------


def test_scaled_fills_what_would_overflow_and_shares_the_rest() -> None:
    """14 of 20 places at 1 : 3 would be 3.5 and 10.5: b is full, and a gets the 4 left."""
    found = scaled({"a": 1.0, "b": 3.0}, {"a": 10, "b": 10}, 14)
    assert found == pytest.approx({"a": 0.4, "b": 1.0})


def test_where_only_layers_without_a_say_have_room_left_they_share_by_it() -> None:
    found = scaled({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 10, "b": 30, "c": 10}, 30)
    assert found == {"a": 1.0, "b": 0.5, "c": 0.5}


@pytest.mark.parametrize("total", [1, 21])
def test_a_total_that_no_bounds_allow_is_refused(total: int) -> None:
    message = f"{total} active weights can't be shared out: the layers take 2 to 20"
    with pytest.raises(ValueError, match=message):
        apportion({"a": 5.0, "b": 5.0}, total, {"a": 1, "b": 1}, {"a": 10, "b": 10})


@given(
    shares=st.lists(
        st.tuples(st.floats(0, 9), st.integers(0, 3), st.integers(3, 9)), min_size=1, max_size=6
    ),
    place=st.floats(0, 1),
)
def test_apportioned_numbers_sum_to_the_total_within_their_bounds(
    shares: list, place: float
) -> None:
    least, most = ({str(i): entry[which] for i, entry in enumerate(shares)} for which in (1, 2))
    low, high = sum(least.values()), sum(most.values())
    total = low + round(place * (high - low))
    counts = apportion({str(i): entry[0] for i, entry in enumerate(shares)}, total, least, most)
    assert sum(counts.values()) == total
    assert all(least[name] <= counts[name] <= most[name] for name in counts)


@settings(deadline=None, max_examples=200)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
    ),
    density=st.floats(1e-4, 1.0),
    method=st.sampled_from(sorted(DISTRIBUTIONS)),
)
def test_counts_sum_to_the_budget_each_at_least_one_and_within_one_of_its_share(
    shapes: list[tuple[int, ...]], density: float, method: str
) -> None:
    layers = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    total = sum(map(math.prod, shapes))
    assume(round(density * total) >= len(layers))
    try:
        counts = active_counts(layers, density, method)
    except ValueError as error:  # a dense first or last layer may be more than the budget
        assume("the fixed densities keep" not in str(error))
        raise
    assert sum(counts.values()) == round(density * total)
    assert all(1 <= counts[name] <= math.prod(shape) for name, shape in layers.items())

    densities = DISTRIBUTIONS[method](layers, density)
    shares = {name: share * math.prod(layers[name]) for name, share in densities.items()}
    if method in ("ER", "ERK"):
        assert sum(shares.values()) == pytest.approx(density * total, rel=1e-6)
    if min(shares.values()) >= 1.0:
        assert all(abs(counts[name] - share) <= 1.0 + 1e-6 for name, share in shares.items())


@pytest.mark.parametrize("method", DISTRIBUTIONS)
def test_density_one_is_dense_everywhere(method: str) -> None:
    sizes = {name: math.prod(shape) for name, shape in SMALL.items()}
    assert active_counts(SMALL, 1.0, method) == sizes


@pytest.mark.parametrize(
    ("shapes", "density", "method", "expected"),
    [
        # The largest remainder gets the weight that is left over.
        ({"a": (5, 2), "b": (5, 2), "c": (5, 2)}, 0.5, {"a": 0.52, "b": 0.49, "c": 0.49}, [5] * 3),
        # A layer whose share is below one, or nothing, keeps one.
        ({"tiny": (2, 2), "large": (100, 100)}, 0.01, "uniform", [1, 99]),
        ({"a": (10, 10), "b": (10, 10)}, 0.5, {"a": 0.0, "b": 1.0}, [1, 99]),
        (SMALL, 3 / 1038, "uniform", [1, 1, 1]),
    ],
)
def test_counts_by_hand(
    shapes: Shapes, density: float, method: str | dict[str, float], expected: list[int]
) -> None:
    method = method if isinstance(method, str) else lambda *_, given=method: given
    assert list(active_counts(shapes, density, method).values()) == expected


# --- functions of a user -------------------------------------------------------------------------


def test_a_function_of_shapes_and_density_is_a_method() -> None:
    seen = {}

    def mine(shapes: Shapes, density: float) -> dict[str, float]:
        seen.update(shapes=dict(shapes), density=density)
        return {"a": 0.75, "b": 0.25}

    assert active_counts({"a": (4, 4), "b": (4, 4)}, 0.5, mine) == {"a": 12, "b": 4}
    assert seen == {"shapes": {"a": (4, 4), "b": (4, 4)}, "density": 0.5}


def test_an_unknown_method_is_answered_with_the_menu() -> None:
    message = r"unknown method 'erk'; known are uniform, uniform\+, ER, ERK, ERK\+"
    with pytest.raises(ValueError, match=message):
        active_counts(SMALL, 0.5, "erk")


HALF = {"conv": 0.5, "fc1": 0.5, "fc2": 0.5}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "mine gave None; a method must give one density per layer, by name"),
        ([0.5] * 3, r"mine gave \[.*; a method must give one density per layer, by name"),
        ({"conv": 0.5, "fc1": 0.5}, r"mine must give .*; missing: \['fc2'\]; not masked: \[\]"),
        ({**HALF, "fc3": 0.5}, r"mine must give .*; missing: \[\]; not masked: \['fc3'\]"),
        *(
            ({**HALF, "fc1": bad}, f"mine gave fc1 the density {bad}; allowed is a number from 0")
            for bad in (-0.1, 1.5, math.nan, math.inf, None, "half")
        ),
        (
            uniform(SMALL, 0.3),
            r"mine keeps 311 weights, but density 0.5 of 1,038 is 519; scale",
        ),
    ],
)
def test_an_answer_that_is_no_distribution_is_refused_with_the_name_of_the_function(
    answer: object, message: str
) -> None:
    def mine(shapes: Shapes, density: float) -> object:
        return answer

    with pytest.raises(ValueError, match=message):
        active_counts(SMALL, 0.5, mine)
    if answer is None:
        with pytest.raises(ValueError, match=message):
            active_counts(SMALL, 0.5, mine, fixed={"conv": 0.5})


def test_a_budget_below_one_weight_per_layer_is_refused_with_the_numbers() -> None:
    message = r"keeps 2 of 1,038 weights, and each of 3 layers needs at least 1"
    with pytest.raises(ValueError, match=message):
        active_counts(SMALL, 0.002, "ERK")
