"""The sections of a recipe against the calls they are for: signatures first, then the calls themselves, made small."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm
import torch
from itop_prune_tools.config.sections import section_problems
from itop_prune_tools.models import registration as models  # noqa: F401  (registers lenet300)


def open_stub(
    name: Literal["digits", "npz"],
    *,
    batch_size: int,
    device: str = "",
    seed: int = 0,
    augment: Any = None,
):  # type: ignore[no-untyped-def]
    """Stands for the runner's function that opens data."""


def crop(padding: int = 0, input_size: int = 8, is_training: bool = True) -> None:
    """Stands for what an augmentation is made by."""


def problems_of(**sections: Any) -> list[str]:
    return section_problems(sections, open_stub, lambda data: crop)


MODEL = {"model_name": "lenet300", "img_size": 8}


def test_sections_that_fit_have_no_problems() -> None:
    assert (
        problems_of(
            model=MODEL,
            data={"name": "digits", "batch_size": 32},
            augment={"padding": 1},
            optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
            lr_schedule={"sched": "cosine", "warmup_epochs": 1},
            masks={"sparsity": 0.9, "method": "ERK", "exclude": ["head"]},
            regrow={"every": 10, "grow": "gradient"},
            loss={"smoothing": 0.1},
            mixup={"mixup_alpha": 0.8},
            ema={"decay": 0.99},
            accelerator={"mixed_precision": "no"},
            checkpoint={"every": 2, "keep": 1},
        )
        == []
    )


def test_sections_left_out_or_null_are_not_checked() -> None:
    assert problems_of(model=MODEL, masks=None, regrow=None) == []


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("data", "device"),
        ("data", "seed"),
        ("data", "augment"),
        ("augment", "input_size"),
        ("augment", "is_training"),
        ("optimizer", "model_or_params"),
        ("lr_schedule", "optimizer"),
        ("lr_schedule", "num_epochs"),
        ("lr_schedule", "updates_per_epoch"),
        ("masks", "model"),
        ("regrow", "masks"),
        ("regrow", "optimizer"),
        ("regrow", "total_steps"),
        ("mixup", "num_classes"),
        ("ema", "model"),
    ],
)
def test_what_the_runner_gives_is_not_for_recipes(section: str, key: str) -> None:
    fit = {
        "data": {"name": "digits", "batch_size": 1},
        "masks": {"sparsity": 0.5},
        "regrow": {"every": 1},
    }
    assert problems_of(**{section: {**fit.get(section, {}), key: 3}}) == [
        f"{section}.{key}: given by the runner itself"
    ]


def test_a_key_that_a_model_with_open_keywords_does_not_take_is_found() -> None:
    (problem,) = problems_of(model={**MODEL, "foo": 1})
    assert problem.startswith("model: ")
    assert "'foo'" in problem


def test_a_key_that_an_optimizer_with_open_keywords_does_not_take_is_found() -> None:
    (problem,) = problems_of(optimizer={"opt": "adamw", "lr": 0.1, "nestrov": True})
    assert problem.startswith("optimizer: ")
    assert "'nestrov'" in problem


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    assert problems_of(model={"model_name": "lenet30"}) == [
        "model: timm knows no 'lenet30' (nearest: 'lenet300')"
    ]


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    assert problems_of(optimizer={"opt": "adopit"}) == [
        "optimizer: timm knows no opt 'adopit' (nearest: 'adopt')"
    ]


def test_an_unknown_learning_rate_schedule_is_found() -> None:
    (problem,) = problems_of(lr_schedule={"sched": "mutlistep", "decay_milestones": [1]})
    assert problem.startswith("lr_schedule: ")
    assert "'mutlistep'" in problem


def test_a_schedule_that_depends_on_the_past_is_refused() -> None:
    found = [
        "lr_schedule: sched plateau depends on the past and could not be resumed; take another"
    ]
    assert problems_of(lr_schedule={"sched": "plateau"}) == found


def test_an_unknown_precision_is_answered_with_the_known() -> None:
    (problem,) = problems_of(accelerator={"mixed_precision": "bf17"})
    assert problem.startswith("accelerator: unknown mixed_precision 'bf17'; known are 'no', ")
    assert problem.endswith(" (nearest: 'bf16')")


def test_no_precision_in_yaml_wants_quotes() -> None:
    (problem,) = problems_of(accelerator={"mixed_precision": False})
    assert problem.endswith('; write "no" in quotes, YAML reads it as false')


def test_a_schedule_of_none_is_a_choice() -> None:
    assert problems_of(lr_schedule={"sched": "none"}) == []


def test_a_pattern_that_matches_nothing_names_itself_and_the_weights() -> None:
    (problem,) = problems_of(model=MODEL, masks={"sparsity": 0.5, "exclude": ["classifier"]})
    assert problem == (
        "masks: exclude pattern 'classifier' matches no weight; "
        "the weights are: layers.0.weight, layers.1.weight, head.weight"
    )


