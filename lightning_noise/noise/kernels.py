"""The kernel that draws random numbers and perturbs with them in one pass over the memory of a GPU."""
# without "from __future__ import annotations": Triton reads the annotations, and a string is no type

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

__all__ = ["BLOCK", "TAG", "perturb"]

BLOCK = 512  # the counters of a program, each of which gives four numbers
TAG = 0x6E6F6973  # a word of the counter that torch leaves at 0, so that the two never draw the same


@triton.jit(do_not_specialize=["seed", "offset"])
def perturb(
    x, y, mask, level, low, high, seed, offset, n, row,
    draw: tl.constexpr, formula: tl.constexpr, masked: tl.constexpr, rows: tl.constexpr, wide: tl.constexpr,
    block: tl.constexpr, tag: tl.constexpr,
):  # fmt: skip
    """Writes the n perturbed elements of x to y.

    Philox4x32-10 (Salmon et al., 2011) turns the seed and the counter (c, offset, tag) into four words. The word k of the
    counter ``c = program * block + lane`` belongs to the element ``4 * program * block + k * block + lane``. So the number of
    an element depends on its place alone, and neighbors in memory are read and written together.
    """
    program = tl.program_id(0)
    if wide:
        program = program.to(tl.int64)
    lane = tl.arange(0, block)
    counter = program.to(tl.int64) * block + lane
    zero = tl.zeros([block], dtype=tl.uint32)
    a, b, c, d = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero + offset.to(tl.uint32), zero + tag)
    if draw == "normal":
        z0, z1 = _normal(a, b)
        z2, z3 = _normal(c, d)
    elif draw == "uniform":
        z0, z1, z2, z3 = _uniform(a), _uniform(b), _uniform(c), _uniform(d)
    else:
        z0, z1, z2, z3 = _bits(a), _bits(b), _bits(c), _bits(d)
    i = program * (4 * block) + lane
    _write(z0, x, y, mask, level, low, high, i, n, row, formula, masked, rows)
    _write(z1, x, y, mask, level, low, high, i + block, n, row, formula, masked, rows)
    _write(z2, x, y, mask, level, low, high, i + 2 * block, n, row, formula, masked, rows)
    _write(z3, x, y, mask, level, low, high, i + 3 * block, n, row, formula, masked, rows)


@triton.jit
def _normal(a, b):
    """Returns two normal numbers for two words (Box and Muller, 1958)."""
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float32) + 0.5) * 2.3283064365386963e-10))  # of a number in (0, 1]
    # the second word is a number of quarter turns and an angle in [-pi / 4, pi / 4), for which the series are short
    turns = (b + 0x20000000) >> 30
    angle = (b - (turns << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    s = angle * angle
    sine = tl.fma(angle * s, tl.fma(s, tl.fma(s, -1.95152959e-4, 8.33216087e-3), -1.66666546e-1), angle)
    cosine = tl.fma(s * s, tl.fma(s, tl.fma(s, 2.44331571e-5, -1.38873163e-3), 4.16666457e-2), tl.fma(s, -0.5, 1.0))
    is_odd = (turns & 1) == 1
    x, y = tl.where(is_odd, -sine, cosine), tl.where(is_odd, cosine, sine)
    radius = tl.where((turns & 2) == 2, -radius, radius)
    return radius * x, radius * y


@triton.jit
def _uniform(a):
    """Returns uniform numbers in (-1, 1), each of which is exact."""
    return (2 * (a >> 8).to(tl.int32) - 16777215).to(tl.float32) * 5.960464477539063e-08


@triton.jit
def _bits(a):
    """Returns uniform integers in [0, 2^31)."""
    return (a >> 1).to(tl.int32)


@triton.jit
def _write(
    z, x, y, mask, level, low, high, i, n, row, formula: tl.constexpr, masked: tl.constexpr, rows: tl.constexpr
):  # fmt: skip
    """Writes the elements i of y for the numbers z. Each product and sum rounds as in torch from 2.11."""
    inside = i < n
    if formula == "draw":
        result = z
    else:
        value = tl.load(x + i, mask=inside).to(tl.float32)
        amount = _of_row(level, i, inside, row, rows)
        if formula == "add":
            result = tl.fma(z, amount, value)
        elif formula == "scale":
            result = (z * amount + 1.0) * value
        elif formula == "drop":
            result = tl.where(z > amount, value, 0.0) * _of_row(high, i, inside, row, rows)
        else:
            extreme = tl.where((z & 1) == 1, _of_row(high, i, inside, row, rows), _of_row(low, i, inside, row, rows))
            result = tl.where(z <= amount, extreme, value)
        keep = value != value  # NaN
        if masked:
            keep = keep | (tl.load(mask + i, mask=inside) == 0)
        result = tl.where(keep, value, result)
    tl.store(y + i, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _of_row(values, i, inside, row, rows: tl.constexpr):
    """Returns the value of the row of each element, or the only value."""
    return tl.load(values + i // row, mask=inside) if rows else tl.load(values)
