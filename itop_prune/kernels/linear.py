"""Products of a linear layer with its active weights: Numba kernels.

Rows of activations are taken in tiles. A tile is transposed, so that each feature is one vector
with a number for each row. Then the product with an active weight is one line: add value times
vector.

    forward             output o:  bias[o] + the sum of value * x[input] over its weights
    input's gradient    input i:   the sum of value * gradient[output] over its weights
    values' gradient    weight:    gradient[output] · x[input], over all rows

Results do not depend on the number of threads. Tensors come as addresses of contiguous numbers,
which costs the least at a call. Nothing is checked here: `linear_products.py` checks.
"""

# mypy: disable-error-code=no-untyped-def

from numba import njit, prange

from itop_prune.kernels.vectors import (
    LINE,
    SQUARE,
    add_product,
    add_totals,
    at,
    empty,
    full,
    gather,
    integers,
    load,
    numbers,
    pointer,
    put,
    store,
    total,
    transpose,
)

CHUNKS = 8
"""Rows are shared out over so many sums of the values' gradient, if there are as many tiles."""
FAST = {"nogil": True, "cache": True, "error_model": "numpy"}
# Numba would make a parallel loop of all that fills an array, and compile each for a second.
PARALLEL = {"prange": True} | dict.fromkeys(
    ("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil"), False
)


@njit(**FAST)
def turn(kind, source, start, stride, target, first, step, rows, columns):
    """target[first + j * step + i] = source[start + i * stride + j], for i < rows, j < columns."""
    side = numbers(kind, SQUARE)
    if rows < side or columns < side:
        for i in range(rows):
            for j in range(columns):
                put(target, first + j * step + i, at(source, start + i * stride + j))
        return
    # The last squares overlap those before, where a side is no multiple.
    for j_begin in range(0, columns, side):
        j = min(j_begin, columns - side)
        for i_begin in range(0, rows, side):
            i = min(i_begin, rows - side)
            place = start + i * stride + j
            transpose(source, place, stride, target, first + j * step + i, step)


@njit(**FAST)
def read_tile(kind, source, row, rows, features, tile):
    """tile[feature, i] = source[row + i, feature]; 0 where there are no more rows."""
    tile_rows = numbers(kind, kind)
    n = min(tile_rows, rows - row)
    turn(kind, source, row * features, features, tile, 0, tile_rows, n, features)
    if n < tile_rows:
        for f in range(features):
            for i in range(n, tile_rows):
                put(tile, f * tile_rows + i, 0)


@njit(**FAST)
def multiply(
    kind,
    tile,
    starts,
    others,
    values,
    biased,
    bias,
    first,
    last,
    result,
    row,
    rows,
    features,
    block,
):
    """result[row + i, f] = bias[f] + the sum of value * tile[other, i], for f in first..last."""
    tile_rows, line = numbers(kind, kind), numbers(kind, LINE)
    n, m = min(tile_rows, rows - row), min(line, last - first)
    for begin in range(first, last, line):
        f = min(begin, last - m)
        for j in range(m):
            sums = full(kind, at(bias, f + j) if biased else 0, kind)
            for k in range(at(starts, f + j), at(starts, f + j + 1)):
                sums = add_product(sums, at(values, k), load(tile, at(others, k) * tile_rows, kind))
            store(block, j * tile_rows, sums)

        # Whole cache lines of each row, one after the other.
        turn(kind, block, 0, tile_rows, result, row * features + f, features, m, n)


