"""What can be masked, what is refused, and that a refusal says what to do and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ids import as_text
from helpers.toys import convnet, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
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


# --- which weights there are ---------------------------------------------------------------------


def test_every_kind_of_convolution_and_linear_map_is_found() -> None:
    class Standardised(nn.Conv2d):
        pass

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, Standardised)
    for layer in (*(kind(2, 2, 3) for kind in kinds), nn.Linear(2, 2)):
        assert names(layer) == ["weight"], layer


def test_norms_and_embeddings_are_no_weights_to_mask() -> None:
    norms = (nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4))
    for layer in (*norms, nn.Embedding(4, 4), nn.PReLU(4)):
        assert names(layer) == [], layer


def test_the_input_projections_of_attention_are_found() -> None:
    assert names(nn.MultiheadAttention(4, 2)) == ["in_proj_weight", "out_proj.weight"]
    separate = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert names(nn.MultiheadAttention(4, 2, kdim=6, vdim=8)) == separate


def test_weights_come_in_the_order_of_the_model_masked_ones_too() -> None:
    model = convnet()
    itop_prune.apply(model, 0.5, include="3")
    assert names(model) == ["0.weight", "3.weight", "7.weight"]


def test_a_class_that_happens_to_be_called_like_timms_is_masked_as_what_it_is() -> None:
    class CondConv2d(nn.Conv2d):
        pass

    assert itop_prune.apply(CondConv2d(2, 3, 3), 0.5)["weight"].mask.shape == (3, 2, 3, 3)


WRAPPERS = [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["DP", "Averaged", "compile"])
def test_names_are_those_of_the_model_inside_a_wrapper(wrap: Callable) -> None:
    assert names(wrap(mlp())) == ["0.weight", "2.weight", "4.weight"]


def test_names_hold_what_the_user_named_and_not_what_compiling_a_part_puts_in() -> None:
    assert names(nn.ModuleDict({"module": nn.Linear(2, 2)})) == ["module.weight"]
    model = mlp()
    assert unwrap(model) is model
    model[2] = torch.compile(model[2])
    assert names(model) == ["0.weight", "2.weight", "4.weight"]


@given(st.lists(st.sampled_from(["blocks", "0", "fc", "_orig_mod"]), max_size=5))
def test_plain_name_takes_out_exactly_what_compile_puts_in(parts: list[str]) -> None:
    expected = [part for part in parts if part != "_orig_mod"]
    assert plain_name(".".join(parts), "weight") == ".".join([*expected, "weight"])


# --- what is refused -----------------------------------------------------------------------------


def masked_already(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, include="2")


def old_weight_norm(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])


def tied(model: nn.Module) -> None:
    model[4] = nn.Linear(16, 12)
    model[4].weight = model[2].weight


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "masked": (masked_already, "it has a mask already; .*call itop_prune.remove first"),
    "tied": (tied, r"it is tied to 4\.weight.*\n.*4\.weight: it is tied to 2\.weight"),
    "parametrized": (
        lambda model: parametrizations.weight_norm(model[2]),
        "it is parametrized .*call .*remove_parametrizations first",
    ),
    "old weight norm": (old_weight_norm, "it is not a parameter .*call .*remove_weight_norm first"),
    "pruned by torch": (
        lambda model: prune.random_unstructured(model[2], "weight", 0.5),
        "torch's own pruning masks it: call .*prune.remove first",
    ),
    "lazy": (
        lambda model: model.__setitem__(2, nn.LazyLinear(12)),
        "its shape is not known yet: run the model once first",
    ),
    "empty": (
        lambda model: model.__setitem__(2, nn.Linear(16, 0)),
        r"it is empty, of shape \(0, 16\)\nTo leave them dense: exclude=\['2\.weight'\]",
    ),
    "two names": (
        lambda model: model[2].register_parameter("again", model[2].weight),
        r"it is tied to 2\.again",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_weight_that_can_not_be_masked_is_refused_with_what_to_do(
    change: Callable[[nn.Module], object], message: str
) -> None:
    model = mlp()
    change(model)
    found = list(itop_prune.find_masks(model))
    with pytest.raises(ValueError, match=rf"2\.weight: {message}"):
        itop_prune.apply(model, 0.5)
    assert list(itop_prune.find_masks(model)) == found


@pytest.mark.parametrize(
    "convert",
    [
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to(torch.complex128),
        Tensor.int,
        Tensor.bool,
        Tensor.to_sparse,
    ],
)
def test_a_weight_that_is_not_of_dense_real_numbers_is_refused(
    convert: Callable[[Tensor], Tensor],
) -> None:
    model = mlp()
    weight = convert(model[4].weight.detach())
    model[4].weight = nn.Parameter(weight, requires_grad=False)
    message = rf"4\.weight: it is of {weight.dtype} and {weight.layout}, and masks need dense, real"
    for call in (itop_prune.apply, itop_prune.count_active):
        with pytest.raises(ValueError, match=message):
            call(model, 0.5)
    assert [type(layer) for layer in model] == [type(layer) for layer in mlp()]
    assert list(itop_prune.apply(model, 0.5, exclude="4")) == ["0.weight", "2.weight"]


def test_a_head_tied_to_an_embedding_stays_dense_and_a_warning_says_so() -> None:
    model = TiedLanguageModel()
    with pytest.warns(UserWarning, match=r"left dense") as caught:
        masks = itop_prune.apply(model, 0.5)
    assert list(masks) == ["body.weight"]
    assert model.head.weight is model.embedding.weight
    message = str(caught[0].message)
    assert "head.weight (tied to embedding.weight); exclude=['head.weight'] says so" in message
    assert caught[0].filename == __file__
    assert list(itop_prune.apply(TiedLanguageModel(), 0.5, exclude="head")) == ["body.weight"]


@pytest.mark.parametrize("build", [lambda: TiedLanguageModel(), lambda: Own()])
def test_other_ranks_do_not_repeat_what_stays_dense(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("itop_prune.distributed.is_first", lambda: False)
    itop_prune.apply(build(), 0.5)


@pytest.mark.parametrize("include", ["head", "h*", ["*", "head.weight"]])
def test_a_tied_head_that_is_asked_for_by_name_is_refused(include: Any) -> None:
    model = TiedLanguageModel()
    message = r"head\.weight: it is tied to embedding\.weight.*untie them"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, include=include)
    assert not itop_prune.find_masks(model)


def test_a_model_of_nothing_but_a_tied_head_is_refused() -> None:
    model = TiedLanguageModel()
    del model.body
    message = r"head\.weight: it is tied to .*\nThere is no other weight: without these nothing is"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5)


# --- what stays dense ----------------------------------------------------------------------------


class Own(nn.Module):
    """A matrix whose class the table does not know, between two linear layers."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.first = nn.Linear(size, 10)
        self.mine = nn.Module()
        self.mine.kernel = nn.Parameter(torch.randn(size, size))
        self.last = nn.Linear(10, 4)


