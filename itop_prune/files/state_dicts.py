"""Weights in and out: of sparse models that were saved, and to plain dense ones."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.files import small_files
from itop_prune.files.small_files import (
    ActiveWeights,
    Entry,
    entries_by_weight,
    with_active_weights,
)
from itop_prune.layers.handle import ITOP, exclude_masks_from_ddp, find_masks, refuse_deployed
from itop_prune.layers.maskable import Target, obstacles, plain_name, unwrap, walk
from itop_prune.layers.masked_layer import (
    BROKEN_PATTERN,
    breaks_pattern,
    masked_names,
    pattern_of,
    sparse_names,
)
from itop_prune.layers.names import mask_name, parameter_name, positions_name, values_name
from itop_prune.layers.sparse_handle import STORAGES, Storage
from itop_prune.layers.sparse_storage import gather
from itop_prune.memory import in_bytes, total_memory
from itop_prune.messages import nearest
from itop_prune.methods.lookup import lookup
from itop_prune.sharding import is_sharded, whole

AVERAGED = "n_averaged"
"""The entry that AveragedModel adds beside those of its module."""


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Make the state dict that a copy of the model without masks loads strictly.

    Args:
        model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not.

    Returns:
        New tensors for masked weights, 0 wherever a mask is False, and the model's own for all
        others, in the model's order. If FSDP2 shards the model, all ranks must call, and each gets
        whole tensors.

    Raises:
        ValueError: The model was made by `deploy`.
    """
    refuse_deployed(model)
    source = _StateDict.of(unwrap(model).state_dict())
    targets = _targets(unwrap(model))

    dense: dict[str, Tensor] = OrderedDict()
    dense._metadata = {  # type: ignore[attr-defined]
        plain_name(name): version for name, version in source.versions.items()
    }
    for name, entries in source.entries.items():
        if entries == [name]:
            dense[name] = whole(source.tensors[name])
            continue

        if name in targets:
            layer, tensor = targets[name]
            weight = getattr(layer, tensor).detach()
        else:  # masked by torch's own pruning
            weight = source.tensors[parameter_name(name)]
        mask: Any = source.tensors[mask_name(name)]
        if isinstance(mask, ActiveWeights):  # made of them just now
            dense[name] = weight
        else:
            dense[name] = whole(weight).masked_fill(~mask.bool(), 0)
    return dense


def load(
    model: nn.Module,
    source: Mapping[str, Tensor] | str | Path,
    *,
    strict: bool = True,
    storage: Storage = "mask",
) -> dict[str, ITOP]:
    """Make a model sparse with the weights and masks of a saved sparse model.

    Args:
        model: Dense, or masked at the same places; changed in place.
        source: A file that `itop_prune.save` wrote, a state dict of a sparse model, a file of one
            (.safetensors or of `torch.save`), or a folder that Accelerate saved. Dense weights with
            zeros have no masks: load them by `model.load_state_dict`, and take the masks by
            `itop_prune.apply(model, scores="nonzero")`. A state dict has
            `<name>_orig` and `<name>_mask`, of this package or of torch's own pruning, or
            `<name>_values`, `<name>_positions` and `<name>_shape`. Prefixes of wrappers (DDP,
            torch.compile) are taken off. No code from a file is run.
        strict: Refuse a source whose names or shapes differ from the model's. Otherwise what
            differs stays as it is in the model: a new head stays dense, for example.
        storage: Of weights that have no mask yet, as in `itop_prune.apply`. A masked weight keeps
            its storage; the source may have either.

    Returns:
        The masks, as `itop_prune.find_masks` gives them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source is no state dict, is damaged, has no masks, or does not fit. The
            model is then as it was.
        ImportError: A .safetensors file needs safetensors and numpy, and one is not installed.
    """
    handle = lookup(storage, STORAGES, "storage")
    if isinstance(source, Mapping):
        found = _StateDict.of(_find_state_dict(source, "the source"))
    else:
        found = _StateDict.of(_read(Path(source)))

    model = unwrap(model)
    present = _StateDict.of(model.state_dict(keep_vars=True))
    _refuse_meta(present)
    found = _without_wrappers(found, present)

    targets = _targets(model)
    masked_here = {name for name, (layer, its) in targets.items() if its in masked_names(layer)}
    fitting = _fitting_names(found, present, targets, strict)
    _check_masks(model, found, fitting, targets, masked_here)

    placed: dict[str, ITOP] = {}
    to_mask = found.masked & fitting - masked_here
    for name, (layer, tensor) in targets.items():
        if name in to_mask and tensor not in masked_names(layer):  # a layer may have two names
            placed[name] = handle.place(layer, tensor)

    tensors = _fit_storage(_write_active_weights(found, fitting, targets), targets)
    model.load_state_dict(_with_own_names(tensors, found, present), strict=strict)
    exclude_masks_from_ddp(model)
    return find_masks(model) if masked_here else placed


