"""Recipes: every mistake comes in one RecipeError, before anything is built."""

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from itop_prune_tools.config.recipe import Recipe, RecipeError, read_recipe
from itop_prune_tools.models import registration as models  # noqa: F401  (registers lenet300)

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
GOOD = """\
model: {model_name: lenet300, img_size: 8, num_classes: 10}
data: {name: digits, batch_size: 32}
optimizer: {opt: sgd, lr: 0.1, momentum: 0.9}
lr_schedule: {sched: multistep, decay_milestones: [5, 8], decay_rate: 0.1}
masks: {sparsity: 0.9, method: ERK}
regrow: {every: 50, grow: random}
epochs: 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe without a mistake."""
    return write(tmp_path, GOOD)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path | str, *overrides: str) -> Recipe:
    return read_recipe(path, overrides)


@functools.cache
def read_of_repository(path: Path) -> Recipe:
    return read(path)


def mistakes_of(path: Path | str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read(path, *overrides)
    assert len(str(caught.value).split("\n  ")) == 1 + len(caught.value.mistakes)
    return caught.value.mistakes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_reads(recipe: Path) -> None:
    assert read_of_repository(recipe).epochs > 0


def test_a_recipe_needs_no_more_than_model_data_optimizer_and_epochs(tmp_path: Path) -> None:
    dense = "".join(
        line for line in GOOD.splitlines(True) if line.split(":")[0] not in ("masks", "regrow")
    )
    recipe = read(write(tmp_path, dense.replace("lr_schedule", "# lr_schedule")))
    assert (recipe.masks, recipe.regrow, recipe.lr_schedule) == (None, None, None)


@pytest.mark.parametrize("missing", ["model", "data", "optimizer", "epochs"])
def test_what_every_recipe_needs_is_named_when_it_is_missing(tmp_path: Path, missing: str) -> None:
    lines = [line for line in GOOD.splitlines(True) if not line.startswith(f"{missing}:")]
    assert f"{missing}: missing; it is needed" in mistakes_of(write(tmp_path, "".join(lines)))


# The message


def test_the_message_starts_with_the_file_and_the_number_of_mistakes(path: Path) -> None:
    with pytest.raises(RecipeError, match="2 mistakes") as caught:
        read(path, "epochs=0", "seed=-1")
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}: 2 mistakes"
    assert rest == ["  epochs: is 0; allowed is from 1", "  seed: is -1; allowed is from 0"]


def test_all_mistakes_of_all_kinds_come_in_one_error(tmp_path: Path) -> None:
    text = """\
modle: {model_name: lenet300}
model: {model_name: lenet300, img_size: 8, foo: 1}
data: {name: digist, batch_size: many}
optimizer: {opt: sgd, lr: 1e-3}
lr_schedule: {sched: cosine, warmup_epoch: 3}
masks: {sparsity: 1.5}
regrow: {every: 50, grow: gradeint}
epochs: ten
seed: -1
"""
    mistakes = mistakes_of(write(tmp_path, text), "nothing.here=1")
    beginnings = [
        "override 'nothing.here=1'",
        "modle:",
        "epochs:",
        "data.name:",
        "data.batch_size:",
        "optimizer.lr:",
        "lr_schedule.warmup_epoch:",
        "model.foo:",
        "masks: sparsity",
        "regrow: unknown grow 'gradeint'",
        "seed:",
    ]
    assert [sum(mistake.startswith(start) for mistake in mistakes) for start in beginnings] == [
        1
    ] * len(beginnings)
    assert len(mistakes) == len(beginnings)


# Rows of "Bad input"


def test_an_unknown_section_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (mistake,) = mistakes_of(write(tmp_path, GOOD + "epcohs: 3\n"))
    assert mistake.startswith("epcohs: unknown key; known are model, data, optimizer, epochs, ")
    assert mistake.endswith(" (nearest: 'epochs')")