@njit(**FAST)
def add_gradients(kind, x, gradient, starts, others, sums, begin, first, last):
    """sums[begin + weight] += gradient[output] · x[input], for outputs in first..last."""
    tile_rows, line = numbers(kind, kind), numbers(kind, LINE)
    for o in range(first, last):
        g = o * tile_rows
        k, end = at(starts, o), at(starts, o + 1)
        while k + 4 <= end:
            a = b = c = d = full(kind, 0, LINE)
            i, j = at(others, k) * tile_rows, at(others, k + 1) * tile_rows
            m, n = at(others, k + 2) * tile_rows, at(others, k + 3) * tile_rows
            for r in range(0, tile_rows, line):
                factor = load(gradient, g + r, LINE)
                a = add_product(a, factor, load(x, i + r, LINE))
                b = add_product(b, factor, load(x, j + r, LINE))
                c = add_product(c, factor, load(x, m + r, LINE))
                d = add_product(d, factor, load(x, n + r, LINE))
            add_totals(sums, begin + k, a, b, c, d)
            k += 4
        while k < end:
            a = full(kind, 0, LINE)
            i = at(others, k) * tile_rows
            for r in range(0, tile_rows, line):
                a = add_product(a, load(gradient, g + r, LINE), load(x, i + r, LINE))
            put(sums, begin + k, at(sums, begin + k) + total(a))
            k += 1


@njit(**FAST)
def add_columns(kind, gradient, sums, begin, first, last):
    """sums[begin + output] += the sum of gradient[output], for outputs in first..last."""
    tile_rows, line = numbers(kind, kind), numbers(kind, LINE)
    ones = full(kind, 1, LINE)
    for o in range(first, last):
        a = full(kind, 0, LINE)
        for r in range(0, tile_rows, line):
            a = add_product(a, ones, load(gradient, o * tile_rows + r, LINE))
        put(sums, begin + o, at(sums, begin + o) + total(a))


