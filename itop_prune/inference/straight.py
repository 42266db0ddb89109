"""The forward of a small model as straight-line code: its calls of torch one after the other, and no module between.

Of the time that a small sparse model takes, most goes by in Python on the way from layer to layer. The calls are
recorded once, as torch.jit.trace does, and written out as one function, which first asks whether all is as it was.
"""

import inspect
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from itop_prune.inference.speed import difference

Held = dict[tuple[str, str], Any]

AS_THE_SHAPE = {"__get__", "__len__", "dim", "is_contiguous", "numel", "size", "stride"}
"""What says the same of every tensor of one shape, type and layout: attributes, and these methods."""
BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
VIEWS = {"flatten", "reshape", "squeeze", "unsqueeze", "view"}
RELU: set[Any] = {torch.relu, F.relu, Tensor.relu}
CONSTANTS = (float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
OF_EVERY_MODULE = {*vars(nn.Module()), "forward", "report"}
TOLERANCE = 1e-6
"""How far outputs may be from those of the usual forward, as a share of their norm."""
ALIKE = (
    "type(x) is Tensor and x.shape == shape and x.dtype is dtype and x.is_cpu and x.is_contiguous() and "
    "not x.requires_grad and not autocast('cpu')"
)


class StraightLine:
    """A forward that is straight-line code for contiguous tensors of one shape and type on the CPU.

    All else goes through the forward of the model's class: other inputs, inputs that ask for a gradient, autocast,
    torch.compile and torch.export; and a model with a layer in training mode, with hooks on layers, or with anything
    else in an attribute, as a parameter or as a layer than when the code was made (as after `load_state_dict` and
    `to`). Then `make` makes it anew; a copy has none until it is asked to. What the code can't see are changes within a
    list or dictionary, of a class, and of what is no part of the model, such as the gradient mode; and it leaves out
    what a forward does beside computing, such as adding to a list.

    Args:
        model: Whose forward it shall be.
        shape: Of the inputs that it is for.
        dtype: Their type.
    """

    def __init__(self, model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> None:
        self.model, self.shape, self.dtype = model, shape, dtype
        self.code: Callable[[Tensor], Any] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the model's class makes of the arguments."""
        code = self.code
        if code is None or named or len(arguments) != 1 or torch.compiler.is_compiling():
            return self.usual(*arguments, **named)
        return code(*arguments)

    def make(self) -> bool:
        """Make the code, and return whether there can be any; the model is run, and must be in evaluation mode."""
        self.code = straight_line(self.model, self.shape, self.dtype, self.usual)
        return self.code is not None

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

    The calls of torch that one input leads to are written down. None can be made where another input might lead to
    others, since a call's result or its shape depends on values, or where something else comes into the computation
    than tensors of calls and of layers. It is tried with a second input.
    """
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.rand(shape, generator=generator, dtype=dtype, device="cpu") for _ in range(2))
    try:
        with torch.no_grad():
            held = _held(model)
            with _ByNoValue(), _Recorder() as recorder:
                result = usual(example)
            if not _same(held, _held(model)):
                return None  # it keeps something
            expected = usual(other)
            code = _Code(model, held, example, recorder.calls, result).compiled(_refuse)
            found = code(other)
        alike = found.dtype is expected.dtype and found.shape == expected.shape
        code.__globals__["usual"] = usual
        return code if alike and difference(found, expected) <= TOLERANCE else None
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
        if isinstance(result, Tensor) or function is Tensor.__setitem__:
            self.calls.append(_Call(function, args, kwargs or {}, result))
        elif function.__name__ not in AS_THE_SHAPE and not (function is torch._assert and args[0] is True):
            raise NotImplementedError(f"{function.__name__} gives no tensor")
        return result


class _ByNoValue(TorchDispatchMode):
    """Refuses operations of which shapes depend on values, or that give other numbers each time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if BY_VALUE.intersection(func.tags):
            raise NotImplementedError(f"{func} depends on values or on chance")
        return func(*args, **(kwargs or {}))


def _held(model: nn.Module) -> Held:
    """Return what the layers hold, by what the holder is called in the code, and the key."""
    found: Held = {}
    for i, layer in enumerate(model.modules()):
        for letter, held in _holders(layer).items():
            found |= {(f"{letter}{i}", key): thing for key, thing in held.items()}
    return found


def _same(some: Held, others: Held) -> bool:
    """Whether both hold the same objects."""
    return some.keys() == others.keys() and all(map(operator.is_, some.values(), others.values()))


def _holders(layer: nn.Module) -> dict[str, Mapping[str, Any]]:
    return {"p": layer._parameters, "b": layer._buffers, "m": layer._modules, "d": vars(layer)}


def _refuse(x: Tensor) -> Any:
    raise NotImplementedError("the model is not as the code must find it")


class _Code:
    """Lines of Python for calls of torch.

    A view is no line of its own: a tensor is known by a variable that holds its numbers in their order, maybe in
    another shape, and gets a view of it where a call needs one.
    """

    def __init__(self, model: nn.Module, held: Held, x: Tensor, calls: list[_Call], result: Tensor) -> None:
        self.model, self.held, self.x = model, held, x
        self.lines: list[str] = []
        known = [thing for thing in self.held.values() if isinstance(thing, Tensor)]
        products = [thing for (_, key), thing in self.held.items() if key == "_product"]
        known += [product.matrix for product in products if hasattr(product, "matrix")]  # of kernels.csr
        self.values: dict[str, Any] = {f"t{i}": tensor for i, tensor in enumerate(known)}
        self.forms = {id(tensor): (name, tensor.shape) for name, tensor in (*self.values.items(), ("x", x))}
        for call in calls:
            self.write(call)
        self.lines.append(f"return {self.text(result)}")

    def write(self, call: _Call) -> None:
        """Write down a call.

        Raises:
            KeyError: It takes a tensor that neither a call nor a layer holds.
        """
        x, y = call.arguments[0] if call.arguments else None, call.result
        if not isinstance(x, Tensor) or y is x:
            self.line(call.function, call.arguments, call.named, y)
        elif call.function.__name__ in VIEWS and _lies_as(x, y):
            self.forms[id(y)] = self.forms[id(x)]
        elif call.function in RELU:
            variable, shape = self.forms[id(x)]  # in whatever shape
            self.line(torch.relu, (_Text(variable),), {}, y, shape)
        elif call.function is F.linear and x.is_contiguous() and x.numel() == x.shape[-1] and len(call.arguments) == 3:
            _, weight, bias = call.arguments  # of one row a product with a vector is faster
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
        if not isinstance(value, CONSTANTS) and not callable(value):
            raise NotImplementedError(f"{type(value).__name__} may hold what changes")
        self.values[name := f"c{len(self.values)}"] = value
        return name

    def compiled(self, usual: Callable[[Tensor], Any]) -> Any:
        """Return the function of the lines; it asks first whether input and model are as they were."""
        names = {"Tensor": Tensor, "shape": self.x.shape, "dtype": self.x.dtype, "usual": usual, **self.values}
        names["autocast"] = torch.is_autocast_enabled
        same, other = [ALIKE], []
        for i, layer in enumerate(self.model.modules()):
            names |= {f"{letter}{i}": held for letter, held in _holders(layer).items()}
            other.append(f"d{i}['training']")
            if layer._modules:
                same.append(f"len(m{i}) == {len(layer._modules)}")
            if i:  # a model's own hooks are called around its forward, which this is
                names |= {f"g{i}": layer._forward_pre_hooks, f"h{i}": layer._forward_hooks}
                other += [f"g{i}", f"h{i}"]
                same.append(f"'forward' not in d{i}")
        for (holder, key), thing in self.held.items():
            if key not in OF_EVERY_MODULE:
                names[f"s{len(same)}"] = thing
                same.append(f"{holder}.get({key!r}) is s{len(same)}")
        body = [f"if not ({' and '.join(same)}) or {' or '.join(other)}: return usual(x)", *self.freeing()]
        exec("def code(x):\n" + "\n".join(f"    {line}" for line in body), names)
        return names["code"]

    def freeing(self) -> list[str]:
        """Return the lines, each with its variables that no later one reads let go of."""
        used = [set(re.findall(r"\bv\d+\b", line)) for line in self.lines]
        gone = [sorted(here - set().union(*used[i + 1 :])) for i, here in enumerate(used[:-1])]
        deleted = [f"; del {', '.join(names)}" if names else "" for names in (*gone, [])]
        return [line + more for line, more in zip(self.lines, deleted, strict=True)]


class _Text(str):
    """Text of the code, as it stands."""


def _lies_as(x: Tensor, y: Tensor) -> bool:
    """Whether a tensor and a view of it hold the same numbers in the same order."""
    return x.is_contiguous() and y.is_contiguous() and x.dtype is y.dtype
