"""GPU kernels over the packed format, in Triton: y = x W' for few tokens, the same in matrix units, and W unpacked.

Each program expands four inputs side by side at a time (a quad: four bits of the mask). A quad's survivors lie one after the other:
they begin at the start of its row in the word of 64 inputs plus the number of bits below it. The starts of rows are what on_gpu.py
makes beside the stored tensors. Sums are fp32 and in one order for one shape, so a product is the same each time.
Shapes: T tokens, O outputs, I inputs; P panels of 4 rows, J words of 64 inputs, G groups, S splits of the inputs.
This module imports triton; on_gpu.py imports it where triton is installed.
"""

import triton
import triton.language as tl

# what all kernels are given of a matrix and know when they are compiled:
# BITS: of an integer, 0 for floats. MASKED: only survivors are stored. KEPT: survivors of every quad, 0 if that varies.
# GROUP: inputs of a scale. MIDDLE: the integer's zero on a symmetric grid; ZEROS: zeros are given instead


@triton.jit
def _ones(x):
    """The number of bits of a uint32 that are set; LLVM makes one instruction of it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _load(at, there, EVEN: tl.constexpr):
    """What lies there, 0 elsewhere. EVEN: it is there everywhere."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=there, other=0)


@triton.jit
def _low(both, HALF: tl.constexpr):
    """The first of two 16-bit floats that lie in a uint32, as fp32. HALF: they are fp16, not bf16."""
    if HALF:
        return (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (both << 16).to(tl.float32, bitcast=True)


@triton.jit
def _integer(codes, of_zero, BITS: tl.constexpr):
    """The lowest integer of those in a uint32, as fp32."""
    return ((codes & ((1 << BITS) - 1)).to(tl.int32) - of_zero).to(tl.float32)


@triton.jit
def _codes(values, bit, there, EVEN: tl.constexpr, BITS: tl.constexpr):
    """Four integers that begin at that bit, in a uint32; the padding makes readable what follows the last."""
    at = values + bit // 8
    codes = _load(at, there, EVEN).to(tl.uint32)
    # where integers begin within a byte, at the most
    late: tl.constexpr = 0 if BITS == 8 else 4 if BITS == 4 else 6 if BITS % 2 == 0 else 7
    if 4 * BITS + late > 8:
        codes |= _load(at + 1, there, EVEN).to(tl.uint32) << 8
    if 4 * BITS + late > 16:
        codes |= _load(at + 2, there, EVEN).to(tl.uint32) << 16
    if 4 * BITS + late > 24:
        codes |= _load(at + 3, there, EVEN).to(tl.uint32) << 24
    return codes >> (bit % 8).to(tl.uint32)


@triton.jit
def _quad(
    values, mask, starts, scale, zero, panel, row, word, quad, there, words, groups,
    BITS: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Four weights side by side in fp32, without their scale, and that scale.

    panel, row (0 to 3), word, quad (0 to 15): of each element; there: whether it is inside of the matrix; EVEN: all are.
    """
    place = panel * words + word
    run = place * 4 + row
    of_zero = MIDDLE
    s = 1.0
    if BITS > 0:
        group = (panel * groups + (word * 64 + quad * 4) // GROUP) * 4 + row
        s = _load(scale + group, there, EVEN).to(tl.float32)
        if ZEROS:
            of_zero = _load(zero + group, there, EVEN).to(tl.int32)
    if not MASKED:
        if BITS == 8 or BITS == 4 or BITS == 2:
            # four integers in one load
            wide = values.to(tl.pointer_type(tl.uint32 if BITS == 8 else tl.uint16 if BITS == 4 else tl.uint8))
            codes = _load(wide + run * 16 + quad, there, EVEN).to(tl.uint32)
        else:
            codes = _codes(values, (run * 16 + quad) * (4 * BITS), there, EVEN, BITS)
        w0 = _integer(codes, of_zero, BITS)
        w1 = _integer(codes >> BITS, of_zero, BITS)
        w2 = _integer(codes >> (2 * BITS), of_zero, BITS)
        w3 = _integer(codes >> (3 * BITS), of_zero, BITS)
        return w0, w1, w2, w3, s
    both = _load(mask + run, there, EVEN).to(tl.uint64, bitcast=True)
    lower = both.to(tl.uint32)
    upper = (both >> 32).to(tl.uint32)
    shift = (quad % 8).to(tl.uint32) * 4
    bits = tl.where(quad >= 8, upper, lower) >> shift
    b0 = (bits & 1) != 0
    b1 = (bits & 2) != 0
    b2 = (bits & 4) != 0
    b3 = (bits & 8) != 0
    if KEPT == 2 and (BITS == 8 or BITS == 4 or (BITS == 0 and values.dtype.element_ty.primitive_bitwidth == 16)):
        # both survivors in one load; the first goes where no bit below is set
        wide = values.to(tl.pointer_type(tl.uint32 if BITS == 0 else tl.uint16 if BITS == 8 else tl.uint8))
        two = _load(wide + run * 16 + quad, there, EVEN).to(tl.uint32)
        if BITS == 0:
            v0 = _low(two, values.dtype.element_ty == tl.float16)
            v1 = _low(two >> 16, values.dtype.element_ty == tl.float16)
        else:
            v0 = _integer(two, of_zero, BITS)
            v1 = _integer(two >> BITS, of_zero, BITS)
        w0 = tl.where(b0, v0, 0.0)
        w1 = tl.where(b1, tl.where(b0, v1, v0), 0.0)
        w2 = tl.where(b2, tl.where(b0 | b1, v1, v0), 0.0)
        w3 = tl.where(b3, v1, 0.0)
        return w0, w1, w2, w3, s
    if KEPT > 0:
        # as many in every quad: nothing has to be counted
        rank = quad * KEPT
        start = run * (16 * KEPT * BITS // 8 if BITS > 0 else 16 * KEPT)
    else:
        below = (tl.full(quad.shape, 1, tl.uint32) << shift) - 1
        rank = _ones(lower & tl.where(quad >= 8, below | 0xFFFFFFFF, below)) + _ones(
            upper & tl.where(quad >= 8, below, 0)
        )
        rank = rank.to(tl.int32)
        of_both = _load(starts + place, there, EVEN)
        # how much further the row begins: a byte of the upper half
        start = of_both.to(tl.int32) + ((of_both >> (row * 8 + 32)).to(tl.int32) & 255)
    if BITS > 0:
        # a set bit takes the lowest integer off
        codes = _codes(values + start, rank * BITS, there, EVEN, BITS)
        w0 = tl.where(b0, _integer(codes, of_zero, BITS), 0.0)
        codes = tl.where(b0, codes >> BITS, codes)
        w1 = tl.where(b1, _integer(codes, of_zero, BITS), 0.0)
        codes = tl.where(b1, codes >> BITS, codes)
        w2 = tl.where(b2, _integer(codes, of_zero, BITS), 0.0)
        codes = tl.where(b2, codes >> BITS, codes)
        w3 = tl.where(b3, _integer(codes, of_zero, BITS), 0.0)
        return w0, w1, w2, w3, s
    # four loads at one address, whatever the mask: what is not a survivor of this quad is of the next, or padding
    at = values + (start + rank)
    v0 = _load(at, there, EVEN).to(tl.float32)
    v1 = _load(at + 1, there, EVEN).to(tl.float32)
    v2 = _load(at + 2, there, EVEN).to(tl.float32)
    v3 = _load(at + 3, there, EVEN).to(tl.float32)
    # an input that is not kept moves the survivors one further
    w0 = tl.where(b0, v0, 0.0)
    v1, v2, v3 = tl.where(b0, v1, v0), tl.where(b0, v2, v1), tl.where(b0, v3, v2)
    w1 = tl.where(b1, v1, 0.0)
    v2, v3 = tl.where(b1, v2, v1), tl.where(b1, v3, v2)
    w2 = tl.where(b2, v2, 0.0)
    w3 = tl.where(b3, tl.where(b2, v3, v2), 0.0)
    return w0, w1, w2, w3, s


@triton.jit
def _add(sums, w0, w1, w2, w3, s, x0, x1, x2, x3, BITS: tl.constexpr):
    """sums (T, QUADS) + the product of every quad; integers are summed before their scale multiplies them."""
    if BITS == 0:
        return sums + w0[None, :] * x0 + w1[None, :] * x1 + w2[None, :] * x2 + w3[None, :] * x3
    else:
        return sums + s[None, :] * (w0[None, :] * x0 + w1[None, :] * x1 + w2[None, :] * x2 + w3[None, :] * x3)


@triton.jit
def _store_row(
    y, bias, sums_T, row, split, tokens, outputs,
    TOKENS: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One output of all tokens: y with its bias, or the sum of a split."""
    t = tl.arange(0, TOKENS)
    if WHOLE and BIASED:
        sums_T += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    at = (split * tokens + t).to(tl.int64) * outputs + row
    tl.store(y + at, sums_T.to(y.dtype.element_ty), mask=(t < tokens) & (row < outputs))


@triton.jit
def few_tokens(
    x, values, mask, starts, scale, zero, bias, y,
    tokens, outputs, inputs, words, groups,
    BITS: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """y (T, O), or sums (S, T, O) if not WHOLE: a program multiplies a panel of four rows with all of T <= TOKENS.

    Grid: (P, S). Each thread keeps a column of quads, so what it reads of x serves four rows. BLOCKS: of QUADS quads that a program
    does; a constant, since Triton 3.6 cannot interpret loops to a number beside numpy 2.4.
    """
    panel = tl.program_id(0)
    split = tl.program_id(1)
    q = tl.arange(0, QUADS)
    quad = q % 16
    t = tl.arange(0, TOKENS)
    a0 = tl.zeros([TOKENS, QUADS], tl.float32)
    a1 = tl.zeros([TOKENS, QUADS], tl.float32)
    a2 = tl.zeros([TOKENS, QUADS], tl.float32)
    a3 = tl.zeros([TOKENS, QUADS], tl.float32)
    for number in tl.range(BLOCKS):
        block = split * BLOCKS + number
        word = block * (QUADS // 16) + q // 16
        k = word * 64 + quad * 4
        there = k < inputs
        # four inputs of every quad in one load
        at = (t[:, None] * inputs + k[None, :])[:, :, None] + tl.arange(0, 4)[None, None, :]
        here = (t < tokens)[:, None, None]
        if not EVEN:
            here = here & ((k[:, None] + tl.arange(0, 4)[None, :]) < inputs)[None, :, :]
        x_TQ4 = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x_TQ4, [TOKENS, QUADS, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        for row in tl.static_range(4):
            w0, w1, w2, w3, s = _quad(
                values, mask, starts, scale, zero, panel, row, word, quad, there, words, groups,
                BITS, MASKED, KEPT, GROUP, MIDDLE, ZEROS, EVEN,
            )  # fmt: skip
            if row == 0:
                a0 = _add(a0, w0, w1, w2, w3, s, x0, x1, x2, x3, BITS)
            elif row == 1:
                a1 = _add(a1, w0, w1, w2, w3, s, x0, x1, x2, x3, BITS)
            elif row == 2:
                a2 = _add(a2, w0, w1, w2, w3, s, x0, x1, x2, x3, BITS)
            else:
                a3 = _add(a3, w0, w1, w2, w3, s, x0, x1, x2, x3, BITS)
    _store_row(y, bias, tl.sum(a0, 1), panel * 4, split, tokens, outputs, TOKENS, BIASED, WHOLE)
    _store_row(y, bias, tl.sum(a1, 1), panel * 4 + 1, split, tokens, outputs, TOKENS, BIASED, WHOLE)
    _store_row(y, bias, tl.sum(a2, 1), panel * 4 + 2, split, tokens, outputs, TOKENS, BIASED, WHOLE)
    _store_row(y, bias, tl.sum(a3, 1), panel * 4 + 3, split, tokens, outputs, TOKENS, BIASED, WHOLE)


@triton.jit
def _tile(
    values, mask, starts, scale, zero, row, q, inputs, panels, words,
    groups, dtype: tl.constexpr,
    BITS: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """(ROWS, 4 * QUADS) weights in dtype; row (ROWS), q (QUADS): rows and quads of the whole matrix, zeros outside of it."""
    panel = (row // 4)[:, None]
    word = (q // 16)[None, :]
    w0, w1, w2, w3, s = _quad(
        values, mask, starts, scale, zero, panel, (row % 4)[:, None], word, (q % 16)[None, :],
        (panel < panels) & (q * 4 < inputs)[None, :], words, groups, BITS, MASKED, KEPT, GROUP, MIDDLE, ZEROS, EVEN,
    )  # fmt: skip
    if BITS > 0:
        # + 0.0 makes every zero positive, as unpack() does
        w0 = w0 * s + 0.0
        w1 = w1 * s + 0.0
        w2 = w2 * s + 0.0
        w3 = w3 * s + 0.0
    # (.., 2, 2) holds w0 w1, w2 w3 in the order of the inputs
    four = tl.join(tl.join(w0.to(dtype), w2.to(dtype)), tl.join(w1.to(dtype), w3.to(dtype)))
    return tl.reshape(four, [ROWS, QUADS * 4])


@triton.jit
def many_tokens(
    x, values, mask, starts, scale, zero, bias, y,
    tokens, outputs, inputs, panels, words, groups,
    BITS: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    QUADS: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y (T, O), or sums (S, T, O) if not WHOLE, in matrix units: a tile is expanded once for TOKENS tokens.

    Grid: (ceil(O / ROWS), ceil(T / TOKENS), S). Integers are multiplied by their scale and rounded to x's dtype first, as the
    plain layer's weights are. WIDE: products of fp32, for Triton's interpreter, which takes bf16 for integers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for number in tl.range(BLOCKS):
        block = split * BLOCKS + number
        q = block * QUADS + tl.arange(0, QUADS)
        k = block * (QUADS * 4) + tl.arange(0, QUADS * 4)
        w = _tile(
            values, mask, starts, scale, zero, row, q, inputs, panels, words, groups, x.dtype.element_ty,
            BITS, MASKED, KEPT, GROUP, MIDDLE, ZEROS, EVEN, ROWS, QUADS,
        )  # fmt: skip
        at = t[None, :].to(tl.int64) * inputs + k[:, None]
        x_IT = tl.load(x + at, mask=(t < tokens)[None, :] & (k < inputs)[:, None], other=0.0)
        if WIDE:
            sums = tl.dot(w.to(tl.float32), x_IT.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(w, x_IT, sums, input_precision="ieee")
    if WHOLE and BIASED:
        sums += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
    at = (split * tokens + t)[None, :].to(tl.int64) * outputs + row[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(t < tokens)[None, :] & (row < outputs)[:, None])


@triton.jit
def add_splits(sums, bias, y, total, outputs, SPLITS: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """y (T, O) = the sums (S, T, O) added in the order of splits, + bias. total: T * O, SPLITS times that is below 2^31."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(SPLITS):
        found += tl.load(sums + split * total + at, mask=at < total, other=0.0)
    if BIASED:
        found += tl.load(bias + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    tl.store(y + at, found.to(y.dtype.element_ty), mask=at < total)


@triton.jit
def expand(
    values, mask, starts, scale, zero, weight,
    outputs, inputs, panels, words, groups,
    BITS: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """weight (O, I), all of it. Grid: (ceil(O / ROWS), ceil(J * 16 / QUADS))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    k = tl.program_id(1) * (QUADS * 4) + tl.arange(0, QUADS * 4)
    w = _tile(
        values, mask, starts, scale, zero, row, q, inputs, panels, words, groups, weight.dtype.element_ty,
        BITS, MASKED, KEPT, GROUP, MIDDLE, ZEROS, EVEN, ROWS, QUADS,
    )  # fmt: skip
    inside = (row < outputs)[:, None] & (k < inputs)[None, :]
    tl.store(weight + row[:, None].to(tl.int64) * inputs + k[None, :], w, mask=inside)