def test_matrices_that_no_row_knows_are_named_with_their_class_and_share() -> None:
    with pytest.warns(UserWarning, match="masks 38% of the matrix weights") as caught:
        itop_prune.apply(Own(), 0.5)  # 240 of 640
    message = str(caught[0].message)
    assert "left dense: Module × 1 (mine.kernel)" in message
    assert "itop_prune.MASKABLE" in message
    assert caught[0].filename == __file__


def test_the_share_is_that_of_what_a_pattern_divides() -> None:
    share = pytest.warns(UserWarning, match="masks 31% of the matrix weights")
    with share, pytest.warns(UserWarning, match="2:4 does not divide") as caught:
        itop_prune.apply(Own(), 0.5, pattern="2:4")  # 200 of 640: 10 inputs are left out
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "mine"},
        {"exclude": "mine.kernel"},
        {"exclude": ["last", "mi*"]},
        {"include": ["first", "last"]},
    ],
    ids=str,
)
def test_what_the_user_left_out_is_not_named(options: dict) -> None:
    assert "first.weight" in itop_prune.apply(Own(), 0.5, **options)


def test_a_pattern_for_an_unknown_matrix_says_how_to_mask_it() -> None:
    message = r"include pattern 'mine' matches Module × 1 \(mine\.kernel\) alone: .*MASKABLE"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(Own(), 0.5, include=["first", "mine"])


