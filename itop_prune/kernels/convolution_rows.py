"""Products of a 2-d convolution with its active weights, for few images: Numba kernels.

In `convolution.py` a vector holds a pixel of many images. Here it holds neighbouring pixels of one
image, which is taken in bands of rows. A band is packed with the rows around it that the weights
read, as planes of one channel and phase each. The rows of a plane follow each other, so a vector
may go on into the next row. Between the results of two rows it computes a few numbers that belong
to no pixel. They are left out, and for them the packed gradient of the results has zeros.

The products are those of `convolution.py`, which a plane's rows enter as one long row. Results do
not depend on the number of threads. Nothing is checked here: `convolution_products.py` checks.
"""

# mypy: disable-error-code=no-untyped-def

from numba import njit, prange

from itop_prune.kernels.convolution import add_gradients, cleared, convolve, within
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
    SQUARE,
    at,
    integers,
    load,
    numbers,
    pointer,
    put,
    store,
)


@njit(**FAST)
def copy(kind, source, place, step, target, first, gap, count):
    """target[first + i * gap] = source[place + i * step], for i < count."""
    side = numbers(kind, SQUARE)
    if step == 1 and gap == 1 and count >= side:
        for begin in range(0, count, side):
            i = min(begin, count - side)  # the last one overlaps the one before
            store(target, first + i, load(source, place + i, SQUARE))
    else:
        for i in range(count):
            put(target, first + i * gap, at(source, place + i * step))


@njit(**FAST)
def pack(kind, source, images, image, packing, begin, plane, tile):
    """Pack rows of an image: tile[channel, phase, row, column]; its padding stays as it is.

    The first one is row `begin` of the padded image's phases. A plane has so many numbers, of which
    the rows take the first ones.
    """
    channels, height, width, last = images
    s, top, left, rows, wq = packing
    start = image * size_of(images)
    if s == 1 and wq == width:  # rows follow each other without a gap: they are one
        y = max(0, begin - top)
        count, first = (min(height, begin + rows - top) - y) * width, (y + top - begin) * width
        if last:
            place = start + y * width * channels
            turn(kind, source, place, channels, tile, first, plane, count, channels)
        else:
            for c in range(channels):
                place = start + (c * height + y) * width
                copy(kind, source, place, 1, tile, c * plane + first, 1, count)
        return

    for j in range(rows):
        for phase in range(s * s):
            y = (begin + j) * s + phase // s - top
            if y < 0 or y >= height:
                continue
            x = (phase % s - left) % s
            count, first = (width - x + s - 1) // s, phase * plane + j * wq + (x + left) // s
            step = s * s * plane
            if last:
                place = start + (y * width + x) * channels
                turn(kind, source, place, s * channels, tile, first, step, count, channels)
            else:
                for c in range(channels):
                    place = start + (c * height + y) * width + x
                    copy(kind, source, place, s, tile, first + c * step, 1, count)


@njit(**FAST)
def clear_ends(kind, tile, planes, plane, used):
    """Write 0 behind the numbers that are used of each plane, and behind the last plane.

    Vectors go over the ends. What lies there enters no result. But products with denormal numbers
    are slow: by chance, a layer of ResNet-50 took ten times as long.
    """
    for begin in range(used, planes * plane, plane):
        for i in range(begin, begin + plane - used):
            put(tile, i, 0)
    for i in range(planes * plane, len(tile)):
        put(tile, i, 0)


