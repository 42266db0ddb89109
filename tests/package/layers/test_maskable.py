"""What can be masked, what is refused, and that a refusal names the weight, says what to do and changes nothing."""

from collections.abc import Callable

import pytest
import torch
from helpers.toys import convnet, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import itop_prune
from itop_prune.layers.maskable import plain_name, unwrap, walk


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight


def names(model: nn.Module) -> list[str]:
    return [name for name, _, _ in walk(model)]


def test_walk_yields_weights_of_convolutions_and_linear_maps_in_model_order() -> None:
    assert names(convnet()) == ["0.weight", "3.weight", "7.weight"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 3),
        nn.Conv2d(2, 2, 3),
        nn.Conv3d(2, 2, 3),
        nn.ConvTranspose1d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        nn.Linear(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_walk_finds_every_kind_of_convolution_and_linear_map(layer: nn.Module) -> None:
    assert names(layer) == ["weight"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.Embedding(4, 4),
        nn.PReLU(4),
        nn.RMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norms_and_embeddings_are_no_weights_to_mask(layer: nn.Module) -> None:
    assert names(layer) == []


def test_walk_finds_the_input_projection_of_attention() -> None:
    assert names(nn.MultiheadAttention(4, 2)) == ["in_proj_weight", "out_proj.weight"]


def test_walk_finds_separate_input_projections_of_attention() -> None:
    attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
    assert names(attention) == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    ]


def test_walk_finds_subclasses() -> None:
    class Standardised(nn.Conv2d):
        pass

    assert names(Standardised(2, 2, 3)) == ["weight"]


def test_walk_finds_masked_weights_too() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="2")
    assert names(model) == ["0.weight", "2.weight", "4.weight"]


def test_a_second_apply_is_refused() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="2")
    with pytest.raises(
        ValueError, match=r"2\.weight: it has a mask already; .*call itop_prune\.remove first"
    ):
        itop_prune.apply(model, 0.5)


def test_a_weight_tied_to_an_embedding_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"head\.weight: it is tied to embedding\.weight.*untie them"
    ):
        itop_prune.apply(TiedLanguageModel(), 0.5)


def test_two_tied_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(
        ValueError,
        match=r"0\.weight: it is tied to 1\.weight.*\n.*1\.weight: it is tied to 0\.weight",
    ):
        itop_prune.apply(model, 0.5)


def test_a_layer_used_twice_is_not_a_tied_weight() -> None:
    layer = nn.Linear(4, 4)
    assert list(itop_prune.apply(nn.Sequential(layer, nn.ReLU(), layer), 0.5)) == ["0.weight"]


def test_a_parametrized_weight_norm_is_refused() -> None:
    model = mlp()
    parametrizations.weight_norm(model[2])
    with pytest.raises(
        ValueError, match=r"2\.weight: it is parametrized .*call .*remove_parametrizations first"
    ):
        itop_prune.apply(model, 0.5)


def test_the_old_weight_norm_is_refused() -> None:
    model = mlp()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])
    with pytest.raises(
        ValueError, match=r"2\.weight: it is not a parameter .*call .*remove_weight_norm first"
    ):
        itop_prune.apply(model, 0.5)


def test_a_layer_pruned_by_torch_is_refused() -> None:
    model = mlp()
    prune.random_unstructured(model[2], "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"2\.weight: torch's own pruning masks it: call .*prune\.remove first"
    ):
        itop_prune.apply(model, 0.5)


def test_a_lazy_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match=r"1\.weight: its shape is not known yet: run the model once first"
    ):
        itop_prune.apply(model, 0.5)


def test_inference_mode_is_refused() -> None:
    model = mlp()
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"0\.weight: .*outside of torch\.inference_mode"),
    ):
        itop_prune.apply(model, 0.5)


def test_a_model_built_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"0\.weight: .*inference mode"):
        itop_prune.apply(model, 0.5)


def test_all_obstacles_are_named_at_once() -> None:
    model = mlp()
    parametrizations.weight_norm(model[2])
    prune.random_unstructured(model[4], "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"(?s)2\.weight: it is parametrized.*4\.weight: torch's own pruning"
    ):
        itop_prune.apply(model, 0.5)


def test_the_refusal_says_how_to_leave_the_weights_dense() -> None:
    model = mlp()
    parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"To leave them dense: exclude=\['2\.weight'\]"):
        itop_prune.apply(model, 0.5)


@pytest.mark.parametrize("tie", [False, True], ids=["parametrized", "tied"])
def test_what_is_excluded_is_no_obstacle(tie: bool) -> None:
    model = TiedLanguageModel()
    if not tie:
        model.head = parametrizations.weight_norm(nn.Linear(6, 10))
    assert list(itop_prune.apply(model, 0.5, exclude="head")) == ["body.weight"]


def test_a_model_with_nothing_to_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has nothing to mask: no weight matrix"):
        itop_prune.apply(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), 0.5)


@pytest.mark.parametrize("what", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_what_exists(what: str) -> None:
    message = rf"{what} pattern 'head' matches no weight; the weights are: 0\.weight, 2\.weight, 4\.weight"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(mlp(), 0.5, **{what: ["4", "head"]})


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"include='4' without exclude='\*' leaves nothing of: 0\.weight"
    ):
        itop_prune.apply(mlp(), 0.5, include="4", exclude="*")