def test_a_share_of_a_tenth_is_not_named() -> None:
    model = Own()
    model.first = nn.Linear(200, 20)  # 4,040 beside 400
    assert len(itop_prune.apply(model, 0.5)) == 2


def table(**tensors: Tensor) -> nn.Module:
    model = Own(4)
    model.mine = nn.Module()
    for name, tensor in tensors.items():
        model.mine.register_parameter(name, nn.Parameter(tensor, tensor.is_floating_point()))
    return model


NO_MATRICES: dict[str, Callable[[], nn.Module]] = {
    "position table": lambda: table(pos_embed=torch.zeros(50, 40)),
    "relative positions": lambda: table(relative_position_bias_table=torch.zeros(99, 8)),
    "added to a batch": lambda: table(query=torch.zeros(1, 50, 40)),
    "scale of channels": lambda: table(gamma=torch.zeros(900, 1, 1)),
    "integers": lambda: table(lookup=torch.zeros(50, 40, dtype=torch.int32)),
    "not used": lambda: table(none=torch.zeros(0)),
}


@pytest.mark.parametrize("build", NO_MATRICES.values(), ids=NO_MATRICES)
def test_tables_and_scales_are_no_matrices(build: Callable[[], nn.Module]) -> None:
    assert len(itop_prune.apply(build(), 0.5)) == 2


def test_large_embeddings_norms_and_what_is_tied_to_them_are_no_matrices() -> None:
    model = Own(4)
    model.mine = nn.Module()
    model.words, model.bags = nn.Embedding(50, 40), nn.EmbeddingBag(50, 40)
    model.norm = nn.LayerNorm((50, 40))
    model.mine.register_parameter("output", model.words.weight)
    assert len(itop_prune.apply(model, 0.5)) == 2


def test_a_model_of_unknown_matrices_alone_says_which() -> None:
    model = Own()
    del model.first, model.last
    message = r"nothing to mask: .*; dense are Module × 1 \(mine\.kernel\): .*MASKABLE"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5)


def test_a_layer_used_twice_is_not_a_tied_weight() -> None:
    layer = nn.Linear(4, 4)
    assert list(itop_prune.apply(nn.Sequential(layer, nn.ReLU(), layer), 0.5)) == ["0.weight"]


def test_inference_mode_is_refused_and_a_model_built_in_it_too() -> None:
    with torch.inference_mode():
        built = mlp()
        with pytest.raises(ValueError, match=r"0\.weight: .*outside of torch\.inference_mode"):
            itop_prune.apply(mlp(), 0.5)
    with pytest.raises(ValueError, match=r"0\.weight: .*inference mode"):
        itop_prune.apply(built, 0.5)


def test_all_obstacles_are_named_at_once_with_how_to_leave_them_dense() -> None:
    model = mlp()
    parametrizations.weight_norm(model[2])
    prune.random_unstructured(model[4], "weight", 0.5)
    message = (
        r"(?s)2\.weight: it is parametrized.*4\.weight: torch's own pruning.*"
        r"To leave them dense: exclude=\['2\.weight', '4\.weight'\]"
    )
    with pytest.raises(ValueError, match=message):
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
    message = r"(?s)1.weight: Keeper reads it from its kept .*exclude=\['1.weight'\]"
    with pytest.raises(ValueError, match=message) as error:
        itop_prune.apply(model, 0.5)
    assert "0.weight:" not in str(error.value)
    assert list(itop_prune.apply(model, 0.5, exclude="1.weight")) == ["0.weight"]


