"""The reference of recipe keys, read from the signatures that recipes are checked against."""

import inspect
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

import griffe
import timm
import yaml

import itop_prune
from itop_prune.methods.saliency import SALIENCY

from ..data.datasets import COMMON_KEYS, KINDS
from ..models import registration
from .arguments import PLAIN, type_hints, type_of_default, yaml_type
from .recipe import Recipe
from .sections import section_calls


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    values: str
    """What YAML may hold, in words; "" if that is not known."""
    default: str
    """As YAML; "needed" if the key can't be left out, "" if YAML can't write the default."""
    meaning: str
    """What the docstring says first about it; "" if it says nothing."""


@dataclass(frozen=True)
class SectionKeys:
    """The keys of a section of a recipe, or those that only some kinds of data have."""

    name: str
    """"" at the top level."""
    condition: str
    """When these keys apply, such as "name: folder"; "" if always."""
    about: tuple[str, ...]
    """Sentences."""
    keys: tuple[Key, ...]


def reference() -> list[SectionKeys]:
    """List the keys of every section, in the order of `Recipe`, the top level first."""
    calls, meanings = section_calls({}), _meanings(Recipe)
    found = [replace(_keys_of("", Recipe, given=tuple(calls)), about=())]
    for field in fields(Recipe):
        if field.name in calls:
            meaning = meanings.get(field.name, "").replace("None:", "Left out:")
            needed = "Needed" if field.default is MISSING else meaning or "May be left out"
            first, *others = _parts(field.name)
            found += [replace(first, about=(f"{needed}.", *first.about)), *others]
    return found


def _parts(name: str) -> list[SectionKeys]:
    """List the keys of a section; where they depend on the data, once for each kind."""
    call, given = section_calls({})[name]
    section = _keys_of(name, call, given)

    if name == "model":
        models = ", ".join(timm.list_models(module=registration.__name__.rpartition(".")[2]))
        more = f"The names are those of timm.list_models(), and of the papers {models}."
        return [replace(section, about=(*section.about, more))]

    if name == "masks":  # the runner makes these scores itself, `apply` takes them as tensors
        more = f"method and scores may also be {', '.join(SALIENCY)}."
        return [replace(section, about=(*section.about, more))]

    if name == "data":
        kinds = [
            SectionKeys(
                name,
                condition=f"name: {', '.join(kind.names)}",
                about=(kind.about,),
                keys=_named(section.keys, kind.keys),
            )
            for kind in KINDS
        ]
        return [replace(section, keys=_named(section.keys, COMMON_KEYS)), *kinds]

    if name == "augment":
        of_folder, given = section_calls({"name": "folder"})[name]
        return [
            replace(section, condition="unless data.name is folder"),
            replace(_keys_of(name, of_folder, given), condition="if data.name is folder"),
        ]
    return [section]


def _named(keys: Sequence[Key], names: Sequence[str]) -> tuple[Key, ...]:
    return tuple(key for key in keys if key.name in names)


def _keys_of(name: str, call: Callable[..., Any], given: Sequence[str]) -> SectionKeys:
    """Read the keys of a section from the signature and the docstring of its call."""
    hints, meanings = type_hints(call), _meanings(call)
    parameters = inspect.signature(call).parameters.values()
    keys = []
    for parameter in parameters:
        values = _values(hints.get(parameter.name, type_of_default(parameter)))
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if values is None or variadic or parameter.name in given:
            continue
        default = _default(parameter)
        if default == "null":
            values = values.replace(" or null", "")
        keys.append(Key(parameter.name, values, default, meanings.get(parameter.name, "")))

    library = call.__module__.partition(".")[0]
    about = [f"Arguments of {library}'s {call.__name__}."] if library != "itop_prune_tools" else []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        about.append(f"Other keys go to the {name} itself.")
    return SectionKeys(name, "", tuple(about), tuple(keys))


def _values(hint: Any) -> str | None:
    """Describe what YAML may hold for a type; None if YAML can write no such value."""
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    words = []
    for part in typing.get_args(hint) if is_union else (hint,):
        if typing.get_origin(part) is typing.Literal:
            words.append(", ".join(map(str, typing.get_args(part))))
            continue
        kind = yaml_type(part)
        if kind is Any:
            return ""
        held = typing.get_args(part)[-1:] if kind in (list, dict) else ()
        if kind is not None and all(_values(item) is not None for item in held):
            words.append(PLAIN[kind])
    return " or ".join(dict.fromkeys(words)) if set(words) - {"null"} else None


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "needed"
    try:
        text = yaml.safe_dump(parameter.default, default_flow_style=True, width=1000)
    except yaml.YAMLError:
        return ""
    return text.removesuffix("...\n").strip()


def _meanings(call: Callable[..., Any]) -> dict[str, str]:
    """Read what is said about every argument, or about every attribute of a dataclass."""
    found: dict[str, str] = {}
    if is_dataclass(call):
        path = Path(inspect.getfile(call))
        module = griffe.visit(path.stem, filepath=path, code=inspect.getsource(call))
        for name, attribute in module[call.__name__].attributes.items():
            found[name] = attribute.docstring.value if attribute.docstring else ""
    else:
        docstring = griffe.Docstring(inspect.getdoc(call) or "")
        for section in docstring.parse("google", warnings=False):
            if section.kind is griffe.DocstringSectionKind.parameters:
                found |= {argument.name: argument.description for argument in section.value}
    return {name: _short(text) for name, text in found.items()}


def _short(text: str, most: int = 200) -> str:
    """Take whole sentences of a description, of up to `most` characters but at least one.

    >>> _short("Share of zeros, at least 0. The rest stays active.", most=40)
    'Share of zeros, at least 0'
    >>> _short("A key of `itop_prune.redistribution.REDISTRIBUTIONS`.")
    'One of momentum, magnitude, nonzeros'
    """
    table = r"\b([Aa]) key of `itop_prune\.(\w+)\.(\w+)`"
    text = re.sub(table, _names_of_table, " ".join(text.split()))
    found, *others = re.split(r"(?<=\.)\s+(?=[A-Z`\"'])", text)
    for sentence in others:
        if len(found) + len(sentence) >= most:
            break
        found = f"{found} {sentence}"
    return found.rstrip(".")


def _names_of_table(match: re.Match[str]) -> str:
    article, module, table = match.groups()
    names = getattr(getattr(itop_prune, module), table)
    return f"{'One' if article == 'A' else 'one'} of {', '.join(names)}"
