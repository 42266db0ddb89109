"""FLOPs: against published numbers and torch's own counter, by the weight that is read."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.toys import mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import itop_prune
from itop_prune.analysis.flops import FLOPs, flops

REFERENCE = json.loads((Path(__file__).parents[2] / "reference" / "numbers.json").read_text())[
    "flops_resnet50_224"
]


@pytest.fixture(scope="module")
def resnet50() -> dict[float, FLOPs]:
    """The cost of a ResNet-50 by sparsity; the forward is counted once."""
    model = timm.create_model("resnet50")
    found: dict[float, FLOPs] = {}
    for case in REFERENCE["forward_ratio_macs"]:
        masks = itop_prune.apply(model, case["sparsity"], case["distribution"])
        cost = next(iter(found.values()), None) or flops(model, torch.zeros(1, 3, 224, 224))
        densities = {name: itop.active / itop.mask.numel() for name, itop in masks.items()}
        found[case["sparsity"]] = dataclasses.replace(cost, densities=densities)
        itop_prune.remove(model)
    return found


def test_resnet50_layer_by_layer(resnet50: dict[float, FLOPs]) -> None:
    expected = {f"{name}.weight": 2 * macs for name, macs in REFERENCE["per_layer_macs"].items()}
    assert resnet50[0.9].by_weight == expected
    assert resnet50[0.9].dense_forward == 2 * REFERENCE["total_macs"]


def test_resnet50_sparse_over_dense(resnet50: dict[float, FLOPs]) -> None:
    for case in REFERENCE["forward_ratio_macs"]:
        found = resnet50[case["sparsity"]]
        expected = pytest.approx(case["ratio_macs"], rel=REFERENCE["tolerance"])
        assert found.sparse_forward / found.dense_forward == expected, case


def test_training_of_resnet50_at_90_percent_as_the_paper_reports_it(
    resnet50: dict[float, FLOPs],
) -> None:
    """Static and RigL with the dense gradient at every 4000th step: .24 of dense training."""
    found = resnet50[0.9]
    for every in (None, 4000):
        share = found.training_step(every) / (3 * found.dense_forward)
        assert share == pytest.approx(0.24, abs=0.005)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "mixer_s32_224", "convnext_atto"]
)
def test_the_dense_cost_is_that_of_torch_s_own_counter(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.zeros(1, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(x)
    itop_prune.apply(model, 0.5)
    assert flops(model, x).dense_forward == counter.get_total_flops()


def test_a_model_without_masks_has_one_cost() -> None:
    found = flops(mlp(), torch.zeros(1, 20))
    assert found.sparse_forward == found.dense_forward == 2 * 560
    assert found.by_weight == {}


def test_the_cost_is_of_the_whole_batch() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    assert (
        flops(model, torch.zeros(7, 20)).dense_forward
        == 7 * flops(model, torch.zeros(1, 20)).dense_forward
    )


class Reader(nn.Module):
    """Reads one layer's weight itself, calls one twice, and uses parts of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.twice, self.parts = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.read.weight)
        x = self.twice(self.twice(x))
        top, bottom = self.parts.weight.chunk(2)
        return nn.functional.linear(x, top.bfloat16().float()) + x @ bottom.t() @ torch.ones(3, 3)


def test_a_weight_counts_as_often_as_it_is_read_by_whoever_reads_it() -> None:
    model = Reader()
    itop_prune.apply(model, 0.5)
    found = flops(model, torch.zeros(1, 6))
    assert found.by_weight == {"read.weight": 72, "twice.weight": 144, "parts.weight": 72}
    assert found.others == 18


