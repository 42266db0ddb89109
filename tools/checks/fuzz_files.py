"""Random damage to files of weights: small files, state dicts, shards, checkpoints, pickles.

A damaged file must be refused by an error of ours, which leaves the model as it was. If it is read,
then the damage was in bytes that mean nothing, and the content is that of before, bit for bit.
Content under a right checksum may be anything; then what is loaded must be a sound sparse model.
States of a MaskScheduler are changed likewise.
"""

import copy
import functools
import io
import json
import os
import pickle
import random
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

import itop_prune
from itop_prune.layers.sparse_handle import Storage

from ..training.checkpoint import CheckpointError, Checkpoints, damage, load_checkpoint
from .fuzz_runner import require
from .fuzz_trainings import STORAGES, same

REFUSALS = (ValueError, FileNotFoundError)
CHECKSUM = re.compile(rb'"itop_prune":"3 ([0-9a-f]{8}) ')
NUMBERS = (0, 1, 7, 12, 255, 2**31, 2**63, -1, 10**30)


def case(seed: int) -> None:
    """Damage a file and load it."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    kind = draw.choice([*KINDS])
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind](draw, Path(folder))


def build(seed: int) -> nn.Module:
    """Make a small net with a convolution and a linear map."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    )


@functools.cache
def source(storage: Storage) -> nn.Module:
    """Make the sparse net whose files are damaged."""
    model = build(0)
    itop_prune.apply(model, 0.8, storage=storage)
    return model


@functools.cache
def content_of(kind: str, storage: Storage) -> bytes:
    """Write the sparse net as a file of a kind, and return its bytes."""
    file = io.BytesIO()
    if kind == "small":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            itop_prune.save(source(storage), path)
            return path.read_bytes()
    if kind == "safetensors":
        return safetensors_bytes(dict(source(storage).state_dict()))
    torch.save(source(storage).state_dict(), file)
    return file.getvalue()


# --- damage --------------------------------------------------------------------------------------


def flip_bits(draw: random.Random, content: bytes) -> bytes:
    """Flip one to three bits; those of the header come often."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        most = draw.choice([len(changed), min(400, len(changed))])
        changed[draw.randrange(most)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, content: bytes) -> bytes:
    """Take off the end."""
    return content[: draw.randrange(len(content))]


def extend(draw: random.Random, content: bytes) -> bytes:
    """Put something behind the end."""
    return content + draw.randbytes(draw.randint(1, 100))


def overwrite(draw: random.Random, content: bytes) -> bytes:
    """Write zeros, noise or another part over a part."""
    begin, length = draw.randrange(len(content)), draw.randint(1, 64)
    other = draw.randrange(len(content))
    part = draw.choice([bytes(length), draw.randbytes(length), content[other : other + length]])
    return content[:begin] + part + content[begin + len(part) :]


def splice(draw: random.Random, content: bytes) -> bytes:
    """Take out a part."""
    begin = draw.randrange(len(content))
    return content[:begin] + content[begin + draw.randint(1, 64) :]


DAMAGE = (flip_bits, flip_bits, flip_bits, cut, extend, overwrite, splice)


# --- files of weights ----------------------------------------------------------------------------


def damaged_file(draw: random.Random, folder: Path) -> None:
    """Damage the bytes of a small file or of a state dict with checksums."""
    kind, storage = draw.choice(["small", "torch"]), draw.choice(STORAGES)
    path = folder / ("file.safetensors" if kind == "small" else "file.pt")
    path.write_bytes(draw.choice(DAMAGE)(draw, content_of(kind, storage)))
    model = load_or_refuse(draw, path)
    if model is not None:
        check_same_content(model, source(storage))


def file_without_checksum(draw: random.Random, folder: Path) -> None:
    """Damage a state dict in plain safetensors."""
    path = folder / "file.safetensors"
    path.write_bytes(draw.choice(DAMAGE)(draw, content_of("safetensors", draw.choice(STORAGES))))
    check_sound(load_or_refuse(draw, path))


def right_checksum(draw: random.Random, folder: Path) -> None:
    """Change a small file, and write the checksum that it should have."""
    content = content_of("small", draw.choice(STORAGES))
    content = draw.choice([change_header, change_header, *DAMAGE])(draw, content)
    path = folder / "file.safetensors"
    path.write_bytes(with_checksum(content))
    check_sound(load_or_refuse(draw, path))


def other_pickle(draw: random.Random, folder: Path) -> None:
    """Write a file of torch with other values in place of tensors, or a damaged pickle in it."""
    state = dict(source(draw.choice(STORAGES)).state_dict())
    path = folder / "file.pt"
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 3)):
            state[draw.choice([*state])] = draw_entry(draw)
        torch.save(draw.choice([state, state, {"state_dict": state}, [state], (state, 1)]), path)
    else:
        torch.save(state, path)
        damage_pickle(draw, path)
    check_sound(load_or_refuse(draw, path))
    require(not path.with_name("made").exists(), "code from a file was run")


def folder_of_shards(draw: random.Random, folder: Path) -> None:
    """Damage the index of a folder that Accelerate saved, or what it names."""
    state = dict(source(draw.choice(STORAGES)).state_dict())
    names, files = [*state], ("one.safetensors", "two.safetensors")
    for file, part in zip(files, (names[:3], names[3:]), strict=True):
        (folder / file).write_bytes(safetensors_bytes({name: state[name] for name in part}))
    index: dict[str, Any] = {
        "metadata": {},
        "weight_map": {name: files[number >= 3] for number, name in enumerate(names)},
    }
    if draw.random() < 0.7:
        others: list[Any] = [
            None,
            3,
            "",
            ".",
            "..",
            "absent",
            "one\0",
            "a" * 300,
            [],
            {},
            "é\ud800",
        ]
        target = draw.choice([index, index["weight_map"], index["weight_map"]])
        target[draw.choice([*target])] = draw.choice(others)
    content = draw.choice([json.dumps(index), json.dumps([index]), "[" * 5000]).encode()
    if draw.random() < 0.5:
        content = draw.choice(DAMAGE)(draw, content)
    (folder / "model.safetensors.index.json").write_bytes(content)
    check_sound(load_or_refuse(draw, folder))


def change_header(draw: random.Random, content: bytes) -> bytes:
    """Change a number or a word in the header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode()
    words = [*re.finditer(r"\d+|gaps|bits|F32|U8|I32|weight_orig|weight_mask|shape", header)]
    word = draw.choice(words)
    new = str(draw.choice([*NUMBERS, "F64", "BOOL", "bits", "gaps", "x", '"', "weight_mask"]))
    header = header[: word.start()] + new + header[word.end() :]
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def with_checksum(content: bytes) -> bytes:
    """Put the right checksum into a small file."""
    found = CHECKSUM.search(content)
    if found is None:
        return content
    begin, end = found.span(1)
    total = zlib.crc32(content[:begin] + b"0" * 8 + content[end:])
    return content[:begin] + f"{total:08x}".encode() + content[end:]


