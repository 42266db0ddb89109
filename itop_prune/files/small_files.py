"""Small files of sparse models: active weights alone, and where they are.

A file is safetensors. A tensor without a mask stands in it as in a state dict. Of a masked weight
`<name>_orig` holds the active values, row by row, and `<name>_mask` their positions as bytes (see
`itop_prune.files.positions`).

The metadata have one entry, "itop_prune", of three words: the version of the format, a checksum,
and the masked weights as JSON: `{"fc.weight": {"shape": [4, 12], "positions": "gaps"}}`. The
checksum is the CRC-32 of the file in which its eight hexadecimal digits are 0. Equal models give
equal files.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.layers.maskable import plain_name, unwrap
from itop_prune.layers.names import (
    mask_name,
    parameter_name,
    positions_name,
    shape_name,
    values_name,
)
from itop_prune.layers.sparse_storage import problem
from itop_prune.messages import listed
from itop_prune.methods.validation import is_plain
from itop_prune.sharding import whole
from itop_prune.topology import count_true, true_positions

from .writing import replacing

FORMAT, VERSION = "itop_prune", "3"
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
NO_CHECKSUM = "00000000"
BEFORE_CHECKSUM = f'"{FORMAT}":"{VERSION} '.encode()
"""What stands before the digits of the checksum in a file."""


@dataclass(frozen=True)
class ActiveWeights:
    """A masked weight: its active values, and where they are among all, row by row.

    Of sparse storage these are all slots in their order, and -1 is the position of a free one.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Make the weight, 0 wherever the mask is False, and the mask.

        Raises:
            ValueError: So large a weight does not fit into memory, or has an unusual dtype.
        """
        try:
            weight = self.values.new_empty(self.shape)
            mask = self.values.new_empty(self.shape, dtype=torch.bool)
            self.write_into(weight, mask)
        except (RuntimeError, TypeError) as error:  # of a file that was made by hand
            raise ValueError(f"a weight of shape {self.shape} can't be made: {error}") from None
        return weight, mask

    @torch.no_grad()
    def write_into(self, weight: Tensor, mask: Tensor) -> None:
        """Write weight and mask into contiguous tensors of the shape, on any device."""
        used = self.positions >= 0
        places = self.positions[used].to(weight.device, torch.int64)
        weight.view(-1).zero_().index_copy_(0, places, self.values[used].to(weight))
        mask.view(-1).zero_().index_fill_(0, places, True)


Entry = Tensor | ActiveWeights


def with_active_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Put `ActiveWeights` in place of weights in sparse storage, under the names of a mask."""
    owners = _sparse_entries(state)
    found: dict[str, Any] = {}
    for entry, tensor in state.items():
        if entry not in owners:
            found[entry] = tensor
        elif entry == values_name(owners[entry]):
            name = owners[entry]
            weight = _read_slots(name, tensor, state[positions_name(name)], state[shape_name(name)])
            found[parameter_name(name)] = found[mask_name(name)] = weight
    return found


def _sparse_entries(state: Mapping[str, object]) -> dict[str, str]:
    """Find the entries of weights in sparse storage, and the names of their weights."""
    names = {entry.removesuffix("_positions") for entry in state if entry.endswith("_positions")}
    owners: dict[str, str] = {}
    for name in names:
        entries = values_name(name), positions_name(name), shape_name(name)
        if all(entry in state for entry in entries):
            owners |= dict.fromkeys(entries, name)
    return owners


def _read_slots(name: str, values: Tensor, positions: Tensor, shape: Tensor) -> ActiveWeights:
    """Read a weight in sparse storage.

    Raises:
        ValueError: Values, positions and shape do not fit together.
    """
    if not (is_plain(values) and is_plain(positions) and is_plain(shape)):
        raise ValueError(
            f"{name}: values, positions or shape are no dense tensor with numbers; save "
            "model.state_dict() again"
        )
    sizes = shape.tolist() if shape.ndim == 1 else [-1]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(
            f"{name}: its shape is {shape}; allowed are whole numbers in one dimension: save "
            "model.state_dict() again"
        )
    dense_shape = tuple(sizes)
    reason = problem(values, positions, dense_shape)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return ActiveWeights(values.detach().squeeze(0), positions, dense_shape)


