"""The checks of architectures: a spread of families passes them, what is wrong is found, and a sweep can be stopped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from itop_prune_tools.checks import architectures
from itop_prune_tools.checks import check_architectures as sweep
from itop_prune_tools.checks import exactness as twins
from torch import Tensor, nn

import itop_prune
from itop_prune import scheduler
from itop_prune.layers import masked_layer as layer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# Every way in which a model of timm does something else with a weight than call its layer once.
SPREAD: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": TINY,  # a parent reads qkv.weight
    "beitv2_base_patch16_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "swinv2_cr_tiny_224": {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {
        "window_size": 2,
        "depths": (1, 1),
        "embed_dim": 24,
        "num_heads": (2, 4),
    },
    "naflexvit_base_patch16_gap": TINY,
    "coat_tiny": {
        "serial_depths": (1,) * 4,
        "parallel_depth": 1,
    },  # layers called several times, and held twice
    "test_nfnet": {},  # scaled standardised filters
    "resnetv2_50x1_bit": {},  # standardised filters
    "vit_tiny_r_s16_p8_224": {"depth": 2},  # the same with padding of its own
    "efficientnet_cc_b0_4e": {},  # kernels mixed by experts
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},  # LSTM
    "repvgg_a0": {},  # branches to be fused
    "mobileone_s0": {},
    "fastvit_t8": {},
    "xcit_nano_12_p16_224": {"depth": 1},  # asks a weight for its dtype
    "convit_tiny": {"depth": 2, "local_up_to_layer": 1},
    "edgenext_xx_small": {},
    "csatv2": {},  # Conv1d, fixed matrices
    "mobilevitv2_050": {},
    "levit_128s": {},
    "test_resnet": {},
    "test_vit": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "torchvision/swin_v2_t": {},  # a parent reads both projections
    "torchvision/regnet_y_400mf": {},
    "torchvision/googlenet": {},  # three outputs
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_family_trains_as_its_dense_twin(name: str) -> None:
    if name not in architectures.names():
        pytest.skip(f"timm {timm.__version__} does not have {name}")
    found = twins.trained(name, **SPREAD[name])
    assert found.wrong == []
    assert found.refused == ""
    assert found.masked > 5
    assert found.covered > 0.8


@pytest.mark.parametrize(
    "name", ["efficientnet_cc_b1_8e", "sequencer2d_l", "nfnet_f7", "vit_giant_patch14_dinov2"]
)
def test_a_model_of_any_size_is_counted_on_the_meta_device(name: str) -> None:
    found = twins.counts(name)
    assert found.wrong == []
    assert found.refused == ""
    assert found.covered > 0.99


def test_every_name_of_timm_and_torchvision_is_looked_at() -> None:
    names = architectures.names()
    assert set(timm.list_models()) <= set(names)
    assert "torchvision/resnet18" in names
    assert {architectures.module_of(name) for name in names} >= set(timm.list_modules())


# --- what the check of a trained model finds -------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).relu().mean((2, 3)))


class Unread(Small):
    def __init__(self) -> None:
        super().__init__()
        self.old_head = nn.Linear(8, 4)


class Assigning(Small):
    """Writes into its weight at every step, which a masked layer does not see."""

    def forward(self, x: Tensor) -> Tensor:
        self.convolution.weight.data.mul_(0.5)
        return super().forward(x)


def check(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> twins.Finding:
    monkeypatch.setattr(
        twins, "with_images", lambda name, keywords: (model(), torch.randn(2, 3, 8, 8))
    )
    return twins.trained("a model")


def test_a_plain_model_passes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(Small, monkeypatch) == twins.Finding(masked=2, covered=248 / 260, size=8)


def test_a_layer_that_the_model_does_not_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no gradient: old_head.weight" in check(Unread, monkeypatch).wrong


def test_a_weight_that_is_not_what_the_twin_computes_with_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert any("differ by" in text for text in check(Assigning, monkeypatch).wrong)


def test_a_kernel_that_is_dense_in_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "effective", lambda weight, mask, centred: weight * mask)
    found = twins.trained("test_nfnet")
    assert any(
        text.endswith("the kernel in use is not 0 where the mask is") for text in found.wrong
    )


def test_masks_that_do_not_move_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stay(
        _: object, layers: list[Any], leaving: int, entering: int
    ) -> list[tuple[Tensor, Tensor]]:
        return [(layer.itop.mask.clone(), layer.itop.mask.sum() - leaving) for layer in layers]

    monkeypatch.setattr(scheduler, "exchange", stay)
    assert "no mask moved" in check(Small, monkeypatch).wrong


def test_a_mask_that_loses_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = itop_prune.MaskScheduler.step

    def losing(self: itop_prune.MaskScheduler) -> bool:
        moved = step(self)
        self._masks["head.weight"].mask[:2] = False
        return moved

    monkeypatch.setattr(itop_prune.MaskScheduler, "step", losing)
    assert "the number of active weights changed" in check(Small, monkeypatch).wrong


@pytest.mark.parametrize("name", ["torchvision/fasterrcnn_resnet50_fpn", "torchvision/raft_small"])
def test_a_model_with_inputs_of_its_own_kind_is_left_out_with_the_reason(name: str) -> None:
    assert twins.trained(name).refused.startswith("it needs inputs of its own kind: it ")


def test_a_refusal_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "create", lambda name, **keywords: nn.Embedding(3, 4))
    assert "nothing to mask" in twins.counts("a model").refused


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that a sweep looked at; each is exact at once."""
    seen: list[str] = []

    def look_at(name: str, real: bool) -> sweep.Line:
        seen.append(name)
        return sweep.Line(name, 3, 0.9, "trained, 64 px", "exact", "", 0.1)

    monkeypatch.setattr(sweep, "look_at", look_at)
    return seen


