"""What architectures there are, and how to build one with images of a size that it takes."""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
TORCHVISION = "torchvision/"


def names() -> list[str]:
    """Return every model there is: timm's, and torchvision's with a prefix."""
    others = torchvision.models.list_models(exclude="quantized_*")  # those hold no parameters
    return [*timm.list_models(), *(TORCHVISION + name for name in others)]


def smallest() -> dict[str, str]:
    """Return the model with the fewest parameters of every model module of timm and of torchvision."""
    sizes: dict[str, tuple[int, str]] = {}
    for name in names():
        module = module_of(name)
        size = size_of(on_meta(name))
        sizes[module] = min(sizes.get(module, (size, name)), (size, name))
    return {module: name for module, (_, name) in sorted(sizes.items())}


def module_of(name: str) -> str:
    """Return the module that a model is defined in, such as "resnet" or "torchvision/resnet"."""
    if name.startswith(TORCHVISION):
        return TORCHVISION + _builder(name).__module__.removeprefix("torchvision.models.")
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def size_of(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def create(name: str, **keywords: Any) -> nn.Module:
    """Build a model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm and torchvision, about weights that are not there
        if not name.startswith(TORCHVISION):
            return timm.create_model(name, **keywords)
        builder = _builder(name)
        return builder(
            **{
                key: None
                for key in inspect.signature(builder).parameters
                if key.startswith("weights")
            }
        )


def _builder(name: str) -> Any:
    return torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))


def on_meta(name: str, **keywords: Any) -> nn.Module:
    """Build a model on the meta device; one that computes with numbers while it is built is moved there."""
    try:
        with torch.device("meta"):
            return create(name, **keywords)
    except NotImplementedError:
        return create(name, **keywords).to("meta")


def with_images(name: str, given: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """Return a model and two images (or a clip) of the smallest size that it takes, found on the meta device."""
    problems = []
    for keywords, shape in _attempts(name, given):
        try:
            model = on_meta(name, **keywords).train()
            with torch.device("meta"):
                model(torch.empty(2, *shape))
        except (
            Exception
        ) as error:  # whatever a model raises for arguments or a size that it can't take
            problems.append(f"{keywords} {shape}: {error}")
        else:
            return create(name, **keywords), torch.randn(2 if len(shape) == 3 else 1, *shape)
    raise RuntimeError("no size of image fits\n" + "\n".join(problems))


def _attempts(name: str, given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield keyword arguments and the shape of an image, the cheapest first."""
    if name.startswith(TORCHVISION):
        clip = (16,) if ".video." in _builder(name).__module__ else ()
        yield from (({}, (3, *clip, size, size)) for size in SIZES)
        return
    large = not given and size_of(on_meta(name)) > 50_000_000
    for more in ({"depth": 4}, {}) if large else (given,):
        for size in (*SIZES, timm.get_pretrained_cfg(name).input_size[-1]):
            yield more, (3, size, size)
            yield {**more, "img_size": size}, (3, size, size)