def masked(state: Mapping[str, object]) -> set[str]:
    """Find the names of the masked weights in a state dict, of either storage."""
    names = {entry.removesuffix("_mask") for entry in state if entry.endswith("_mask")}
    names = {name for name in names if parameter_name(name) in state}
    return names | set(_sparse_entries(state).values())


def entries_by_weight(state: Mapping[str, object]) -> dict[str, list[str]]:
    """List the entries of a state dict by plain name: a masked weight has two, others one.

    >>> entries_by_weight({"fc.weight_orig": 0, "fc.bias": 0, "fc.weight_mask": 0})
    {'fc.weight': ['fc.weight_orig', 'fc.weight_mask'], 'fc.bias': ['fc.bias']}
    """
    names = masked(state)
    owners = {parameter_name(name): name for name in names}
    owners |= {mask_name(name): name for name in names}
    found: dict[str, list[str]] = {}
    for entry in state:
        found.setdefault(owners.get(entry, entry), []).append(entry)
    return found


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a sparse model into a small file, which `itop_prune.load` reads.

    Active weights, masks, and every other parameter and buffer come back bit for bit. The file
    appears under its name when it is whole; if writing fails, the file of before stays. Needs
    safetensors and numpy.

    Sparse storage comes back with its slots sorted and none free. An optimizer's state of before
    does not fit them: go on with training from a state dict.

    Args:
        model: Masked by `itop_prune.apply`, on any device; wrapped (DDP, torch.compile,
            AveragedModel) or not. If FSDP2 shards it, all ranks must call: the tensors are
            gathered, and each rank writes the whole file. Otherwise one rank is enough.
        path: Name of the file; it ends in .safetensors.
        dtype: Round every floating-point tensor to torch.float32, float16 or bfloat16, those of
            dense layers and buffers too. None keeps them as they are. A model that loads the file
            keeps its own.

    Raises:
        ValueError: The model has no masks, a name or dtype is not allowed, a tensor is not dense
            or has no values, or a number does not fit into the dtype.
        OSError: The file can't be written.
        ImportError: safetensors or numpy is not installed.
    """
    state = {plain_name(name): tensor for name, tensor in unwrap(model).state_dict().items()}
    write(state, path, dtype)


def write(state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the state dict of a sparse model as `save` writes the model.

    Raises:
        ValueError, OSError, ImportError: As of `save`.
    """
    path, state = Path(path), with_active_weights(state)
    _check(state, path, dtype)
    safetensors = _import_safetensors()
    from itop_prune.files import positions  # it needs numpy

    tensors, layouts = {}, {}
    for name, entries in entries_by_weight(state).items():
        if entries == [name]:
            tensors[name] = _convert(name, _on_cpu(state[name]), dtype)
            continue

        weight, mask = state[parameter_name(name)], state[mask_name(name)]
        if isinstance(weight, ActiveWeights):
            shape, places, slots = weight.shape, *_on_cpu(weight.positions).sort()
            free = count_true(places < 0)
            places, values = places[free:], _on_cpu(weight.values)[slots[free:]]
        else:
            shape, mask = tuple(weight.shape), _on_cpu(mask).bool().flatten()
            places, values = true_positions(mask), _on_cpu(weight).flatten()[mask]
        encoding, code = positions.encode(places.numpy(), math.prod(shape))
        tensors[parameter_name(name)] = _convert(name, values, dtype)
        tensors[mask_name(name)] = torch.from_numpy(code)
        layouts[name] = {"shape": list(shape), "positions": encoding}

    about = f"{VERSION} {NO_CHECKSUM} {json.dumps(layouts)}"
    content = bytearray(safetensors.torch.save(tensors, {FORMAT: about}))
    start, checksum = _checksum(content)
    content[start : start + len(checksum)] = checksum.encode()
    _replace_file(path, content)


