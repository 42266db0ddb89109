"""The authors' procedure: its update by hand, and equal to the runner from equal masks."""

import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from itop_prune_tools.checks import authors_procedure as authors
from itop_prune_tools.config.recipe import Recipe, read_recipe
from itop_prune_tools.data.source import CPU
from itop_prune_tools.reports import comparison
from itop_prune_tools.training import command as train
from itop_prune_tools.training.build import build_model
from torch import nn

import itop_prune

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
STATIC, DENSE = ("regrow=null",), ("regrow=null", "masks=null")
GRADIENT, RANDOM = ("regrow.every=20", "regrow.grow=gradient"), ("regrow.every=20",)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> list[str]:
    """Override the quickstart: 4 epochs of 44 steps, on digits with noise.

    Without it equal pixels would have equal gradients, which tie.
    """
    with np.load(ROOT / "tools" / "data" / "digits.npz") as file:
        images, labels = file["images"] * np.uint8(14), file["labels"]
    images += np.random.default_rng(0).integers(0, 14, images.shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(
        path,
        x_train=images[:1408],
        y_train=labels[:1408],
        x_test=images[1408:],
        y_test=labels[1408:],
    )
    times = ["epochs=2", "multiplier=2", "lr_schedule.decay_milestones=[1.5]"]
    return [f"data={{name: npz, root: {path}, batch_size: 32}}", *times]


def recipe(*overrides: str) -> Recipe:
    return read_recipe(QUICKSTART, overrides)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MASK = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
WEIGHT = torch.tensor([4.0, -1.0, 3.0, -2.0, 0.0, 0.0, 0.0, 0.0])


def updated(weight: torch.Tensor, rate: float, grad: list[float]) -> list[float]:
    return authors.update_mask(MASK, weight, rate, generator(), torch.tensor(grad)).tolist()


def test_an_update_by_hand():
    """Pruned are -1 and -2, half of four; growth takes a pruned position and the last."""
    grad = [9.0, 0.0, 9.0, -6.0, 1.0, 2.0, 3.0, -5.0]
    assert updated(WEIGHT, 0.5, grad) == [1, 0, 1, 1, 0, 0, 0, 1]


def test_the_number_of_pruned_weights_is_rounded_up():
    grad = [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0]
    assert updated(WEIGHT, 0.3, grad) == [1, 0, 1, 0, 1, 1, 0, 0]


def test_weights_that_tie_are_pruned_together_and_as_many_grow():
    grad = [0.0, 0.0, 0.0, 0.0, 4.0, 3.0, 2.0, 1.0]
    weight = torch.tensor([4.0, 2.0, -2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    assert updated(weight, 0.25, grad) == [1, 0, 0, 0, 1, 1, 1, 0]


def test_growth_at_random_keeps_what_is_large_and_grows_as_many_on_average():
    mask = (torch.rand(100, 100, generator=generator()) < 0.2).float()
    weight = torch.randn(100, 100, generator=generator(1)) * mask
    active, draws = int(mask.sum()), generator(2)
    largest = weight.abs().flatten().topk(active - math.ceil(0.5 * active)).indices
    counts = []
    for _ in range(100):
        moved = authors.update_mask(mask, weight, 0.5, draws)
        assert set(moved.unique().tolist()) == {0.0, 1.0}
        assert bool(moved.flatten()[largest].all())
        counts.append(int(moved.sum()))
    assert len(set(counts)) > 10
    deviation = math.sqrt(0.5 * active)  # of one update, a little above Bernoulli's own
    assert max(abs(count - active) for count in counts) < 5 * deviation
    assert abs(sum(counts) / 100 - active) < 5 * deviation / 10


def test_if_every_inactive_position_grows_all_are_active():
    assert bool(authors.update_mask(torch.ones(8), torch.arange(1.0, 9.0), 0.25, generator()).all())


def test_masks_are_drawn_position_by_position_with_the_density_of_their_layer():
    weights = {"a": torch.zeros(300, 784), "b": torch.zeros(100, 300), "c": torch.zeros(10, 100)}
    masks = authors.draw_masks(weights, generator(), sparsity=0.95, method="ERK")
    exact = itop_prune.distributions.active_counts(
        {name: tuple(w.shape) for name, w in weights.items()}, 0.05
    )
    for name, count in exact.items():
        assert 0 < abs(int(masks[name].sum()) - count) < 5 * math.sqrt(count)


def test_masks_multiply_weights_and_momentum():
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    authors.multiply({"weight": mask}, {"weight": layer.weight}, optimizer)
    for tensor in (layer.weight, optimizer.state[layer.weight]["momentum_buffer"]):
        assert torch.equal(tensor != 0, mask.bool())


def trained_by_ours(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Train by the runner; return test accuracy and R_s."""
    assert train.main([str(QUICKSTART), *overrides, "--out", str(folder)]) == 0
    found = comparison.read(folder.parent, [folder])
    return found.top1[0], found.explored[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", [DENSE, STATIC, GRADIENT], ids=["dense", "static", "gradient"])
def test_from_the_same_masks_it_is_the_run_of_the_runner(method, short, tmp_path, monkeypatch):
    """Only random growth and the drawing of the masks differ."""
    ours = trained_by_ours(tmp_path / "ours", [*short, *method])
    assert ours[0] > 50
    settings = recipe(*short, *method)
    model = build_model(settings, None, CPU)
    masks = itop_prune.apply(model, seed=settings.seed, **settings.masks) if settings.masks else {}
    drawn = {name: itop.mask.float() for name, itop in masks.items()}
    monkeypatch.setattr(authors, "draw_masks", lambda *_, **__: drawn)
    top1, explored, active = authors.train(settings)
    assert (top1, explored) == ours
    assert set(active) == {2510 if masks else 0}
    assert len(active) == (1 + 176 // 20 if method == GRADIENT else 1)


@pytest.mark.slow
def test_random_growth_explores_as_the_runner_does_while_counts_drift(short, tmp_path):
    settings = recipe(*short, *RANDOM)
    _, explored, active = authors.train(settings)
    assert len(set(active)) > 3
    assert all(abs(count - 2510) < 0.2 * 2510 for count in active)
    assert explored == pytest.approx(
        trained_by_ours(tmp_path / "ours", [*short, *RANDOM])[1], rel=0.05
    )
    assert authors.train(settings)[2] == active
    assert authors.train(replace(settings, seed=1))[2] != active


def test_what_is_off_the_mask_is_zero_at_the_end_and_at_every_update(short, monkeypatch):
    models, build, move = [], authors.build_model, authors.update_mask

    def build_and_keep(*arguments):
        models.append(build(*arguments))
        return models[-1]

    def look(mask, weight, *others):
        assert not bool(weight[mask == 0].any())
        return move(mask, weight, *others)

    monkeypatch.setattr(authors, "build_model", build_and_keep)
    monkeypatch.setattr(authors, "update_mask", look)
    for method in (STATIC, GRADIENT):
        *_, active = authors.train(recipe(*short, *method))
        weights = [weight for weight in models.pop().parameters() if weight.ndim > 1]
        assert (
            0.8 * active[-1] < sum(int(weight.count_nonzero()) for weight in weights) <= active[-1]
        )


def test_the_rate_falls_to_its_last_at_the_last_step(short, monkeypatch):
    rates, move = [], authors.update_mask

    def note(mask, weight, rate, *others):
        rates.append(rate)
        return move(mask, weight, rate, *others)

    monkeypatch.setattr(authors, "update_mask", note)
    authors.train(recipe(*short, "regrow.every=88"))
    assert rates == pytest.approx([0.2525] * 3 + [0.005] * 3)


# The command


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory) -> Path:
    """A recipe and, beside it in ours/, two runs of the runner."""
    folder = tmp_path_factory.mktemp("set")
    path = folder / "short.yaml"
    path.write_text(recipe(*short, *RANDOM).as_yaml(), encoding="utf-8")
    assert train.main([str(path), "--seeds", "2", "--out", str(folder / "ours")]) == 0
    return folder


@pytest.fixture
def set_itop(trained, monkeypatch) -> Path:
    """Two runs of the recipe that is put in place of SET-ITOP's."""
    monkeypatch.setitem(authors.RECIPES, "SET-ITOP", trained / "short.yaml")
    return trained / "ours"


def test_every_method_is_a_recipe_and_each_is_trained_as_the_runner_trains_it():
    assert list(authors.RECIPES) == ["dense", "static", "SET-ITOP", "RigL-ITOP"]
    for path in authors.RECIPES.values():
        found = read_recipe(path)
        assert (found.masks or {}).keys() <= {"sparsity", "method"}
        assert (found.regrow or {}).keys() <= {"every", "rate", "prune", "grow"}
        assert (found.regrow or {}).get("prune") in (None, "magnitude")
        assert found.lr_schedule is not None
        assert (found.mixup, found.loss, found.ema, found.clip_grad_norm, found.accelerator) == (
            None,
        ) * 5


@pytest.mark.slow
def test_a_line_a_seed_and_what_they_come_to(set_itop, capsys):
    capsys.readouterr()
    assert (
        authors.main(
            ["--method", "SET-ITOP", "--sparsity", "0.95", "--seeds", "3", "--ours", str(set_itop)]
        )
        == 0
    )
    *seeds, theirs, drift, ours = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in seeds] == ["seed 0", "seed 1", "seed 2"]
    assert len({line.partition("active")[2] for line in seeds}) == 3
    top1 = [float(re.search(r"top-1 ([\d.]+) %", line)[1]) for line in seeds]
    assert float(re.search(r"3 seeds: ([\d.]+) ±", theirs)[1]) == pytest.approx(
        statistics.mean(top1), abs=0.011
    )
    mean = statistics.mean(comparison.read(set_itop).top1)
    shown, error = re.fullmatch(
        rf"ours, 2 seeds: {mean:.2f} ± .* less theirs: ([+-].*) ± (.*)", ours
    ).groups()
    assert float(shown) == pytest.approx(mean - statistics.mean(top1), abs=0.011)
    assert float(error) > 0
    low, high = map(float, re.search(r"drawn: (\S+) to (\S+) %", drift).groups())
    assert -20 < low <= 0 <= high < 20
    assert low < high


def test_runs_of_another_recipe_are_refused_before_any_training(set_itop, capsys):
    capsys.readouterr()
    for other in (["--sparsity", "0.9"], ["--multiplier", "3"]):
        assert authors.main(["--method", "SET-ITOP", *other, "--ours", str(set_itop)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "is not the recipe of --method, --sparsity and --multiplier" in said.err


def test_one_run_and_none_are_refused(set_itop, tmp_path, capsys):
    shutil.copytree(set_itop / "seed0", tmp_path / "seed0")
    assert authors.main(["--method", "SET-ITOP", "--ours", str(tmp_path)]) == 1
    message = "holds one finished run; a deviation needs two; train another"
    assert message in capsys.readouterr().err
    assert authors.main(["--method", "SET-ITOP", "--ours", str(tmp_path / "nothing")]) == 1
    assert "holds no finished run" in capsys.readouterr().err


def test_what_can_not_be_read_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        authors.main(["--method", "dense", "--sparsity", "0.98"])
    assert "--sparsity is of masks, and --method dense has none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        authors.main(["--method", "dense", "--seeds", "1"])
    assert "a deviation needs two, so give a number from 2" in capsys.readouterr().err