def test_an_unknown_key_of_a_section_is_answered_with_the_nearest(path: Path) -> None:
    (mistake,) = mistakes_of(path, "masks.methd=ERK")
    assert mistake.startswith("masks.methd: unknown key; known are sparsity, method")
    assert mistake.endswith(" (nearest: 'method')")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("model.pretraned=true", "pretrained"), ("optimizer.momentun=0.9", "momentum")],
)
def test_an_unknown_key_of_an_open_ended_factory_is_answered_with_the_nearest(
    path: Path, override: str, nearest: str
) -> None:
    (mistake,) = mistakes_of(path, override)
    assert mistake.startswith(f"{override.partition('=')[0]}: unknown key; known are ")
    assert mistake.endswith(f" (nearest: '{nearest}')")


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("epochs=1.5", "epochs: is 1.5; allowed is a whole number"),
        ("epochs=true", "epochs: is True; allowed is a whole number"),
        ("epochs=[3]", "epochs: is [3]; allowed is a whole number"),
        ("epochs=null", "epochs: missing; it is needed"),
        ("data=null", "data: missing; it is needed"),
        ("data=3", "data: is 3; allowed is a mapping of keys to values"),
        ("model=[1]", "model: is [1]; allowed is a mapping of keys to values"),
        ("regrow=[1]", "regrow: is [1]; allowed is a mapping of keys to values or null"),
        ("regrow=3", "regrow: is 3; allowed is a mapping of keys to values or null"),
        ("regrow={1: 2}", "regrow: is {1: 2}; allowed is a mapping of keys to values or null"),
        ("compile=maybe", "compile: is 'maybe'; allowed is true or false"),
        ("init=3", "init: is 3; allowed is text or null"),
        ("data.batch_size=many", "data.batch_size: is 'many'; allowed is a whole number"),
        ("model.model_name=3", "model.model_name: is 3; allowed is text"),
        ("ema={decay: slow}", "ema.decay: is 'slow'; allowed is a number"),
        (
            "stop_after_bad_losses=often",
            "stop_after_bad_losses: is 'often'; allowed is a whole number or null",
        ),
    ],
    ids=str,
)
def test_a_wrong_type_is_answered_with_what_is_allowed(
    path: Path, override: str, mistake: str
) -> None:
    assert mistake in mistakes_of(path, override)


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("epochs=0", "epochs: is 0; allowed is from 1"),
        ("multiplier=0", "multiplier: is 0; allowed is from 1"),
        ("seed=-1", "seed: is -1; allowed is from 0"),
        ("stop_after_bad_losses=0", "stop_after_bad_losses: is 0; allowed is from 1"),
        *(
            (
                f"clip_grad_norm={text}",
                f"clip_grad_norm: is {shown}; allowed is a number above 0, or null for no clipping",
            )
            for text, shown in (("-0.5", "-0.5"), ("0", "0"))
        ),
        ("data.batch_size=0", "data.batch_size: is 0; allowed is from 1"),
        ("data.eval_batch_size=0", "data.eval_batch_size: is 0; allowed is from 1"),
        ("data.image_size=0", "data.image_size: is 0; allowed is from 1"),
        ("data.validation=-1", "data.validation: is -1; allowed is from 0"),
        ("data.workers=-1", "data.workers: is -1; allowed is from 0"),
        ("checkpoint={every: 0}", "checkpoint.every: is 0; allowed is from 1"),
        ("checkpoint={keep: 0}", "checkpoint.keep: is 0; allowed is from 1"),
        ("init=/no/such/file.pt", "init: /no/such/file.pt does not exist"),
    ],
    ids=str,
)
def test_a_number_or_file_out_of_range_is_answered_with_what_is_allowed(
    path: Path, override: str, mistake: str
) -> None:
    assert mistakes_of(path, override) == (mistake,)


def test_mixup_wants_an_even_batch(path: Path) -> None:
    mixup = "mixup={mixup_alpha: 0.2}"
    message = "data.batch_size: is 33; mixup mixes images in pairs: take an even number"
    assert mistakes_of(path, mixup, "data.batch_size=33") == (message,)
    assert read(path, mixup).mixup == {"mixup_alpha": 0.2}


