"""Recipes: a YAML file whose sections are the keyword arguments of a few calls, checked before anything is built.

`itop_prune_tools.config.sections` says which calls. Needs the extra `train`; `import itop_prune`
does not import it.
"""

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from itop_prune.messages import nearest

from .arguments import type_problem
from .sections import Section, section_problems


class RecipeError(ValueError):
    """A recipe with mistakes: all of them, one a line."""

    def __init__(self, path: Path | str, mistakes: Sequence[str]) -> None:
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n  ".join([f"{path}: {count}", *mistakes]))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. A section that is None was left out."""

    model: Section
    data: Section
    optimizer: Section
    epochs: int
    """Of training, before `multiplier`."""
    lr_schedule: Section | None = None
    """Left out: a constant learning rate."""
    masks: Section | None = None
    """Left out: dense training."""
    regrow: Section | None = None
    """Left out: static masks."""
    multiplier: int = 1
    """The paper's extended training: epochs and milestones times this; warm-up and `every` as they are."""
    seed: int = 0
    loss: Section | None = None
    mixup: Section | None = None
    ema: Section | None = None
    augment: Section | None = None
    accelerator: Section | None = None
    checkpoint: Section | None = None
    clip_grad_norm: float | None = None
    """Largest norm of the (sparse) gradient."""
    compile: bool = False
    """torch.compile the model."""
    channels_last: bool = False
    init: str | None = None
    """A dense checkpoint, loaded before the masks are placed."""
    stop_after_bad_losses: int | None = None
    """Stop after so many steps in a row whose loss is not finite."""

    def as_yaml(self) -> str:
        """Return the recipe as YAML, defaults included, sections that were left out not."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def read(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    data: Callable[..., Any],
    augment: Callable[[Section], Callable[..., Any]],
) -> Recipe:
    """Read a recipe and check every section against the call it is for; nothing is built but on the meta device.

    Args: path: The YAML file. overrides: "section.key=value" or "key=value", the value in YAML. The
        section must be one that the recipe has; a whole one can be given ("regrow={every: 100}") or
        taken out ("regrow=null"). data: What the section `data` is the keyword arguments of.
        augment: Given the section `data`, what `augment` is the keyword arguments of.

    Raises:
        RecipeError: With all mistakes at once: file, key, what is allowed, the nearest known name.
    """
    path = Path(path)
    values, mistakes = _parse(path), list[str]()
    for override in overrides:
        mistakes += _override(values, override)
    known = {field.name: field for field in fields(Recipe)}
    for key in [key for key in values if key not in known]:
        mistakes.append(f"{key}: unknown key; known are {', '.join(known)}{nearest(key, known)}")
        del values[key]
    hints = typing.get_type_hints(Recipe)
    broken = set()
    for name, field in known.items():
        if values.get(name) is None and field.default is not None:
            if name in values or field.default is MISSING:
                mistakes.append(f"{name}: missing; it is needed")
                broken.add(name)
        elif name in values and (problem := type_problem(values[name], hints[name])):
            mistakes.append(f"{name}: {problem}")
            broken.add(name)
    values = {name: value for name, value in values.items() if name not in broken}
    mistakes += section_problems(values, data, augment)
    mistakes += _check_numbers(values)
    if mistakes:
        raise RecipeError(path, mistakes)
    return Recipe(**values)


NOT_YAML = (
    yaml.YAMLError,
    ValueError,
    AttributeError,
)  # the last two: what PyYAML lets through, as at 2020-13-45


class _Loader(yaml.SafeLoader):
    """The safe loader, which neither a key given twice nor an alias passes: one may hold itself. 2:4 is text."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name); write it out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_whole(self, node: yaml.ScalarNode) -> int | str:
        """Read 2:4 as the text that it looks like, and not to base 60 as 124."""
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def _parse(path: Path) -> Section:
    if not path.is_file():
        what, folder = (
            ("a folder, no file", path) if path.is_dir() else ("no such file", path.parent)
        )
        others = [str(other) for other in sorted(folder.glob("*.yaml"))]
        raise RecipeError(
            path, [f"{what}; there are: {', '.join(others) or 'none'}{nearest(path, others)}"]
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(
            path, [f"{line}not YAML: {getattr(error, 'problem', None) or error}"]
        ) from None
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
        value = yaml.load(text, _Loader)
    except NOT_YAML:
        return [f"override {override!r}: {text!r} is not YAML"]
    if not key:
        values[section] = value
    elif isinstance(values.get(section), dict):
        values[section][key] = value
    else:
        has = [name for name, part in values.items() if isinstance(part, dict)]
        known = f"it has {', '.join(has)}{nearest(section, has)}"
        return [f"override {override!r}: the recipe has no section {section}; {known}"]
    return []


LEAST = {
    **dict.fromkeys(
        ("epochs", "multiplier", "stop_after_bad_losses", "checkpoint.every", "checkpoint.keep"), 1
    ),
    **dict.fromkeys(("data.batch_size", "data.eval_batch_size", "data.image_size"), 1),
    **dict.fromkeys(("seed", "data.validation", "data.workers"), 0),
}
"""What whole numbers are at least."""


def _check_numbers(values: Section) -> list[str]:
    mistakes = []
    data, clip = values.get("data") or {}, values.get("clip_grad_norm")
    for name, least in LEAST.items():
        section, _, key = name.rpartition(".")
        number = (values.get(section) or {} if section else values).get(key)
        if type(number) is int and number < least:
            mistakes.append(f"{name}: is {number}; allowed is from {least}")
    if clip is not None and not clip > 0:  # also NaN
        mistakes.append(
            f"clip_grad_norm: is {clip}; allowed is a number above 0, or null for no clipping"
        )
    if values.get("mixup") and type(data.get("batch_size")) is int and data["batch_size"] % 2:
        mistakes.append(
            f"data.batch_size: is {data['batch_size']}; mixup mixes images in pairs: take an even number"
        )
    if values.get("regrow") and not values.get("masks"):
        mistakes.append(
            "regrow: there are no masks to move; add a section masks, or leave out regrow"
        )
    if values.get("mixup") and values.get("loss"):
        mistakes.append("loss: mixup makes soft labels; give label_smoothing in mixup instead")
    if values.get("init") and not Path(values["init"]).exists():
        mistakes.append(f"init: {values['init']} does not exist")
    return mistakes