def test_patterns_may_come_one_by_one() -> None:
    masks = itop_prune.apply(
        mlp(), 0.5, include=(p for p in ["0", "2"]), exclude=(p for p in ["2"])
    )
    assert list(masks) == ["0.weight"]


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"include=\(\).* leaves nothing of: 0\.weight"):
        itop_prune.apply(mlp(), 0.5, include=())


def test_a_long_list_of_weights_is_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    with pytest.raises(ValueError, match=r"10\.weight, 11\.weight, \.\.\. \(30 in all\)$"):
        itop_prune.apply(model, 0.5, include="head")


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("0.weight", ["0.weight"]),
        ("0", ["0.weight"]),
        ("*", ["0.weight", "2.weight", "4.weight"]),
        (["4", "0"], ["0.weight", "4.weight"]),
        ("[02].weight", ["0.weight", "2.weight"]),
    ],
)
def test_include_by_name_layer_or_pattern(include: str | list[str], expected: list[str]) -> None:
    assert list(itop_prune.apply(mlp(), 0.5, include=include)) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("4.weight", ["0.weight", "2.weight"]),
        ("4", ["0.weight", "2.weight"]),
        (("0", "2"), ["4.weight"]),
        ((), None),
    ],
)
def test_exclude_by_name_layer_or_nothing(
    exclude: str | tuple[str, ...], expected: list[str] | None
) -> None:
    assert list(itop_prune.apply(mlp(), 0.5, exclude=exclude)) == (
        expected or ["0.weight", "2.weight", "4.weight"]
    )


def test_patterns_tell_capitals_apart() -> None:
    model = nn.ModuleDict({"Head": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert list(itop_prune.apply(model, 0.5, include="head")) == ["head.weight"]


def test_a_layer_pattern_does_not_match_what_merely_begins_alike() -> None:
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    assert list(itop_prune.apply(model, 0.5, include="layer1")) == ["layer1.weight"]


def test_unwrap_leaves_an_ordinary_model() -> None:
    model = mlp()
    assert unwrap(model) is model


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile],
    ids=["DP", "Averaged", "compile"],
)
def test_names_are_those_of_the_model_inside_a_wrapper(wrap) -> None:
    assert names(wrap(mlp())) == ["0.weight", "2.weight", "4.weight"]


def test_a_layer_that_is_called_module_keeps_its_name() -> None:
    assert names(nn.ModuleDict({"module": nn.Linear(2, 2)})) == ["module.weight"]


def test_names_do_not_hold_what_compiling_a_part_puts_in() -> None:
    model = mlp()
    model[2] = torch.compile(model[2])
    assert names(model) == ["0.weight", "2.weight", "4.weight"]


@given(st.lists(st.sampled_from(["blocks", "0", "fc", "_orig_mod"]), max_size=5))
def test_plain_name_takes_out_exactly_what_compile_puts_in(parts: list[str]) -> None:
    expected = [part for part in parts if part != "_orig_mod"]
    assert plain_name(".".join(parts), "weight") == ".".join([*expected, "weight"])


class Keeper(nn.Linear):
    """A layer that keeps its weight a second time, where a mask is not seen."""

    def __init__(self, keep: Callable[[nn.Parameter], object]) -> None:
        super().__init__(4, 4)
        self.kept = keep(self.weight)


KEPT = {
    "list": lambda p: [p],
    "tuple": lambda p: (None, p),
    "dict": lambda p: {"w": p},
    "set": lambda p: {p},
    "nested": lambda p: {"a": [(p,)]},
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_a_weight_that_its_layer_keeps_in_another_attribute_is_refused(
    keep: Callable[[nn.Parameter], object],
) -> None:
    model = nn.Sequential(nn.Linear(4, 2), Keeper(keep))
    with pytest.raises(
        ValueError, match=r"(?s)1.weight: Keeper reads it from its kept .*exclude=\['1.weight'\]"
    ) as error:
        itop_prune.apply(model, 0.5)
    assert "0.weight:" not in str(error.value)
    assert list(itop_prune.apply(model, 0.5, exclude="1.weight")) == ["0.weight"]


def test_a_model_whose_weights_are_all_refused_says_that_nothing_is_left() -> None:
    model = nn.Sequential(Keeper(lambda weight: [weight]), Keeper(lambda weight: [weight]))
    with pytest.raises(
        ValueError, match=r"0.weight: Keeper.*\n.*1.weight: .*\n.* nothing is left to mask"
    ):
        itop_prune.apply(model, 0.5)
    model.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"To leave them dense: exclude=\['0.weight'\]"):
        itop_prune.apply(model, 0.5, include="0")


def test_lists_of_parameters_elsewhere_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.slow = list(model[0].parameters())
    assert list(itop_prune.apply(model, 0.5)) == ["0.weight", "1.weight"]


def test_a_class_that_happens_to_be_called_like_timms_is_masked_as_what_it_is() -> None:
    class CondConv2d(nn.Conv2d):
        pass

    assert itop_prune.apply(CondConv2d(2, 3, 3), 0.5)["weight"].mask.shape == (3, 2, 3, 3)


def test_a_weight_under_two_names_in_its_own_module_is_tied() -> None:
    layer = nn.Linear(4, 4)
    layer.register_parameter("again", layer.weight)
    with pytest.raises(ValueError, match=r"weight: it is tied to again"):
        itop_prune.apply(layer, 0.5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_that_is_empty_is_refused_with_its_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(
        ValueError, match=r"1\.weight: it is empty, of shape \(0, 4\)\nTo leave them dense: exclude"
    ):
        itop_prune.apply(model, 0.5)
