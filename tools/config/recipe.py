"""Recipes: YAML files whose sections are the keyword arguments of a few calls.

`itop_prune_tools.config.sections` names the calls. A recipe is checked before anything is built.
"""

import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import yaml

from itop_prune.messages import nearest

from .arguments import Section, shown, type_problem
from .sections import section_calls, section_problems
from .yaml_text import NotYaml, load_yaml


class RecipeError(ValueError):
    """A recipe with mistakes; the message lists all of them, one a line."""

    def __init__(self, path: Path | str, mistakes: Sequence[str]) -> None:
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n  ".join([f"{path}: {count}", *mistakes]))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Sections that were left out are None."""

    model: Section
    data: Section
    optimizer: Section
    epochs: int
    """Epochs before `multiplier`."""
    lr_schedule: Section | None = None
    """None: a constant learning rate."""
    masks: Section | None = None
    """None: dense training."""
    regrow: Section | None = None
    """None: static masks."""
    multiplier: int = 1
    """Extends the training, as in the paper: multiplies epochs and milestones, not warm-up."""
    seed: int = 0
    """Of the weights, the masks, and the order of the images."""
    loss: Section | None = None
    """None: cross-entropy."""
    mixup: Section | None = None
    ema: Section | None = None
    augment: Section | None = None
    accelerator: Section | None = None
    checkpoint: Section | None = None
    clip_grad_norm: float | None = None
    """Largest norm of the (sparse) gradient."""
    compile: bool = False
    """Whether to torch.compile the model."""
    channels_last: bool = False
    """Whether weights and images keep the channels of a pixel beside each other in memory."""
    init: str | None = None
    """A dense checkpoint, loaded before the masks are placed."""
    stop_after_bad_losses: int | None = None
    """Stop after this many consecutive steps with a non-finite loss."""

    def as_yaml(self) -> str:
        """Write the recipe as YAML, with defaults, without the sections that were left out."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def read_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and check every section; nothing is built except on the meta device.

    Args:
        path: The YAML file.
        overrides: "section.key=value" or "key=value", with the value in YAML. A section that the
            recipe lacks begins with its first key; a whole one can be given
            ("regrow={every: 100}") or taken out ("regrow=null").

    Raises:
        RecipeError: All mistakes at once, with file, key, what is allowed, and the nearest name.
    """
    path = Path(path)
    values = _read_sections(path)
    mistakes: list[str] = []
    for override in overrides:
        mistakes += _override(values, override)

    # First the top level: unknown, missing, of the wrong type. What is wrong goes no further.
    known = {field.name: field for field in fields(Recipe)}
    hints = typing.get_type_hints(Recipe)
    for key in [key for key in values if key not in known]:
        mistakes.append(f"{key}: unknown key; known are {', '.join(known)}{nearest(key, known)}")
        del values[key]
    for name, field in known.items():
        may_be_null = field.default is None
        if values.get(name) is None and not may_be_null:
            if name in values or field.default is MISSING:
                mistakes.append(f"{name}: missing; it is needed")
                values.pop(name, None)
        elif name in values:
            problem = type_problem(values[name], hints[name])
            if problem:
                mistakes.append(f"{name}: {problem}")
                del values[name]

    # Then each section by its call, and what no signature tells.
    mistakes += section_problems(values)
    mistakes += _out_of_range(values)
    mistakes += _contradictions(values)
    if mistakes:
        raise RecipeError(path, mistakes)
    return Recipe(**values)


def _read_sections(path: Path) -> Section:
    if not path.is_file():
        is_folder = path.is_dir()
        what = "a folder, no file" if is_folder else "no such file"
        folder = path if is_folder else path.parent
        others = [str(other) for other in sorted(folder.glob("*.yaml"))]
        known = f"{', '.join(others) or 'none'}{nearest(path, others)}"
        raise RecipeError(path, [f"{what}; there are: {known}"])

    try:
        values = load_yaml(path.read_bytes())
    except NotYaml as error:
        raise RecipeError(path, [str(error)]) from None

    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(path, ["a recipe is a mapping of sections; see recipes/quickstart.yaml"])
    return values


def _override(values: Section, override: str) -> list[str]:
    """Put one override into the values; return what is wrong with it."""
    names, equals, text = override.partition("=")
    section, _, key = names.partition(".")
    if not equals:
        return [f"override {override!r}: has no value; write section.key=value"]

    try:
        value = load_yaml(text)
    except NotYaml as error:
        return [f"override {shown(override)}: {error}"]

    sections = section_calls({})
    if not key:
        values[section] = value
    elif section not in sections:
        known = f"sections are {', '.join(sections)}{nearest(section, sections)}"
        return [f"override {override!r}: {section} is no section; {known}"]
    elif values.get(section) is None:
        values[section] = {key: value}
    elif isinstance(values[section], dict):
        values[section][key] = value
    return []  # a section of another type is refused with the rest of the recipe


SMALLEST = {
    "accelerator.gradient_accumulation_steps": 1,
    "epochs": 1,
    "multiplier": 1,
    "stop_after_bad_losses": 1,
    "seed": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.image_size": 1,
    "data.validation": 0,
    "data.workers": 0,
}
"""The smallest allowed value of whole numbers."""


def _out_of_range(values: Section) -> list[str]:
    mistakes = []
    for name, smallest in SMALLEST.items():
        section, _, key = name.rpartition(".")
        arguments = values.get(section) or {} if section else values
        number = arguments.get(key)
        if type(number) is int and number < smallest:
            mistakes.append(f"{name}: is {number}; allowed is from {smallest}")

    clip = values.get("clip_grad_norm")
    if clip is not None and clip <= 0:
        mistakes.append(
            f"clip_grad_norm: is {clip}; allowed is a number above 0, or null for no clipping"
        )
    return mistakes


def _contradictions(values: Section) -> list[str]:
    mistakes = []
    batch_size = (values.get("data") or {}).get("batch_size")
    if values.get("mixup") and type(batch_size) is int and batch_size % 2:
        mistakes.append(
            f"data.batch_size: is {batch_size}; mixup mixes images in pairs: take an even number"
        )

    schedule = values.get("lr_schedule") or {}
    sched = str(schedule.get("sched"))
    needed = {"multistep": "decay_milestones", "step": "decay_epochs"}.get(sched)
    if needed and schedule.get(needed) is None:
        mistakes.append(
            f"lr_schedule: sched {sched} has no {needed}, and timm's default is of "
            "another run, which no multiplier stretches; say after how many epochs the learning "
            "rate falls"
        )

    if values.get("mixup") and values.get("loss"):
        mistakes.append("loss: mixup makes soft labels; give label_smoothing in mixup instead")
    if values.get("regrow") and not values.get("masks"):
        mistakes.append(
            "regrow: there are no masks to move; add a section masks, or leave out regrow"
        )
    if values.get("init") and not Path(values["init"]).exists():
        mistakes.append(f"init: {values['init']} does not exist")
    return mistakes
