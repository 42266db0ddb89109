"""Sections of a recipe against their calls: signatures first, then small calls."""

from typing import Any

import pytest
import timm
import torch
from itop_prune_tools.config.sections import section_problems
from itop_prune_tools.models import registration as models  # noqa: F401  (registers lenet300)


def problems_of(**sections: Any) -> list[str]:
    return section_problems(sections)


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
    sections = {section: {**fit.get(section, {}), key: 3}}
    if section == "augment":
        sections["data"] = {"name": "folder", "batch_size": 1}
    assert problems_of(**sections) == [f"{section}.{key}: given by the runner itself"]


@pytest.mark.parametrize(
    ("section", "arguments"),
    [("model", MODEL), ("optimizer", {"opt": "adamw", "lr": 0.1})],
)
def test_a_key_that_a_call_with_open_keywords_does_not_take_is_found(
    section: str, arguments: dict[str, Any]
) -> None:
    (problem,) = problems_of(**{section: {**arguments, "foo": 1}})
    assert problem.startswith(f"{section}.foo: unknown key; known are ")


RESNET = {"model_name": "resnet18", "pretraned": True, "num_classes": "three", "output_stride": "x"}


@pytest.mark.parametrize(
    ("section", "arguments", "beginnings"),
    [
        ("model", RESNET, ("num_classes: is 'three'; allowed", "pretraned: unk", "output_stride:")),
        (
            "model",
            {**MODEL, "img_size": "big", "drop_rate": 0.1},
            ("img_size: is", "drop_rate: un"),
        ),
        ("model", {"model_name": "vovnet39a", "pretraned": True}, ("pretraned: unknown key",)),
        ("optimizer", {"opt": "adamw", "lrr": 1, "betas": 1}, ("lrr: unknown", "betas: is 1")),
    ],
    ids=["resnet18", "lenet300", "vovnet39a", "adamw"],
)
def test_one_wrong_argument_behind_open_keywords_does_not_hide_the_others(
    section: str, arguments: dict[str, Any], beginnings: tuple[str, ...]
) -> None:
    problems = problems_of(**{section: arguments})
    assert len(problems) == len(beginnings), problems
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(f"{section}.{beginning}")


@pytest.mark.parametrize("key", ["num_classes", "in_chans", "drop_rate", "drop_path_rate"])
def test_what_every_model_takes_has_a_type_even_where_building_does_not_use_it(key: str) -> None:
    (problem,) = problems_of(model={"model_name": "resnet18", key: "x"})
    assert problem.startswith(f"model.{key}: is 'x'; allowed is a ")
    assert problems_of(model={"model_name": "resnet18", key: None}) == []


def test_an_argument_that_needs_another_is_not_blamed_for_a_mistake_beside_it() -> None:
    features = {"model_name": "resnet18", "out_indices": [1], "features_only": True}
    assert problems_of(model=features) == []
    (problem,) = problems_of(model={**features, "pretraned": True})
    assert problem.startswith("model.pretraned: unknown key")


def test_arguments_that_need_each_other_are_not_blamed_for_a_mistake_beside_them() -> None:
    regrow = {"every": 3, "density": {"power": 1.5}, "final_sparsity": 0.98}
    assert problems_of(masks={"sparsity": 0.9}, regrow=regrow) == []
    problems = problems_of(masks={"sparsity": 0.9}, regrow={**regrow, "gradient_steps": 5})
    assert problems
    assert all(problem.startswith("regrow: gradient_steps is 5") for problem in problems)


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    assert problems_of(model={"model_name": "lenet30"}) == [
        "model: timm knows no 'lenet30' (nearest: 'lenet300')"
    ]


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    assert problems_of(optimizer={"opt": "adopit"}) == [
        "optimizer: timm knows no opt 'adopit' (nearest: 'adopt')"
    ]


def test_an_unknown_learning_rate_schedule_is_answered_with_the_choices() -> None:
    (problem,) = problems_of(lr_schedule={"sched": "cosin"})
    choices, _, nearest = problem.partition("known are ")[2].partition(" (")
    assert problem.startswith("lr_schedule: timm knows no sched 'cosin'; known are cosine, ")
    assert nearest == "nearest: 'cosine')"
    for sched in choices.split(", "):
        section = {"sched": sched, "decay_epochs": 1, "stable_timescale": 1}
        assert problems_of(lr_schedule=section) == []


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


def test_wrong_values_of_masks_and_regrow_are_reported_together() -> None:
    masks, regrow = problems_of(
        model=MODEL, masks={"sparsity": 1.5}, regrow={"every": 5, "grow": "gradeint"}
    )
    assert masks.startswith("masks: sparsity is 1.5; allowed is a number in [0, 1)")
    assert regrow.startswith("regrow: unknown grow 'gradeint'; known are random, gradient, ")
    assert regrow.endswith("(nearest: 'gradient')")


