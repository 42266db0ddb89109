"""Weights in and out: of sparse models that were saved, and to plain dense ones."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itop_prune.files import small_files as compact
from itop_prune.files.positions import Packed
from itop_prune.layers.handle import ITOP, exclude_masks_from_ddp, find_masks
from itop_prune.layers.maskable import obstacles, plain_name, refuse_deployed, unwrap, walk
from itop_prune.layers.masked_layer import BROKEN_PATTERN as BROKEN
from itop_prune.layers.masked_layer import breaks_pattern, masked_names, pattern_of
from itop_prune.messages import nearest
from itop_prune.sharding import is_sharded, whole

State = dict[str, Tensor]
Shapes = dict[str, set[tuple[int, ...]]]
AVERAGED = "n_averaged"
"""What AveragedModel counts in, beside its `module`."""


def dense_state_dict(model: nn.Module) -> State:
    """Return the effective weights under their plain names: what a copy of the model without masks loads strictly.

    Args:
        model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not.

    Returns: New tensors for masked weights, the model's own for all others, in the model's order.
        Of a model that FSDP2 shards, all of them whole, on every rank: all must ask.

    Raises:
        ValueError: It was made by `deploy`.
    """
    refuse_deployed(model)
    own = unwrap(model).state_dict()
    state = {plain_name(name): tensor for name, tensor in own.items()}
    places = {name: (layer, tensor) for name, layer, tensor in walk(model, remove_duplicate=False)}
    dense: State = OrderedDict()
    dense._metadata = {plain_name(name): versions for name, versions in own._metadata.items()}  # type: ignore[attr-defined]
    for owner, entries in _owners(state).items():
        if owner in entries:
            dense[owner] = whole(state[owner])
        else:
            effective = (
                getattr(*places[owner]) if owner in places else state[f"{owner}_orig"]
            )  # or torch's own mask
            dense[owner] = whole(effective.detach()).masked_fill(~state[f"{owner}_mask"].bool(), 0)
    return dense


def load(
    model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, strict: bool = True
) -> dict[str, ITOP]:
    """Make a model sparse with the weights and masks of a saved sparse model.

    Args: model: Dense, or masked at the same places; changed in place. source: A file that
        `itop_prune.save` wrote; a state dict with `<name>_orig` and `<name>_mask` (of this package
        or of torch's own pruning; prefixes that DistributedDataParallel and torch.compile put in
        are taken off); a file of one, .safetensors or what `torch.save` writes (read with
        `weights_only=True`); or a folder that Accelerate saved. strict: Whether the names and
        shapes of model and source must be the same. If not, what differs keeps what the model has:
        a new head stays dense, say.

    Returns:
        The masks, as `itop_prune.find_masks` gives them.

    Raises: FileNotFoundError: There is no such file. ValueError: The source is no state dict, is
        damaged, has no masks, or does not fit the model, which is then as it was.
    """
    given = _state_in(source, "the source") if isinstance(source, Mapping) else _read(Path(source))
    state = {plain_name(name): tensor for name, tensor in given.items()}
    versions = {plain_name(name): layer for name, layer in getattr(given, "_metadata", {}).items()}
    model = unwrap(model)
    present = model.state_dict(keep_vars=True)
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in present.values()):
        raise ValueError("the model is on the meta device; call model.to_empty(device=...) first")
    actual = {plain_name(name): name for name in present}
    here = {name: present[actual[name]] for name in actual}
    shapes, owners = _shapes(here, _owners(here)), _owners(state)
    while not shapes.keys() & owners.keys() and (inner := _inside_module(state)):
        state = inner
        versions = {
            name.removeprefix("module").removeprefix("."): layer for name, layer in versions.items()
        }
        owners = _owners(state)
    found, weights = _shapes(state, owners), [*walk(model, remove_duplicate=False)]
    masked = {owner for owner, entries in owners.items() if owner not in entries}
    if not masked:
        raise ValueError(
            "the source has no masks; load a dense one with model.load_state_dict, then call itop_prune.apply"
        )
    if strange := sorted(masked & shapes.keys() - {name for name, _, _ in weights}):
        raise ValueError(
            f"the source masks what is no weight matrix here: {', '.join(strange)}; prune.remove it first"
        )
    differing = sorted(
        name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)
    )
    if strict and differing:
        raise ValueError(
            "model and source differ; strict=False loads the rest\n"
            + _differences(shapes, found, differing)
        )
    fitting = masked - set(differing)
    if not fitting:
        raise ValueError(
            f"no masked weight of the source fits the model: {differing[0]!r}{nearest(differing[0], shapes)}"
        )
    masked_here = {name for name, layer, tensor in weights if tensor in masked_names(layer)}
    if only_here := sorted(masked_here - masked - set(differing)):
        raise ValueError(
            f"masked in the model and dense in the source: {', '.join(only_here)}; load into a dense model"
        )
    state = {
        entry: state[entry]
        for name, entries in owners.items()
        if name not in differing
        for entry in entries
    }
    bound = [
        place
        for place in weights
        if place[0] in fitting & masked_here and pattern_of(*place[1:]) is not None
    ]
    if odd := [
        name for name, layer, tensor in bound if breaks_pattern(layer, tensor, _mask(state, name))
    ]:
        raise ValueError(f"{', '.join(odd)}: {BROKEN}")
    to_mask = {
        name: (layer, tensor)
        for name, layer, tensor in weights
        if name in fitting and name not in masked_here
    }
    if reasons := obstacles(model, to_mask):
        raise ValueError(
            "can't mask\n" + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        )
    placed: dict[str, ITOP] = {}
    for name, (layer, tensor) in to_mask.items():
        if tensor not in masked_names(layer):  # it may have two names
            placed[name] = ITOP.place(layer, tensor)
    for name, layer, tensor in weights:
        if isinstance(packed := state.get(f"{name}_mask"), Packed):
            state[f"{name}_orig"], state[f"{name}_mask"] = _unpacked(packed, layer, tensor)
    named = OrderedDict(
        (actual.get(name) or actual[name[:-5]] + name[-5:], tensor)
        for name, tensor in state.items()
    )
    # How torch keeps the versions of layers beside the tensors; those that the source does not tell are the model's.
    own_versions = present._metadata  # type: ignore[attr-defined]
    named._metadata = {  # type: ignore[attr-defined]
        name: versions.get(plain_name(name), own) for name, own in own_versions.items()
    }
    model.load_state_dict(named, strict=strict)
    exclude_masks_from_ddp(model)
    return find_masks(model) if masked_here else placed


def _inside_module(state: Mapping[str, Tensor | Packed]) -> dict[str, Tensor | Packed]:
    """Return what DataParallel, DDP or AveragedModel have put below "module.", {} where that is not all there is."""
    inside = {name: tensor for name, tensor in state.items() if name != AVERAGED}
    if not all(name.startswith("module.") for name in inside):
        return {}
    return {name.removeprefix("module."): tensor for name, tensor in inside.items()}


def _owners(state: Mapping[str, Tensor | Packed]) -> dict[str, list[str]]:
    """Return the names of a state dict's entries by plain name: of a masked weight there are two, of others one."""
    owners: dict[str, list[str]] = {}
    masked = compact.masked(state)
    for name in state:
        stem = name[:-5] if name.endswith(("_orig", "_mask")) else name
        owners.setdefault(stem if stem in masked else name, []).append(name)
    return owners


