"""The table of what can be masked: own rows, the order of dimensions, and what follows from it."""

import pytest
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune.patterns import best_of_groups, grow_in_groups, holds


class Stored(nn.Module):
    """A linear map of 8 inputs to 12 outputs, stored as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class Subclass(Stored):
    pass


class Experts(nn.Module):
    """Three experts of 8 inputs and 5 outputs in one tensor."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(*((3, 8, 5) if transposed else (3, 5, 8))))


FULL_NAME = f"{__name__}.Stored"


@pytest.mark.parametrize("key", [Stored, FULL_NAME], ids=["class", "name"])
@pytest.mark.parametrize("kind", [Stored, Subclass])
def test_a_row_masks_a_class_and_its_subclasses(
    key: type[nn.Module] | str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(kind(), nn.Linear(12, 4))
    monkeypatch.setitem(itop_prune.MASKABLE, key, {"kernel": "in out"})
    masks = itop_prune.apply(model, 0.5)
    assert list(masks) == list(itop_prune.find_masks(model)) == ["0.kernel", "1.weight"]
    assert not model[0].kernel[~masks["0.kernel"].mask].any()
    itop_prune.remove(model)
    assert type(model[0]) is kind
    assert [name for name, _ in model[0].named_parameters()] == ["kernel"]


def test_the_nearest_class_in_the_table_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Linear):
        pass

    monkeypatch.setitem(itop_prune.MASKABLE, Odd, {})
    assert list(itop_prune.apply(nn.Sequential(Odd(4, 4), nn.Linear(4, 4)), 0.5)) == ["1.weight"]


ORDERED = {
    "out in": (nn.Linear(8, 12), (12, 8), 12, 1),
    "in out": (Stored(), (12, 8), 12, 0),
    "experts out in": (Experts(), (15, 8), 15, 2),
    "experts in out": (Experts(transposed=True), (15, 8), 15, 1),
}


@pytest.mark.parametrize("order", ORDERED)
@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_shapes_and_n_m_patterns_follow_the_order(
    order: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, kernel_shape, outputs, input_dim = ORDERED[order]
    name = next(iter(dict(layer.named_parameters())))
    monkeypatch.setitem(itop_prune.MASKABLE, type(layer), {name: order})
    (itop,) = itop_prune.apply(layer, 0.5, pattern="2:4", storage=storage).values()
    found = (itop.kernel_shape, itop.outputs, itop.input_dim)
    groups = itop.mask.movedim(input_dim, -1).reshape(-1, 4)
    itop_prune.remove(layer)
    assert found == (kernel_shape, outputs, input_dim)
    assert groups.sum(1).tolist() == [2] * len(groups)


def test_distributions_get_out_and_in_and_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(itop_prune.MASKABLE, Stored, {"kernel": "in out"})
    monkeypatch.setitem(itop_prune.MASKABLE, Experts, {"kernels": "experts out in"})
    model = nn.Sequential(Stored(), Experts(), nn.ConvTranspose2d(6, 4, 3))
    seen = {}

    def spy(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
        seen.update(shapes)
        return dict.fromkeys(shapes, density)

    itop_prune.count_active(model, 0.5, spy)
    assert seen == {"0.kernel": (12, 8), "1.kernels": (15, 8), "2.weight": (4, 6, 3, 3)}


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_updates_keep_a_pattern_along_the_inputs(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(itop_prune.MASKABLE, Stored, {"kernel": "in out"})
    model = nn.Sequential(Stored(), nn.ReLU(), nn.ConvTranspose1d(12, 4, 1))
    masks = itop_prune.apply(model, 0.5, pattern="2:4", storage=storage)
    first = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=6, every=2, grow="gradient")
    for _ in range(6):
        hidden = model[1](model[0](torch.randn(16, 8)))
        model[2](hidden.unsqueeze(-1)).square().mean().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    for name, itop in masks.items():
        assert not torch.equal(itop.mask, first[name])
        groups = itop.mask.movedim(0, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()

    again = nn.Sequential(Stored(), nn.ReLU(), nn.ConvTranspose1d(12, 4, 1))
    itop_prune.apply(again, 0.5, pattern="2:4", storage=storage, seed=1)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[0].kernel, model[0].kernel)


def test_a_mask_that_keeps_the_pattern_along_the_outputs_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(itop_prune.MASKABLE, Stored, {"kernel": "in out"})
    layer = Stored()
    itop_prune.apply(layer, 0.5, pattern="2:4")
    broken = {**layer.state_dict()}
    broken["kernel_mask"] = torch.tensor([True, True, False, False]).repeat(8, 3)
    with pytest.raises(RuntimeError, match="does not hold the N:M pattern"):
        layer.load_state_dict(broken)


def test_groups_of_a_transposed_convolution_stay_within_its_own_groups() -> None:
    whole = nn.ConvTranspose1d(8, 4, 1, groups=2)
    assert itop_prune.apply(whole, 0.5, pattern="2:4")["weight"].active == 8
    with pytest.raises(ValueError, match=r"dimension 0 of \(8, 1, 1\) is no multiple of 4"):
        itop_prune.apply(nn.ConvTranspose1d(8, 4, 1, groups=4), 0.5, pattern="2:4")


def test_groups_along_another_dimension_are_those_of_the_moved_tensor() -> None:
    scores = torch.rand(3, 5, 8)
    mask = best_of_groups(scores, 2, 4, dim=2)
    assert torch.equal(mask, best_of_groups(scores.movedim(2, 1), 2, 4).movedim(1, 2))
    assert holds(mask, 2, 4, dim=2)
    assert not holds(mask, 2, 4)
    kept = mask & (torch.rand(mask.shape) < 0.5)
    assert holds(grow_in_groups(kept, scores, 2, 4, dim=2), 2, 4, dim=2)
    with pytest.raises(ValueError, match=r"groups of 4 can't be formed along dimension 0 of"):
        best_of_groups(scores, 2, 4, dim=0)


WRONG_ROWS = {
    "order": (
        {"kernel": "inputs out"},
        r"'inputs out' for 'kernel' of Stored; allowed are 'out in'",
    ),
    "name": ({"kernle": "in out"}, r"0\.kernle: Stored has no 'kernle': correct its row"),
    "dimensions": (
        {"kernel": "experts in out"},
        r"0\.kernel: its shape \(8, 12\) can't be read as 'experts in out': correct the row",
    ),
}


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_row_that_does_not_fit_is_an_error(
    row: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(itop_prune.MASKABLE, Stored, row)
    model = nn.Sequential(Stored(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5)
    assert type(model[0]) is Stored
    assert type(model[1]) is nn.Linear