def test_a_model_whose_weights_are_all_refused_says_that_nothing_is_left() -> None:
    model = nn.Sequential(Keeper(lambda weight: [weight]), Keeper(lambda weight: [weight]))
    message = r"0.weight: Keeper.*\n.*1.weight: .*\n.* nothing is left to mask"
    with pytest.raises(ValueError, match=message) as error:
        itop_prune.apply(model, 0.5)
    assert "There is no other weight: without" in str(error.value)
    model.append(nn.Linear(4, 4))
    for options in ({"include": "0"}, {"exclude": ["1", "2"]}):
        with pytest.raises(ValueError, match="include and exclude select no other weight: without"):
            itop_prune.apply(model, 0.5, **options)
    with pytest.raises(ValueError, match=r"To leave them dense: exclude=\['0.weight', '1'\]"):
        itop_prune.apply(model, 0.5, exclude="1")


def test_lists_of_parameters_elsewhere_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.slow = list(model[0].parameters())
    assert list(itop_prune.apply(model, 0.5)) == ["0.weight", "1.weight"]


# --- include and exclude -------------------------------------------------------------------------

FIRST, SECOND, THIRD = "0.weight", "2.weight", "4.weight"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": FIRST}, [FIRST]),
        ({"include": "0"}, [FIRST]),
        ({"include": "*"}, [FIRST, SECOND, THIRD]),
        ({"include": ["4", "0"]}, [FIRST, THIRD]),
        ({"include": "[02].weight"}, [FIRST, SECOND]),
        ({"exclude": THIRD}, [FIRST, SECOND]),
        ({"exclude": ("0", "2")}, [THIRD]),
        ({"exclude": ()}, [FIRST, SECOND, THIRD]),
        ({"include": iter(["0", "2"]), "exclude": iter(["2"])}, [FIRST]),
    ],
    ids=as_text,
)
def test_weights_are_chosen_by_name_layer_or_pattern(options: dict, expected: list[str]) -> None:
    assert list(itop_prune.apply(mlp(), 0.5, **options)) == expected


def test_patterns_tell_capitals_and_beginnings_apart() -> None:
    keys = ("Head", "head", "layer1", "layer10")
    model = nn.ModuleDict({key: nn.Linear(2, 2) for key in keys})
    assert list(itop_prune.apply(model, 0.5, include="head")) == ["head.weight"]
    assert list(itop_prune.apply(model, 0.5, include="layer1")) == ["layer1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({what: ["4", "head"]}, rf"{what} pattern 'head' matches no weight; .*: 0\.weight, 2\.")
            for what in ("include", "exclude")
        ),
        ({"include": "4", "exclude": "*"}, r"include='4' without exclude='\*' leaves nothing of"),
        ({"include": ()}, r"include=\(\).* leaves nothing of: 0\.weight"),
    ],
)
def test_patterns_that_match_or_leave_nothing_are_refused_with_what_exists(
    options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(mlp(), 0.5, **options)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("head", "head.fc.weight, heads.0.weight"),
        ("*.head.*", "head.fc.weight, heads.0.weight"),
        ("stem.fcl", "stem.fc1.weight"),
        ("Stem", "stem.fc1.weight"),
    ],
)
def test_the_nearest_names_are_shown(pattern: str, near: str) -> None:
    model = nn.ModuleDict(
        {
            "stem": nn.ModuleDict({"fc1": nn.Linear(2, 2)}),
            "head": nn.ModuleDict({"fc": nn.Linear(2, 2)}),
            "heads": nn.ModuleList([nn.Linear(2, 2)]),
        }
    )
    with pytest.raises(ValueError, match=rf"matches no weight; the nearest are: {near}$"):
        itop_prune.apply(model, 0.5, exclude=pattern)


def test_a_long_list_of_weights_is_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    with pytest.raises(ValueError, match=r"10\.weight, 11\.weight, \.\.\. \(30 in all\)$"):
        itop_prune.apply(model, 0.5, include="head")
