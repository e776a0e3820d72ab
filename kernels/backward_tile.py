"""Views of a backward tile, and the gradients that reach the states from outside."""

import triton
import triton.language as tl

from fastsiam.kernels.tile import (
    _fill_columns,
    _load_cells,
    _load_cells_where,
    _take_columns,
    _turn,
    _unpack,
)


@triton.jit
def _bwd_accumulator(x, BLOCK_H: tl.constexpr):
    # cells [blocks, half, columns, each, warps, 8, 4] -> [BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(x, 3), (0, 4, 1, 5, 2, 6, 3))
    return tl.reshape(x, (BLOCK_H, 8 * x.shape[4]))


@triton.jit
def _bwd_cells(a, BLOCKS: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr):
    # the way back
    x = tl.reshape(a, (BLOCKS, WARPS, 2, 8, a.shape[1] // 8, 4, 2))
    return _take_columns(tl.permute(x, (0, 2, 4, 6, 1, 3, 5)), 3, EACH)


@triton.jit
def _bwd_units(x):
    # [columns, each, 4] -> the same for every unit
    return tl.reshape(x, (1, 1, x.shape[0], x.shape[1], 1, 1, 4))


@triton.jit
def _load_gates(gates_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    return _load_cells(gates_ptrs + tl.expand_dims(row * STRIDE, 7), 7)


@triton.jit
def _gates(x, DTYPE: tl.constexpr):
    # tanh values of i, f, g and the derivative of 2h by o's gate
    if DTYPE == tl.float32:
        i_g, f_o = tl.split(tl.reshape(x, x.shape[:7] + (2, 2)))
    else:
        i_g, f_o = _unpack(x, DTYPE)
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def _opaque(x, ASSEMBLY: tl.constexpr):
    # the same values, but a history the compiler does not see: a join behind an operand of tl.dot
    # makes it choose a layout that shared memory is then read four bytes at a time for
    if not ASSEMBLY:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )


@triton.jit
def _bwd_operand(x, BLOCK_H: tl.constexpr, ASSEMBLY: tl.constexpr):
    # cells with two gates [blocks, half, columns, each, warps, 8, 4, 2] -> twice as many rows
    x = tl.permute(_fill_columns(_opaque(x, ASSEMBLY), 3), (7, 0, 4, 1, 5, 2, 6, 3))
    return tl.reshape(x, (2 * BLOCK_H, 8 * x.shape[5]))


@triton.jit
def _scales(x):
    # powers of two, one pair a sequence, for what float16 has no range for: one brings the largest
    # of its cells below 2^15, one takes that back. Below 2^-112 all stay small, or neither was one
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(bits, 0, keep_dims=True), 1, keep_dims=True)
    largest = tl.max(tl.max(largest, 5, keep_dims=True), 4, keep_dims=True)
    exponent = tl.maximum(largest & 0x7F800000, 15 << 23) - (14 << 23)
    scale = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return scale, exponent.to(tl.float32, bitcast=True)


@triton.jit
def _upstream(
    t,
    dv,  # gradient of twice the sentence vector, cells
    peak,
    mask_ptr,
    doutputs_ptrs,
    first_token,
    way,
    length,
    stride,  # of a token in doutputs
    inside,  # whether a unit is one of the H
    POOLING: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
):
    # what reaches 2h after t steps from outside the recurrence
    token = first_token + way * (t - 1)
    valid = (t <= length) & (t > 0)
    if POOLING == "mask":
        m = tl.load(mask_ptr + token, mask=valid, other=0.0)
        d = dv * _bwd_units(m.to(tl.float32))
    elif POOLING == "max":
        d = tl.where(peak == t - 1, dv, 0.0)
    else:
        d = tl.where(_bwd_units(length == t), dv, 0.0)
    if HAS_DOUTPUTS:
        pointers = doutputs_ptrs + _bwd_units(token) * stride
        d += 0.5 * _load_cells_where(pointers, _bwd_units(valid) & inside, 7)
    return d


@triton.jit
def _vector_gradient(
    dsim_ptr,
    similarity_ptr,
    dpair_ptr,
    dvectors_ptr,
    vectors_ptr,
    peaks_ptr,
    scale,
    seq,
    other,
    live,
    direction,
    unit,
    inside,  # whether a unit is one of the H
    H,
    DIRECTIONS: tl.constexpr,
    POOLING: tl.constexpr,
    HAS_DSIM: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
):
    # gradient of the sentence vectors; of 2h, which is what the recurrence carries
    offs = (_bwd_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit
    inside = _bwd_units(live) & inside
    dv = tl.zeros(inside.shape, tl.float32)
    if HAS_DVECTORS:
        dv += _load_cells_where(dvectors_ptr + offs, inside, 7)
    if HAS_DSIM or HAS_DPAIR:
        pair = tl.minimum(seq, other)
        dpair = tl.zeros(pair.shape, tl.float32)
        if HAS_DSIM:
            dpair += tl.load(dsim_ptr + pair) * tl.load(similarity_ptr + pair) * -scale
        if HAS_DPAIR:
            dpair += tl.load(dpair_ptr + pair)
        offs_other = (_bwd_units(other).to(tl.int64) * DIRECTIONS + direction) * H + unit
        own = _load_cells_where(vectors_ptr + offs, inside, 7)
        its = _load_cells_where(vectors_ptr + offs_other, inside, 7)
        sign = tl.where(own > its, 1.0, tl.where(own < its, -1.0, 0.0))
        dv += sign * _bwd_units(dpair)
    dv = 0.5 * dv
    peak = tl.full(dv.shape, -1, tl.int32)
    if POOLING == "max":
        peak = _turn(tl.load(_turn(peaks_ptr + offs, 7), _turn(inside, 7), -1), 7)
    return dv, peak
