"""Batch norms that only follow a convolution become part of it, and outputs stay."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import itop_prune
from itop_prune.inference.deployment import deploy
from itop_prune.inference.folding import fold_norms


def with_statistics(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and scales as after training."""
    generator = torch.Generator().manual_seed(1)

    def some(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                some(norm.running_mean, -0.5, 0.5)
                some(norm.running_var, 0.3, 3.0)
                some(norm.weight, -1.5, 1.5)
                some(norm.bias, -0.5, 0.5)
    return model.eval()


def check(model: nn.Module, x: Tensor, folded: int) -> nn.Module:
    """Fold so many norms of a copy, which must give the outputs of the model."""
    made = copy.deepcopy(model)
    assert fold_norms(made, (x,)) == folded
    with torch.no_grad():
        for given in (x, x.flip(0)[:1], torch.cat([x, 2 * x])):
            torch.testing.assert_close(made(given), model(given), rtol=1e-4, atol=1e-5)
    return made


def conv(channels: int = 4, **keywords: object) -> nn.Conv2d:
    return nn.Conv2d(4, channels, 3, padding=1, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers",
    [
        (conv(), nn.BatchNorm2d(4)),
        (conv(6, bias=False), nn.BatchNorm2d(6, affine=False)),
        (conv(padding_mode="reflect"), nn.BatchNorm2d(4, eps=0.1)),
        (conv(8, groups=2, stride=2), BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)),
        (nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3)),
        (nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)),
        (conv().double(), nn.BatchNorm2d(4).double()),
    ],
    ids=["2d", "plain", "padded", "activation", "1d", "3d", "double"],
)
def test_a_convolution_takes_the_batch_norm_after_it(layers: tuple[nn.Module, ...]) -> None:
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(*layers, nn.ReLU()))
    x = torch.randn(3, 4, 6, 6, dtype=next(model.parameters()).dtype)
    made = check(model, x, folded=1)
    assert not list(made[len(layers) - 1].parameters())


def in_a_row(block: Any, x: Tensor) -> Tensor:
    output: Tensor = block.norm(block.conv(x))
    return output


class Block(nn.Module):
    """Two convolutions with a batch norm each; the second pair is always on its own."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor] = in_a_row) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.conv, self.last = conv(), conv()
        self.norm, self.norm_of_last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        with_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of_last(self.last(self.first(self, x)))


def of_one_output(block: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    y = block.conv(x)
    return block.norm(y) + change(y)


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "output": lambda block, x: of_one_output(block, x, torch.relu),
    "part of the output": lambda block, x: of_one_output(block, x, lambda y: y[:, :1]),
    "output, by the norm twice": lambda block, x: of_one_output(block, x, block.norm),
    "output, in place": lambda block, x: block.norm(block.conv(x).mul_(2)),
    "output, of which the norm gets a view": lambda block, x: block.norm(
        block.conv(x).transpose(1, 2)
    ),
    "norm elsewhere": lambda block, x: in_a_row(block, x) + block.norm(x),
    "convolution elsewhere": lambda block, x: block.conv(in_a_row(block, x)),
    "weight": lambda block, x: in_a_row(block, x) + block.conv.weight.mean(),
    "bias": lambda block, x: in_a_row(block, x) + block.conv.bias.view(-1, 1, 1),
}


@pytest.mark.parametrize("first", READS.values(), ids=READS)
def test_a_convolution_stays_where_more_is_read(first: Callable[[Any, Tensor], Tensor]) -> None:
    check(Block(first), torch.randn(3, 4, 4, 4), folded=1)


def test_a_convolution_stays_where_its_output_is_returned() -> None:
    class Telling(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return {"y": y, "z": self.norm_of_last(self.last(self.norm(y)))}

    check(Telling(), torch.randn(3, 4, 4, 4), folded=1)


class Centred(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def sharing() -> nn.Module:
    block = Block(lambda block, x: in_a_row(block, block.third(x)))  # type: ignore[operator]
    block.third = conv()
    block.third.weight = block.conv.weight
    return block


def two_norms() -> nn.Module:
    block = Block(lambda block, x: of_one_output(block, x, block.second))
    block.second = with_statistics(nn.BatchNorm2d(4))
    return block


def changed(change: Callable[[Block], object]) -> nn.Module:
    block = Block()
    change(block)
    return block.eval()


@pytest.mark.parametrize(
    "block",
    [
        sharing(),
        two_norms(),
        changed(lambda b: b.conv.register_forward_hook(lambda conv, inputs, output: 2 * output)),
        changed(lambda b: b.norm.register_forward_pre_hook(lambda norm, inputs: 2 * inputs[0])),
        changed(lambda b: parametrizations.weight_norm(b.conv)),
        changed(lambda b: setattr(b, "conv", Centred(4, 4, 3, padding=1))),
        changed(lambda b: setattr(b, "norm", nn.BatchNorm2d(4, track_running_stats=False))),
        changed(lambda b: setattr(b, "norm", nn.InstanceNorm2d(4, track_running_stats=True))),
    ],
    ids=[
        "shared",
        "two norms",
        "hook",
        "hook of norm",
        "parametrized",
        "own",
        "no statistics",
        "other norm",
    ],
)
def test_other_convolutions_and_norms_stay(block: nn.Module) -> None:
    check(block, torch.randn(3, 4, 4, 4), folded=1)


def test_both_are_folded_where_nothing_else_reads() -> None:
    check(Block(), torch.randn(3, 4, 4, 4), folded=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripts_between_do_not_matter() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU()), conv())
    check(with_statistics(model), torch.randn(3, 4, 4, 4), folded=1)


def test_half_precision_stays_as_it_is() -> None:
    assert fold_norms(Block().bfloat16(), (torch.randn(1, 4, 6, 6).bfloat16(),)) == 0


# --- in a deployed model --------------------------------------------------------------------------


@functools.cache
def deployed_and_model() -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = Block(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        model.norm.weight[1] = 0  # type: ignore[union-attr]
    itop_prune.apply(model, 0.8)
    return deploy(model, x, choices=("sparse",)), model, x


def test_a_deployed_model_says_how_many_norms_it_has_no_more() -> None:
    deployed, model, x = deployed_and_model()
    assert deployed.report.norms == 2
    assert "batch norms that are part of convolutions: 2" in str(deployed.report)
    assert {row.storage for row in deployed.report.choices} == {"sparse"}
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


def test_copies_and_pickles_of_it_compute_the_same() -> None:
    deployed, _, x = deployed_and_model()
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(other(x), deployed(x))


def test_the_original_keeps_its_norms() -> None:
    deployed, model, _ = deployed_and_model()
    assert type(model.norm) is nn.BatchNorm2d
    assert {"norm.weight", "norm.running_mean"} <= model.state_dict().keys()
    assert not any(name.startswith("norm") for name in deployed.state_dict())


def test_a_model_that_is_dense_in_the_end_has_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(2, 4, 6, 6)
    itop_prune.apply(model, 0.8)
    monkeypatch.setattr("itop_prune.inference.deployment.TOLERANCE", -1.0)
    deployed = deploy(model, x)
    assert deployed.report.norms == 0
    assert type(deployed.norm) is nn.BatchNorm2d
