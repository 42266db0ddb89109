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

from itop_prune.kernels.convolution import (
    add_gradients,
    cleared,
    convolve,
    offsets_by_input,
    offsets_by_output,
    turn,
)
from itop_prune.kernels.linear import CHUNKS, FAST, PARALLEL, add_chunks, scratch, take, zeros
from itop_prune.kernels.runtime import ALIGNED
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
def aligned(count):
    """Round up to a multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


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
def pack(
    kind, source, start, channels, height, width, last, s, top, left, begin, rows, wq, plane, tile
):
    """Pack rows of an image: tile[channel, phase, row, column]; its padding stays as it is.

    The first one is row `begin` of the padded image's phases; a plane has `rows` of `wq` numbers.
    """
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
            if last:
                place, step = start + (y * width + x) * channels, s * s * plane
                turn(kind, source, place, s * channels, tile, first, step, count, channels)
            else:
                place, step = start + y * width + x, s * s * plane
                for c in range(channels):
                    copy(
                        kind,
                        source,
                        place + c * height * width,
                        s,
                        tile,
                        first + c * step,
                        1,
                        count,
                    )


@njit(**FAST)
def unpack(
    kind,
    block,
    length,
    step,
    first,
    count,
    y,
    rows,
    columns,
    start,
    channels,
    height,
    width,
    last,
    s,
    top,
    left,
    target,
):
    """Write rows of results, block[channel, row * step + column], where they belong.

    Row r of the block is row (y + r) * s + top of the image; columns likewise.
    """
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
    band,
    blocks,
):
    """Compute the output of a convolution.

    The arguments are those of `convolution.forward`, but for two. `hq` is the rows of a packed
    band, and `band` how many rows of results it gives.
    """
    biased = bias != 0
    source, target, bias = pointer(kind, x), pointer(kind, result), pointer(kind, bias)
    starts, others, shifts = integers(starts), integers(others), integers(shifts)
    ordered = take(kind, pointer(kind, values), integers(slots), active)
    plane, wide = aligned(hq * wq), numbers(kind, kind)
    offsets = offsets_by_output(others, active, places, shifts, s * s * plane, 1)

    bands = -(-rows // band)
    for task in prange(images * bands * blocks):
        part, image, y = task % blocks, task // blocks // bands, task // blocks % bands * band
        first, end = outputs * part // blocks, outputs * (part + 1) // blocks
        high = min(band, rows - y)
        tile = scratch(kind, channels * s * s * plane + wide)
        if top or left:
            tile[:] = 0
        start = image * channels * height * width
        pack(
            kind,
            source,
            start,
            channels,
            height,
            width,
            x_last,
            s,
            top,
            left,
            y,
            hq,
            wq,
            plane,
            tile,
        )
        length = (high - 1) * wq + columns
        block = scratch(kind, (end - first) * length + wide)
        convolve(
            kind,
            tile,
            0,
            0,
            1,
            length,
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
        start = image * outputs * rows * columns
        unpack(
            kind,
            block,
            length,
            wq,
            first,
            end - first,
            y,
            high,
            columns,
            start,
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
    band,
    blocks,
):
    """Compute the gradients of input and values; one whose address is 0 is not computed.

    The arguments are those of `convolution.backward`, but for three. `hq` and `hg` are the rows of
    packed bands, and `band` how many rows of results, or of a phase, one gives.
    """
    needs_x, needs_values = for_x != 0, for_values != 0
    for_x, nothing = pointer(kind, for_x), pointer(kind, 0)
    source, gradient = pointer(kind, x), pointer(kind, gradient)
    starts, others, slots = integers(starts), integers(others), integers(slots)
    input_starts, input_others = integers(input_starts), integers(input_others)
    shifts, mirrored, phases = integers(shifts), integers(mirrored), integers(phases)
    line, wide = numbers(kind, LINE), numbers(kind, kind)
    plane, around = aligned(hq * wq), aligned(hg * wg)
    lines = -(-band * wq // line)
    ordered = take(kind, pointer(kind, values), integers(input_slots), active if needs_x else 0)
    offsets = offsets_by_output(
        others, active if needs_values else 0, places, shifts, s * s * plane, 1
    )
    features = channels * places if needs_x else 0
    input_offsets = offsets_by_input(
        input_starts, input_others, active, features, places, mirrored, around, 1
    )

    bands = -(-max(rows, (height - 1 + top) // s + 1) // band)
    tasks = images * bands
    chunks = min(tasks, CHUNKS)
    sums = zeros(kind, chunks * active if needs_values else 0)
    for task in prange(chunks * blocks):
        chunk, part = task // blocks, task % blocks
        for t in range(tasks * chunk // chunks, tasks * (chunk + 1) // chunks):
            image, y = t // bands, t % bands * band
            start, results = image * channels * height * width, image * outputs * rows * columns
            if needs_x:
                first, end = channels * part // blocks, channels * (part + 1) // blocks
                gradients = cleared(kind, outputs * around + wide)
                pack(
                    kind,
                    gradient,
                    results,
                    outputs,
                    rows,
                    columns,
                    last,
                    1,
                    qy,
                    qx,
                    y,
                    hg,
                    wg,
                    around,
                    gradients,
                )
                block = scratch(kind, (end - first) * band * wg + wide)
                for phase in range(s * s):
                    py, px = phase // s, phase % s
                    x0 = (max(0, left - px) + s - 1) // s
                    x1 = (width - 1 + left - px) // s + 1
                    y0 = max(y, (max(0, top - py) + s - 1) // s)
                    y1 = min(y + band, (height - 1 + top - py) // s + 1)
                    if y0 >= y1 or x0 >= x1:
                        continue
                    length = (y1 - y0 - 1) * wg + x1 - x0
                    convolve(
                        kind,
                        gradients[(y0 - y) * wg + x0 :],
                        0,
                        0,
                        1,
                        length,
                        input_starts,
                        places,
                        at(phases, phase),
                        at(phases, phase + 1),
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
                        length,
                        wg,
                        first,
                        end - first,
                        y0,
                        y1 - y0,
                        x1 - x0,
                        start,
                        channels,
                        height,
                        width,
                        x_last,
                        s,
                        py - top,
                        x0 * s + px - left,
                        for_x,
                    )
            if needs_values and y < rows:
                first, end = outputs * part // blocks, outputs * (part + 1) // blocks
                gradients = cleared(kind, outputs * lines * line)
                high = min(band, rows - y)
                pack(
                    kind,
                    gradient,
                    results,
                    outputs,
                    rows,
                    columns,
                    last,
                    1,
                    0,
                    0,
                    y,
                    high,
                    wq,
                    lines * line,
                    gradients,
                )
                # Lines may go over the end of the last plane, by a shift and a part of a line.
                tile = cleared(kind, channels * s * s * plane + wq + line)
                pack(
                    kind,
                    source,
                    start,
                    channels,
                    height,
                    width,
                    x_last,
                    s,
                    top,
                    left,
                    y,
                    hq,
                    wq,
                    plane,
                    tile,
                )
                add_gradients(
                    kind,
                    tile,
                    0,
                    gradients,
                    lines * line,
                    0,
                    0,
                    1,
                    lines,
                    starts,
                    offsets,
                    sums,
                    chunk * active,
                    first,
                    end,
                )

    if needs_values:
        add_chunks(sums, chunks, active)
        for k in range(active):
            put(pointer(kind, for_values), at(slots, k), at(sums, k))