def test_a_path_that_is_no_file_is_answered_with_the_recipes_that_are_there(path: Path) -> None:
    (mistake,) = mistakes_of(path.with_name("recip.yaml"))
    assert mistake == f"no such file; there are: {path} (nearest: {str(path)!r})"
    (mistake,) = mistakes_of(path.parent)
    assert mistake.startswith(f"a folder, no file; there are: {path}")
    assert mistakes_of(path.parent / "empty" / "a.yaml") == ("no such file; there are: none",)


def test_a_pattern_that_matches_no_weight_names_those_that_are(path: Path) -> None:
    (mistake,) = mistakes_of(path, "masks.include=[conv1]")
    assert mistake.startswith("masks: include pattern 'conv1' matches no weight")
    assert "head.weight" in mistake


def test_masks_that_move_need_masks(path: Path) -> None:
    (mistake,) = mistakes_of(path, "masks=null")
    assert mistake.startswith("regrow: there are no masks to move")


def test_a_smoothed_loss_beside_mixup_is_refused(path: Path) -> None:
    (mistake,) = mistakes_of(path, "loss={smoothing: 0.1}", "mixup={mixup_alpha: 0.2}")
    assert mistake.startswith("loss: mixup makes soft labels")


@pytest.mark.parametrize(
    ("sched", "key", "value"),
    [("multistep", "decay_milestones", "[5]"), ("step", "decay_epochs", 5)],
)
def test_a_schedule_in_steps_must_say_where_they_are(
    path: Path, sched: str, key: str, value: object
) -> None:
    """timm's own, of epoch 90, are stretched by no multiplier."""
    (mistake,) = mistakes_of(path, f"lr_schedule={{sched: {sched}}}", "multiplier=3")
    assert mistake.startswith(f"lr_schedule: sched {sched} has no {key}, and timm's default is of")
    read(path, f"lr_schedule={{sched: {sched}, {key}: {value}}}", "multiplier=3")


# YAML


@pytest.mark.parametrize(
    ("text", "line"),
    [("epochs: 3\nepochs: 4\n", 1), ("seed: 1\nmodel:\n  epochs: 1\n  epochs: 3\n", 3)],
    ids=["top", "nested"],
)
def test_a_key_given_twice_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (mistake,) = mistakes_of(write(tmp_path, text))
    assert mistake == f"line {line}: not YAML: the key 'epochs' is there twice"


@pytest.mark.parametrize("text", ["model: {", "a: b: c", "\tepochs: 3", "*nothing"], ids=repr)
def test_what_is_not_yaml_names_the_line(tmp_path: Path, text: str) -> None:
    (mistake,) = mistakes_of(write(tmp_path, "seed: 0\n" + text))
    assert mistake.startswith("line 2: not YAML") or mistake.startswith("line 3: not YAML")


def test_bytes_that_are_not_text_are_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"epochs: \xff\xfe\n")
    (mistake,) = mistakes_of(path)
    assert mistake.startswith("not YAML: ")


@pytest.mark.parametrize(
    "text", ["", "- model\n- data\n", "just text\n", "3\n", "{1: 2}\n", "? [a]\n: 3\n"], ids=repr
)
def test_what_is_not_a_mapping_of_sections_is_a_mistake(tmp_path: Path, text: str) -> None:
    assert len(mistakes_of(write(tmp_path, text))) == 1


