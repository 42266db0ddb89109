"""Small files of sparse models: of a masked weight the active values and where they are, of the rest all.

A file is safetensors. A tensor that is not masked stands in it as in a state dict; of a masked
weight `<name>_orig` holds the active values and `<name>_mask` their positions, as
`itop_prune.files.positions` writes them. The metadata say under "itop_prune" the version of the
format, the CRC-32 of the whole file but its own eight digits, and as JSON the shapes of the masked
weights. Equal models give equal files.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from itop_prune.files.positions import Packed
from itop_prune.layers.maskable import plain_name, unwrap
from itop_prune.sharding import whole

FORMAT, VERSION = "itop_prune", "2"
BEFORE_CHECKSUM = f'"{FORMAT}":"{VERSION} '.encode()
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write weights and masks of a sparse model into a small file, which `itop_prune.load` reads.

    What is loaded is what was saved, bit for bit: active weights, masks, every other parameter and
    buffer. The file appears under its name when it is whole; where that fails, what had the name
    before stays.

    Args: model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not,
        on any device. Of one that FSDP2 shards the tensors are gathered, one at a time, on every
        rank: all must call, and each writes the whole file. Of any other model one rank is enough;
        which one calls is up to the caller. path: Of the file; its name ends in .safetensors.
        dtype: What every floating-point tensor is rounded to, those of dense layers and buffers
        too: torch.float32, float16 or bfloat16; None keeps each as it is. The model that loads the
        file keeps its own.

    Raises: ValueError: The model has no masks, a name or dtype is not allowed, or a number does not
        fit into the dtype. RuntimeError: A mask was made on the meta device and has no positions
        yet. OSError: The file can't be written.
    """
    write(
        {plain_name(name): tensor for name, tensor in unwrap(model).state_dict().items()},
        path,
        dtype,
    )


def masked(state: Mapping[str, object]) -> set[str]:
    """Return the names of the masked weights of a state dict."""
    stems = {name.removesuffix("_mask") for name in state if name.endswith("_mask")}
    return {stem for stem in stems if f"{stem}_orig" in state}


def write(state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the state dict of a sparse model as `save` writes the model.

    Raises:
        ValueError: As of `save`.
        OSError: As of `save`.
    """
    from safetensors import SafetensorError  # an optional dependency, needed for this format alone
    from safetensors.torch import save_file

    path, owners = Path(path), masked(state)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"the name of {path} tells of another format; give it one that ends in .safetensors"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES))}; None keeps what is there"
        )
    if not owners:
        raise ValueError(
            "there are no masks, and without them the file would not be small; call itop_prune.apply first, or save a "
            "dense model's state_dict() with safetensors"
        )
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{', '.join(strange)} holds no tensor, and this file nothing else; let get_extra_state return one, or "
            "write model.state_dict() with torch.save"
        )
    tensors, shapes = {}, {}
    for name, tensor in state.items():
        owner = name.removesuffix("_mask")
        if owner in owners:
            packed = Packed.of(_whole(state[f"{owner}_orig"]), _whole(tensor))
            tensors[f"{owner}_orig"] = _convert(owner, packed.values, dtype)
            tensors[name], shapes[owner] = packed.code, packed.shape
        elif name.removesuffix("_orig") not in owners:
            tensors[name] = _convert(name, _whole(tensor), dtype)
    about = {FORMAT: f"{VERSION} {8 * '0'} {json.dumps(shapes)}"}
    unfinished = path.with_name(
        f"{path.name}.{os.urandom(4).hex()}.unfinished"
    )  # several ranks may write at once
    try:
        save_file(tensors, unfinished, about)
        start, checksum = _checksum(unfinished.read_bytes())
        with unfinished.open("r+b") as file:
            file.seek(start)
            file.write(checksum.encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written: {error}; what had the name before is as it was"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> Mapping[str, Tensor | Packed]:
    """Return the state dict that a .safetensors file holds; of a compact one weight and mask are one `Packed`.

    Raises:
        ValueError: It is damaged, no safetensors file, or of another version.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(FORMAT)
            if about is None:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file: {error}; copy or save it again"
        ) from None
    version, _, rest = about.partition(" ")
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}; this itop_prune reads version {VERSION}: install the one that wrote it"
        )
    checksum, _, shapes = rest.partition(" ")
    content = path.read_bytes()
    if checksum != _checksum(content)[1]:
        raise ValueError(
            f"{path} is damaged: its checksum is not that of what it holds; copy or save it again"
        )
    tensors = load(content)
    state: dict[str, Tensor | Packed] = {**tensors}
    for owner, shape in json.loads(shapes).items():
        weight, mask = f"{owner}_orig", f"{owner}_mask"
        state[weight] = state[mask] = Packed(tensors[weight], tensors[mask], tuple(shape))
    return state


def unpack(state: Mapping[str, Tensor | Packed]) -> Mapping[str, Tensor]:
    """Return a state dict with tensors in place of what is packed."""
    unpacked = {
        name: entry.unpack()[name.endswith("_mask")]
        for name, entry in state.items()
        if isinstance(entry, Packed)
    }
    return {**state, **unpacked} if unpacked else state  # type: ignore[return-value, dict-item]


def _whole(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().cpu()


def _convert(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in the file's dtype and in memory of its own; a module under two names has one for both."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    converted = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if (
        torch.finfo(tensor.dtype).max > torch.finfo(dtype).max
        and (converted.isinf() & ~tensor.isinf()).any()
    ):
        raise ValueError(
            f"{name} holds numbers beyond the range of {dtype}; save it with dtype=None"
        )
    return converted


def _checksum(content: bytes) -> tuple[int, str]:
    """Return where in a file the digits of its checksum stand, and what they have to be: the CRC-32 of all the rest."""
    start = content.find(BEFORE_CHECKSUM) + len(BEFORE_CHECKSUM)
    every = memoryview(content)
    return start, f"{zlib.crc32(every[start + 8 :], zlib.crc32(every[:start])):08x}"
