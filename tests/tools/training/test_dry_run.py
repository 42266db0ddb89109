"""A dry run answers a wrong value of any key with one message, and never with a traceback."""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from helpers.processes import QUICKSTART
from itop_prune_tools.config.sections import section_calls
from itop_prune_tools.training import command as train
from PIL import Image

BRACKETS = f"{'[' * 3000}{']' * 3000}"
DIGITS = "1" + "0" * 400


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Take back the variables that Accelerate sets before it refuses a plugin."""
    with mock.patch.dict(os.environ):
        yield


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert train.main([*arguments, "--dry-run"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert all(c.isprintable() for c in message.replace("\n", ""))
    return message


WRONG = {
    # Of another type than the call takes
    "lr_schedule.decay_milestones=50": "lr_schedule.decay_milestones: is 50; allowed is a list",
    "ema={dtype: half}": "ema.dtype: is 'half'; allowed is null",
    "optimizer.param_group_fn=x": "optimizer.param_group_fn: is 'x'; allowed is null",
    "accelerator={fsdp_plugin: {a: 1}}": "accelerator.fsdp_plugin: is {'a': 1}; allowed is null",
    "accelerator={project_config: x}": "accelerator.project_config: is 'x'; allowed is null",
    "model.pretrained_cfg=3": "model.pretrained_cfg: is 3; allowed is text or a mapping",
    # Numbers that torch does not take
    f"epochs={DIGITS}": "epochs: is 1000",
    f"optimizer.lr={DIGITS}": "optimizer.lr: is 1000",
    f"optimizer.lr={DIGITS}.0": "optimizer.lr: is inf; allowed are finite numbers",
    f"lr_schedule.decay_milestones=[{DIGITS}]": "lr_schedule.decay_milestones: is 1000",
    "accelerator={gradient_accumulation_steps: 0}": "gradient_accumulation_steps: is 0; allowed",
    # What a call refuses when it is made or used
    "ema={device: gpu}": "ema: Expected one of cpu, cuda",
    "lr_schedule.decay_milestones=[a]": "look at the arguments {'sched': 'multistep', 'decay",
    "lr_schedule.decay_milestones=[1, 2, a]": "look at the arguments {'sched': 'multistep', 'dec",
    "lr_schedule={sched: rsqrt, decay_epochs: 200, stable_timescale: 1}": "lr_schedule: rsqrt sch",
    "optimizer.fallback_list=[1]": "optimizer: expected str",
    "accelerator={kwargs_handlers: [1]}": "accelerator: Unsupported kwargs handler passed: 1",
    "model.checkpoint_path=none": "the model can't be built: [Errno 2] No such file",
    'lr_schedule.sched="a\\e[31m"': "timm knows no sched 'a\\x1b[31m'",
    # A pattern that no layer takes
    "masks={sparsity: 0.5, pattern: 1:1000000}": "the pattern 1:1000000 divides no weight",
    # Deep nesting
    f"epochs={BRACKETS}": "lists and mappings more than 20 deep",
    # Tags of YAML whose constructors fail
    "epochs=!!bool x": "override 'epochs=!!bool x': not YAML",
    "epochs=!!int ''": "override \"epochs=!!int ''\": not YAML",
    "epochs=!!map [a]": "override 'epochs=!!map [a]': not YAML",
}


@pytest.mark.parametrize("override", WRONG, ids=lambda override: override[:40])
def test_a_wrong_value_is_answered_with_its_key_or_section(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WRONG[override] in refused(capsys, QUICKSTART, override)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("scale: [1]", "look at the arguments {'scale': [1]}"),
        ("train_crop_mode: x", "augment: AssertionError; look at the arguments"),
        ("naflex: true", "augment: these options give no images"),
        ("normalize: false", "augment: normalize is False"),
    ],
)
def test_wrong_transforms_of_a_folder_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, reason: str
) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "cat" / "1.png")
    data = f"data={{name: folder, root: {tmp_path}, batch_size: 1}}"
    assert reason in refused(capsys, QUICKSTART, data, f"augment={{{option}}}")


def test_mistakes_of_all_sections_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = (
        "lr_schedule.decay_milestones=50",
        "ema={device: gpu}",
        "accelerator={fsdp_plugin: 3}",
        "masks={sparsity: 0.5, pattern: 1:1000000, seed: x}",
        f"seed={DIGITS}",
    )
    message = refused(capsys, QUICKSTART, *wrong)
    keys = ("lr_schedule.decay_milestones:", "ema:", "accelerator.fsdp_plugin:", "masks:", "seed:")
    assert all(f"\n  {key}" in message for key in (*keys, "masks.seed:"))


def test_a_file_of_nested_brackets_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: 0\nepochs: {BRACKETS}\n", encoding="utf-8")
    assert "line 2: not YAML: lists and mappings more than 20 deep" in refused(capsys, str(path))


KEYS = [
    f"{section}.{parameter.name}"
    for section, (call, given) in section_calls({}).items()
    for parameter in inspect.signature(call).parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in given
]
ODD_VALUES = ["null", "true", "-1", DIGITS, ".nan", "1:1000000", "[[1]]", "{x: 1}", "2020-01-01"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: value[:10])
def test_any_value_of_any_key_builds_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    assert KEYS
    path = tmp_path / "recipe.yaml"
    sections = yaml.safe_load(Path(QUICKSTART).read_text(encoding="utf-8"))
    for key in KEYS:
        section, _, name = key.partition(".")
        path.write_text(yaml.safe_dump({section: {}, **sections}), encoding="utf-8")
        status = train.main([str(path), f"{section}.{name}={value}", "--dry-run"])
        message = capsys.readouterr().err
        assert status in (0, 1), key
        assert status == 0 or "error: " in message, key