def test_patterns_are_not_judged_against_a_model_that_can_not_be_made() -> None:
    (problem,) = problems_of(
        model={"model_name": "lenet30"}, masks={"sparsity": 0.5, "exclude": ["head"]}
    )
    assert problem.startswith("model: ")


def test_wrong_values_of_masks_and_regrow_are_reported_together() -> None:
    masks, regrow = problems_of(
        model=MODEL, masks={"sparsity": 1.5}, regrow={"every": 5, "grow": "gradeint"}
    )
    assert masks.startswith("masks: sparsity is 1.5; allowed is a number in [0, 1)")
    assert regrow.startswith("regrow: unknown grow 'gradeint'; known are random, gradient, ")
    assert regrow.endswith("(nearest: 'gradient')")


def test_a_pattern_of_masks_is_checked_against_the_model_and_with_what_moves_them() -> None:
    masks = {"sparsity": 0.5, "method": "2:4"}
    assert (
        problems_of(
            model=MODEL, masks=masks, regrow={"every": 5, "grow": "gradient", "scope": "global"}
        )
        == []
    )
    (problem,) = problems_of(
        model=MODEL, masks=masks, regrow={"every": 5, "redistribute": "momentum"}
    )
    assert problem.startswith(
        "regrow: weight keeps 2 of every 4 weights, and redistribute and final_sparsity"
    )
    (problem,) = problems_of(model=MODEL, masks={"sparsity": 0.9, "method": "1:4"})
    assert problem.startswith(
        "masks: sparsity is 0.9, and the pattern 1:4 keeps 1 of 4; allowed is 0.75"
    )
    (problem,) = problems_of(model=MODEL, masks={"sparsity": 0.5, "method": 124})
    assert problem.startswith("masks: method is 124, a number")
    resnet = {"model_name": "resnet18"}
    assert problems_of(model=resnet, masks=masks) == []  # its first convolution is left out
    (problem,) = problems_of(model=resnet, masks={**masks, "strict": True})
    assert problem.startswith("masks: the pattern 2:4 does not divide")


def test_a_pattern_is_not_judged_against_a_model_that_can_not_be_made() -> None:
    (problem,) = problems_of(
        model={"model_name": "lenet30"}, masks={"sparsity": 4 / 7, "method": "3:7"}
    )
    assert problem.startswith("model: ")


def test_a_mix_can_be_said_in_a_recipe_and_is_checked() -> None:
    assert problems_of(regrow={"every": 5, "grow": "gradient+random"}) == []
    (problem,) = problems_of(regrow={"every": 5, "grow": "gradient+randm"})
    assert problem.startswith("regrow: unknown grow 'randm'; known are random, gradient, ")


def test_one_wrong_value_of_regrow_does_not_hide_the_others() -> None:
    problems = problems_of(
        regrow={"every": 0, "rate": 2.0, "grow": "gradeint", "prune": "magnitud", "schedule": "cos"}
    )
    found = [
        word
        for word in ("every", "rate", "'gradeint'", "'magnitud'", "'cos'")
        if word in " ".join(problems)
    ]
    assert found == ["every", "rate", "'gradeint'", "'magnitud'", "'cos'"]
    assert len(problems) == 5


def test_one_wrong_value_of_masks_does_not_hide_the_others() -> None:
    problems = problems_of(
        model=MODEL, masks={"sparsity": 1.5, "method": "EKR", "scores": "radnom"}
    )
    assert len(problems) == 3
    assert all(problem.startswith("masks: ") for problem in problems)


def test_a_misspelt_key_does_not_hide_a_wrong_value_beside_it() -> None:
    problems = problems_of(model=MODEL, masks={"sparsity": 1.5, "methd": "ERK"})
    assert [problem.partition(" ")[0] for problem in problems] == ["masks.methd:", "masks:"]


def test_the_model_is_tried_without_memory_and_without_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    create = timm.create_model

    def spy(model_name: str, **arguments: Any) -> torch.nn.Module:
        model = create(model_name, **arguments)
        made.append((arguments["pretrained"], {p.device.type for p in model.parameters()}))
        return model

    monkeypatch.setattr(timm, "create_model", spy)
    assert problems_of(model={"model_name": "resnet18", "pretrained": True}) == []
    assert made == [(False, {"meta"})]


def test_an_unknown_key_of_checkpoint_is_answered_with_the_nearest() -> None:
    assert problems_of(checkpoint={"evry": 2}) == [
        "checkpoint.evry: unknown key; known are every, keep (nearest: 'every')"
    ]


def test_augment_is_checked_against_what_suits_the_data() -> None:
    asked = []

    def choose(data: dict[str, Any]) -> Callable[..., Any]:
        asked.append(data)
        return crop

    data = {"name": "npz", "batch_size": 2}
    assert section_problems({"data": data, "augment": {"pading": 1}}, open_stub, choose) == [
        "augment.pading: unknown key; known are padding (nearest: 'padding')"
    ]
    assert asked == [data]
