"""Products of a 2-d convolution with its active weights: Numba kernels.

Images are taken in tiles of one cache line: 16 in float32. A tile is packed as planes, one for each
channel, in which a pixel is one line with a number for each image. Padding is part of the plane.
Then a weight that reads channel c at a shift (dy, dx) is an offset into the tile, the same for all
output pixels:

    forward             pixel p of output o:  bias[o] + the sum of value * tile[p + offset]
    input's gradient    the same, over the packed gradient, with mirrored offsets
    values' gradient    weight:  the sum over pixels of gradient[o, p] · tile[p + offset]

With strides s, planes are split first by the phases of row and column: s · s planes a channel,
in which neighbours are s pixels apart. So all loops read lines that lie one after the other.

Results do not depend on the number of threads. Nothing is checked here: `convolution_products.py`
checks.
"""

# mypy: disable-error-code=no-untyped-def

import numpy as np
from numba import njit, prange

from itop_prune.kernels.linear import CHUNKS, FAST, PARALLEL, add_chunks, scratch, take, zeros
from itop_prune.kernels.vectors import (
    LINE,
    SQUARE,
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
    transpose,
)

BAND = 1 << 16
"""Numbers of results that wait in the second cache level to be unpacked."""
SPAN = 8
"""Pixels over which the values' gradient is summed in registers."""


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
    for i_begin in range(0, rows, side):
        i = min(i_begin, rows - side)
        for j_begin in range(0, columns, side):
            j = min(j_begin, columns - side)
            place = start + i * stride + j
            transpose(source, place, stride, target, first + j * step + i, step)


@njit(**FAST)
def pack(
    kind, source, image, n, image_step, channels, height, width, last, s, top, left, hq, wq, tile
):
    """Pack n images: tile[channel, phases, row, column, i]; its padding stays as it is."""
    line = numbers(kind, LINE)
    plane = hq * wq * line
    start = image * image_step
    for y in range(height):
        phase_y, row = (y + top) % s, (y + top) // s
        if last:
            for x in range(width):
                phase, column = phase_y * s + (x + left) % s, (x + left) // s
                first = phase * plane + (row * wq + column) * line
                place = start + (y * width + x) * channels
                turn(kind, source, place, image_step, tile, first, s * s * plane, n, channels)
        elif s == 1:
            for c in range(channels):
                first = c * plane + (row * wq + left) * line
                place = start + (c * height + y) * width
                turn(kind, source, place, image_step, tile, first, line, n, width)
        else:
            for c in range(channels):
                for x in range(width):
                    phase, column = phase_y * s + (x + left) % s, (x + left) // s
                    first = (c * s * s + phase) * plane + (row * wq + column) * line
                    place = start + (c * height + y) * width + x
                    for i in range(n):
                        put(tile, first + i, at(source, place + i * image_step))


@njit(**FAST)
def unpack(
    kind,
    block,
    channel,
    count,
    y,
    rows,
    columns,
    image,
    n,
    image_step,
    channels,
    height,
    width,
    last,
    s,
    top,
    left,
    target,
):
    """Write rows of results, block[channel, row, column, i], where they belong.

    Row r of the block is row (y + r) * s + top of the images; columns likewise.
    """
    line = numbers(kind, LINE)
    plane = rows * columns * line
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
def convolve(
    kind,
    tile,
    row_step,
    y,
    rows,
    length,
    starts,
    places,
    low,
    high,
    first,
    last,
    offsets,
    values,
    biased,
    bias,
    block,
):
    """block[f, row, i] = bias[f] + the sum of value * tile[row, i + offset], for i < length.

    Feature f has the weights from starts[f * places + low] to starts[f * places + high]. Rows that
    are shorter than a vector are written over by the next one, and the last one over its end.
    """
    wide = numbers(kind, kind)
    for r in range(rows):
        for begin in range(0, length, wide):
            i = max(0, min(begin, length - wide))
            base = (y + r) * row_step + i
            for f in range(first, last):
                sums = full(kind, at(bias, f) if biased else 0, kind)
                for k in range(at(starts, f * places + low), at(starts, f * places + high)):
                    sums = add_product(sums, at(values, k), load(tile, base + at(offsets, k), kind))
                store(block, ((f - first) * rows + r) * length + i, sums)


