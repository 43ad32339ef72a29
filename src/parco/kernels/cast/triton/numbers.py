# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# What pyright sees of Triton's functions is Python that never runs.
"""Device functions: numbers to codes, codes in bytes, scales of blocks, random bits, transforms.

Each follows its reference in plain torch step by step (rounding.py, scaling.py, philox.py, hadamard.py), so that the
bits are the same. Divisions are rounded to nearest (`div_rn`; `/` is not), and kernels are compiled without fused
multiply-adds.
"""

import triton
import triton.language as tl

FRACTION = tl.constexpr((1 << 23) - 1)
INFINITY = tl.constexpr(0xFF << 23)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
NAN = tl.constexpr(0x7FC00000)
LARGEST = tl.constexpr(0x7F7FFFFF)
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
LARGEST_FP16 = tl.constexpr(65504.0)
HALF = tl.constexpr(0x400000)  # 2**-127, and the upper half of a fraction
BEYOND = tl.constexpr(1024.0)  # past every integer element
TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 · 2**23: what is added to it is rounded to a whole number


@triton.jit
def random_words(seed, row, first_column, R: tl.constexpr, C: tl.constexpr):
    """32 random bits for the elements of rows `row` [R] and the C columns from `first_column`, a multiple of 4."""
    counter = tl.zeros([R, C // 4], tl.int64)
    row = row[:, None] + counter
    quad = (first_column // 4 + tl.arange(0, C // 4))[None, :] + counter
    word0, word1, word2, word3 = tl.philox(
        seed.to(tl.int64),
        (row & 0xFFFFFFFF).to(tl.uint32),
        quad.to(tl.uint32),
        (row >> 32).to(tl.uint32),
        counter.to(tl.uint32),
    )
    return tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [R, C]).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def drop_bits(significand, drop, random, FORM: tl.constexpr):
    """`significand` / 2**drop, rounded."""
    if FORM.rounding == "stochastic":
        wide = significand.to(tl.int64) >> tl.minimum(tl.maximum(drop - 32, 0), 31).to(tl.int64)
        less = tl.minimum(drop, 32).to(tl.int64)
        one = tl.full(less.shape, 1, tl.int64)
        kept = ((wide + (random & ((one << less) - 1))) >> less).to(tl.int32)
    else:
        less = tl.minimum(drop, 25)
        kept = significand >> less
        if FORM.rounding == "nearest":
            one = tl.full(less.shape, 1, tl.int32)
            kept = (significand + ((one << (less - 1)) - 1) + (kept & 1)) >> less
    return kept


@triton.jit
def float_codes(x, random, FORM: tl.constexpr):
    """Codes of fp32 numbers in an element of floats: int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & MAGNITUDE
    exponent = tl.maximum(magnitude >> 23, 1)
    significand = tl.where(magnitude > FRACTION, (magnitude & FRACTION) | (1 << 23), magnitude)
    binade = exponent - (FORM.least_exponent + 127)
    drop = (23 - FORM.mantissa_bits) - tl.minimum(binade, 0)
    codes = drop_bits(significand, drop, random, FORM) + (tl.maximum(binade, 0) << FORM.mantissa_bits)
    codes = tl.minimum(codes, FORM.max_code)
    is_nan = magnitude > INFINITY
    is_negative = bits < 0
    if FORM.nan_code == -1:
        codes = tl.where(is_nan, FORM.max_code, codes)
        is_negative = is_negative & (is_nan == 0)
    else:
        codes = tl.where(is_nan, FORM.nan_code, codes)
    return codes | (is_negative.to(tl.int32) << (FORM.bits - 1))


@triton.jit
def integer_codes(x, random, zero, FORM: tl.constexpr):
    """Codes of fp32 numbers as integers: int32. `zero` is the code of 0 where the format is asymmetric."""
    x = tl.where(x != x, 0.0, x)
    x = tl.minimum(tl.maximum(x, -BEYOND), BEYOND)
    if FORM.rounding == "nearest":
        whole = ((x + TO_WHOLE) - TO_WHOLE).to(tl.int32)
    elif FORM.rounding == "zero":
        whole = x.to(tl.int32)
    else:
        below = x.to(tl.int32).to(tl.float32)
        below = tl.where(below > x, below - 1.0, below)
        up = random.to(tl.float64) < (x - below).to(tl.float64) * 4294967296.0
        whole = below.to(tl.int32) + up.to(tl.int32)
    if FORM.is_asymmetric:
        codes = tl.minimum(tl.maximum(whole + zero, 0), (1 << FORM.bits) - 1)
    else:
        codes = tl.minimum(tl.maximum(whole, FORM.least), FORM.greatest) + FORM.offset
    return codes


@triton.jit
def rounded_codes(x, zero, seed, row, first_column, FORM: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Codes of scaled numbers [R, C], int32."""
    random = x
    if FORM.rounding == "stochastic":
        random = random_words(seed, row, first_column, R, C)
    if FORM.kind == "float":
        codes = float_codes(x, random, FORM)
    else:
        codes = integer_codes(x, random, zero, FORM)
    return codes


@triton.jit
def store_codes(
    codes, codes_ptr, row, rows, first_column, columns, row_bytes, FORM: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Write codes [R, C] of a matrix of `rows` by `columns` as bytes, `row_bytes` a row."""
    words: tl.constexpr = C // FORM.word
    word_bytes: tl.constexpr = FORM.word_bytes
    first = first_column // FORM.word * word_bytes
    column = first_column + tl.arange(0, C)
    codes = tl.where((column < columns)[None, :], codes, 0)
    if FORM.word == 1:
        word = codes
    elif FORM.word * FORM.bits > 32:
        shift = tl.arange(0, FORM.word).to(tl.int64) * FORM.bits
        word = tl.sum(tl.reshape(codes.to(tl.int64), [R, words, FORM.word]) << shift[None, None, :], 2)
    else:
        shift = tl.arange(0, FORM.word) * FORM.bits
        word = tl.sum(tl.reshape(codes, [R, words, FORM.word]) << shift[None, None, :], 2)
    for i in tl.static_range(word_bytes):
        byte = first + tl.arange(0, words) * word_bytes + i
        at = codes_ptr + row[:, None] * row_bytes + byte[None, :]
        valid = (row < rows)[:, None] & (byte < row_bytes)[None, :]
        tl.store(at, ((word >> (8 * i)) & 0xFF).to(tl.uint8), mask=valid)


@triton.jit
def power_of_two(code):
    """The number of an e8m0 code, as bits of fp32."""
    return tl.where(code == 255, NAN, tl.where(code == 0, HALF, code << 23))


@triton.jit
def e4m3_number(code):
    """The number of an e4m3 code, fp32."""
    magnitude = code & 127
    exponent, mantissa = magnitude >> 3, magnitude & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    number = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    bits = tl.where(magnitude == 127, NAN, number.to(tl.int32, bitcast=True)) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_number(stored, factor, FORM: tl.constexpr):
    """What codes under a stored scale are multiplied with: fp32."""
    if FORM.scale == "e8m0":
        number = power_of_two(stored.to(tl.int32)).to(tl.float32, bitcast=True)
    elif FORM.scale == "e4m3":
        number = e4m3_number(stored.to(tl.int32)) * factor
    elif FORM.scale == "bf16":  # its bits
        number = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = stored.to(tl.float32)
    return number


@triton.jit
def rescaled(x, stored, factor, FORM: tl.constexpr):
    """Numbers brought under their stored scales, which broadcast: multiplied by a byte's reciprocal, divided by others.
    Under a scale of 0 they become 0.
    """
    if FORM.scale == "none":
        scaled = x
    elif FORM.scale == "e8m0":
        code = stored.to(tl.int32)
        bits = tl.where(code == 255, NAN, tl.where(code == 254, HALF, (254 - code) << 23))
        scaled = x * bits.to(tl.float32, bitcast=True)
    elif FORM.scale == "e4m3":
        number = e4m3_number(stored.to(tl.int32))
        reciprocal = tl.math.div_rn(tl.math.div_rn(1.0, factor), number)
        scaled = x * tl.where(number == 0.0, 0.0, reciprocal)
    else:
        number = scale_number(stored, factor, FORM)
        scaled = tl.math.div_rn(x, tl.where(number == 0.0, float("inf"), number))
    return scaled


@triton.jit
def bf16_bits(x):
    """fp32 numbers rounded to the nearest bf16, ties to even: its bits, int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > INFINITY, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def stored_float(scale, FORM: tl.constexpr):
    """A scale as it is stored: fp32, fp16, or the bits of bf16; rounded, saturating."""
    if FORM.scale == "bf16":
        stored = bf16_bits(tl.where(scale > LARGEST_BF16, LARGEST_BF16, scale))
    elif FORM.scale == "fp16":
        stored = tl.where(scale > LARGEST_FP16, LARGEST_FP16, scale).to(tl.float16)
    else:
        stored = scale
    return stored


@triton.jit
def e8m0_scale(amax_bits, FORM: tl.constexpr):
    """The e8m0 codes of blocks with these greatest magnitudes (bits of fp32), by one of the four rules."""
    if FORM.rule == "rceil":
        amax = amax_bits.to(tl.float32, bitcast=True)
        bits = tl.math.div_rn(amax, FORM.largest).to(tl.int32, bitcast=True)
        code = tl.where(bits <= HALF, 0, (bits >> 23) + ((bits & FRACTION) > 0).to(tl.int32))
    else:
        bits = amax_bits
        if FORM.rule == "even":
            bits += 1 << (22 - FORM.mantissa_bits)
        code = bits >> 23
        if FORM.rule == "ceil":
            code += ((bits & FRACTION) > 0).to(tl.int32)
        code = tl.maximum(code - FORM.greatest_exponent, 0)
    return tl.where(amax_bits > INFINITY, 255, tl.minimum(code, 254)).to(tl.uint8)


@triton.jit
def block_scale(amax_bits, factor, FORM: tl.constexpr, E4M3: tl.constexpr):
    """The stored scale of blocks with these greatest magnitudes (bits of fp32), by the format's rule."""
    if FORM.rule == "absmax":
        amax = tl.where(amax_bits == INFINITY, LARGEST, amax_bits).to(tl.float32, bitcast=True)
        stored = stored_float(tl.math.div_rn(amax, FORM.largest), FORM)
    elif FORM.rule == "e4m3":
        amax = amax_bits.to(tl.float32, bitcast=True)
        wanted = tl.math.div_rn(tl.math.div_rn(amax, FORM.largest), factor)
        stored = float_codes(wanted, wanted, E4M3).to(tl.uint8)
    else:
        stored = e8m0_scale(amax_bits, FORM)
    return stored


@triton.jit
def sums_and_differences(x, APART: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Of numbers APART in the rows of x [R, C], in their places."""
    pairs = tl.permute(tl.reshape(x, [R, C // (2 * APART), 2, APART]), [0, 1, 3, 2])
    first, second = tl.split(pairs)
    sums = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(sums, [0, 1, 3, 2]), [R, C])


@triton.jit
def transformed(x, signs_ptr, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The Hadamard transform of every SIZE (up to 128) neighbours in the rows of x [R, C]."""
    sign = tl.load(signs_ptr + tl.arange(0, C) % SIZE)
    x = x * sign[None, :]
    for step in tl.static_range(7):
        if (1 << step) < SIZE:
            x = sums_and_differences(x, 1 << step, R, C)
    return x


@triton.jit
def cast_tile(
    x,
    codes_ptr,
    scale_ptr,
    factor_ptr,
    row,
    rows,
    first_column,
    columns,
    row_bytes,
    scale_stride,
    seed,
    FORM: tl.constexpr,
    E4M3: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Find the scales of a tile [R, C], zeros outside the matrix, one for every G of a row, and write them and the
    codes.
    """
    groups: tl.constexpr = C // G
    factor = x
    if FORM.rule == "e4m3":
        factor = tl.load(factor_ptr)
    blocks = tl.reshape(x, [R, groups, G])
    amax = tl.max(blocks.to(tl.int32, bitcast=True) & MAGNITUDE, 2)
    stored = block_scale(amax, factor, FORM, E4M3)
    group = first_column // G + tl.arange(0, groups)
    valid = (row < rows)[:, None] & (group < scale_stride)[None, :]
    tl.store(scale_ptr + row[:, None] * scale_stride + group[None, :], stored, mask=valid)
    scaled = tl.reshape(rescaled(blocks, stored[:, :, None], factor, FORM), [R, C])
    codes = rounded_codes(scaled, 0, seed, row, first_column, FORM, R, C)
    store_codes(codes, codes_ptr, row, rows, first_column, columns, row_bytes, FORM, R, C)
