"""Architectures: families pass the checks, failures are found, a stopped check continues."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.processes import ROOT
from itop_prune_tools.checks import architectures, check_architectures, exactness
from torch import Tensor, nn

import itop_prune

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:timm.*", "ignore::DeprecationWarning:torch.*"
)

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# Every way in which a model of timm uses a weight other than by one call of its layer.
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


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["mask", "sparse"])
@pytest.mark.parametrize("name", SPREAD)
def test_a_family_trains_as_its_dense_twin(name: str, storage: str) -> None:
    if name not in architectures.names():
        pytest.skip(f"timm {timm.__version__} does not have {name}")
    found = exactness.train_beside_twin(name, storage, **SPREAD[name])
    assert found.wrong == []
    assert found.refused == ""
    assert found.masked > 5
    assert found.covered > 0.8


@pytest.mark.parametrize(
    "name", ["efficientnet_cc_b1_8e", "sequencer2d_l", "nfnet_f7", "vit_giant_patch14_dinov2"]
)
def test_a_model_of_any_size_is_counted_on_the_meta_device(name: str) -> None:
    found = exactness.count_masks(name)
    assert found.wrong == []
    assert found.refused == ""
    assert found.covered > 0.99


def test_every_name_of_timm_and_torchvision_is_looked_at() -> None:
    names = architectures.names()
    assert set(timm.list_models()) <= set(names)
    assert "torchvision/resnet18" in names
    assert {architectures.module_of(name) for name in names} >= set(timm.list_modules())


# --- what the check of a trained model finds ---


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


def check(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> exactness.Finding:
    monkeypatch.setattr(
        exactness, "with_images", lambda name, keywords: (model(), torch.randn(2, 3, 8, 8))
    )
    return exactness.train_beside_twin("a model")


def test_a_plain_model_passes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(Small, monkeypatch) == exactness.Finding(masked=2, covered=248 / 260, size=8)


def test_a_layer_that_the_model_does_not_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no gradient: old_head.weight" in check(Unread, monkeypatch).wrong


def test_a_weight_that_is_not_what_the_twin_computes_with_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert any("differ by" in text for text in check(Assigning, monkeypatch).wrong)


class Centering(nn.Linear):
    """Subtracts the mean of its weight, which leaves no zeros in the weight in use."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


class DenseInUse(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head = Centering(8, 4)


def test_a_kernel_that_is_dense_in_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = check(DenseInUse, monkeypatch).wrong
    assert set(wrong) == {"head.weight: the kernel in use is not 0 where the mask is"}


def test_masks_that_do_not_move_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(itop_prune.MaskScheduler, "step", lambda self: True)
    wrong = check(Small, monkeypatch).wrong
    assert "no mask moved" in wrong
    assert "not grown: convolution.weight, head.weight" in wrong
    assert "step 1: an update was made" in wrong


def test_a_mask_that_loses_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: dict[str, itop_prune.ITOP] = {}
    apply, step = itop_prune.apply, itop_prune.MaskScheduler.step

    def keep(*arguments: Any, **keywords: Any) -> dict[str, itop_prune.ITOP]:
        applied.update(apply(*arguments, **keywords))
        return applied

    def losing(self: itop_prune.MaskScheduler) -> bool:
        moved = step(self)
        applied["head.weight"].mask[:2] = False
        return moved

    monkeypatch.setattr(itop_prune, "apply", keep)
    monkeypatch.setattr(itop_prune.MaskScheduler, "step", losing)
    assert "the number of active weights changed" in check(Small, monkeypatch).wrong


def test_a_difference_that_is_not_a_number_is_infinite() -> None:
    found = exactness.Finding()
    found.compare(torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 1.0]))
    assert found.difference == float("inf")


@pytest.mark.parametrize("name", ["torchvision/fasterrcnn_resnet50_fpn", "torchvision/raft_small"])
def test_a_model_with_inputs_of_its_own_kind_is_left_out_with_the_reason(name: str) -> None:
    assert exactness.train_beside_twin(name).refused.startswith(
        "it needs inputs of its own kind: it "
    )


def test_a_refusal_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "create", lambda name, **keywords: nn.Embedding(3, 4))
    assert "nothing to mask" in exactness.count_masks("a model").refused


