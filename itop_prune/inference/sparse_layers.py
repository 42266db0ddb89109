"""Layers for inference that compute with their active weights alone.

Each is a sparse matrix times a dense one, [outputs, inputs] @ [inputs, columns]. A linear layer has
a column for each row of its input, unless its kernel takes rows. A convolution has a column for
each place of its kernel on the image, with the pixels under the kernel; kernels larger than 1 by 1
need the image unfolded.

torch.export takes no CSR tensors, so it gets `embedding_bag` in place of any kernel. ONNX has no
product for sparse weights: it gets dense layers, whose weight is made of the active ones.
"""

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itop_prune.inference.kernels import KERNELS, ROW_KERNELS, Active, Product


def obstacle(layer: nn.Module, tensor: str) -> str:
    """Say why a layer can't compute with the active weights of a tensor alone, or ""."""
    if tensor != "weight" or type(layer) not in SPARSE or "forward" in vars(layer):
        package = type(layer).__module__.partition(".")[0]
        return f"{package}'s {type(layer).__name__} computes in a way of its own"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{layer.groups} groups"
    if layer.weight.dtype is not torch.float32:
        return f"{layer.weight.dtype}, not float32"
    return ""


def kernels_for(layer: nn.Module) -> tuple[str, ...]:
    """List the kernels that can compute a layer without an `obstacle`."""
    by_rows = type(layer) is nn.Linear and layer.weight.device.type == "cpu"
    return (*KERNELS, *ROW_KERNELS) if by_rows else tuple(KERNELS)


def sparse(layer: nn.Module, kernel: str) -> Any:
    """Make a sparse layer of a plain one with one of `kernels_for`; both share bias and hooks."""
    new = copy.copy(layer)
    new.__class__ = RowLinear if kernel in ROW_KERNELS else SPARSE[type(layer)]
    new.__dict__ |= {
        "_parameters": dict(layer._parameters),
        "_buffers": dict(layer._buffers),
        "kernel": kernel,
    }
    weight = new.__dict__["_parameters"].pop("weight").detach().flatten(1)
    outputs, inputs = weight.nonzero(as_tuple=True)
    counts = torch.bincount(outputs, minlength=len(weight))
    new.register_buffer("weight_starts", F.pad(counts.cumsum(0), (1, 0)).int())
    new.register_buffer("weight_inputs", inputs.int())
    new.register_buffer("weight_values", weight[outputs, inputs])
    new.prepare()  # type: ignore[operator]
    return new


def replace(layer: nn.Module, new: nn.Module) -> None:
    """Turn a layer into the new one, wherever it is held: the object stays."""
    layer.__class__ = type(new)
    layer.__dict__ = vars(new)


