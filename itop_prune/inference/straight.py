"""The forward of a small model as straight-line code: its calls of torch one after the other, and no module between.

Of the time that a small sparse model takes, most goes by in Python on the way from layer to layer.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from itop_prune.inference.speed import difference, tensors_in

AS_THE_SHAPE = {"__get__", "__len__", "dim", "is_contiguous", "numel", "size", "stride"}
"""What says the same of every tensor of one shape, type and layout: attributes, and these methods."""
VIEWS = {"flatten", "reshape", "squeeze", "unsqueeze", "view"}
RELU: set[Any] = {torch.relu, F.relu, Tensor.relu}
TOLERANCE = 1e-6
"""How far outputs may be from those of the usual forward, as a share of their norm."""
UNCHANGED = "type(x) is Tensor and x.shape == shape and x.dtype is dtype and x.is_contiguous() and not x.requires_grad"


class StraightLine:
    """A forward that is straight-line code for contiguous tensors of one shape and type.

    Everything else goes through the forward of the model's class: other inputs, inputs that ask for a gradient,
    autocast, torch.compile and exporters, a model with a layer in training mode, one whose layers were replaced or got
    hooks since, and one of which no such code can be made. Tensors are looked up in their layers at every call. The
    code is made at the first call; a copy makes its own.

    Args:
        model: Whose forward it shall be, on the CPU and in evaluation mode.
        shape: Of the inputs that it is for.
        dtype: Their type.
    """

    def __init__(self, model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> None:
        self.model, self.shape, self.dtype = model, shape, dtype
        self.code: Callable[[Tensor], Any] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the model's class makes of the arguments."""
        if named or len(arguments) != 1 or torch.compiler.is_compiling():
            return self.usual(*arguments, **named)
        if self.code is None:
            self.make()
        return self.code(*arguments)  # type: ignore[misc]

    def make(self) -> bool:
        """Make the code, and return whether that is possible."""
        code = straight_line(self.model, self.shape, self.dtype, self.usual)
        self.code = code or self.usual
        return code is not None

    def usual(self, *arguments: Any, **named: Any) -> Any:
        """Call the forward of the model's class."""
        return type(self.model).forward(self.model, *arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.model).forward, self.model))

    @property
    def __code__(self) -> types.CodeType:
        return type(self.model).forward.__code__  # which torch.export looks into

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "code": None}


def straight_line(
    model: nn.Module, shape: torch.Size, dtype: torch.dtype, usual: Callable[[Tensor], Any]
) -> Callable[[Tensor], Any] | None:
    """Return a function that computes what `usual`, a forward of a model, does; None where none can be made.

    The calls of torch that one input leads to are written down, in fewer where that comes to the same. Another input
    leads to the same ones unless the model asks for values in Python, which is refused, or shapes depend on values, for
    which a second one is tried.
    """
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        try:
            expected = usual(other)
            with _Recorder() as recorder:
                result = usual(example)
            code = _Code(model, example, recorder.calls, result).compiled(usual)
            return code if difference(code(other), expected) <= TOLERANCE else None
        except Exception:  # whatever a model raises at numbers that are not its own
            return None


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    result: Any


class _Recorder(TorchFunctionMode):
    """Writes down each call of torch that does not only ask for a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) or result is None:
            self.calls.append(_Call(function, args, kwargs or {}, result))
        elif function.__name__ not in AS_THE_SHAPE:
            raise NotImplementedError(f"{function.__name__} gives no tensor")
        return result


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the layers by what they are called in the code."""
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(model.modules()):
        holders: tuple[Mapping[str, object], ...] = (layer._parameters, layer._buffers, vars(layer))
        for letter, held in zip("pbd", holders, strict=True):
            found |= {f"{letter}{i}[{key!r}]": value for key, value in held.items() if isinstance(value, Tensor)}
        if (matrix := getattr(vars(layer).get("_product"), "matrix", None)) is not None:
            found[f"d{i}['_product'].matrix"] = matrix
    return found