def draw_entry(draw: random.Random) -> Any:
    """Draw what does not belong into a state dict, or belongs elsewhere."""
    tensor = source("mask").state_dict()[draw.choice(["0.weight_orig", "4.weight_mask", "1.bias"])]
    return draw.choice(
        [
            None,
            "text",
            3,
            [tensor],
            tensor.double() if tensor.is_floating_point() else tensor.float(),
            tensor.unsqueeze(0),
            tensor.flatten()[:1],
            torch.full_like(tensor, 1),
            torch.empty(0),
            torch.randn(4, 2, 3, 3).to_sparse(),
            torch.tensor([-2, 5, 5, 10**9]),
            torch.randn(3, dtype=torch.complex64),
            tensor.to("meta"),
        ]
    )


class MakesFolder:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def damage_pickle(draw: random.Random, path: Path) -> None:
    """Damage the pickle in a file of torch, under a right checksum of the archive."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    if draw.random() < 0.3:
        hostile = draw.choice([MakesFolder(path.with_name("made")), print, {"a": [len]}])
        parts[pickled] = pickle.dumps(hostile, protocol=2)
    else:
        parts[pickled] = draw.choice(DAMAGE)(draw, parts[pickled])
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


# --- what must hold ------------------------------------------------------------------------------


def load_or_refuse(draw: random.Random, path: Path) -> nn.Module | None:
    """Load a file into a model, and return it; None if it is refused and the model as before."""
    model = build(1)
    if draw.random() < 0.5:
        itop_prune.apply(model, 0.7, storage=draw.choice(STORAGES))
    before = copy.deepcopy(model.state_dict())
    try:
        itop_prune.load(
            model,
            path,
            strict=draw.random() < 0.8,
            storage=draw.choice(STORAGES),
        )
    except REFUSALS as error:
        require(len(str(error)) > 20, f"a refusal says no more than {error!r}")
        after = model.state_dict()
        require(before.keys() == after.keys(), f"refused by {error}, the model has other entries")
        differing = [name for name in before if not same(after[name], before[name])]
        require(not differing, f"refused by {error}, the model has other {differing}")
        return None
    return model


def check_same_content(model: nn.Module, expected: nn.Module) -> None:
    """Refuse other weights or masks than the file had before its damage."""
    found, should = (itop_prune.dense_state_dict(one) for one in (model, expected))
    differing = [name for name in should if not same(found[name], should[name])]
    require(not differing, f"a damaged file was read with other {differing}")
    masks, others = itop_prune.find_masks(model), itop_prune.find_masks(expected)
    require(masks.keys() == others.keys(), "a damaged file was read with other masked layers")
    for name, itop in masks.items():
        require(torch.equal(itop.mask, others[name].mask), f"read with another mask of {name}")


def check_sound(model: nn.Module | None) -> None:
    """Refuse a model that is not sparse as it says, or does not compute."""
    if model is None:
        return
    for name, itop in itop_prune.find_masks(model).items():
        mask = itop.mask
        require(mask.dtype == torch.bool, f"the mask of {name} is {mask.dtype}")
        require(not itop.weight[~mask].any(), f"{name} has weights off the mask")
        require(itop.active == int(mask.sum()), f"{name} counts {itop.active} active weights")
    model.eval()(torch.zeros(2, 2, 5, 5))


# --- checkpoints of runs -------------------------------------------------------------------------


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    """Write a checkpoint, and return its files."""
    state = {"step": 7, "nested": {"loss": [0.5, 1.0]}, "tensor": torch.arange(5.0)}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: dict(source("mask").state_dict()) for name in ("model", "ema")}
        path = Checkpoints(Path(folder), keep=2).save(7, models, state)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def damaged_checkpoint(draw: random.Random, folder: Path) -> None:
    """Damage a file of a checkpoint, or its checksums in a way that a person might."""
    files = dict(checkpoint_files())
    name = draw.choice([*files])
    if draw.random() < 0.1:
        del files[name]
    elif name == "checksums.json" and draw.random() < 0.5:
        files[name] = draw_checksums(draw, files[name])
    else:
        files[name] = draw.choice(DAMAGE)(draw, files[name])
    for file, content in files.items():
        (folder / file).write_bytes(content)

    changed = {file for file, content in checkpoint_files().items() if files.get(file) != content}
    found = damage(folder)
    harmless = changed <= {"checksums.json"} and same_sums(files.get("checksums.json", b""))
    require(bool(found) or harmless, f"{name} is damaged, and its checkpoint counts as whole")
    require(len(found.splitlines()) <= 1, f"the damage is told in several lines: {found}")

    # It is read all the same, as by a caller that does not look at checksums.
    model = copy.deepcopy(source("mask"))
    try:
        load_checkpoint(folder, {"model": model, "ema": copy.deepcopy(model)})
    except CheckpointError:
        return


def draw_checksums(draw: random.Random, content: bytes) -> bytes:
    """Change the values of checksums."""
    sums = json.loads(content)
    name = draw.choice([*sums])
    sums[name] = draw.choice([None, 3, "", sums[name][:-1], sums[name].upper(), [], "é"])
    return draw.choice([json.dumps(sums), json.dumps([sums]), "{}", "null", "[" * 5000]).encode()


def same_sums(content: bytes) -> bool:
    """Tell whether checksums differ from the right ones in form or in optional files alone."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    right = json.loads(checkpoint_files()["checksums.json"])
    needed = {"model.safetensors", "state.pt"}
    if not isinstance(found, dict) or not needed <= found.keys():
        return False
    return all(found[name] == right[name] for name in found.keys() & right.keys())