def test_multihead_attention_and_rnns_are_counted() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    itop_prune.apply(attention, 0.5)
    tokens = torch.zeros(1, 5, 8)
    found = flops(attention, (tokens, tokens, tokens))
    assert found.by_weight == {"in_proj_weight": 2 * 5 * 192, "out_proj.weight": 2 * 5 * 64}
    assert found.others == 2 * 2 * 5 * 5 * 8
    rnn = nn.LSTM(3, 4, batch_first=True)
    itop_prune.apply(rnn, 0.5)
    assert flops(rnn, torch.zeros(1, 5, 3)).by_weight == {
        "weight_ih_l0": 2 * 5 * 48,
        "weight_hh_l0": 2 * 5 * 64,
    }


def test_the_cost_at_other_densities_follows_from_that_of_each_weight() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5, "uniform")
    found = flops(model, torch.zeros(1, 20))
    assert found.sparse_forward == 560
    assert found.forward({"0.weight": 1.0, "2.weight": 0.0, "4.weight": 0.0}) == 640
    masks["4.weight"].mask[:] = True
    assert flops(model, torch.zeros(1, 20)).sparse_forward == 560 + 48


def test_training_costs_three_forwards_and_what_the_dense_gradient_takes() -> None:
    """The formula of the paper notes: (3 f_S (every - 1) + 2 f_S + f_D) / every."""
    found = FLOPs({"a": 1000}, 0, {"a": 0.2})
    assert found.training_step() == pytest.approx(600)
    assert found.training_step(every=4) == pytest.approx((3 * 200 * 3 + 2 * 200 + 1000) / 4)
    assert found.training_step(every=1) == pytest.approx(2 * 200 + 1000)
    assert found.training_step(densities={"a": 0.5}) == pytest.approx(1500)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    masks = itop_prune.apply(model, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    flops(model, torch.zeros(3, 20))
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(itop.parameter.grad is None for itop in masks.values())


def test_inputs_that_do_not_fit_are_one_clear_error() -> None:
    model = mlp().train()
    with pytest.raises(
        ValueError,
        match=r"Sequential can't be run with inputs of shape \[\(1, 7\)\].*give what its forward",
    ):
        flops(model, torch.zeros(1, 7))
    assert model.training


class Pair(nn.Module):
    """Wants two inputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image, self.head = (
            nn.Embedding(9, 6),
            nn.Linear(4, 6, bias=False),
            nn.Linear(6, 3, bias=False),
        )

    def forward(self, words: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(words).mean(1) + self.image(image))


INPUTS = (torch.tensor([[1, 2, 8]]), torch.zeros(1, 4))


def test_a_model_of_several_inputs_takes_a_tuple_of_them() -> None:
    model = Pair()
    masks = itop_prune.apply(model, 0.5, "uniform")
    cost = flops(model, INPUTS)
    assert (cost.dense_forward, cost.sparse_forward) == (2 * (24 + 18), 24 + 18)
    assert itop_prune.summarize(model, example_inputs=INPUTS).flops == cost
    assert list(masks) == ["image.weight", "head.weight"]


class Batch(nn.Module):
    """Wants a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.fc(batch["image"])


def test_a_model_of_a_mapping_takes_a_mapping() -> None:
    assert flops(Batch(), {"image": INPUTS[1]}).dense_forward == 24
    with pytest.raises(ValueError, match="Batch can't be run with inputs of shape"):
        flops(Batch(), INPUTS[1])


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (INPUTS[0], "missing 1 required positional argument: 'image'"),
        (INPUTS[::-1], "Long"),
        ((*INPUTS, INPUTS[0]), "takes 3 positional arguments but 4 were given"),
    ],
    ids=["one", "exchanged", "three"],
)
def test_a_model_of_several_inputs_says_what_is_wrong_with_others(
    inputs: object, reason: str
) -> None:
    model = Pair()
    itop_prune.apply(model, 0.5, "uniform")
    for count in (flops, lambda model, inputs: itop_prune.summarize(model, example_inputs=inputs)):
        with pytest.raises(
            ValueError, match=rf"Pair can't be run with inputs of shape .*{reason}"
        ) as caught:
            count(model, inputs)
        assert str(caught.value).endswith(
            "give what its forward takes, a tensor or a tuple of arguments"
        )
