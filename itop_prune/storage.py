"""Weights in and out: of sparse models that were saved, and to plain dense ones."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from itop_prune.layer import masked_names
from itop_prune.mask import ITOP, find_masks, leave_out_of_ddp
from itop_prune.menu import nearest
from itop_prune.selection import obstacle, plain_name, unwrap, walk
from itop_prune.sharding import whole

State = dict[str, Tensor]


def dense_state_dict(model: nn.Module) -> State:
    """Return the effective weights under their plain names: what a copy of the model without masks loads strictly.

    Args:
        model: Masked by `itop_prune.apply`; wrapped (DDP, torch.compile, AveragedModel) or not.

    Returns:
        New tensors for masked weights, the model's own for all others, in the model's order. Of a model that FSDP2
        shards, all of them whole, on every rank: all must ask.
    """
    own = unwrap(model).state_dict()
    state = {plain_name(name): tensor for name, tensor in own.items()}
    places = {name: (layer, tensor) for name, layer, tensor in walk(model, remove_duplicate=False)}
    dense: State = OrderedDict()
    dense._metadata = {plain_name(name): versions for name, versions in own._metadata.items()}  # type: ignore[attr-defined]
    for owner, entries in _owners(state).items():
        if owner in entries:
            dense[owner] = whole(state[owner])
        else:
            effective = getattr(*places[owner]) if owner in places else state[f"{owner}_orig"]  # or torch's own mask
            dense[owner] = whole(effective.detach()).masked_fill(~state[f"{owner}_mask"].bool(), 0)
    return dense


def load(model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, strict: bool = True) -> dict[str, ITOP]:
    """Make a model sparse with the weights and masks of a saved sparse model.

    Args:
        model: Dense, or masked at the same places; changed in place.
        source: A state dict with `<name>_orig` and `<name>_mask` (of this package or of torch's own pruning; prefixes
            that DistributedDataParallel and torch.compile put in are taken off); a file of one, .safetensors or what
            `torch.save` writes (read with `weights_only=True`); or a folder that Accelerate saved.
        strict: Whether the names and shapes of model and source must be the same. If not, what differs keeps what the
            model has: a new head stays dense, say.

    Returns:
        The masks, as `itop_prune.find_masks` gives them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source is no state dict, has no masks, or does not fit the model; the model is then as it was.
    """
    state = source if isinstance(source, Mapping) else read_state(source)
    state = {plain_name(name): tensor for name, tensor in state.items()}
    versions = {plain_name(name): layer for name, layer in getattr(source, "_metadata", {}).items()}
    model = unwrap(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device; call model.to_empty(device=...) first")
    own = dense_state_dict(model)
    while state and not own.keys() & _owners(state).keys() and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        versions = {name.removeprefix("module").removeprefix("."): layer for name, layer in versions.items()}
    owners = _owners(state)
    given = {name: _shapes(state[entry] for entry in entries) for name, entries in owners.items()}
    masked = {owner for owner, entries in owners.items() if owner not in entries}
    if not masked:
        raise ValueError(
            "the source has no masks; load a dense one with model.load_state_dict, then call itop_prune.apply"
        )
    if strange := sorted(masked & own.keys() - {name for name, _, _ in walk(model, remove_duplicate=False)}):
        raise ValueError(f"the source masks what is no weight matrix here: {', '.join(strange)}; prune.remove it first")
    shapes = {name: _shapes([tensor]) for name, tensor in own.items()}
    differing = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
    if strict and differing:
        lines = [
            f"  {n}: the model has {shapes.get(n, 'none')}, the source {given.get(n, 'none')}" for n in differing[:10]
        ]
        more = f"\n  and {len(differing) - 10} more" if differing[10:] else ""
        raise ValueError("model and source differ; strict=False loads the rest\n" + "\n".join(lines) + more)
    if not masked - set(differing):
        raise ValueError(
            f"no masked weight of the source fits the model: {differing[0]!r}{nearest(differing[0], shapes)}"
        )
    if only_here := sorted(set(find_masks(model)) - masked - set(differing)):
        raise ValueError(
            f"masked in the model and dense in the source: {', '.join(only_here)}; load into a dense model"
        )
    state = {entry: state[entry] for name, entries in owners.items() if name not in differing for entry in entries}
    to_mask = [
        (name, layer, tensor)
        for name, layer, tensor in walk(model)
        if name in masked - set(differing) and tensor not in masked_names(layer)
    ]
    if reasons := [f"  {name}: {why}" for name, layer, tensor in to_mask if (why := obstacle(layer, tensor))]:
        raise ValueError("can't mask\n" + "\n".join(reasons))
    for name, layer, tensor in to_mask:
        ITOP.apply(layer, tensor, state[f"{name}_mask"])
    present = model.state_dict()
    actual = {plain_name(name): name for name in present}
    named = OrderedDict((actual[name], tensor) for name, tensor in state.items())
    # How torch keeps the versions of layers beside the tensors; those that the source does not tell are the model's.
    named._metadata = {name: versions.get(plain_name(name), own) for name, own in present._metadata.items()}  # type: ignore[attr-defined]
    model.load_state_dict(named, strict=strict)
    leave_out_of_ddp(model)
    return find_masks(model)


def _owners(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of a state dict's entries by plain name: of a masked weight there are two, of others one."""
    owners: dict[str, list[str]] = {}
    for name in state:
        stems = (name.removesuffix(ending) for ending in ("_orig", "_mask"))
        masked = (stem for stem in stems if stem != name and {f"{stem}_orig", f"{stem}_mask"} <= state.keys())
        owners.setdefault(next(masked, name), []).append(name)
    return owners


def _shapes(tensors: Iterable[Tensor]) -> str:
    """Return the shapes in words; weight and mask have one and the same."""
    return " and ".join(sorted({str(tuple(tensor.shape)) for tensor in tensors}))


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Read a state dict from a .safetensors file, what `torch.save` wrote, or a folder of Accelerate's; never a pickle.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; allowed are a .safetensors or torch file, or a folder of Accelerate's"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # an optional dependency, needed for this format alone

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged; no code from a file is run: save "
            "model.state_dict()"
        ) from None
    for key in ("state_dict", "model"):  # what timm and others wrap a state dict into
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, a dict of tensors by name; save model.state_dict()")
    return state


def _read_folder(folder: Path) -> Mapping[str, Tensor]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return read_state(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read_state(folder / shard).items()}
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin; is it a folder of Accelerate's?"
    )
