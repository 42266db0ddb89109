"""Products of a 2-d convolution with its active weights: Numba kernels.

Images are taken in tiles of one cache line: 16 in float32. Bands of a tile's rows are packed, one
after the other, and mostly stay in the second cache level. Each channel of a band is a plane, in
which a pixel is one line with a number for each image. Padding is part of the plane. Then a weight
that reads channel c at a shift (dy, dx) is an offset into the band, the same for all output pixels:

    forward             pixel p of output o:  bias[o] + the sum of value * tile[p + offset]
    input's gradient    the same, over the packed gradient, with mirrored offsets
    values' gradient    weight:  the sum over pixels of gradient[o, p] · tile[p + offset]

With strides s, planes are split first by the phases of row and column: s · s planes a channel,
in which neighbours are s pixels apart. So all loops read lines that lie one after the other.

Results do not depend on the number of threads. Nothing is checked here: `convolution_products.py`
checks.
"""

# mypy: disable-error-code=no-untyped-def

from numba import njit, prange

from itop_prune.kernels.convolution_geometry import (
    Images,
    Lines,
    Packing,
    Part,
    Weights,
    geometry_at,
    size_of,
)
from itop_prune.kernels.linear import CHUNKS, FAST, PARALLEL, add_chunks, scratch, turn, zeros
from itop_prune.kernels.vectors import (
    LINE,
    add_product,
    add_totals,
    at,
    full,
    integers,
    load,
    numbers,
    pointer,
    put,
    store,
    total,
)

BLOCK = 1 << 16
"""Numbers of results that wait in the second cache level to be unpacked."""
SPAN = 8
"""Pixels over which the values' gradient is summed in registers."""


@njit(**FAST)
def cleared(kind, count):
    """A scratch of zeros."""
    array = scratch(kind, count)
    array[:] = 0
    return array


@njit(**FAST)
def pack(kind, source, images, image, n, packing, begin, band, tile):
    """Pack rows of n images: tile[channel, phases, row, column, i].

    The first one is row `begin` of the padded images' phases. After the first band, the tile holds
    the band before, and rows that both have are moved. Rows of padding become 0, and columns of
    padding stay as they are.
    """
    channels, height, width, last = images
    s, top, left, rows, wq = packing
    line = numbers(kind, LINE)
    row, plane = wq * line, rows * wq * line
    image_step = size_of(images)
    known = rows - band if begin else 0
    for first in range(0, channels * s * s * plane, plane):
        for place in range(first, first + known * row, line):
            store(tile, place, load(tile, place + band * row, LINE))

    # Row j from here is row y + j of the images.
    y = begin * s - top
    low, high = max(known * s, -y), min(rows * s, height - y)
    for j in range(known * s, rows * s):
        if j < low or j >= high:
            for c in range(channels):
                for phase in range(s):
                    first = (c * s * s + j % s * s + phase) * plane + j // s * row
                    tile[first : first + row] = 0

    start = image * image_step
    if last:
        for j in range(low, high):
            for x in range(width):
                column = (x + left) % s * plane + (x + left) // s * line
                first = j % s * s * plane + j // s * row + column
                place = start + ((y + j) * width + x) * channels
                turn(kind, source, place, image_step, tile, first, s * s * plane, n, channels)
        return
    pixels = cleared(kind, width * line if s > 1 else 0)
    for c in range(channels):
        for j in range(low, high):
            first = (c * s * s + j % s * s) * plane + j // s * row
            place = start + (c * height + y + j) * width
            if s == 1:
                turn(kind, source, place, image_step, tile, first + left * line, line, n, width)
                continue
            turn(kind, source, place, image_step, pixels, 0, line, n, width)
            for x in range(width):
                column = (x + left) % s * plane + (x + left) // s * line
                store(tile, first + column, load(pixels, x * line, LINE))


@njit(**FAST)
def unpack(kind, block, part, images, image, n, target):
    """Write a part of the results, block[channel, row, column, i], where it belongs."""
    channel, count, y, rows, columns, s, top, left = part
    channels, height, width, last = images
    line = numbers(kind, LINE)
    plane = rows * columns * line
    image_step = size_of(images)
    start = image * image_step
    if last:
        for r in range(rows):
            for c in range(columns):
                pixel = ((y + r) * s + top) * width + c * s + left
                first = start + pixel * channels + channel
                place = (r * columns + c) * line
                turn(kind, block, place, plane, target, first, image_step, count, n)
    elif s == 1 and columns == width:
        for k in range(count):
            first = start + ((channel + k) * height + y + top) * width
            turn(kind, block, k * plane, line, target, first, image_step, rows * columns, n)
    else:
        for k in range(count):
            for r in range(rows):
                for c in range(columns):
                    row = (channel + k) * height + (y + r) * s + top
                    first = start + row * width + c * s + left
                    place = k * plane + (r * columns + c) * line
                    for i in range(n):
                        put(target, first + i * image_step, at(block, place + i))