class _Code:
    """Lines of Python for calls of torch.

    A view is no line of its own: a tensor is known by a variable that holds its numbers in their order, maybe in
    another shape, and gets a view of it where a call needs one.
    """

    def __init__(self, model: nn.Module, x: Tensor, calls: list[_Call], result: Tensor) -> None:
        self.model, self.x = model, x
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}
        places = _places(model)
        self.forms = {id(x): ("x", x.shape), **{id(tensor): (name, tensor.shape) for name, tensor in places.items()}}
        read = {
            _storage(tensor): i for i, call in enumerate(calls) for tensor in tensors_in((call.arguments, call.named))
        }
        self.last_read = read | dict.fromkeys(map(_storage, (x, result, *places.values())), len(calls))
        for i, call in enumerate(calls):
            self.write(call, i)
        self.lines.append(f"return {self.text(result)}")

    def write(self, call: _Call, i: int) -> None:
        """Write down the call of a place among all.

        Raises:
            KeyError: It takes a tensor that neither a call nor a layer holds.
        """
        x, y = call.arguments[0] if call.arguments else None, call.result
        if not isinstance(x, Tensor):
            self.line(call.function, call.arguments, call.named, y)
        elif call.function.__name__ in VIEWS and _lies_as(x, y):
            self.forms[id(y)] = self.forms[id(x)]
        elif call.function in RELU:
            in_place = y is x or (x.is_contiguous() and self.last_read[_storage(x)] == i)
            variable, shape = self.forms[id(x)]
            self.line(torch.relu_ if in_place else torch.relu, (_Text(variable),), {}, y, shape)
        elif call.function is F.linear and x.is_contiguous() and x.numel() == x.shape[-1] and len(call.arguments) == 3:
            _, weight, bias = call.arguments
            row = _Text(self.shaped(x, weight.shape[1:]))
            function, inputs = (torch.mv, (weight, row)) if bias is None else (torch.addmv, (bias, weight, row))
            self.line(function, inputs, {}, y, weight.shape[:1])
        else:
            self.line(call.function, call.arguments, call.named, y)

    def line(
        self, function: Any, arguments: Iterable[Any], named: Mapping[str, Any], result: Any, shape: Any = None
    ) -> None:
        """Write a line whose variable holds the numbers of the result, in its shape if no other is given."""
        given = [*map(self.text, arguments), *(f"{key}={self.text(value)}" for key, value in named.items())]
        self.lines.append(f"v{len(self.lines)} = {self.text(function)}({', '.join(given)})")
        if isinstance(result, Tensor):
            self.forms[id(result)] = (f"v{len(self.lines) - 1}", result.shape if shape is None else shape)

    def shaped(self, tensor: Tensor, shape: torch.Size) -> str:
        """Return a variable that is a tensor in a shape."""
        variable, its = self.forms[id(tensor)]
        if its != shape:
            self.line(Tensor.view, (_Text(variable), *shape), {}, None)
            variable = f"v{len(self.lines) - 1}"
        return variable

    def text(self, value: Any) -> str:
        """Return what a value is called in the code."""
        if isinstance(value, _Text):
            return value
        if isinstance(value, Tensor):
            return self.shaped(value, value.shape)
        if type(value) is tuple or type(value) is list:
            inside = "".join(f"{self.text(item)}, " for item in value)
            return f"({inside})" if type(value) is tuple else f"[{inside}]"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        self.values[name := f"c{len(self.values)}"] = value
        return name

    def compiled(self, usual: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Return the function of the lines; it asks first whether input and model are as they were."""
        names: dict[str, Any] = {"Tensor": Tensor, "shape": self.x.shape, "dtype": self.x.dtype, "usual": usual}
        names |= {"autocast": torch.is_autocast_enabled, **self.values}
        same, other = [UNCHANGED, "not autocast('cpu')"], []
        for i, layer in enumerate(self.model.modules()):
            names |= {f"p{i}": layer._parameters, f"b{i}": layer._buffers, f"d{i}": vars(layer)}
            other.append(f"d{i}['training']")
            if layer._modules:
                names |= {f"m{i}": layer._modules, f"n{i}": dict(layer._modules)}
                same.append(f"m{i} == n{i}")
            if i:  # a model's own hooks are called around its forward
                names |= {f"g{i}": layer._forward_pre_hooks, f"h{i}": layer._forward_hooks}
                other += [f"g{i}", f"h{i}"]
        same.append(f"not ({' or '.join(other)})")
        body = [f"if not ({' and '.join(same)}): return usual(x)", *self.lines]
        exec("def code(x):\n" + "\n".join(f"    {line}" for line in body), names)
        return names["code"]


class _Text(str):
    """Text of the code, as it stands."""


def _lies_as(x: Tensor, y: Tensor) -> bool:
    """Whether a tensor and a view of it hold the same numbers in the same order."""
    return x.is_contiguous() and y.is_contiguous() and x.dtype is y.dtype


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