PATTERN = {"sparsity": 0.5, "pattern": "2:4"}


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ({"sparsity": 0.9, "pattern": "1:4"}, "masks: sparsity is 0.9, and the pattern 1:4 keeps"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "masks: pattern is '4:2'; allowed is text N:M"),
        ({"sparsity": 0.5, "method": "2:4"}, "masks: method is '2:4'; a pattern N:M has an argum"),
        ({**PATTERN, "method": "snip"}, "masks: method is 'snip', and the pattern 2:4 gives"),
        ({**PATTERN, "method": "magnitude"}, "masks: method is 'magnitude', and the pattern"),
        ({**PATTERN, "pattern": 124}, "masks.pattern: is 124; allowed is text or null"),
        ({**PATTERN, "scores": "radnom"}, "masks: unknown scores 'radnom'; known are random, mag"),
    ],
    ids=str,
)
def test_a_wrong_pattern_of_masks_is_found(masks: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(model=MODEL, masks=masks)
    assert found.startswith(problem)


def test_a_pattern_is_checked_against_the_model_and_the_updates() -> None:
    regrow = {"every": 5, "grow": "gradient"}
    assert problems_of(model=MODEL, masks=PATTERN, regrow={**regrow, "scope": "global"}) == []
    (problem,) = problems_of(
        model=MODEL, masks=PATTERN, regrow={**regrow, "redistribute": "momentum"}
    )
    assert problem.startswith("regrow: ")
    assert "2 of every 4" in problem
    resnet = {"model_name": "resnet18"}
    assert problems_of(model=resnet, masks=PATTERN) == []  # its first convolution is left out
    (problem,) = problems_of(model=resnet, masks={**PATTERN, "strict": True})
    assert problem.startswith("masks: the pattern 2:4 does not divide")


def test_a_model_that_can_not_be_made_leaves_the_pattern_to_be_judged_alone() -> None:
    masks = {"sparsity": 4 / 7, "pattern": "3:7", "exclude": ["head"]}
    (problem,) = problems_of(model={"model_name": "lenet30"}, masks=masks)
    assert problem.startswith("model: ")


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow"])
def test_scores_of_the_whole_model_pass_without_its_values(method: str) -> None:
    assert problems_of(model=MODEL, masks={"sparsity": 0.5, "method": method}) == []
    assert problems_of(model=MODEL, masks={"sparsity": 0.5, "scores": method}) == []


def test_fan_in_is_refused_where_masks_keep_weights_for_their_values() -> None:
    masks = {"sparsity": 0.5, "init": "fan_in"}
    for given in ({}, {"method": "uniform"}, {"scores": "snip", "method": "snip"}):
        assert problems_of(model=MODEL, masks={**masks, **given}) == []
    for key in ("method", "scores"):
        (problem,) = problems_of(model=MODEL, masks={**masks, key: "magnitude"})
        assert problem.startswith(f"masks: {key} is 'magnitude', which keeps weights for their")
    zeros = {"scores": "nonzero", "init": "fan_in"}
    (problem,) = problems_of(model=MODEL, masks=zeros)
    assert problem.startswith("masks: scores is 'nonzero', which keeps weights for their values")
    (problem,) = problems_of(model=MODEL, masks={**masks, "init": "fanin"})
    assert problem == ("masks.init: unknown 'fanin'; known are keep, fan_in (nearest: 'fan_in')")


def test_a_power_names_a_schedule_and_a_method_that_moves_masks_its_preset() -> None:
    regrow = {"every": 5, "density": {"power": 1.5}, "final_sparsity": 0.9}
    assert problems_of(model=MODEL, regrow={**regrow, "schedule": {"power": 2}}) == []
    assert problems_of(model=MODEL, regrow={**regrow, "scope": "global"}) == []  # the run warns
    problem, *_ = problems_of(model=MODEL, regrow={**regrow, "density": {"power": -1}})
    assert problem.startswith("regrow: the power of a schedule is -1; allowed is a number above 0")
    (problem,) = problems_of(model=MODEL, masks={"sparsity": 0.9, "method": "RigL"})
    assert problem.endswith(
        "'RigL' moves masks: itop_prune.preset('RigL', ...) gives its arguments"
    )


def test_masks_of_zeros_need_no_sparsity_and_all_others_do() -> None:
    masks = {"scores": "nonzero", "exclude": ["head"], "storage": "sparse"}
    assert problems_of(model=MODEL, masks=masks) == []
    assert problems_of(model=MODEL, masks={"scores": "nonzero", "pattern": "2:4"}) == []
    (problem,) = problems_of(model=MODEL, masks={**masks, "sparsity": 0.5})
    assert problem.startswith("masks: sparsity is 0.5, and scores='nonzero' keeps every weight")
    (problem,) = problems_of(model=MODEL, masks={"scores": "nonzero", "exclude": ["haed"]})
    assert problem.startswith("masks: exclude pattern 'haed' matches no weight")
    for section in ({"scores": "magnitude"}, {"method": "ERK"}):
        assert problems_of(model=MODEL, masks=section) == ["masks.sparsity: missing; it is needed"]


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
    digits = {"name": "digits", "batch_size": 2}
    assert problems_of(data=digits, augment={"pading": 1}) == [
        "augment.pading: unknown key; known are padding, hflip (nearest: 'padding')"
    ]
    folder = {"name": "folder", "batch_size": 2}
    assert problems_of(data=folder, augment={"scale": [0.5, 1.0]}) == []
