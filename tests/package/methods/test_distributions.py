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

REFERENCE = json.loads(
    (Path(__file__).parents[2] / "reference" / "densities_resnet50.json").read_text()
)
SHAPES = {name: tuple(shape) for name, shape in REFERENCE["shapes"].items()}
CASES = {f"{case['distribution']} {case['sparsity']}": case for case in REFERENCE["cases"]}

SMALL = {"conv": (8, 4, 3, 3), "fc1": (30, 20), "fc2": (5, 30)}

layers = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})


def test_there_are_reference_cases() -> None:
    assert {case["distribution"] for case in CASES.values()} == {"ER", "ERK"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_densities_of_resnet50(case: dict) -> None:
    densities = DISTRIBUTIONS[case["distribution"]](SHAPES, 1.0 - case["sparsity"])
    assert densities == pytest.approx(case["density"], rel=0, abs=REFERENCE["tolerance"]["density"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dense_layers_of_resnet50(case: dict) -> None:
    densities = DISTRIBUTIONS[case["distribution"]](SHAPES, 1.0 - case["sparsity"])
    assert sorted(name for name, density in densities.items() if density == 1.0) == sorted(
        case["dense_layers"]
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_active_counts_of_resnet50(case: dict) -> None:
    """At the budget of the reference, which rounds up in every layer: 26 weights above `round(density * total)`."""
    expected = {
        name: density * math.prod(SHAPES[name]) for name, density in case["density"].items()
    }
    counts = active_counts(
        SHAPES, sum(expected.values()) / REFERENCE["n_weights"], case["distribution"]
    )
    assert counts == pytest.approx(
        expected, rel=0, abs=2
    )  # the tolerance of the reference: within 2 per layer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_total_of_resnet50(case: dict) -> None:
    counts = active_counts(SHAPES, 1.0 - case["sparsity"], case["distribution"])
    assert sum(counts.values()) == round((1.0 - case["sparsity"]) * REFERENCE["n_weights"])


def test_uniform_is_the_same_everywhere() -> None:
    assert uniform(SMALL, 0.3) == {"conv": 0.3, "fc1": 0.3, "fc2": 0.3}


def test_er_ignores_the_kernel() -> None:
    densities = er({"conv": (8, 4, 3, 3), "fc": (8, 4)}, 0.1)
    assert densities["conv"] == pytest.approx(densities["fc"])


def test_erk_counts_the_kernel() -> None:
    densities = erk({"conv": (8, 4, 3, 3), "fc": (40, 20)}, 0.1)
    assert densities["conv"] / densities["fc"] == pytest.approx((18 / 288) / (60 / 800))


def test_erk_to_the_power_of_zero_is_uniform_and_to_half_in_between() -> None:
    """Raw densities of (8, 8) and (2, 8): 1/4 and 5/8; their roots 1/2 and sqrt(5/8)."""
    shapes = {"a": (8, 8), "b": (2, 8)}
    assert erk(shapes, 0.2, power=0.0) == pytest.approx({"a": 0.2, "b": 0.2})
    ratio = {power: (d := erk(shapes, 0.2, power=power))["b"] / d["a"] for power in (0.5, 1.0)}
    assert ratio == pytest.approx({0.5: math.sqrt(2.5), 1.0: 2.5})


def test_uniform_plus_keeps_the_first_layer_dense_and_a_fifth_of_the_last() -> None:
    """Of 1,000 weights 150: 20 in the first, 0.2 * 80 in the last, and the 114 left are 114/900 of the middle."""
    shapes = {"first": (2, 10), "middle": (30, 30), "last": (8, 10)}
    assert uniform_plus(shapes, 0.15) == pytest.approx(
        {"first": 1.0, "middle": 114 / 900, "last": 0.2}
    )


def test_uniform_plus_leaves_a_last_layer_that_is_denser_alone() -> None:
    shapes = {"first": (2, 10), "middle": (30, 30), "last": (8, 10)}
    assert uniform_plus(shapes, 0.5) == pytest.approx(
        {"first": 1.0, "middle": 480 / 980, "last": 480 / 980}
    )


def test_erk_plus_is_erk_of_the_others_beside_a_dense_last_layer() -> None:
    """Of 1,000 weights 200: 40 in the last; the 160 left are 1/6 of the others."""
    shapes = {"a": (30, 20), "b": (12, 30), "last": (4, 10)}
    expected = {**erk({"a": (30, 20), "b": (12, 30)}, 1 / 6), "last": 1.0}
    assert erk_plus(shapes, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("method", [uniform_plus, erk_plus])
def test_one_layer_alone_gets_the_budget(method: Callable) -> None:
    assert method({"only": (10, 10)}, 0.3) == pytest.approx({"only": 0.3})


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
    with pytest.raises(
        ValueError, match=rf"the fixed densities keep {kept} weights, and the budget is 20 of 200"
    ):
        active_counts({"a": (10, 10), "b": (10, 10)}, 0.1, with_fixed(fixed, uniform))


def test_a_fixed_density_is_kept_exactly_where_tiny_layers_round_up() -> None:
    shapes = {"big": (100, 100), **{str(i): (2, 2) for i in range(6)}, "head": (10, 10)}
    counts = active_counts(shapes, 0.03, "uniform", fixed={"head": 1.0})
    assert counts == {
        "big": 198,
        **{str(i): 1 for i in range(6)},
        "head": 100,
    }  # round(0.03 * 10,124) is 304


def test_fixing_a_layer_does_not_make_another_one_the_first_or_the_last() -> None:
    shapes = {"first": (10, 10), "middle": (20, 20), "last": (4, 10)}
    densities = with_fixed({"last": 1.0}, erk_plus)(shapes, 0.5)
    assert densities == erk_plus(shapes, 0.5)
    densities = with_fixed({"last": 0.1}, uniform_plus)(shapes, 0.5)
    assert densities["first"] == 1.0
    assert densities["last"] == 0.1
    assert densities["middle"] == pytest.approx((270 - 100 - 4) / 400)
    densities = with_fixed({"first": 0.5}, uniform_plus)(shapes, 0.5)
    assert densities == pytest.approx({"first": 0.5, "middle": 0.5, "last": 0.5})


def test_a_function_that_gives_no_densities_is_named_also_where_some_are_fixed() -> None:
    def forgetful(shapes: Mapping, density: float) -> None:
        return None

    with pytest.raises(
        ValueError, match="forgetful gave None; a method must give one density per layer"
    ):
        active_counts(SMALL, 0.5, forgetful, fixed={"conv": 0.5})


def test_where_only_layers_without_a_say_have_room_left_they_share_by_it() -> None:
    assert scaled({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 10, "b": 30, "c": 10}, 30) == {
        "a": 1.0,
        "b": 0.5,
        "c": 0.5,
    }


@pytest.mark.parametrize("total", [1, 21])
def test_a_total_that_no_bounds_allow_is_refused(total: int) -> None:
    with pytest.raises(
        ValueError, match=f"{total} active weights can't be shared out: the layers take 2 to 20"
    ):
        apportion({"a": 5.0, "b": 5.0}, total, {"a": 1, "b": 1}, {"a": 10, "b": 10})


def test_all_layers_fixed_at_the_budget_are_no_error() -> None:
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert active_counts(shapes, 0.2, with_fixed({"a": 0.3, "b": 0.1}, erk)) == {"a": 30, "b": 10}


def test_scaled_fills_what_would_overflow_and_shares_the_rest() -> None:
    """14 of 20 places at 1 : 3 would be 3.5 and 10.5: b is full, and a gets the 4 left."""
    assert scaled({"a": 1.0, "b": 3.0}, {"a": 10, "b": 10}, 14) == pytest.approx(
        {"a": 0.4, "b": 1.0}
    )


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


@pytest.mark.parametrize("method", DISTRIBUTIONS)
def test_density_one_is_dense_everywhere(method: str) -> None:
    assert active_counts(SMALL, 1.0, method) == {
        name: math.prod(shape) for name, shape in SMALL.items()
    }


def counts_or_skip(
    shapes: dict[str, tuple[int, ...]], density: float, method: str
) -> dict[str, int]:
    """Where a dense first or last layer is more than the budget, there are none."""
    try:
        return active_counts(shapes, density, method)
    except ValueError as error:
        assume("the fixed densities keep" not in str(error))
        raise


@settings(deadline=None, max_examples=200)
@given(shapes=layers, density=st.floats(1e-4, 1.0), method=st.sampled_from(sorted(DISTRIBUTIONS)))
def test_total_is_exact(shapes: dict[str, tuple[int, ...]], density: float, method: str) -> None:
    total = round(density * sum(map(math.prod, shapes.values())))
    assume(total >= len(shapes))
    assert sum(counts_or_skip(shapes, density, method).values()) == total


@settings(deadline=None, max_examples=200)
@given(shapes=layers, density=st.floats(1e-4, 1.0), method=st.sampled_from(sorted(DISTRIBUTIONS)))
def test_every_layer_keeps_at_least_one_and_at_most_all(
    shapes: dict[str, tuple[int, ...]], density: float, method: str
) -> None:
    assume(round(density * sum(map(math.prod, shapes.values()))) >= len(shapes))
    counts = counts_or_skip(shapes, density, method)
    assert all(1 <= counts[name] <= math.prod(shape) for name, shape in shapes.items())


@settings(deadline=None, max_examples=200)
@given(shapes=layers, density=st.floats(1e-3, 1.0), method=st.sampled_from(sorted(DISTRIBUTIONS)))
def test_every_layer_is_within_one_of_its_share(
    shapes: dict[str, tuple[int, ...]], density: float, method: str
) -> None:
    assume(round(density * sum(map(math.prod, shapes.values()))) >= len(shapes))
    counts = counts_or_skip(shapes, density, method)
    shares = {
        name: share * math.prod(shapes[name])
        for name, share in DISTRIBUTIONS[method](shapes, density).items()
    }
    assume(min(shares.values()) >= 1.0)
    assert all(abs(counts[name] - share) <= 1.0 + 1e-6 for name, share in shares.items())


@settings(deadline=None, max_examples=100)
@given(shapes=layers, density=st.floats(1e-3, 1.0), method=st.sampled_from(["ER", "ERK"]))
def test_densities_meet_the_budget(
    shapes: dict[str, tuple[int, ...]], density: float, method: str
) -> None:
    densities = DISTRIBUTIONS[method](shapes, density)
    kept = sum(densities[name] * math.prod(shape) for name, shape in shapes.items())
    assert kept == pytest.approx(density * sum(map(math.prod, shapes.values())), rel=1e-6)


def test_largest_remainder_gets_the_odd_weight() -> None:
    counts = active_counts(
        {"a": (10,), "b": (10,), "c": (10,)}, 0.5, lambda *_: {"a": 0.52, "b": 0.49, "c": 0.49}
    )
    assert counts == {"a": 5, "b": 5, "c": 5}


def test_a_layer_whose_share_is_below_one_keeps_one() -> None:
    assert active_counts({"tiny": (2, 2), "large": (100, 100)}, 0.01, "uniform") == {
        "tiny": 1,
        "large": 99,
    }


def test_a_layer_of_share_zero_keeps_one() -> None:
    counts = active_counts({"a": (10, 10), "b": (10, 10)}, 0.5, lambda *_: {"a": 0.0, "b": 1.0})
    assert counts == {"a": 1, "b": 99}


def test_a_function_of_shapes_and_density_is_a_method() -> None:
    seen = {}

    def mine(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
        seen.update(shapes=dict(shapes), density=density)
        return {"a": 0.75, "b": 0.25}

    assert active_counts({"a": (4, 4), "b": (4, 4)}, 0.5, mine) == {"a": 12, "b": 4}
    assert seen == {"shapes": {"a": (4, 4), "b": (4, 4)}, "density": 0.5}


def test_an_unknown_method_is_answered_with_the_menu() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'erk'; known are uniform, uniform\+, ER, ERK, ERK\+"
    ):
        active_counts(SMALL, 0.5, "erk")


@pytest.mark.parametrize("answer", [None, 0.5, [0.5, 0.5, 0.5]])
def test_what_is_no_mapping_is_refused_with_the_name_of_the_function(answer: object) -> None:
    def mine(shapes: Mapping[str, tuple[int, ...]], density: float) -> object:
        return answer

    with pytest.raises(
        ValueError, match=r"mine gave .*; a method must give one density per layer, by name"
    ):
        active_counts(SMALL, 0.5, mine)


def test_a_missing_layer_is_named() -> None:
    def mine(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
        return {"conv": 0.5, "fc1": 0.5}

    with pytest.raises(
        ValueError,
        match=r"mine must give one density per layer; missing: \['fc2'\]; not masked: \[\]",
    ):
        active_counts(SMALL, 0.5, mine)


def test_an_extra_layer_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"one density per layer; missing: \[\]; not masked: \['fc3'\]"
    ):
        active_counts(SMALL, 0.5, lambda shapes, density: {**uniform(shapes, density), "fc3": 0.5})


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan, math.inf, None, "half"])
def test_a_density_out_of_range_is_named(bad: object) -> None:
    def mine(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, object]:
        return {**uniform(shapes, density), "fc1": bad}

    with pytest.raises(
        ValueError, match=f"mine gave fc1 the density {bad}; allowed is a number from 0 to 1"
    ):
        active_counts(SMALL, 0.5, mine)


def test_densities_that_miss_the_budget_are_refused_with_the_numbers() -> None:
    def mine(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
        return uniform(shapes, 0.3)

    with pytest.raises(
        ValueError, match=r"mine keeps 311 weights, but density 0.5 of 1,038 is 519; scale"
    ):
        active_counts(SMALL, 0.5, mine)


def test_a_budget_below_one_weight_per_layer_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"keeps 2 of 1,038 weights, and each of 3 layers needs at least 1"
    ):
        active_counts(SMALL, 0.002, "ERK")


def test_a_budget_of_exactly_one_weight_per_layer_is_met() -> None:
    assert active_counts(SMALL, 3 / 1038, "uniform") == {"conv": 1, "fc1": 1, "fc2": 1}
