"""Which architectures there are, and how to build one with images of a size that it takes."""

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
    """List every model: timm's, and torchvision's with a prefix."""
    others = torchvision.models.list_models(exclude="quantized_*")  # those hold no parameters
    return [*timm.list_models(), *(TORCHVISION + name for name in others)]


def smallest() -> dict[str, str]:
    """Find the model with the fewest parameters in every model module."""
    sizes: dict[str, tuple[int, str]] = {}
    for name in names():
        module = module_of(name)
        size = size_of(on_meta(name))
        sizes[module] = min(sizes.get(module, (size, name)), (size, name))
    return {module: name for module, (_, name) in sorted(sizes.items())}


def module_of(name: str) -> str:
    """Find the module that defines a model, such as "resnet" or "torchvision/resnet"."""
    if name.startswith(TORCHVISION):
        return TORCHVISION + _builder(name).__module__.removeprefix("torchvision.models.")
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def size_of(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def create(name: str, **keywords: Any) -> nn.Module:
    """Build a model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both libraries warn about weights that are not loaded
        if not name.startswith(TORCHVISION):
            return timm.create_model(name, **keywords)

        builder = _builder(name)
        parameters = inspect.signature(builder).parameters
        return builder(**{key: None for key in parameters if key.startswith("weights")})


def _builder(name: str) -> Any:
    return torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))


def on_meta(name: str, **keywords: Any) -> nn.Module:
    """Build a model on the meta device, or move it there if its constructor needs numbers."""
    try:
        with torch.device("meta"):
            return create(name, **keywords)
    except NotImplementedError:
        return create(name, **keywords).to("meta")


def with_images(name: str, given: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """Build a model and two images, or a clip, of the smallest size that it takes.

    Raises:
        RuntimeError: No size fits; the message holds every attempt.
    """
    problems = []
    for keywords, shape in _attempts(name, given):
        try:  # on the meta device, where an attempt costs nothing
            model = on_meta(name, **keywords).train()
            with torch.device("meta"):
                model(torch.empty(2, *shape))
        except Exception as error:  # models raise all kinds of errors for a size they can't take
            problems.append(f"{keywords} {shape}: {error}")
        else:
            return create(name, **keywords), torch.randn(2 if len(shape) == 3 else 1, *shape)
    raise RuntimeError("no size of image fits\n" + "\n".join(problems))


def _attempts(name: str, given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield keyword arguments and the shape of an image, the cheapest first."""
    if name.startswith(TORCHVISION):
        clip = (16,) if ".video." in _builder(name).__module__ else ()
        for size in SIZES:
            yield {}, (3, *clip, size, size)
        return

    choices = [given]
    if not given and size_of(on_meta(name)) > 50_000_000:
        choices = [{"depth": 4}, {}]
    own_size = timm.get_pretrained_cfg(name).input_size[-1]
    for keywords in choices:
        for size in (*SIZES, own_size):
            yield keywords, (3, size, size)
            yield {**keywords, "img_size": size}, (3, size, size)