# --- states of a MaskScheduler -------------------------------------------------------------------


def scheduler() -> itop_prune.MaskScheduler:
    """Make a scheduler that sums gradients and counts survival, after five steps."""
    model = build(0)
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=20, every=3, grow="gradient", gradient_steps=2, survival=True
    )
    for _ in range(5):
        model(torch.randn(4, 2, 5, 5)).square().mean().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()
    return regrow


def changed_state(draw: random.Random, folder: Path) -> None:
    """Load a state of a scheduler in which something has another type, size or name."""
    regrow, state = scheduler(), scheduler().state_dict()
    for _ in range(draw.randint(1, 2)):
        place: Any = state
        key = draw.choice([*place])
        while isinstance(place[key], dict) and place[key] and draw.random() < 0.8:
            place = place[key]
            key = draw.choice([*place])
        others: list[Any] = [
            None,
            -1,
            0,
            3,
            10**30,
            True,
            "x",
            [],
            {},
            ["0.weight"],
            {"0.weight": 3},
            1.5,
        ]
        others += [torch.zeros(0), torch.zeros(3, dtype=torch.bool), torch.tensor(1)]
        change = draw.random()
        if change < 0.2:
            del place[key]
        elif change < 0.3:
            place[draw.choice(["x", 3, f"{key}s"])] = place.pop(key)
        else:
            place[key] = draw.choice(others)

    before = copy.deepcopy(regrow.state_dict())
    try:
        regrow.load_state_dict(state)
    except ValueError as error:
        require(len(str(error)) > 20, f"a refusal says no more than {error!r}")
        require(same_states(regrow.state_dict(), before), f"refused by {error}, it has changed")
    else:
        regrow.load_state_dict(regrow.state_dict())
        repr(regrow)


def same_states(one: Any, other: Any) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_states(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_states, one, other))
    return same(one, other)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "damaged file": damaged_file,
    "no checksum": file_without_checksum,
    "right checksum": right_checksum,
    "pickle": other_pickle,
    "shards": folder_of_shards,
    "checkpoint": damaged_checkpoint,
    "scheduler": changed_state,
}