@njit(**FAST)
def convolve(kind, tile, lines, part, weights, biased, bias, block):
    """block[f, row, i] = bias[f] + the sum of value * tile[row, i + offset], over the weights of f.

    Rows that are shorter than a vector are written over by the next one, and the last one over its
    end.
    """
    y, rows, step, length = lines
    first, end = part.first, part.first + part.channels
    starts, places, low, high, offsets, values = weights
    wide = numbers(kind, kind)
    for r in range(rows):
        for begin in range(0, length, wide):
            i = max(0, min(begin, length - wide))
            base = (y + r) * step + i
            for f in range(first, end):
                sums = full(kind, at(bias, f) if biased else 0, kind)
                for k in range(at(starts, f * places + low), at(starts, f * places + high)):
                    sums = add_product(sums, at(values, k), load(tile, base + at(offsets, k), kind))
                store(block, ((f - first) * rows + r) * length + i, sums)


@njit(**FAST)
def add_gradients(
    kind, tile, row_step, gradients, plane, gradient_step, part, starts, offsets, sums, begin
):
    """sums[begin + weight] += the sum of gradient[output, pixel] · tile[pixel + offset].

    The pixels are rows and columns of a part; its first pixel is (top, left) of a packed gradient.
    """
    line = numbers(kind, LINE)
    first, count, _, rows, columns, _, top, left = part
    inside = top * gradient_step + left * line
    high = max(1, SPAN // columns)
    for y in range(0, rows, high):
        y_end = min(y + high, rows)
        for x in range(0, columns, SPAN):
            length = (min(x + SPAN, columns) - x) * line
            for o in range(first, first + count):
                g = o * plane + inside + x * line
                k, end = at(starts, o), at(starts, o + 1)
                while k + 4 <= end:
                    a = b = c = d = full(kind, 0, LINE)
                    for row in range(y, y_end):
                        shift = row * row_step + x * line
                        h, i = at(offsets, k) + shift, at(offsets, k + 1) + shift
                        j, m = at(offsets, k + 2) + shift, at(offsets, k + 3) + shift
                        place = g + row * gradient_step
                        for r in range(0, length, line):
                            factor = load(gradients, place + r, LINE)
                            a = add_product(a, factor, load(tile, h + r, LINE))
                            b = add_product(b, factor, load(tile, i + r, LINE))
                            c = add_product(c, factor, load(tile, j + r, LINE))
                            d = add_product(d, factor, load(tile, m + r, LINE))
                    add_totals(sums, begin + k, a, b, c, d)
                    k += 4
                while k < end:
                    a = full(kind, 0, LINE)
                    for row in range(y, y_end):
                        h = at(offsets, k) + row * row_step + x * line
                        place = g + row * gradient_step
                        for r in range(0, length, line):
                            factor = load(gradients, place + r, LINE)
                            a = add_product(a, factor, load(tile, h + r, LINE))
                    put(sums, begin + k, at(sums, begin + k) + total(a))
                    k += 1


@njit(**FAST)
def within(size, padding, phase, s):
    """The first pixel of a phase that is not padding, and the one after the last, along an axis."""
    return (max(0, padding - phase) + s - 1) // s, (size - 1 + padding - phase) // s + 1


@njit(parallel=PARALLEL, **FAST)
def forward(
    kind,
    x,
    starts,
    offsets,
    values,
    bias,
    result,
    geometry,
    images,
    x_last,
    last,
    blocks,
):
    """Compute the output of a convolution.

    Args:
        kind: Of the numbers; its size is that of one, two or four pixels.
        x: images * channels * height * width; it is read.
        starts: `Order.by_output.starts`.
        offsets: `Offsets.by_output`.
        values: As `Order.values_by_output` gives them.
        bias: outputs; 0 if there is none.
        result: images * outputs * rows * columns; it is written.
        geometry: `Plan.numbers`.
        images: Number of images.
        x_last: Whether channels are the last dimension of x in memory, else the second.
        last: As `x_last`, of the result.
        blocks: In how many parts of the outputs a tile is computed, for more threads than tiles.
    """
    biased = bias != 0
    source, target, bias = pointer(kind, x), pointer(kind, result), pointer(kind, bias)
    starts, offsets, values = integers(starts), integers(offsets), pointer(kind, values)
    line = numbers(kind, LINE)

    tiles = -(-images // line)
    for task in prange(tiles * blocks):
        g = geometry_at(geometry)  # Numba hands threads no named tuple
        image, block_of = task // blocks * line, task % blocks
        first, end = g.outputs * block_of // blocks, g.outputs * (block_of + 1) // blocks
        count, n = end - first, min(line, images - image)
        of_x = Images(g.channels, g.height, g.width, x_last)
        of_result = Images(g.outputs, g.rows, g.columns, last)
        weights = Weights(starts, 1, 0, 1, offsets, values)
        tile = cleared(kind, g.channels * g.s * g.s * g.plane * line)
        packing = Packing(g.s, g.top, g.left, g.hq, g.wq)
        strip = max(1, min(g.band, BLOCK // (count * g.columns * line)))
        block = scratch(kind, count * strip * g.columns * line)
        for begin in range(0, g.rows, g.band):
            pack(kind, source, of_x, image, n, packing, begin, g.band, tile)
            until = min(begin + g.band, g.rows)
            for y in range(begin, until, strip):
                part = Part(first, count, y, min(strip, until - y), g.columns, 1, 0, 0)
                lines = Lines(y - begin, part.rows, g.wq * line, g.columns * line)
                convolve(kind, tile, lines, part, weights, biased, bias, block)
                unpack(kind, block, part, of_result, image, n, target)


@njit(parallel=PARALLEL, **FAST)
def backward(
    kind,
    gradient,
    x,
    starts,
    offsets,
    slots,
    input_starts,
    input_offsets,
    values,
    for_x,
    for_values,
    phases,
    geometry,
    images,
    x_last,
    last,
    active,
    blocks,
):
    """Compute the gradients of input and values; one whose address is 0 is not computed.

    There is at least one image. Beside the arguments of `forward`, which mean the same, there are:

    - gradient: images * outputs * rows * columns; it is read. `last` is about it.
    - slots: `Order.by_output.slots`.
    - input_starts: `Order.by_input.starts`, with ranks in place of the kernel's places.
    - input_offsets: `Offsets.by_input`.
    - values: As `Order.values_by_input` gives them.
    - for_x: as x; it is written.
    - for_values: slots; written but for free slots.
    - phases: `Plan.phases`.
    - active: Number of active weights.

    `blocks` is in how many parts of the channels a tile is computed.
    """
    needs_x, needs_values = for_x != 0, for_values != 0
    for_x, nothing = pointer(kind, for_x), pointer(kind, 0)
    source, gradient = pointer(kind, x), pointer(kind, gradient)
    starts, offsets, slots = integers(starts), integers(offsets), integers(slots)
    input_starts, input_offsets = integers(input_starts), integers(input_offsets)
    values, phases, line = pointer(kind, values), integers(phases), numbers(kind, LINE)

    tiles = -(-images // line)
    chunks = min(tiles, CHUNKS)
    sums = zeros(kind, chunks * active if needs_values else 0)
    for task in prange(chunks * blocks):
        g = geometry_at(geometry)  # Numba hands threads no named tuple
        chunk, block_of = task // blocks, task % blocks
        of_x = Images(g.channels, g.height, g.width, x_last)
        of_gradient = Images(g.outputs, g.rows, g.columns, last)
        around, last_row = g.around * line, (g.height - 1 + g.top) // g.s
        gradients = cleared(kind, g.outputs * around)
        tile = cleared(kind, g.channels * g.s * g.s * g.plane * line if needs_values else 0)
        first, end = g.channels * block_of // blocks, g.channels * (block_of + 1) // blocks
        count, widest = end - first, (g.width - 1 + g.left) // g.s + 1
        strip = max(1, min(g.band, BLOCK // (count * widest * line)))
        block = scratch(kind, count * strip * widest * line if needs_x else 0)
        for t in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
            image = t * line
            n = min(line, images - image)
            if n < line:
                gradients[:] = 0
                tile[:] = 0
            for begin in range(0, max(g.rows, last_row + 1), g.band):
                packing = Packing(1, g.qy, g.qx, g.hg, g.wg)
                pack(kind, gradient, of_gradient, image, n, packing, begin, g.band, gradients)
                for phase in range(g.s * g.s if needs_x else 0):
                    py, px = phase // g.s, phase % g.s
                    y0, y1 = within(g.height, g.top, py, g.s)
                    x0, x1 = within(g.width, g.left, px, g.s)
                    low, high = at(phases, phase), at(phases, phase + 1)
                    weights = Weights(input_starts, g.places, low, high, input_offsets, values)
                    shifted = gradients[x0 * line :]
                    top, left = py - g.top, x0 * g.s + px - g.left
                    until = min(begin + g.band, y1)
                    for y in range(max(begin, y0), until, strip):
                        rows = min(strip, until - y)
                        part = Part(first, count, y, rows, x1 - x0, g.s, top, left)
                        lines = Lines(y - begin, rows, g.wg * line, part.columns * line)
                        convolve(kind, shifted, lines, part, weights, False, nothing, block)
                        unpack(kind, block, part, of_x, image, n, for_x)
                if needs_values and begin < g.rows:
                    packing = Packing(g.s, g.top, g.left, g.hq, g.wq)
                    pack(kind, source, of_x, image, n, packing, begin, g.band, tile)
                    output = g.outputs * block_of // blocks
                    outputs = g.outputs * (block_of + 1) // blocks - output
                    rows = min(g.band, g.rows - begin)
                    part = Part(output, outputs, 0, rows, g.columns, 1, g.qy, g.qx)
                    step, step_of_gradient, into = g.wq * line, g.wg * line, chunk * active
                    add_gradients(
                        kind,
                        tile,
                        step,
                        gradients,
                        around,
                        step_of_gradient,
                        part,
                        starts,
                        offsets,
                        sums,
                        into,
                    )

    if needs_values:
        add_chunks(sums, chunks, active)
        for k in range(active):
            put(pointer(kind, for_values), at(slots, k), at(sums, k))