def test_names_are_checked_and_their_table_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--names", "test_vit*", "--out", str(tmp_path / "table.md")]) == 0
    rows = [
        line
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| test_vit")
    ]
    assert len(rows) == len(timm.list_models("test_vit*")) > 2
    assert all("| counted | masked |" in row for row in rows)
    assert f"{len(rows)} models: {len(rows)} masked in full." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.md"]


def test_a_real_check_by_name(tmp_path: Path) -> None:
    assert sweep.main(["--names", "test_vit", "--real", "--out", str(tmp_path / "table.md")]) == 0
    assert "| trained, 64 px | exact |" in (tmp_path / "table.md").read_text()


def test_a_model_that_fails_is_told_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = architectures.create

    def broken(name: str, **keywords: Any) -> nn.Module:
        if name == "test_vit2":
            raise RuntimeError("a | in\nits message")
        return create(name, **keywords)

    monkeypatch.setattr(architectures, "create", broken)
    assert sweep.main(["--names", "test_vit*", "--out", str(tmp_path / "table.md")]) == 1
    text = (tmp_path / "table.md").read_text()
    assert "| failed | RuntimeError: a / in its message |" in text
    assert text.count("| masked |") == len(timm.list_models("test_vit*")) - 1
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("torn", ["", '{"name": "test_v'])
def test_a_stopped_sweep_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str], torn: str
) -> None:
    stop_after, look_at = 2, sweep.look_at

    def stopped(name: str, real: bool) -> sweep.Line:
        if len(looked_at) == stop_after:
            raise KeyboardInterrupt
        return look_at(name, real)

    names = timm.list_models("test_vit*")
    command = ["--names", "test_vit*", "--real", "--out", str(tmp_path / "table.md")]
    monkeypatch.setattr(sweep, "look_at", stopped)
    assert sweep.main(command) == 130
    assert not (tmp_path / "table.md").exists()
    with (tmp_path / "table.jsonl").open("a") as file:
        file.write(torn)
    monkeypatch.setattr(sweep, "look_at", look_at)
    assert sweep.main(command) == 0
    assert looked_at == names
    assert [
        line.split()[1]
        for line in (tmp_path / "table.md").read_text().splitlines()
        if "| exact |" in line
    ] == names


@pytest.mark.parametrize(
    "head", ['{"setup": {"versions": "timm 0.1"}, "names": []}', '{"setup": {"ver', ""]
)
def test_what_another_sweep_has_done_is_not_thrown_away(
    tmp_path: Path, looked_at: list[str], capsys: pytest.CaptureFixture[str], head: str
) -> None:
    (tmp_path / "table.jsonl").write_text(head + "\n")
    with pytest.raises(SystemExit):
        sweep.main(["--names", "test_vit*", "--out", str(tmp_path / "table.md")])
    assert (
        "table.jsonl is of a sweep with other arguments or versions; remove it"
        in capsys.readouterr().err
    )
    assert (tmp_path / "table.jsonl").read_text() == head + "\n"
    assert looked_at == []


def test_the_smallest_model_of_every_module_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    chosen = [
        "test_vit",
        "test_vit2",
        "test_resnet",
        "torchvision/resnet18",
        "torchvision/resnet34",
    ]
    monkeypatch.setattr(architectures, "names", lambda: chosen)
    assert sweep.main(["--real", "--out", str(tmp_path / "table.md")]) == 0
    assert looked_at == ["test_resnet", "torchvision/resnet18", "test_vit"]


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "give --all, --names GLOB or --real"), (["--names", "no_such*"], "no model matches")],
)
def test_a_sweep_of_nothing_is_an_error(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main([*command, "--out", str(tmp_path / "table.md")])
    assert message in capsys.readouterr().err