def _unpacked(packed: Packed, layer: nn.Module, tensor: str) -> tuple[Tensor, Tensor]:
    """Return a weight and its mask, written into those of a masked layer at once where that can be, to save a copy."""
    parameter, mask = getattr(layer, f"{tensor}_orig"), getattr(layer, f"{tensor}_mask")
    if is_sharded(parameter) or not (parameter.is_contiguous() and mask.is_contiguous()):
        return packed.unpack()
    packed.fill(parameter, mask)
    return parameter, mask


def _mask(state: Mapping[str, Tensor | Packed], name: str) -> Tensor:
    """Return the mask of a state dict for a weight."""
    mask = state[f"{name}_mask"]
    return mask.unpack()[1] if isinstance(mask, Packed) else mask


def _shapes(state: Mapping[str, Tensor | Packed], owners: Mapping[str, list[str]]) -> Shapes:
    """Return the shapes by plain name; weight and mask have one and the same."""
    return {
        name: {getattr(state[e], "shape", ()) for e in entries} for name, entries in owners.items()
    }


def _differences(here: Shapes, there: Shapes, names: Sequence[str], most: int = 10) -> str:
    """Return the shapes in the model and in the source in lines, for a message; of many the first."""

    def in_words(shapes: Collection[tuple[int, ...]]) -> str:
        return " and ".join(sorted(str(tuple(shape)) for shape in shapes)) or "none"

    lines = [
        f"  {n}: the model has {in_words(here.get(n, ()))}, the source {in_words(there.get(n, ()))}"
        for n in names[:most]
    ]
    return "\n".join([*lines, *([f"  and {len(names) - most} more"] if names[most:] else [])])


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Read a state dict from a .safetensors file (of `itop_prune.save` too), what `torch.save` wrote, or a folder.

    The folder is one of Accelerate's. No code from a file is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    return compact.unpack(_read(Path(path)))


def _read(path: Path) -> Mapping[str, Tensor | Packed]:
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; allowed are a .safetensors or torch file, or a folder of Accelerate's"
        )
    if path.suffix == ".safetensors":
        return compact.read(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged; no code from a file is run: save "
            "model.state_dict()"
        ) from None
    except Exception as error:  # of any kind, as what is damaged happens to read
        raise ValueError(
            f"{path} is damaged or no file of torch.save: {error!r}; copy or save it again"
        ) from None
    return _state_in(state, str(path))


def _state_in(source: Any, called: str) -> Mapping[str, Tensor]:
    """Return the state dict that was given, or that timm and others have wrapped.

    Raises:
        ValueError: It is none.
    """
    state = source
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) or str(name).endswith("_extra_state")
        for name, value in state.items()
    ):
        raise ValueError(
            f"{called} holds no state dict, a dict of tensors by name; save model.state_dict()"
        )
    return state


def _read_folder(folder: Path) -> Mapping[str, Tensor | Packed]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return _read(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{index} is damaged: it has no weight_map, files by name; save it again"
                ) from None
            return {
                name: tensor for shard in shards for name, tensor in _read(folder / shard).items()
            }
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin; is it a folder of Accelerate's?"
    )
