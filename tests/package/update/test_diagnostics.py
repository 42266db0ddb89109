"""What is odd about a layer at an update is told with its name, what was seen and what to do; all else is silence."""

import linecache
from collections.abc import Collection

import pytest
from helpers.toys import mlp

import itop_prune
from itop_prune.distributed import State
from itop_prune.update.diagnostics import Notices, odd_layers

OUTPUTS = {"0.weight": 16, "2.weight": 12, "4.weight": 4}


def odd(
    *,
    without_gradient: Collection[str] = (),
    silent: Collection[str] = (),
    active: dict[str, int] | None = None,
    any_gradient: bool = True,
    listened: bool = True,
    missed: Collection[str] = (),
    absent: Collection[str] = (),
    ends: bool = False,
) -> dict[str, str]:
    """Return messages by key at step 7, of an `mlp` with as many active weights as outputs but for what is given."""
    has_gradient = {name: name not in absent for name in OUTPUTS}
    state = State(True, any_gradient, has_gradient, list(silent), OUTPUTS | (active or {}))
    found = list(
        odd_layers(state, itop_prune.apply(mlp(), 0.5), without_gradient, missed, listened, 7, ends)
    )
    messages = dict(found)
    assert len(messages) == len(found)
    return messages


def test_of_layers_with_gradients_and_a_weight_for_every_output_nothing_is_said() -> None:
    assert odd() == {}


def test_layers_without_a_gradient_are_told_by_name_with_how_to_mask_another() -> None:
    messages = odd(without_gradient=["4.weight", "0.weight"])
    assert list(messages) == ["0.weight", "4.weight"]
    for name, message in messages.items():
        assert message.startswith(
            f"{name} got no gradient since the last update: is its layer still used by the model"
        )
        assert "apply(model, ..., include=[...])" in message
        assert message.endswith("build optimizer and MaskScheduler anew with find_masks(model)")


def test_layers_that_several_updates_missed_are_told_of_together() -> None:
    (message,) = odd(missed=["0.weight", "4.weight"]).values()
    assert message.startswith(
        "0.weight, 4.weight got no gradient at step 7 and the updates before it, though between"
    )
    assert "(experts, heads), choose `every`" in message
    assert list(odd(missed=["0.weight"], without_gradient=["0.weight"])) == ["0.weight"]


def test_what_is_so_in_a_row_is_counted() -> None:
    notices = Notices()
    assert [notices.in_a_row("key", now) for now in (True, True, False, True)] == [1, 2, 0, 1]
    assert notices.in_a_row("other", now=True) == 1


def test_a_final_density_that_a_layer_can_not_reach_is_told() -> None:
    messages = odd(absent=["2.weight"], without_gradient=["2.weight"], ends=True)
    assert list(messages) == ["2.weight", "final"]
    assert messages["final"].startswith(
        "the final sparsity is missed: these got no gradient at the last update, step 7"
    )
    assert "are: 2.weight. Choose `every`, `stop` and total_steps" in messages["final"]
    assert odd(ends=True) == {}


def test_a_dense_gradient_of_zero_is_told_with_the_step_and_what_may_be_the_cause() -> None:
    messages = odd(silent=["2.weight"])
    assert list(messages) == ["silent 2.weight"]
    message = messages["silent 2.weight"]
    assert message.startswith(
        "the dense gradient of 2.weight is 0 everywhere at step 7, so growth there is by chance"
    )
    assert "a layer near it so sparse that nothing passes, or a scale behind it still 0?" in message


@pytest.mark.parametrize("given", [{"listened": False}, {"any_gradient": False}])
def test_zeros_are_not_told_where_no_dense_gradient_was_asked_for_or_no_layer_got_any(
    given: dict[str, bool],
) -> None:
    assert odd(silent=["2.weight"], **given) == {}


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_active_weight_less_than_outputs_is_told_with_both_counts_and_what_to_do(
    name: str,
) -> None:
    messages = odd(active={name: OUTPUTS[name] - 1})
    assert list(messages) == [f"few {name}"]
    message = messages[f"few {name}"]
    assert message.startswith(
        f"{name} has fewer active weights than outputs, {OUTPUTS[name] - 1} and {OUTPUTS[name]}"
    )
    assert message.endswith(
        "lower the sparsity, or take a method that gives small layers more (ERK)"
    )


def test_a_layer_that_is_odd_in_every_way_is_told_of_under_three_keys() -> None:
    messages = odd(without_gradient=["0.weight"], silent=["0.weight"], active={"0.weight": 0})
    assert list(messages) == ["0.weight", "silent 0.weight", "few 0.weight"]


def step(notices: Notices) -> None:
    """Give notices as a method does that a user has called."""
    notices.give()


def test_a_notice_waits_and_is_given_once_where_the_user_called() -> None:
    notices = Notices()
    notices.add("key", "the first")
    notices.add("key", "of the same key")
    notices.add("other", "the second")
    with pytest.warns(UserWarning, match="the ") as given:
        step(notices)
    assert [str(one.message) for one in given] == ["the first", "the second"]
    assert {one.filename for one in given} == {__file__}
    assert {linecache.getline(one.filename, one.lineno).strip() for one in given} == {
        "step(notices)"
    }
    notices.add("key", "the first again")
    step(notices)  # warnings are errors here


def test_where_warnings_are_errors_the_next_one_is_not_lost() -> None:
    notices = Notices()
    notices.add("a", "the first")
    notices.add("b", "the second")
    for message in ("the first", "the second"):
        with pytest.raises(UserWarning, match=message):
            step(notices)
    step(notices)


def test_other_ranks_than_the_first_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itop_prune.update.diagnostics.is_first", lambda: False)
    notices = Notices()
    notices.add("key", "a message")
    step(notices)