@pytest.mark.parametrize("where", ["file", "override"])
def test_no_object_of_python_is_made(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "executed"
    evil = f'!!python/object/apply:os.mkdir ["{trace}"]'
    if where == "file":
        mistakes_of(write(tmp_path, GOOD + f"seed: {evil}\n"))
    else:
        mistakes_of(write(tmp_path, GOOD), f"seed={evil}")
    assert not trace.exists()


@pytest.mark.parametrize("value", ["!!int x", "2020-13-45", "!!float x", "!!timestamp x"])
@pytest.mark.parametrize("where", ["file", "override"])
def test_a_value_that_its_yaml_type_can_not_hold_is_a_mistake(
    tmp_path: Path, where: str, value: str
) -> None:
    if where == "file":
        assert len(mistakes_of(write(tmp_path, GOOD + f"seed: {value}\n"))) == 1
    else:
        assert len(mistakes_of(write(tmp_path, GOOD), f"seed={value}")) == 1


@pytest.mark.parametrize("where", ["file", "override"])
def test_a_list_that_holds_itself_is_a_mistake(tmp_path: Path, where: str) -> None:
    if where == "file":
        assert mistakes_of(write(tmp_path, GOOD.replace("epochs: 10", "epochs: &a [*a]")))
    else:
        assert mistakes_of(write(tmp_path, GOOD), "epochs=&a [*a]")


# Overrides


def test_overrides_are_read_as_yaml_and_the_last_holds(path: Path) -> None:
    recipe = read(
        path,
        "seed=7",
        "epochs=3",
        "epochs=4",
        "data.root=/some/where=else",
        "lr_schedule.decay_milestones=[3, 4]",
        "regrow.rate=0.3",
        "masks={sparsity: 0.5}",
        "ema={decay: 0.5}",
        "ema.decay=0.25",
    )
    assert (recipe.seed, recipe.epochs) == (7, 4)
    assert recipe.data["root"] == "/some/where=else"
    assert recipe.lr_schedule is not None
    assert recipe.lr_schedule["decay_milestones"] == [3, 4]
    assert recipe.regrow == {"every": 50, "grow": "random", "rate": 0.3}
    assert recipe.masks == {"sparsity": 0.5}
    assert recipe.ema == {"decay": 0.25}
    assert path.read_text(encoding="utf-8") == GOOD


def test_sections_can_be_taken_out(path: Path) -> None:
    recipe = read(path, "regrow=null", "masks=")
    assert (recipe.masks, recipe.regrow) == (None, None)
    assert "regrow" not in yaml.safe_load(recipe.as_yaml())


def test_a_number_that_is_text_to_yaml_is_found_in_an_override_and_text_of_digits_passes(
    path: Path,
) -> None:
    assert mistakes_of(path, "optimizer.lr=1e-3") == (
        "optimizer.lr: '1e-3' is text to YAML; write 0.001",
    )
    assert read(path, "data.root='2012'").data["root"] == "2012"


def test_an_override_begins_a_section_that_the_recipe_lacks(path: Path) -> None:
    recipe = read(path, "checkpoint.every=2", "checkpoint.keep=3", "ema.decay=0.5")
    assert (recipe.checkpoint, recipe.ema) == ({"every": 2, "keep": 3}, {"decay": 0.5})
    dense = ("masks=null", "regrow=null")
    assert read(path, *dense, "masks.sparsity=0.5").masks == {"sparsity": 0.5}
    assert mistakes_of(path, *dense, "masks.method=ERK") == (
        "masks.sparsity: missing; it is needed",
    )
    assert mistakes_of(path, "checkpoint.evry=2") == (
        "checkpoint.evry: unknown key; known are every, keep (nearest: 'every')",
    )


@pytest.mark.parametrize(("name", "advice"), [("maks", " (nearest: 'masks')"), ("epochs", "")])
def test_an_override_of_what_is_no_section_is_answered_with_the_sections(
    path: Path, name: str, advice: str
) -> None:
    (mistake,) = mistakes_of(path, f"{name}.sparsity=0.5")
    assert mistake.startswith(
        f"override '{name}.sparsity=0.5': {name} is no section; sections are model, data, "
    )
    assert mistake.endswith(f"checkpoint{advice}")


def test_an_override_within_a_section_of_another_type_leaves_one_mistake(path: Path) -> None:
    (mistake,) = mistakes_of(path, "masks=3", "masks.sparsity=0.5", "regrow=null")
    assert mistake.startswith("masks: is 3; allowed is a mapping")


def test_every_wrong_override_is_reported(path: Path) -> None:
    without_value, without_section, not_yaml, unknown = mistakes_of(
        path, "epochs", "eam.decay=0.5", "seed={", "epcohs=3"
    )
    assert without_value == "override 'epochs': has no value; write section.key=value"
    assert without_section.startswith("override 'eam.decay=0.5': eam is no section; ")
    assert not_yaml.startswith("override 'seed={': line 1: not YAML: ")
    assert unknown.startswith("epcohs: unknown key")


# Writing


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_written_recipe_reads_as_the_same(tmp_path: Path, recipe: Path) -> None:
    first = read_of_repository(recipe)
    assert read(write(tmp_path, first.as_yaml())) == first


# Anything at all

QUICK = (
    Phase.explicit,
    Phase.reuse,
    Phase.generate,
)  # a failure is short enough without minutes of shrinking
ONE_FOLDER = [HealthCheck.function_scoped_fixture]

WORDS = st.sampled_from(
    [
        "model",
        "data",
        "optimizer",
        "lr_schedule",
        "masks",
        "regrow",
        "epochs",
        "seed",
        "augment",
        "checkpoint",
        "x",
        "",
    ]
)
KEYS = st.sampled_from(
    [
        "name",
        "sparsity",
        "include",
        "every",
        "grow",
        "opt",
        "lr",
        "sched",
        "padding",
        "keep",
        "",
        "x",
    ]
)
ODD_VALUES = (
    "|null|3|-1|0.5|.nan|.inf|1e-3|true|text|[]|[1, a]|{}|{a: 1}|{1: 2}|~: ~|2020-01-01"
    "|2020-13-45|!!set {a}|!!binary aGk=|{|[[[1]]]|'3'|&a b|*a|ERK|gradient|sgd|digits"
)
VALUES = st.text(max_size=5) | st.sampled_from(ODD_VALUES.split("|"))
OVERRIDES = st.one_of(
    st.builds(lambda section, key, value: f"{section}.{key}={value}", WORDS, KEYS, VALUES),
    st.builds(lambda section, value: f"{section}={value}", WORDS, VALUES),
    st.text(max_size=8),
)


def reads_or_tells(path: Path, overrides: list[str]) -> None:
    """Read: a recipe comes back whole, or a RecipeError with mistakes to read, and nothing else."""
    mistakes: tuple[str, ...] = ()
    recipe = None
    try:
        recipe = read(path, *overrides)
    except RecipeError as error:
        mistakes = error.mistakes
    assert (recipe is None) == bool(mistakes)
    assert all(mistakes)
    assert recipe is None or (recipe.epochs >= 1 and isinstance(recipe.model, dict))


@settings(max_examples=50, deadline=None, phases=QUICK, suppress_health_check=ONE_FOLDER)
@given(st.lists(OVERRIDES, max_size=3))
def test_overrides_of_any_kind_give_a_recipe_or_a_recipe_error(
    path: Path, overrides: list[str]
) -> None:
    reads_or_tells(path, overrides)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=4)
    | st.dates()
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, phases=QUICK, suppress_health_check=ONE_FOLDER)
@given(st.dictionaries(WORDS, ANYTHING, max_size=4))
def test_files_of_any_content_give_a_recipe_or_a_recipe_error(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = {**yaml.safe_load(GOOD), **changes}
    reads_or_tells(write(tmp_path, yaml.safe_dump(values)), [])


@settings(max_examples=40, deadline=None, phases=QUICK, suppress_health_check=ONE_FOLDER)
@given(st.text(max_size=40))
def test_files_of_any_text_give_a_recipe_or_a_recipe_error(tmp_path: Path, text: str) -> None:
    reads_or_tells(write(tmp_path, text), [])


@pytest.mark.parametrize("pattern", ["2:4", '"2:4"', "4:8"])
def test_a_pattern_needs_no_quotes(path: Path, pattern: str) -> None:
    recipe = read(path, f"masks={{sparsity: 0.5, pattern: {pattern}}}", "regrow.every=70")
    assert recipe.masks == {"sparsity": 0.5, "pattern": pattern.strip('"')}
    assert yaml.safe_load(recipe.as_yaml())["masks"] == recipe.masks
    assert recipe.regrow == {"every": 70, "grow": "random"}
