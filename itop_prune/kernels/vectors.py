"""Vectors as values in Numba functions: loops over them stay in registers.

A loop over 64 numbers that the compiler vectorizes by itself checks sizes and aliases each time. A
value of LLVM's vector type needs none of that, and LLVM splits it into what the CPU has.

Numbers lie behind a pointer or in a contiguous array; both are called a place, and an index counts
from its first number. Nothing is checked: callers guarantee that every index is inside.

Sizes of vectors are bytes, so float64 takes half as many numbers. A size is a constant such as
`LINE`, or a `Kind`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import (
    NativeValue,
    intrinsic,
    models,
    overload,
    register_model,
    typeof_impl,
    unbox,
)

LINE = 64
"""Bytes of a cache line."""
SQUARE = 32
"""Bytes of a row of the squares that `transpose` moves; AVX2's registers hold so many."""
LOOSE = ("contract", "reassoc", "nsz")
"""Sums may be fused and reordered. NaN and infinities stay what they are."""


class Vector(types.Type):
    """The type of a vector of numbers."""

    def __init__(self, element: Any, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"Vector({element}, {count})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """How LLVM holds it: as a vector."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        element = manager.lookup(kind.element).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.count))


class KindType(types.Opaque):
    """The type of a `Kind`: functions are compiled once for each."""

    def __init__(self, dtype: Any, size: int) -> None:
        self.dtype, self.size = dtype, size
        super().__init__(name=f"Kind({dtype}, {size})")


class Kind:
    """A type of numbers and a size of vectors in bytes, to be handed to a Numba function."""

    def __init__(self, dtype: str, size: int) -> None:
        self._numba_type_ = KindType(getattr(types, dtype), size)


register_model(KindType)(models.OpaqueModel)


@typeof_impl.register(Kind)
def _type_of(value: Kind, context: Any) -> KindType:
    return value._numba_type_


@unbox(KindType)
def _unbox(kind: KindType, value: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


def _count(dtype: Any, size: Any) -> int | None:
    """Compute how many numbers a size holds; None while Numba does not know the size."""
    number = getattr(size, "size", getattr(size, "literal_value", None))
    return None if number is None else number * 8 // dtype.bitwidth


def _address(context: Any, builder: Any, kind: Any, place: Any, index: Any, target: Any) -> Any:
    """Make the pointer to what begins at an index of a place."""
    if isinstance(kind, types.Array):
        place = context.make_array(kind)(context, builder, place).data
    return builder.bitcast(builder.gep(place, [index]), ir.PointerType(target))


def _aligned(kind: Any) -> int:
    return int(kind.dtype.bitwidth) // 8


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
    return builder.shuffle_vector(a, b, places)


def _exchange(builder: Any, a: Any, b: Any, step: int) -> tuple[Any, Any]:
    """Exchange the odd groups of `step` numbers of one vector with the even ones of the other."""
    n = a.type.count
    even = [i if not i & step else n + i - step for i in range(n)]
    odd = [i + step if not i & step else n + i for i in range(n)]
    return _shuffle(builder, a, b, even), _shuffle(builder, a, b, odd)


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=LOOSE)


def _fold(builder: Any, vector: Any, count: int) -> Any:
    """Add the halves of a vector until so many numbers are left."""
    while vector.type.count > count:
        half = vector.type.count // 2
        low = _shuffle(builder, vector, vector, list(range(half)))
        high = _shuffle(builder, vector, vector, list(range(half, 2 * half)))
        vector = _add(builder, low, high)
    return vector


@intrinsic
def pointer(typing: Any, kind: Any, address: Any) -> Any:
    """The place of a kind's numbers at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(kind, types.intp), code


@intrinsic
def integers(typing: Any, address: Any) -> Any:
    """The place of int32 numbers at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(types.intp), code


@intrinsic
def numbers(typing: Any, kind: Any, size: Any) -> Any:
    """How many of a kind's numbers a size holds; a constant."""
    count = _count(kind.dtype, size)
    if count is None:
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(kind, size), code


def empty(kind, count):  # type: ignore[no-untyped-def]
    """An array of a kind's numbers."""
    raise NotImplementedError("for Numba functions alone")


@overload(empty)
def _empty(kind, count):  # type: ignore[no-untyped-def]
    dtype = kind.dtype
    return lambda kind, count: np.empty(count, dtype)


@intrinsic
def at(typing: Any, place: Any, index: Any) -> Any:
    """place[index]."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        element = context.get_value_type(kind.dtype)
        return builder.load(_address(context, builder, kind, arguments[0], arguments[1], element))

    return place.dtype(place, types.intp), code


@intrinsic
def put(typing: Any, place: Any, index: Any, number: Any) -> Any:
    """place[index] = number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, index, number = arguments
        address = _address(context, builder, signature.args[0], place, index, number.type)
        builder.store(number, address)
        return context.get_dummy_value()

    return types.none(place, types.intp, place.dtype), code


@intrinsic
def full(typing: Any, kind: Any, number: Any, size: Any) -> Any:
    """A vector of a kind's numbers that are all the same."""
    count = _count(kind.dtype, size)
    if count is None:
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _full(builder, arguments[1], context.get_value_type(signature.return_type))

    return Vector(kind.dtype, count)(kind, kind.dtype, size), code


def _full(builder: Any, number: Any, kind: Any) -> Any:
    empty = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, one, empty, [0] * kind.count)


