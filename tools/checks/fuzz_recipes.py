"""Random recipes: the packaged ones with changed keys, values, types, nesting, text and overrides.

`read_recipe` must accept a recipe or refuse it by a `RecipeError`. One that it accepts must read
back as the same recipe from what it writes.
"""

import copy
import functools
import inspect
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..config.packaged import packaged_recipes
from ..config.recipe import RecipeError, read_recipe
from ..config.sections import section_calls
from ..models import registration  # noqa: F401  (the recipes' nets)
from ..run_folder.folder import run_folder
from .fuzz_runner import require

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**6,
    2**63,
    -(10**40),
    0.0,
    0.5,
    -0.1,
    1.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "1e-3",
    "no",
    "2:4",
    "ERK",
    "random",
    "gradient",
    "sparse",
    "cubic",
    "sgd",
    "adamw",
    "cosine",
    "\0",
    "naïve ✓ 𝔘 \u202e",
    "a" * 5000,
    "../../etc",
    "*",
    "[",
    [],
    [1, 2],
    [[["deep"]]],
    ["head", None],
    {},
    {"power": 1.5},
    {"a": {"b": {"c": 1}}},
    {1: 2},
)
SNIPPETS = (
    "\t",
    "\0",
    "é",
    "&a",
    "*a",
    "!!python/object:os.system x",
    "<<: {}",
    "{",
    "}",
    "- ",
    "'",
)
"""Text that may break YAML."""
HEAVY = ("imagenet", "resnet50", "cifar")
"""Recipes whose nets take long to build, and so come more seldom."""

Mutation = Callable[[random.Random, dict[Any, Any]], None]


@functools.cache
def originals() -> tuple[str, ...]:
    """Read the packaged recipes."""
    recipes = packaged_recipes().values()
    light = [path for path in recipes if not path.stem.startswith(HEAVY)]
    return tuple(path.read_text(encoding="utf-8") for path in [*recipes, *light, *light, *light])


@functools.cache
def known_names() -> tuple[str, ...]:
    """List what overrides may name: keys of recipes, and "section.key" of all arguments."""
    names = {key for text in originals() for key in yaml.safe_load(text)}
    for section, (call, given) in section_calls({}).items():
        arguments = inspect.signature(call).parameters.keys() - {*given, "kwargs"}
        names |= {section, *(f"{section}.{name}" for name in arguments)}
    return tuple(sorted(names))


def draw_key(draw: random.Random) -> str:
    """Draw a key of a section, or of the top."""
    return draw.choice(known_names()).rpartition(".")[2]


def case(seed: int) -> None:
    """Read a random recipe."""
    draw = random.Random(seed)
    text = draw.choice(originals())
    if draw.random() < 0.8:
        recipe = yaml.safe_load(text)
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            draw.choice(MUTATIONS)(draw, recipe)
        text = yaml.safe_dump(recipe, allow_unicode=draw.random() < 0.5, sort_keys=False)
    if draw.random() < 0.1:
        text = changed_text(draw, text)
    overrides = [draw_override(draw) for _ in range(draw.choice([0, 1, 1, 2]))]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        encoding = draw.choice([*["utf-8"] * 8, "utf-16", "latin-1"])
        path.write_bytes(text.encode(encoding, errors="replace"))
        try:
            recipe = read_recipe(path, overrides)
        except RecipeError as error:
            check_message(error, path)
            return

        place = run_folder(path, overrides, recipe.seed)
        longest = max(len(part.encode()) for part in place.parts)
        require(place.parts[0] == "runs" and ".." not in place.parts, f"the run goes to {place}")
        require(longest <= 255 and str(place).isprintable(), f"the run goes to {place!r}")

        again = Path(folder) / "again.yaml"
        again.write_text(recipe.as_yaml(), encoding="utf-8")
        require(read_recipe(again) == recipe, "a recipe does not read back as it was written")


def check_message(error: RecipeError, path: Path) -> None:
    """Refuse an error that names no file, or a mistake without words."""
    first, *lines = str(error).splitlines()
    require(first.startswith(f"{path}: "), f"the error begins with {first!r}")
    require(len(lines) >= len(error.mistakes) > 0, f"{len(lines)} lines of {error.mistakes}")
    for mistake in error.mistakes:
        require(": " in mistake or " " in mistake.strip(), f"a mistake says {mistake!r}")
        require(len(mistake) < 20_000, f"a mistake has {len(mistake):,} characters")


def draw_value(draw: random.Random) -> Any:
    """Draw a value, sometimes in a list or a mapping."""
    value = copy.deepcopy(draw.choice(VALUES))
    chance = draw.random()
    if chance < 0.05:
        return [value, copy.deepcopy(draw.choice(VALUES))]
    return {draw_key(draw): value} if chance < 0.1 else value


def draw_override(draw: random.Random) -> str:
    """Draw an override, most often one that can be read."""
    name = draw.choice(known_names())
    if draw.random() < 0.1:
        name = draw.choice([f"{name}.{draw_key(draw)}", f"{draw_key(draw)}.x", name[1:], ""])
    value = yaml.safe_dump(draw_value(draw), default_flow_style=True).removesuffix("...\n").strip()
    override = f"{name}={value}"
    return changed_text(draw, override) if draw.random() < 0.1 else override


def changed_text(draw: random.Random, text: str) -> str:
    """Cut, double or put something into a text."""
    begin, end = sorted(draw.randint(0, len(text)) for _ in range(2))
    end = min(end, begin + 40)
    middle = draw.choice(
        ["", text[begin:end] * 2, draw.choice(SNIPPETS), chr(draw.randrange(0xD7FF))]
    )
    return text[:begin] + middle + text[end:]


def mapping_in(draw: random.Random, recipe: dict[Any, Any]) -> dict[Any, Any]:
    """Choose the recipe itself or one of its sections."""
    sections = [value for value in recipe.values() if isinstance(value, dict)]
    return draw.choice([recipe, *sections, *sections])


def drop(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Take out a key."""
    mapping = mapping_in(draw, recipe)
    if mapping:
        del mapping[draw.choice([*mapping])]


def rename(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Misspell a key, or give it the name of another."""
    mapping = mapping_in(draw, recipe)
    if mapping:
        key = draw.choice([*mapping])
        mapping[draw.choice([f"{key}s", str(key)[:-1], draw_key(draw)])] = mapping.pop(key)


def replace(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Give a key another value."""
    mapping = mapping_in(draw, recipe)
    if mapping:
        mapping[draw.choice([*mapping])] = draw_value(draw)


def add(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Add a key."""
    mapping_in(draw, recipe)[draw.choice([*[draw_key(draw)] * 9, 1, None, "ключ"])] = draw_value(
        draw
    )


def scale(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Multiply a number."""
    mapping = mapping_in(draw, recipe)
    numbers = [key for key, value in mapping.items() if type(value) in (int, float)]
    if numbers:
        key = draw.choice(numbers)
        mapping[key] = mapping[key] * draw.choice([-1, 0, 2, 0.5, 1000, 1e-9])


def move(draw: random.Random, recipe: dict[Any, Any]) -> None:
    """Put a section into another one."""
    keys = [key for key, value in recipe.items() if isinstance(value, dict)]
    if len(keys) > 1:
        one, other = draw.sample(keys, 2)
        recipe[other][one] = recipe.pop(one)


MUTATIONS: tuple[Mutation, ...] = (drop, rename, replace, replace, add, add, scale, move)