@dataclass(frozen=True)
class _StateDict:
    """A state dict by plain names, which have no parts of torch.compile."""

    tensors: Mapping[str, Entry]
    versions: Mapping[str, Any]
    """Versions of layers by their name, which torch keeps beside the tensors."""
    own_names: Mapping[str, str]
    """Names with those parts, by plain name."""

    @classmethod
    def of(cls, state: Mapping[str, Entry]) -> "_StateDict":
        own_names = {plain_name(name): name for name in state}
        tensors = with_active_weights({name: state[own] for name, own in own_names.items()})
        versions: Mapping[str, Any] = getattr(state, "_metadata", {})
        return cls(tensors, versions, own_names)

    @cached_property
    def entries(self) -> dict[str, list[str]]:
        return entries_by_weight(self.tensors)

    @cached_property
    def masked(self) -> set[str]:
        return {name for name, entries in self.entries.items() if entries != [name]}

    @cached_property
    def shapes(self) -> dict[str, set[str]]:
        """The shapes by plain name: weight and mask of a sound source have the same one."""
        return {
            name: {_shape(self.tensors[entry]) for entry in entries}
            for name, entries in self.entries.items()
        }


def _shape(entry: Any) -> str:
    """Describe the shape of an entry; of other than real, dense tensors also what they are."""
    values = entry.values if isinstance(entry, ActiveWeights) else entry
    if not isinstance(values, Tensor):
        return "()"
    if values.is_nested:
        return "nested"

    kinds = {
        "complex": values.is_complex(),
        "quantized": values.is_quantized,
        "meta": values.is_meta,
        f"{values.layout}".removeprefix("torch."): values.layout != torch.strided,
    }
    return " ".join([*(kind for kind, is_so in kinds.items() if is_so), str(tuple(entry.shape))])


def _targets(model: nn.Module) -> dict[str, Target]:
    return {name: (layer, its) for name, layer, its in walk(model, remove_duplicate=False)}


def _refuse_meta(model: _StateDict) -> None:
    for tensor in model.tensors.values():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(
                "the model is on the meta device; call model.to_empty(device=...) first"
            )


def _without_wrappers(source: _StateDict, model: _StateDict) -> _StateDict:
    """Take off prefixes of DataParallel, DDP and AveragedModel until a name is the model's."""
    prefix = "module."
    while not model.entries.keys() & source.entries.keys():
        inside = {name: tensor for name, tensor in source.tensors.items() if name != AVERAGED}
        if not inside or not all(name.startswith(prefix) for name in inside):
            break

        versions = {}
        for name, version in source.versions.items():
            versions[plain_name(name).removeprefix("module").removeprefix(".")] = version
        tensors = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
        source = _StateDict(tensors, versions, {})
    return source


