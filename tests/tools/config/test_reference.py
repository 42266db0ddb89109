"""The reference of recipe keys: complete, true, and in words of YAML."""

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from itop_prune_tools.config.packaged import packaged_recipes
from itop_prune_tools.config.recipe import Recipe
from itop_prune_tools.config.reference import Key, SectionKeys, reference
from itop_prune_tools.config.sections import section_calls
from itop_prune_tools.data.datasets import KINDS, open_data

FOUND = reference()


def keys_of(name: str, condition: str | None = None) -> dict[str, Key]:
    sections = [
        section
        for section in FOUND
        if section.name == name and condition in (None, section.condition)
    ]
    assert sections
    return {key.name: key for section in sections for key in section.keys}


def calls() -> Iterator[tuple[SectionKeys, Callable[..., Any], tuple[str, ...]]]:
    for section in FOUND:
        data = {"name": "folder"} if section.condition == "if data.name is folder" else {}
        sections = section_calls(data)
        yield section, *sections.get(section.name, (Recipe, tuple(sections)))


def test_every_section_of_a_recipe_is_there_and_says_whether_it_is_needed() -> None:
    assert {section.name for section in FOUND} == {"", *section_calls({})}
    needed = {section.name for section in FOUND if "Needed." in section.about}
    assert needed == {"model", "data", "optimizer"}
    (regrow,) = (section for section in FOUND if section.name == "regrow")
    assert regrow.about[0] == "Left out: static masks."


@pytest.mark.parametrize("path", packaged_recipes().values(), ids=lambda path: path.stem)
def test_the_keys_of_a_packaged_recipe_are_there(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    own_of_models = {"num_classes", "img_size", "widths"}
    for section, values in recipe.items():
        if section not in section_calls({}):
            assert section in keys_of("")
            continue
        known = keys_of(section)
        if section == "data":
            (kind,) = (kind for kind in KINDS if values["name"] in kind.names)
            known = {**keys_of("data", ""), **keys_of("data", f"name: {', '.join(kind.names)}")}
        assert set(values) - own_of_models <= known.keys()


def test_a_default_is_that_of_the_signature_as_yaml() -> None:
    checked = 0
    for section, call, _ in calls():
        parameters = inspect.signature(call).parameters
        for key in section.keys:
            default = parameters[key.name].default
            if key.default == "needed":
                assert default is inspect.Parameter.empty
            elif key.default:
                plain = list(default) if isinstance(default, tuple) else default
                assert yaml.safe_load(key.default) == plain, key
                checked += 1
    assert checked > 100


def test_what_the_runner_gives_itself_and_what_yaml_can_not_write_is_left_out() -> None:
    for section, _, given in calls():
        assert not {key.name for key in section.keys} & set(given)
    assert "param_group_fn" not in keys_of("optimizer")
    assert not {"dataloader_config", "kwargs_handlers"} & keys_of("accelerator").keys()


def test_values_and_meanings_are_in_words() -> None:
    assert keys_of("data")["batch_size"].values == "a whole number"
    assert keys_of("masks")["storage"].values == "mask, sparse"
    assert keys_of("regrow")["final_sparsity"].values == "a number"
    assert "sampled_gradient" in keys_of("regrow")["grow"].meaning
    assert "bf16" in keys_of("accelerator")["mixed_precision"].meaning
    assert keys_of("checkpoint")["every"].meaning == "Epochs between two checkpoints"
    assert keys_of("")["epochs"].meaning == "Epochs before `multiplier`"
    assert "lenet300" in " ".join(next(s for s in FOUND if s.name == "model").about)
    assert "snip" in " ".join(next(s for s in FOUND if s.name == "masks").about)


def test_each_kind_of_data_is_explained() -> None:
    known = typing.get_args(inspect.signature(open_data).parameters["name"].annotation)
    assert sorted(name for kind in KINDS for name in kind.names) == sorted(known)
    given = set(section_calls({})["data"][1])
    assert keys_of("data").keys() == inspect.signature(open_data).parameters.keys() - given


def test_augment_takes_other_keys_for_a_folder() -> None:
    assert keys_of("augment", "unless data.name is folder").keys() == {"padding", "hflip"}
    assert {"scale", "auto_augment"} <= keys_of("augment", "if data.name is folder").keys()


@pytest.mark.parametrize("name", ["digits", "npz"])
def test_a_key_that_a_kind_does_not_list_changes_nothing(name: str, tmp_path: Path) -> None:
    (kind,) = (kind for kind in KINDS if name in kind.names)
    images, labels = np.zeros((8, 4, 4), np.uint8), np.arange(8)
    images[:, 0] = np.arange(8)[:, None]
    path = tmp_path / "own.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    given: dict[str, Any] = {"root": str(path)} if "root" in kind.keys else {}
    others = {"root": "nowhere", "download": True, "image_size": 3, "train": "x", "workers": 9}
    unused = {key: value for key, value in others.items() if key not in kind.keys}
    assert len(unused) >= 4

    plain = open_data(name, batch_size=8, **given)
    same = open_data(name, batch_size=8, **given, **unused)
    for (x, y), (other_x, other_y) in zip(plain.epoch(0), same.epoch(0), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