@njit(**FAST)
def unpack(kind, block, lines, part, images, image, target):
    """Write a part of the results, block[channel, row * step + column], where it belongs.

    `lines` is one line, of all its rows, and its step that from one row to the next.
    """
    _, _, step, length = lines
    first, count, y, rows, columns, s, top, left = part
    channels, height, width, last = images
    start = image * size_of(images)
    if s == 1 and step == width:
        rows, columns = 1, rows * columns
    for r in range(rows):
        row = (y + r) * s + top
        if last:
            place = start + (row * width + left) * channels + first
            turn(kind, block, r * step, length, target, place, s * channels, count, columns)
        else:
            for k in range(count):
                place = start + ((first + k) * height + row) * width + left
                copy(kind, block, k * length + r * step, 1, target, place, s, columns)


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
    """Compute the output of a convolution; the arguments are those of `convolution.forward`."""
    biased = bias != 0
    source, target, bias = pointer(kind, x), pointer(kind, result), pointer(kind, bias)
    starts, offsets, values = integers(starts), integers(offsets), pointer(kind, values)
    wide, whole = numbers(kind, kind), geometry_at(geometry)

    bands = -(-whole.rows // whole.band)
    for task in prange(images * bands * blocks):
        g = geometry_at(geometry)  # Numba hands threads no named tuple
        block_of, image, y = task % blocks, task // blocks // bands, task // blocks % bands * g.band
        first, end = g.outputs * block_of // blocks, g.outputs * (block_of + 1) // blocks
        of_x = Images(g.channels, g.height, g.width, x_last)
        of_result = Images(g.outputs, g.rows, g.columns, last)
        tile = scratch(kind, g.channels * g.s * g.s * g.plane + wide)
        if g.s > 1 or g.top or g.left:
            tile[:] = 0
        else:
            clear_ends(kind, tile, g.channels, g.plane, min(g.hq, g.height - y) * g.wq)
        packing = Packing(g.s, g.top, g.left, g.hq, g.wq)
        pack(kind, source, of_x, image, packing, y, g.plane, tile)

        part = Part(first, end - first, y, min(g.band, g.rows - y), g.columns, 1, 0, 0)
        lines = Lines(0, 1, g.wq, (part.rows - 1) * g.wq + g.columns)
        weights = Weights(starts, 1, 0, 1, offsets, values)
        block = scratch(kind, part.channels * lines.length + wide)
        convolve(kind, tile, lines, part, weights, biased, bias, block)
        unpack(kind, block, lines, part, of_result, image, target)


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

    The arguments are those of `convolution.backward`.
    """
    needs_x, needs_values = for_x != 0, for_values != 0
    for_x, nothing = pointer(kind, for_x), pointer(kind, 0)
    source, gradient = pointer(kind, x), pointer(kind, gradient)
    starts, offsets, slots = integers(starts), integers(offsets), integers(slots)
    input_starts, input_offsets = integers(input_starts), integers(input_offsets)
    values, phases = pointer(kind, values), integers(phases)
    line, wide, whole = numbers(kind, LINE), numbers(kind, kind), geometry_at(geometry)
    vectors = -(-whole.band * whole.wq // line)

    bands = -(-max(whole.rows, (whole.height - 1 + whole.top) // whole.s + 1) // whole.band)
    tasks = images * bands
    chunks = min(tasks, CHUNKS)
    sums = zeros(kind, chunks * active if needs_values else 0)
    for task in prange(chunks * blocks):
        g = geometry_at(geometry)  # Numba hands threads no named tuple
        chunk, block_of = task // blocks, task % blocks
        of_x = Images(g.channels, g.height, g.width, x_last)
        of_gradient = Images(g.outputs, g.rows, g.columns, last)
        for t in range(tasks * chunk // chunks, tasks * (chunk + 1) // chunks):
            image, y = t // bands, t % bands * g.band
            if needs_x:
                first, end = g.channels * block_of // blocks, g.channels * (block_of + 1) // blocks
                gradients = cleared(kind, g.outputs * g.around + wide)
                packing = Packing(1, g.qy, g.qx, g.hg, g.wg)
                pack(kind, gradient, of_gradient, image, packing, y, g.around, gradients)
                block = scratch(kind, (end - first) * g.band * g.wg + wide)
                for phase in range(g.s * g.s):
                    py, px = phase // g.s, phase % g.s
                    x0, x1 = within(g.width, g.left, px, g.s)
                    y0, y1 = within(g.height, g.top, py, g.s)
                    y0, y1 = max(y, y0), min(y + g.band, y1)
                    if y0 >= y1 or x0 >= x1:
                        continue
                    top, left = py - g.top, x0 * g.s + px - g.left
                    part = Part(first, end - first, y0, y1 - y0, x1 - x0, g.s, top, left)
                    lines = Lines(0, 1, g.wg, (part.rows - 1) * g.wg + part.columns)
                    low, high = at(phases, phase), at(phases, phase + 1)
                    weights = Weights(input_starts, g.places, low, high, input_offsets, values)
                    shifted = gradients[(y0 - y) * g.wg + x0 :]
                    convolve(kind, shifted, lines, part, weights, False, nothing, block)
                    unpack(kind, block, lines, part, of_x, image, for_x)
            if needs_values and y < g.rows:
                first, end = g.outputs * block_of // blocks, g.outputs * (block_of + 1) // blocks
                # The gradient has no rows around it, and each of its planes is whole lines.
                gradients = cleared(kind, g.outputs * vectors * line)
                packing = Packing(1, 0, 0, min(g.band, g.rows - y), g.wq)
                pack(kind, gradient, of_gradient, image, packing, y, vectors * line, gradients)
                # Lines may go over the end of the last plane, by a shift and a part of a line.
                tile = cleared(kind, g.channels * g.s * g.s * g.plane + g.wq + line)
                packing = Packing(g.s, g.top, g.left, g.hq, g.wq)
                pack(kind, source, of_x, image, packing, y, g.plane, tile)
                part = Part(first, end - first, 0, 1, vectors, 1, 0, 0)
                into = chunk * active
                add_gradients(
                    kind, tile, 0, gradients, vectors * line, 0, part, starts, offsets, sums, into
                )

    if needs_values:
        add_chunks(sums, chunks, active)
        for k in range(active):
            put(pointer(kind, for_values), at(slots, k), at(sums, k))