# --- the command ---


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were checked; each is exact at once."""
    seen: list[str] = []

    def check(name: str, real: bool, storage: str) -> check_architectures.Line:
        seen.append(name)
        return check_architectures.Line(name, 3, 0.9, "trained, 64 px", "exact", "", 0.1)

    monkeypatch.setattr(check_architectures, "check", check)
    return seen


def table_of(folder: Path, *options: str, status: int = 0) -> str:
    """Run the command; return the table that it wrote."""
    path = folder / "table.md"
    assert check_architectures.main([*options, "--out", str(path)]) == status
    return path.read_text() if path.exists() else ""


def names_in(table: str) -> list[str]:
    _, _, rows = table.partition("|---")
    return [line.split()[1] for line in rows.splitlines()[1:]]


@pytest.mark.slow
def test_names_are_counted_and_their_table_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(tmp_path, "--names", "test_vit*")
    names = timm.list_models("test_vit*")
    assert names_in(table) == names
    assert table.count("| counted | masked |") == len(names) > 2
    assert f"{len(names)} models: {len(names)} masked in full." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.md"]


def test_a_model_is_trained_by_name(tmp_path: Path) -> None:
    table = table_of(tmp_path, "--names", "test_vit", "--real")
    assert "| trained, 64 px | exact |" in table


@pytest.mark.slow
def test_a_model_that_fails_is_reported_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = architectures.create

    def broken(name: str, **keywords: Any) -> nn.Module:
        if name == "test_vit2":
            raise RuntimeError("a | in\nits message")
        return create(name, **keywords)

    monkeypatch.setattr(architectures, "create", broken)
    table = table_of(tmp_path, "--names", "test_vit*", status=1)
    assert "| failed | RuntimeError: a / in its message |" in table
    assert table.count("| masked |") == len(timm.list_models("test_vit*")) - 1
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("torn", ["", '{"name": "test_v'])
def test_a_stopped_check_continues_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: list[str], torn: str
) -> None:
    check = check_architectures.check

    def stop_after_two(name: str, real: bool, storage: str) -> check_architectures.Line:
        if len(checked) == 2:
            raise KeyboardInterrupt
        return check(name, real, storage)

    command = ["--names", "test_vit*", "--real"]
    monkeypatch.setattr(check_architectures, "check", stop_after_two)
    assert table_of(tmp_path, *command, status=130) == ""
    with (tmp_path / "table.jsonl").open("a") as file:
        file.write(torn)
    monkeypatch.setattr(check_architectures, "check", check)
    assert names_in(table_of(tmp_path, *command)) == checked == timm.list_models("test_vit*")


@pytest.mark.parametrize(
    "head", ['{"setup": {"versions": "timm 0.1"}, "names": []}', '{"setup": {"ver', ""]
)
def test_the_progress_of_another_check_is_not_thrown_away(
    tmp_path: Path, checked: list[str], capsys: pytest.CaptureFixture[str], head: str
) -> None:
    progress = tmp_path / "table.jsonl"
    progress.write_text(head + "\n")
    with pytest.raises(SystemExit):
        table_of(tmp_path, "--names", "test_vit*")
    message = "table.jsonl is of a check with other arguments or versions; remove it, or give --out"
    assert message in capsys.readouterr().err
    assert progress.read_text() == head + "\n"
    assert checked == []


def test_the_smallest_model_of_every_module_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: list[str]
) -> None:
    timms = ["test_vit", "test_vit2", "test_resnet"]
    names = [*timms, "torchvision/resnet18", "torchvision/resnet34"]
    monkeypatch.setattr(architectures, "names", lambda: names)
    table_of(tmp_path, "--real")
    assert checked == ["test_resnet", "torchvision/resnet18", "test_vit"]


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "give --all, --names GLOB or --real"), (["--names", "no_such*"], "no model matches")],
)
def test_a_check_of_nothing_is_an_error(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        table_of(tmp_path, *command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "option"), [("counted", "--all"), ("trained", "--real")])
def test_the_results_pages_are_as_the_command_writes_them(kind: str, option: str) -> None:
    page = (ROOT / "recipes" / "results" / f"architectures_{kind}.md").read_text(encoding="utf-8")
    versions = re.search(r"^Versions: (.*)\. \d+ minutes in all\.$", page, re.MULTILINE)
    assert versions

    lines = []
    for row in page.partition("|---|\n")[2].splitlines():
        name, masked, covered, check, result, reason, seconds = row.removeprefix("| ").split(" | ")
        seconds = seconds.removesuffix(" |")
        lines.append(
            check_architectures.Line(
                name, int(masked), float(covered), check, result, reason.strip(), float(seconds)
            )
        )
    assert len(lines) > 100
    options = check_architectures.parser().parse_args([option])
    assert check_architectures.markdown(lines, options, versions[1]) == page