@intrinsic
def load(typing: Any, place: Any, index: Any, size: Any) -> Any:
    """The vector that begins at an index."""
    count = _count(place.dtype, size)
    if count is None:
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        place, index, _ = arguments
        vector = context.get_value_type(signature.return_type)
        address = _address(context, builder, kind, place, index, vector)
        return builder.load(address, align=_aligned(kind))

    return Vector(place.dtype, count)(place, types.intp, size), code


@intrinsic
def gather(typing: Any, place: Any, places: Any, index: Any, size: Any) -> Any:
    """The vector of place[places[index]], place[places[index + 1]] and so on."""
    count = _count(place.dtype, size)
    if count is None:
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, places, index, _ = arguments
        vector = context.get_value_type(signature.return_type)
        result, integer = ir.Constant(vector, ir.Undefined), ir.IntType(32)
        several = ir.VectorType(integer, count)
        # One read brings all indices; a read for each would take as long as that of a number.
        address = _address(context, builder, signature.args[1], places, index, several)
        indices = builder.load(address, align=_aligned(signature.args[1]))
        for i in range(count):
            lane = ir.Constant(integer, i)
            where = builder.sext(builder.extract_element(indices, lane), index.type)
            kind, element = signature.args[0], vector.element
            number = builder.load(_address(context, builder, kind, place, where, element))
            result = builder.insert_element(result, number, lane)
        return result

    return Vector(place.dtype, count)(place, places, types.intp, size), code


@intrinsic
def store(typing: Any, place: Any, index: Any, vector: Any) -> Any:
    """Write a vector at an index."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, index, vector = arguments
        kind = signature.args[0]
        address = _address(context, builder, kind, place, index, vector.type)
        builder.store(vector, address, align=_aligned(kind))
        return context.get_dummy_value()

    return types.none(place, types.intp, vector), code


@intrinsic
def add_product(typing: Any, vector: Any, factor: Any, other: Any) -> Any:
    """Add factor * other to a vector; the factor is a number or a vector."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, factor, other = arguments
        if not isinstance(signature.args[1], Vector):
            factor = _full(builder, factor, vector.type)
        product = builder.fmul(factor, other, flags=LOOSE)
        return _add(builder, product, vector)

    return vector(vector, factor, other), code


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of a vector's numbers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = _fold(builder, arguments[0], 1)
        return builder.extract_element(one, ir.Constant(ir.IntType(32), 0))

    return vector.element(vector), code


@intrinsic
def add_totals(typing: Any, place: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """place[index : index + 4] += the sums of four vectors, together faster than one by one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, index, a, b, c, d = arguments

        def mix(x: Any, y: Any, step: int) -> Any:
            return _add(builder, *_exchange(builder, x, y, step))

        sums = _fold(builder, mix(mix(a, b, 1), mix(c, d, 1), 2), 4)
        kind = signature.args[0]
        address = _address(context, builder, kind, place, index, sums.type)
        align = _aligned(kind)
        before = builder.load(address, align=align)
        builder.store(_add(builder, before, sums), address, align=align)
        return context.get_dummy_value()

    return types.none(place, types.intp, a, b, c, d), code


@intrinsic
def transpose(
    typing: Any, source: Any, start: Any, stride: Any, target: Any, first: Any, step: Any
) -> Any:
    """target[first + j * step + i] = source[start + i * stride + j], over a `SQUARE`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, start, stride, target, first, step = arguments
        kind, other = signature.args[0], signature.args[3]
        n = SQUARE * 8 // kind.dtype.bitwidth
        vector = ir.VectorType(context.get_value_type(kind.dtype), n)

        def row(place: Any, kind: Any, first: Any, step: Any, i: int) -> Any:
            index = builder.add(first, builder.mul(step, ir.Constant(step.type, i)))
            return _address(context, builder, kind, place, index, vector)

        rows = [
            builder.load(row(source, kind, start, stride, i), align=_aligned(kind))
            for i in range(n)
        ]
        group = 1
        while group < n:
            for i in range(n):
                if not i & group:
                    rows[i], rows[i + group] = _exchange(builder, rows[i], rows[i + group], group)
            group *= 2
        for j in range(n):
            builder.store(rows[j], row(target, other, first, step, j), align=_aligned(other))
        return context.get_dummy_value()

    i = types.intp
    return types.none(source, i, i, target, i, i), code