def _fitting_names(
    source: _StateDict, model: _StateDict, targets: Mapping[str, Target], strict: bool
) -> set[str]:
    """Match names and shapes: find the weights that can be loaded.

    Raises:
        ValueError: The source has no masks, masks something else, or does not fit.
    """
    if not source.masked:
        raise ValueError(
            "the source has no masks; load a dense one with model.load_state_dict, then call "
            "itop_prune.apply: with scores='nonzero' the zeros of a pruned one become the masks"
        )
    twice = sorted(source.masked & source.tensors.keys())
    if twice:
        raise ValueError(
            f"the source has both a dense and a masked {twice[0]}; save model.state_dict()"
        )
    unknown = sorted((source.masked & model.entries.keys()) - targets.keys())
    if unknown:
        raise ValueError(
            f"the source masks what is no weight matrix here: {', '.join(unknown)}; call "
            "prune.remove on it first"
        )

    names = model.shapes.keys() | source.shapes.keys()
    fitting = {name for name in names if model.shapes.get(name) == source.shapes.get(name)}
    differing = sorted(names - fitting)
    if strict and differing:
        lines = [_difference(name, model, source) for name in differing[:10]]
        if len(differing) > 10:
            lines.append(f"  and {len(differing) - 10} more")
        raise ValueError(
            "model and source differ; strict=False loads the rest\n" + "\n".join(lines)
        )
    if not source.masked & fitting:
        raise ValueError(
            "no masked weight of the source fits the model: "
            f"{differing[0]!r}{nearest(differing[0], model.shapes)}"
        )
    return fitting


def _difference(name: str, model: _StateDict, source: _StateDict) -> str:
    here, there = (
        " and ".join(sorted(state.shapes.get(name, ()))) or "none" for state in (model, source)
    )
    return f"  {name}: the model has {here}, the source {there}"


def _check_masks(
    model: nn.Module,
    source: _StateDict,
    fitting: set[str],
    targets: Mapping[str, Target],
    masked_here: set[str],
) -> None:
    """Refuse masks that the model can't take.

    Raises:
        ValueError: There are such masks.
    """
    only_here = sorted(masked_here & fitting - source.masked)
    if only_here:
        raise ValueError(
            f"masked in the model and dense in the source: {', '.join(only_here)}; load into a "
            "dense model. Zeros of the source become masks by itop_prune.apply(model, "
            "scores='nonzero') after that"
        )

    broken = []
    for name in masked_here & fitting:
        layer, tensor = targets[name]
        if pattern_of(layer, tensor) is not None:
            mask: Any = source.tensors[mask_name(name)]
            if isinstance(mask, ActiveWeights):
                _, mask = mask.dense()
            if breaks_pattern(layer, tensor, mask):
                broken.append(name)
    if broken:
        raise ValueError(f"{', '.join(sorted(broken))}: {BROKEN_PATTERN}")

    to_mask = source.masked & fitting - masked_here
    reasons = obstacles(model, {name: targets[name] for name in targets if name in to_mask})
    if reasons:
        lines = [f"  {name}: {reason}" for name, reason in reasons.items()]
        raise ValueError("can't mask\n" + "\n".join(lines))


def _write_active_weights(
    source: _StateDict, fitting: set[str], targets: Mapping[str, Target]
) -> dict[str, Any]:
    """List the tensors that fit; `ActiveWeights` are written into their layers before."""
    tensors: dict[str, Any] = {}
    for name in fitting:
        for entry in source.entries[name]:
            tensors[entry] = source.tensors[entry]

    for name, (layer, tensor) in targets.items():
        weight = tensors.get(parameter_name(name))
        if not isinstance(weight, ActiveWeights) or tensor in sparse_names(layer):
            continue
        parameter = getattr(layer, parameter_name(tensor))
        mask = getattr(layer, mask_name(tensor))
        if is_sharded(parameter) or not (parameter.is_contiguous() and mask.is_contiguous()):
            parameter, mask = weight.dense()
        else:  # straight into the layer: it saves a copy
            weight.write_into(parameter, mask)
        tensors[parameter_name(name)], tensors[mask_name(name)] = parameter, mask
    return tensors