class SparseLayer(nn.Module):
    """Base of sparse layers: active weights as buffers, and a product that is remade in copies."""

    kernel: str
    weight_starts: Tensor
    weight_inputs: Tensor
    weight_values: Tensor
    _product: Product
    _dtype: torch.dtype

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, made when it is read, by operations that ONNX has too."""
        inputs, count = math.prod(self.weight_shape[1:]), len(self.weight_values)
        ends = self.weight_starts[1:].long()
        ended = ends.new_zeros(count + 1).scatter_add(0, ends, torch.ones_like(ends))

        # The output of a weight is the number of outputs that ended before it.
        positions = ended[:count].cumsum(0) * inputs + self.weight_inputs
        flat = self.weight_values.new_zeros(self.weight_shape[0] * inputs)
        return flat.scatter(0, positions, self.weight_values).view(self.weight_shape)

    def prepare(self) -> None:
        """Make the product over the present buffers."""
        self.__dict__ |= {"_product": self.product(self.kernel), "_dtype": self.weight_values.dtype}

    def product(self, kernel: str) -> Product:
        """Make a product with a kernel over the present buffers."""
        shape = (self.weight_shape[0], math.prod(self.weight_shape[1:]))
        return (KERNELS | ROW_KERNELS)[kernel](
            Active(self.weight_starts, self.weight_inputs, self.weight_values, shape)
        )

    def check(self, x: Tensor) -> None:
        """Refuse an input that requires a gradient or has another dtype than the weight.

        Raises:
            RuntimeError: It does.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient is asked for through a deployed layer, which has none: use "
                "torch.no_grad() or torch.inference_mode(), or the model that was deployed"
            )
        if x.dtype is not self._dtype:
            raise RuntimeError(
                f"a deployed layer of {self._dtype} was given {x.dtype}; allowed is {self._dtype}: "
                "leave out autocast and convert the input"
            )

    def extra_repr(self) -> str:
        """Show the sizes of the layer, its kernel and the number of its weights."""
        active, total = len(self.weight_values), math.prod(self.weight_shape)
        return f"{super().extra_repr()}, {self.kernel}, {active:,} of {total:,} weights"

    def _apply(self, *args: Any, **keywords: Any) -> Any:
        super()._apply(*args, **keywords)
        self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_product"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[override]  # of weight
    """nn.Linear with its active weights alone."""

    keeps_transposed: Collection[torch.Size] = ()
    """Shapes of inputs whose output stays as the product gives it, column after column.

    The next layer takes it so. For other shapes the output is laid out as by a dense layer, since
    a function between the layers might view it in a way that was not tried."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(outputs, inputs)."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Compute [..., outputs] of [..., inputs]."""
        if input.dtype is not self._dtype or input.requires_grad:
            self.check(input)
        if torch.compiler.is_exporting():
            return self.exported(input)
        shape = (*input.shape[:-1], self.out_features)
        if input.numel() == self.in_features:  # a small product: reading self.bias takes a while
            return self._product(input.reshape(-1), self._parameters["bias"]).view(shape)

        columns = input.reshape(-1, self.in_features).t()
        columns = columns if columns.is_contiguous() else _added(columns, 0)
        kept = self.keeps_transposed and input.shape in self.keeps_transposed
        if kept and not torch.compiler.is_compiling():
            return self._product(columns, self.bias).t().view(shape)

        rows = self._product(columns, None).t()
        return _added(rows, 0 if self.bias is None else self.bias).view(shape)

    def exported(self, input: Tensor) -> Tensor:
        """Compute the same by operations that an exporter takes, for any number of rows."""
        if torch.onnx.is_in_onnx_export():
            return super().forward(input)
        y = self.product("embedding_bag")(
            input.reshape(-1, self.in_features).t().contiguous(), self.bias
        )
        return y.t().contiguous().view(*input.shape[:-1], self.out_features)


class RowLinear(SparseLinear):
    """nn.Linear with its active weights alone, whose kernel takes rows and gives rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute [..., outputs] of [..., inputs]."""
        if input.dtype is not self._dtype or input.requires_grad:
            self.check(input)
        if torch.compiler.is_exporting():
            return self.exported(input)
        rows = self._product(input.reshape(-1, self.in_features), self._parameters["bias"])
        return rows.view(*input.shape[:-1], self.out_features)


def _added(tensor: Tensor, more: Tensor | int) -> Tensor:
    """Add into a new contiguous tensor: threads share a sum, but not a transposing copy."""
    return torch.add(tensor, more, out=tensor.new_empty(tensor.shape))


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d of one group with its active weights alone, image by image."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(outputs, inputs, height, width)."""
        return self.out_channels, self.in_channels, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """Compute [batch, outputs, height, width] of [batch, inputs, height, width]."""
        if input.ndim == 3:
            return self.forward(input[None])[0]
        if input.dtype is not self._dtype or input.requires_grad:
            self.check(input)
        exporting = torch.compiler.is_exporting()
        if exporting and torch.onnx.is_in_onnx_export():
            return super().forward(input)

        windows = input
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            windows = F.pad(input, self._reversed_padding_repeated_twice, mode)
        for axis, size, stride, step in zip(
            (2, 3), self.kernel_size, self.stride, self.dilation, strict=True
        ):
            windows = windows.unfold(axis, (size - 1) * step + 1, stride)[..., ::step]
        batch, _, height, width, _, _ = windows.shape

        if exporting:  # all images in one product: a loop would fix their number
            columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(-1, batch * height * width)
            y = self.product("embedding_bag")(columns, self.bias)
            return y.view(self.out_channels, batch, height, width).transpose(0, 1).contiguous()

        columns = windows.permute(0, 1, 4, 5, 2, 3)
        if batch == 1:
            y = self._product(columns.reshape(-1, height * width).contiguous(), self.bias)
        else:
            y = input.new_empty(batch, self.out_channels, height * width)
            for image, out in zip(columns, y, strict=True):
                out.copy_(self._product(image.reshape(-1, height * width).contiguous(), self.bias))
        y = y.view(batch, self.out_channels, height, width)

        if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
            return y.contiguous(memory_format=torch.channels_last)
        return y


SPARSE: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv2d: SparseConv2d,
}
"""Sparse layers by the exact class of the layer that they replace."""