@njit(**FAST)
def scratch(kind, count):
    """An array of numbers that begins with a cache line, so that vectors touch no more than fit."""
    line = numbers(kind, LINE)
    array = empty(kind, count + line)
    first = -(array.ctypes.data // (LINE // line)) % line
    return array[first : first + count]


@njit(**FAST)
def zeros(kind, count):
    """An array of zeros."""
    result = empty(kind, count)
    result[:] = 0
    return result


@njit(**FAST)
def add_chunks(sums, chunks, count):
    """sums[0, k] becomes the sum of sums[chunk, k] over all chunks."""
    for k in range(count):
        for chunk in range(1, chunks):
            put(sums, k, at(sums, k) + at(sums, chunk * count + k))


@njit(parallel=PARALLEL, **FAST)
def vector_forward(kind, x, starts, others, values, bias, result, outputs):
    """Compute the output of a layer for one row: bias + the sum of value * x[input].

    Args:
        kind: Of the numbers.
        x: inputs.
        starts: `Order.by_output.starts`.
        others: `Order.by_output.others`.
        values: As `Order.values_by_output` gives them.
        bias: outputs; 0 if there is none.
        result: outputs; it is written.
        outputs: Number of features.
    """
    biased = bias != 0
    x, values, bias = pointer(kind, x), pointer(kind, values), pointer(kind, bias)
    starts, others, result = integers(starts), integers(others), pointer(kind, result)
    count = numbers(kind, SQUARE)
    for o in prange(outputs):
        k, end = at(starts, o), at(starts, o + 1)
        a = b = full(kind, 0, SQUARE)
        while k + 2 * count <= end:  # two sums, which do not wait for each other
            a = add_product(a, load(values, k, SQUARE), gather(x, others, k, SQUARE))
            k += count
            b = add_product(b, load(values, k, SQUARE), gather(x, others, k, SQUARE))
            k += count
        if k + count <= end:
            a = add_product(a, load(values, k, SQUARE), gather(x, others, k, SQUARE))
            k += count
        whole = total(a) + total(b)
        while k < end:
            whole += at(values, k) * at(x, at(others, k))
            k += 1
        put(result, o, whole + at(bias, o) if biased else whole)


@njit(parallel=PARALLEL, **FAST)
def forward(
    kind,
    x,
    starts,
    others,
    values,
    bias,
    result,
    rows,
    inputs,
    outputs,
    blocks,
):
    """Compute the output of a layer.

    Args:
        kind: Of the numbers; its size is that of a tile's rows.
        x: rows * inputs.
        starts: `Order.by_output.starts`.
        others: `Order.by_output.others`.
        values: As `Order.values_by_output` gives them.
        bias: outputs; 0 if there is none.
        result: rows * outputs; it is written.
        rows: Number of rows.
        inputs: Number of features.
        outputs: Number of features.
        blocks: In how many parts of the outputs a tile is computed, for more threads than tiles.
    """
    biased = bias != 0
    source, target, bias = pointer(kind, x), pointer(kind, result), pointer(kind, bias)
    starts, others, values = integers(starts), integers(others), pointer(kind, values)

    tile_rows = numbers(kind, kind)
    tiles = -(-rows // tile_rows)
    for task in prange(tiles * blocks):
        row, part = task // blocks * tile_rows, task % blocks
        first, last = outputs * part // blocks, outputs * (part + 1) // blocks
        tile = scratch(kind, inputs * tile_rows)
        block = scratch(kind, numbers(kind, LINE) * tile_rows)
        read_tile(kind, source, row, rows, inputs, tile)
        multiply(
            kind,
            tile,
            starts,
            others,
            values,
            biased,
            bias,
            first,
            last,
            target,
            row,
            rows,
            outputs,
            block,
        )


@njit(parallel=PARALLEL, **FAST)
def backward(
    kind,
    gradient,
    x,
    starts,
    others,
    slots,
    input_starts,
    input_others,
    values,
    for_x,
    for_values,
    for_bias,
    rows,
    inputs,
    outputs,
    active,
    blocks,
):
    """Compute the gradients of input, values and bias; one whose address is 0 is not computed.

    Args:
        kind: Of the numbers; its size is that of a tile's rows.
        gradient: rows * outputs.
        x: rows * inputs.
        starts: `Order.by_output.starts`.
        others: `Order.by_output.others`.
        slots: `Order.by_output.slots`.
        input_starts: `Order.by_input.starts`.
        input_others: `Order.by_input.others`.
        values: As `Order.values_by_input` gives them.
        for_x: rows * inputs; it is written.
        for_values: slots; written but for free slots.
        for_bias: outputs; it is written.
        rows: Number of rows, at least 1.
        inputs: Number of features.
        outputs: Number of features.
        active: Number of active weights.
        blocks: In how many parts of the features a tile is computed.
    """
    needs_x, needs_values, needs_bias = for_x != 0, for_values != 0, for_bias != 0
    for_x, nothing = pointer(kind, for_x), pointer(kind, 0)
    source, gradient = pointer(kind, x), pointer(kind, gradient)
    starts, others, slots = integers(starts), integers(others), integers(slots)
    input_starts, input_others = integers(input_starts), integers(input_others)
    values = pointer(kind, values)

    tile_rows = numbers(kind, kind)
    tiles = -(-rows // tile_rows)
    chunks = min(tiles, CHUNKS)
    sums = zeros(kind, chunks * active if needs_values else 0)
    bias_sums = zeros(kind, chunks * outputs if needs_bias else 0)
    for task in prange(chunks * blocks):
        chunk, part = task // blocks, task % blocks
        gradients = scratch(kind, outputs * tile_rows)
        tile = scratch(kind, inputs * tile_rows if needs_values else 0)
        block = scratch(kind, numbers(kind, LINE) * tile_rows)
        for t in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
            row = t * tile_rows
            read_tile(kind, gradient, row, rows, outputs, gradients)
            if needs_x:
                first, last = inputs * part // blocks, inputs * (part + 1) // blocks
                multiply(
                    kind,
                    gradients,
                    input_starts,
                    input_others,
                    values,
                    False,
                    nothing,
                    first,
                    last,
                    for_x,
                    row,
                    rows,
                    inputs,
                    block,
                )
            first, last = outputs * part // blocks, outputs * (part + 1) // blocks
            if needs_values:
                read_tile(kind, source, row, rows, inputs, tile)
                begin = chunk * active
                add_gradients(kind, tile, gradients, starts, others, sums, begin, first, last)
            if needs_bias:
                add_columns(kind, gradients, bias_sums, chunk * outputs, first, last)

    if needs_values:
        add_chunks(sums, chunks, active)
        for k in range(active):
            put(pointer(kind, for_values), at(slots, k), at(sums, k))
    if needs_bias:
        add_chunks(bias_sums, chunks, outputs)
        for o in range(outputs):
            put(pointer(kind, for_bias), o, at(bias_sums, o))