@njit(**FAST)
def add_gradients(
    kind,
    tile,
    row_step,
    gradients,
    plane,
    gradient_step,
    inside,
    rows,
    columns,
    starts,
    offsets,
    sums,
    begin,
    first,
    last,
):
    """sums[begin + weight] += the sum of gradient[output, pixel] · tile[pixel + offset]."""
    line = numbers(kind, LINE)
    high = max(1, SPAN // columns)
    for y in range(0, rows, high):
        y_end = min(y + high, rows)
        for x in range(0, columns, SPAN):
            length = (min(x + SPAN, columns) - x) * line
            for o in range(first, last):
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
def offsets_by_output(others, active, places, shifts, channel_step, line):
    """Where each weight reads, from the first pixel of the tile."""
    offsets = np.empty(active, np.int32)
    for k in range(active):
        channel, place = divmod(at(others, k), places)
        offsets[k] = (channel * channel_step + at(shifts, place)) * line
    return offsets


@njit(**FAST)
def offsets_by_input(starts, others, active, features, places, shifts, output_step, line):
    """Where each weight reads the packed gradient, from its first pixel."""
    offsets = np.empty(active, np.int32)
    for feature in range(features):
        shift = at(shifts, feature % places)
        for k in range(at(starts, feature), at(starts, feature + 1)):
            offsets[k] = (at(others, k) * output_step + shift) * line
    return offsets


@njit(**FAST)
def cleared(kind, count):
    """A scratch of zeros."""
    array = scratch(kind, count)
    array[:] = 0
    return array


@njit(parallel=PARALLEL, **FAST)
def forward(
    kind,
    x,
    starts,
    others,
    slots,
    values,
    bias,
    result,
    shifts,
    images,
    channels,
    height,
    width,
    x_last,
    outputs,
    rows,
    columns,
    last,
    active,
    places,
    s,
    top,
    left,
    hq,
    wq,
    blocks,
):
    """Compute the output of a convolution.

    Args:
        kind: Of the numbers; its size is that of one, two or four pixels.
        x: images * channels * height * width; it is read.
        starts: `Order.by_output.starts`.
        others: `Order.by_output.others`, with ranks in place of the kernel's places.
        slots: `Order.by_output.slots`.
        values: slots.
        bias: outputs; 0 if there is none.
        result: images * outputs * rows * columns; it is written.
        shifts: `Plan.shifts`.
        images: Number of images.
        channels: Of an image.
        height: Of an image.
        width: Of an image.
        x_last: Whether channels are the last dimension of x in memory, else the second.
        outputs: Channels of the result.
        rows: Of the result.
        columns: Of the result.
        last: As `x_last`, of the result.
        active: Number of active weights.
        places: Of the convolution's kernel.
        s: Stride.
        top: Rows of padding.
        left: Columns of padding.
        hq: Rows of a phase.
        wq: Columns of a phase.
        blocks: In how many parts of the outputs a tile is computed, for more threads than tiles.
    """
    biased = bias != 0
    source, target, bias = pointer(kind, x), pointer(kind, result), pointer(kind, bias)
    starts, others, shifts = integers(starts), integers(others), integers(shifts)
    ordered = take(kind, pointer(kind, values), integers(slots), active)
    line = numbers(kind, LINE)
    step = s * s * hq * wq
    offsets = offsets_by_output(others, active, places, shifts, step, line)

    tiles = -(-images // line)
    for task in prange(tiles * blocks):
        image, part = task // blocks * line, task % blocks
        first, end = outputs * part // blocks, outputs * (part + 1) // blocks
        n = min(line, images - image)
        tile = cleared(kind, channels * step * line)
        pack(
            kind,
            source,
            image,
            n,
            channels * height * width,
            channels,
            height,
            width,
            x_last,
            s,
            top,
            left,
            hq,
            wq,
            tile,
        )
        band = max(1, min(rows, BAND // ((end - first) * columns * line)))
        block = scratch(kind, (end - first) * band * columns * line)
        for y in range(0, rows, band):
            high = min(band, rows - y)
            convolve(
                kind,
                tile,
                wq * line,
                y,
                high,
                columns * line,
                starts,
                1,
                0,
                1,
                first,
                end,
                offsets,
                ordered,
                biased,
                bias,
                block,
            )
            unpack(
                kind,
                block,
                first,
                end - first,
                y,
                high,
                columns,
                image,
                n,
                outputs * rows * columns,
                outputs,
                rows,
                columns,
                last,
                1,
                0,
                0,
                target,
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
    input_slots,
    values,
    for_x,
    for_values,
    shifts,
    mirrored,
    phases,
    images,
    channels,
    height,
    width,
    x_last,
    outputs,
    rows,
    columns,
    last,
    active,
    places,
    s,
    top,
    left,
    hq,
    wq,
    hg,
    wg,
    qy,
    qx,
    blocks,
):
    """Compute the gradients of input and values; one whose address is 0 is not computed.

    There is at least one image. Beside the arguments of `forward`, which mean the same, there are:

    - gradient: images * outputs * rows * columns; it is read. `last` is about it.
    - input_starts, input_others, input_slots: `Order.by_input`, with ranks likewise.
    - for_x: as x; it is written.
    - for_values: slots; written but for free slots.
    - mirrored, phases: `Plan.mirrored`, `Plan.phases`.
    - hg, wg: rows and columns of a packed gradient.
    - qy, qx: rows above and columns before the gradient's own.

    `blocks` is in how many parts of the channels a tile is computed.
    """
    needs_x, needs_values = for_x != 0, for_values != 0
    for_x, nothing = pointer(kind, for_x), pointer(kind, 0)
    source, gradient = pointer(kind, x), pointer(kind, gradient)
    starts, others, slots = integers(starts), integers(others), integers(slots)
    input_starts, input_others = integers(input_starts), integers(input_others)
    shifts, mirrored, phases = integers(shifts), integers(mirrored), integers(phases)
    line = numbers(kind, LINE)
    step, plane = s * s * hq * wq, hg * wg * line
    ordered = take(kind, pointer(kind, values), integers(input_slots), active if needs_x else 0)
    offsets = offsets_by_output(others, active if needs_values else 0, places, shifts, step, line)
    input_offsets = offsets_by_input(
        input_starts,
        input_others,
        active,
        channels * places if needs_x else 0,
        places,
        mirrored,
        hg * wg,
        line,
    )

    tiles = -(-images // line)
    chunks = min(tiles, CHUNKS)
    sums = zeros(kind, chunks * active if needs_values else 0)
    for task in prange(chunks * blocks):
        chunk, part = task // blocks, task % blocks
        gradients = cleared(kind, outputs * plane)
        tile = cleared(kind, channels * step * line if needs_values else 0)
        first, end = channels * part // blocks, channels * (part + 1) // blocks
        widest = (width - 1 + left) // s + 1
        band = max(1, min(height, BAND // ((end - first) * widest * line)))
        block = scratch(kind, (end - first) * band * widest * line if needs_x else 0)
        for t in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
            image = t * line
            n = min(line, images - image)
            if n < line:
                gradients[:] = 0
                tile[:] = 0
            pack(
                kind,
                gradient,
                image,
                n,
                outputs * rows * columns,
                outputs,
                rows,
                columns,
                last,
                1,
                qy,
                qx,
                hg,
                wg,
                gradients,
            )
            if needs_x:
                for phase in range(s * s):
                    py, px = phase // s, phase % s
                    y0, x0 = (max(0, top - py) + s - 1) // s, (max(0, left - px) + s - 1) // s
                    y1, x1 = (height - 1 + top - py) // s + 1, (width - 1 + left - px) // s + 1
                    low, high = at(phases, phase), at(phases, phase + 1)
                    for y in range(y0, y1, band):
                        count = min(band, y1 - y)
                        convolve(
                            kind,
                            gradients[x0 * line :],
                            wg * line,
                            y,
                            count,
                            (x1 - x0) * line,
                            input_starts,
                            places,
                            low,
                            high,
                            first,
                            end,
                            input_offsets,
                            ordered,
                            False,
                            nothing,
                            block,
                        )
                        unpack(
                            kind,
                            block,
                            first,
                            end - first,
                            y,
                            count,
                            x1 - x0,
                            image,
                            n,
                            channels * height * width,
                            channels,
                            height,
                            width,
                            x_last,
                            s,
                            py - top,
                            x0 * s + px - left,
                            for_x,
                        )
            if needs_values:
                pack(
                    kind,
                    source,
                    image,
                    n,
                    channels * height * width,
                    channels,
                    height,
                    width,
                    x_last,
                    s,
                    top,
                    left,
                    hq,
                    wq,
                    tile,
                )
                begin, until = outputs * part // blocks, outputs * (part + 1) // blocks
                add_gradients(
                    kind,
                    tile,
                    wq * line,
                    gradients,
                    plane,
                    wg * line,
                    (qy * wg + qx) * line,
                    rows,
                    columns,
                    starts,
                    offsets,
                    sums,
                    chunk * active,
                    begin,
                    until,
                )

    if needs_values:
        add_chunks(sums, chunks, active)
        for k in range(active):
            put(pointer(kind, for_values), at(slots, k), at(sums, k))
