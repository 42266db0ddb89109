"""The arguments of the callbacks, and what a user learns without the other library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.toys import mlp

import itop_prune
from itop_prune.integrations.sparse_training import SparseTraining, split

ROOT = Path(itop_prune.__file__).parents[1]


def test_arguments_go_to_apply_and_to_the_scheduler_and_a_seed_to_both() -> None:
    for_apply, for_scheduler = split(
        {"sparsity": 0.8, "exclude": "head", "every": 4, "grow": "gradient", "seed": 3}
    )
    assert for_apply == {"sparsity": 0.8, "exclude": "head", "seed": 3}
    assert for_scheduler == {"every": 4, "grow": "gradient", "seed": 3}


def test_a_seed_alone_places_no_masks() -> None:
    assert split({"every": 4, "seed": 3}) == ({}, {"every": 4, "seed": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.8, "evry": 4}, r"unknown argument 'evry' \(nearest: 'every'\)"),
        ({"sparcity": 0.8, "every": 4}, r"unknown argument 'sparcity' \(nearest: 'sparsity'\)"),
        ({"every": 4, "total_steps": 8}, "total_steps comes from the trainer; leave it out"),
        ({"every": 4, "optimizer": None}, "optimizer comes from the trainer; leave it out"),
        ({"sparsity": 0.8}, "the argument every is missing"),
        ({}, "the argument every is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SparseTraining(**arguments)


def test_masks_are_placed_or_found() -> None:
    model = mlp()
    placed = SparseTraining(sparsity=0.5, exclude="4", every=4)
    placed.place_masks(model)
    assert list(placed.masks) == ["0.weight", "2.weight"]

    found = SparseTraining(every=4)
    found.place_masks(model)
    assert found.masks == placed.masks == itop_prune.find_masks(model)
    placed.place_masks(model)  # a second start of the same training


def test_a_model_without_masks_and_without_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no masks.*sparsity=0\.8.*itop_prune\.apply"):
        SparseTraining(every=4).place_masks(mlp())


def test_masks_beside_arguments_for_others_are_refused() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    with pytest.raises(ValueError, match=r"has masks already.*sparsity.*leave out"):
        SparseTraining(sparsity=0.9, every=4).place_masks(model)
    assert all(itop.mask.equal(before[name]) for name, itop in masks.items())


@pytest.mark.parametrize(
    ("module", "library"), [("huggingface", "transformers"), ("lightning", "lightning")]
)
def test_an_integration_without_its_library_says_what_to_install(module: str, library: str) -> None:
    program = (
        f"import sys; sys.modules[{library!r}] = None\n"  # an import of None fails
        "import itop_prune\n"
        f"try: import itop_prune.integrations.{module}\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    found = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
    )
    assert f"itop_prune.integrations.{module} needs {library}" in found.stdout
    assert found.stdout.strip().endswith("pip install 'itop_prune[integrations]'")