def _fit_storage(tensors: dict[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
    """Turn weights and masks into values and positions where the model's storage is sparse."""
    for name, (layer, tensor) in targets.items():
        if tensor not in sparse_names(layer) or parameter_name(name) not in tensors:
            continue
        weight, mask = tensors.pop(parameter_name(name)), tensors.pop(mask_name(name))
        if isinstance(weight, ActiveWeights):
            values, positions = weight.values.unsqueeze(0), weight.positions
        else:
            positions = mask.bool().flatten().nonzero().squeeze(1)
            values = gather(weight, positions)
        tensors[values_name(name)], tensors[positions_name(name)] = values, positions
    return tensors


def _with_own_names(
    tensors: Mapping[str, Tensor], source: _StateDict, model: _StateDict
) -> dict[str, Tensor]:
    """Make the state dict that a model takes; versions that the source lacks are the model's."""
    state: Any = OrderedDict()
    for name, entries in source.entries.items():
        for entry in (*entries, values_name(name), positions_name(name)):
            if entry in tensors and entry in model.own_names:
                state[model.own_names[entry]] = tensors[entry]
            elif entry in tensors:  # of a new mask
                state[model.own_names[name] + entry.removeprefix(name)] = tensors[entry]

    versions = {plain_name(name): version for name, version in source.versions.items()}
    state._metadata = {
        name: versions.get(plain_name(name), version) for name, version in model.versions.items()
    }
    return state


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Read a state dict from a file, or from a folder that Accelerate saved.

    The file is .safetensors (of `itop_prune.save` too) or what `torch.save` wrote. No code from a
    file is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    return small_files.dense_tensors(with_active_weights(_read(Path(path))))


def _read(path: Path) -> Mapping[str, Entry]:
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> Mapping[str, Entry]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; allowed are a .safetensors or torch file, or a folder of "
            "Accelerate's"
        )
    size, there = path.stat().st_size, total_memory(torch.device("cpu"))
    if size > there:
        raise ValueError(
            f"{path} has {in_bytes(size)}, and this machine has {in_bytes(there)} of memory; read "
            "it on a larger one"
        )
    if path.suffix == ".safetensors":
        return small_files.read(path)

    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged; no code from a file "
            "is run: save model.state_dict()"
        ) from None
    except Exception as error:  # of any kind, as what is damaged happens to read
        raise ValueError(
            f"{path} is damaged or no file of torch.save: {error!r}; copy or save it again"
        ) from None
    return _find_state_dict(state, str(path))


def check_archive(path: Path) -> None:
    """Compare the checksums within a file of `torch.save`, which `torch.load` does not do.

    Raises:
        ValueError: The file is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # no zip archive: `torch.load` reads other formats too
            return

    try:
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) writes 0 for all of them.
            for entry in (entry for entry in archive.infolist() if entry.CRC):
                with archive.open(entry) as file:
                    while file.read(1 << 20):  # the end compares
                        pass
    except Exception as error:  # of any kind, as what is damaged happens to read
        raise ValueError(f"{path} is damaged: {error}; copy or save it again") from None


def _find_state_dict(source: Any, called: str) -> Mapping[str, Tensor]:
    """Find the state dict in what was given: timm and others wrap it.

    Raises:
        ValueError: There is none.
    """
    state = source
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]

    problem = _problem(state)
    if problem:
        raise ValueError(
            f"{called} holds no state dict, a dict of tensors by name: {problem}; save "
            "model.state_dict()"
        )
    return state


def _problem(state: Any) -> str:
    """Describe what can't be in a state dict that loads, or return ""."""
    if not isinstance(state, Mapping):
        return f"it is of type {type(state).__name__}"

    for name, value in state.items():
        if not isinstance(name, str):
            return f"the name {name!r} is no text"
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
            return f"{name} is of type {type(value).__name__}"

    versions = getattr(state, "_metadata", {})
    if not isinstance(versions, Mapping) or not all(map(_is_version, versions.items())):
        return "its _metadata are not the versions of layers by name"
    return ""


def _is_version(item: tuple[object, object]) -> bool:
    """Tell whether an item of `_metadata` is a layer's name and what torch keeps of its version."""
    name, kept = item
    if not isinstance(name, str) or not isinstance(kept, Mapping):
        return False
    return isinstance(kept.get("version"), int | None)


def _read_folder(folder: Path) -> Mapping[str, Entry]:
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).exists():
            return _read_file(folder / file)

        index = folder / f"{file}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                missing = [name for name in shards if not os.path.isfile(folder / name)]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{index} is damaged: it has no weight_map, files by name; save it again"
                ) from None
            if missing:
                raise FileNotFoundError(
                    f"{index} names {missing[0]!r}, no file beside it; copy the folder again"
                )

            state: dict[str, Entry] = {}
            for shard in shards:
                state |= _read_file(folder / shard)
            return state
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin; allowed are a file of "
        "weights, and a folder that Accelerate saved"
    )
