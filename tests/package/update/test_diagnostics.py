"""Warnings at an update: by name, with what was seen and what to do, once, and after the step."""

import linecache
from collections.abc import Collection

import pytest
from helpers.toys import mlp

import itop_prune
from itop_prune.distributed import UpdateInputs
from itop_prune.update.diagnostics import PendingWarnings, layer_warnings

OUTPUTS = {"0.weight": 16, "2.weight": 12, "4.weight": 4}


def messages(
    *,
    without_gradient: Collection[str] = (),
    often_missed: Collection[str] = (),
    zero: Collection[str] = (),
    absent: Collection[str] = (),
    active: dict[str, int] | None = None,
    any_gradient: bool = True,
    needs_dense: bool = True,
    last_update: bool = False,
    across_layers: bool = False,
) -> dict[str, str]:
    """Messages by key at step 7; without arguments each layer has a weight for every output."""
    has_gradient = {name: name not in absent for name in OUTPUTS}
    inputs = UpdateInputs(True, any_gradient, has_gradient, list(zero), OUTPUTS | (active or {}))
    masks = itop_prune.apply(mlp(), 0.5)
    given = (inputs, masks, without_gradient, often_missed, needs_dense, 7, last_update)
    pairs = list(layer_warnings(*given, across_layers))
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def test_nothing_is_said_of_layers_with_gradients_and_a_weight_for_every_output() -> None:
    assert messages() == {}


def test_layers_without_a_gradient_are_named_with_how_to_mask_another() -> None:
    found = messages(without_gradient=["4.weight", "0.weight"])
    assert list(found) == ["0.weight", "4.weight"]
    for name, message in found.items():
        assert message.startswith(
            f"{name} got no gradient since the last update: is its layer still used by the model"
        )
        assert "apply(model, ..., include=[...])" in message
        assert message.endswith("build optimizer and MaskScheduler anew with find_masks(model)")


def test_layers_that_several_updates_missed_are_named_together() -> None:
    (message,) = messages(often_missed=["0.weight", "4.weight"]).values()
    assert message.startswith(
        "0.weight, 4.weight got no gradient at step 7 and the updates before it, though between"
    )
    assert "(experts, heads), choose `every`" in message
    both = {"often_missed": ["0.weight"], "without_gradient": ["0.weight"]}
    assert list(messages(**both)) == ["0.weight"]


def test_a_final_density_that_a_layer_can_not_reach_is_reported() -> None:
    found = messages(absent=["2.weight"], last_update=True)
    assert list(found) == ["final"]
    assert found["final"].startswith(
        "the final sparsity is missed: these got no gradient at the last update, step 7"
    )
    assert "stay as they are: 2.weight. Choose `every`, `stop` and total_steps" in found["final"]
    assert messages(last_update=True) == messages(absent=["2.weight"]) == {}


def test_a_dense_gradient_of_zero_is_reported_if_growth_needs_it_and_others_have_one() -> None:
    (message,) = messages(zero=["2.weight"]).values()
    assert message.startswith(
        "the dense gradient of 2.weight is 0 everywhere at step 7, so growth there is by chance"
    )
    assert "a layer near it so sparse that nothing passes, or a scale behind it still 0?" in message
    assert messages(zero=["2.weight"], needs_dense=False) == {}
    assert messages(zero=["2.weight"], any_gradient=False) == {}


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_active_weight_less_than_outputs_is_reported_with_both_counts(name: str) -> None:
    (message,) = messages(active={name: OUTPUTS[name] - 1}).values()
    assert message.startswith(
        f"{name} has fewer active weights than outputs, {OUTPUTS[name] - 1} and {OUTPUTS[name]}"
    )
    assert message.endswith(
        "lower the sparsity, or take a method that gives small layers more (ERK)"
    )
    (message,) = messages(active={name: OUTPUTS[name] - 1}, across_layers=True).values()
    assert message.endswith("or set the floor of MaskScheduler, the least density of a layer")


def test_the_problems_of_one_layer_have_keys_of_their_own() -> None:
    everything = {"without_gradient": ["0.weight"], "zero": ["0.weight"]}
    assert len(messages(**everything, active={"0.weight": 0})) == 3


def test_updates_in_a_row_are_counted_and_three_are_often() -> None:
    pending = PendingWarnings()
    assert [pending.streak("key", now) for now in (True, True, False, True)] == [1, 2, 0, 1]
    assert pending.streak("other", happened=True) == 1
    missed = [{"a": False, "b": i % 2 == 0} for i in range(4)]
    assert [pending.often_without_gradient(has) for has in missed] == [[], [], ["a"], ["a"]]


def step(pending: PendingWarnings) -> None:
    """Issue warnings as a method does that a user has called."""
    pending.issue()


def test_a_warning_waits_and_is_issued_once_at_the_line_of_the_user() -> None:
    pending = PendingWarnings()
    pending.add("key", "the first")
    pending.add("key", "of the same key")
    pending.add("other", "the second")
    with pytest.warns(UserWarning, match="the ") as issued:
        step(pending)
    assert [str(one.message) for one in issued] == ["the first", "the second"]
    for one in issued:
        assert one.filename == __file__
        assert linecache.getline(one.filename, one.lineno).strip() == "step(pending)"

    pending.add("key", "the first again")
    step(pending)  # warnings are errors here


def test_a_warning_turned_into_an_error_does_not_lose_the_next_one() -> None:
    pending = PendingWarnings()
    pending.add("a", "the first")
    pending.add("b", "the second")
    for message in ("the first", "the second"):
        with pytest.raises(UserWarning, match=message):
            step(pending)
    step(pending)


def test_other_ranks_than_the_first_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itop_prune.update.diagnostics.is_first", lambda: False)
    pending = PendingWarnings()
    pending.add("key", "a message")
    step(pending)