def read(path: Path) -> Mapping[str, Entry]:
    """Read a .safetensors file; both entries of a masked weight of ours are its `ActiveWeights`.

    Raises:
        ValueError: It is damaged, no safetensors file, or of another version.
        ImportError: As of `save`.
    """
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(FORMAT)
            if about is None:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file: {error}; copy or save it again"
        ) from None

    version, _, rest = about.partition(" ")
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}; this itop_prune reads version {VERSION}: install the "
            "one that wrote it"
        )

    checksum, _, layouts = rest.partition(" ")
    content = path.read_bytes()
    if checksum != _checksum(content)[1]:
        raise ValueError(
            f"{path} is damaged: its checksum is not that of what it holds; copy or save it again"
        )

    state: dict[str, Entry] = {**safetensors.torch.load(content)}
    try:
        for name, layout in json.loads(layouts).items():
            weight = _active_weights(state, name, layout)
            state[parameter_name(name)] = state[mask_name(name)] = weight
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; copy it again, or write it with itop_prune.save"
        ) from None
    return state


def _import_safetensors() -> Any:
    """Import safetensors and numpy, which only files of this format need."""
    try:
        import numpy  # noqa: F401
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{error}; .safetensors files need two more packages: pip install safetensors numpy"
        ) from None
    return safetensors


def dense_tensors(state: Mapping[str, Entry]) -> Mapping[str, Tensor]:
    """Make parameter and mask of every `ActiveWeights` in a state dict."""
    dense = {}
    for name, entries in entries_by_weight(state).items():
        weight = state[entries[0]]
        if isinstance(weight, ActiveWeights):
            dense[parameter_name(name)], dense[mask_name(name)] = weight.dense()
    return {**state, **dense} if dense else state  # type: ignore[return-value, dict-item]


def _check(state: Mapping[str, object], path: Path, dtype: object) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"the name of {path} tells of another format; give it one that ends in .safetensors"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES))}; None keeps what is there"
        )
    if not masked(state):
        raise ValueError(
            "there are no masks, and without them the file would not be small; call "
            "itop_prune.apply first, or save a dense model's state_dict() with safetensors"
        )
    others = [
        name
        for name, value in state.items()
        if not isinstance(value, ActiveWeights) and not is_plain(value)
    ]
    if others:
        raise ValueError(
            f"{listed(others)} holds no dense tensor with values, and this file nothing else; let "
            "get_extra_state return one, or write model.state_dict() with torch.save"
        )


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().cpu()


def _convert(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Copy a tensor in the file's dtype: a module under two names has one memory for both."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)

    converted = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    narrower = torch.finfo(tensor.dtype).max > torch.finfo(dtype).max
    if narrower and (converted.isinf() & ~tensor.isinf()).any():
        raise ValueError(
            f"{name} holds numbers beyond the range of {dtype}; save it with dtype=None"
        )
    return converted


def _active_weights(
    state: Mapping[str, Any], name: str, layout: Mapping[str, Any]
) -> ActiveWeights:
    """Read a masked weight, and refuse one that could not be written into a model."""
    from itop_prune.files import positions

    shape = layout["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {name} is {shape!r}")

    values, code = state[parameter_name(name)], state[mask_name(name)].numpy()
    try:
        places = positions.decode(layout["positions"], code, math.prod(shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if values.shape != places.shape:
        raise ValueError(f"{name} has {len(places)} positions for values {tuple(values.shape)}")

    return ActiveWeights(values, torch.from_numpy(places), tuple(shape))


def _checksum(content: bytes | bytearray) -> tuple[int, str]:
    """Find where the digits of the checksum stand in a file, and compute them."""
    start = content.find(BEFORE_CHECKSUM) + len(BEFORE_CHECKSUM)
    end = start + len(NO_CHECKSUM)
    with memoryview(content) as view:
        found = zlib.crc32(view[:start])
        found = zlib.crc32(NO_CHECKSUM.encode(), found)
        found = zlib.crc32(view[end:], found)
    return start, f"{found:08x}"


def _replace_file(path: Path, content: bytes | bytearray) -> None:
    """Write a file that appears under its name when all of it is on the disk."""
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error}; a file of that name is whole"
        ) from None
