"""What the backward kernels share: views of a tile, gradients from outside, and the launcher."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import _packing, _tiling
from fastsiam.kernels._math import (
    _fill_columns,
    _load_cells,
    _load_cells_where,
    _take_columns,
    _turn,
    _unpack,
    in_triton,
)


@triton.jit
def _as_accumulator(x, BLOCK_H: tl.constexpr):
    # cells [blocks, half, columns, each, warps, 8, 4] -> [BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(x, 3), (0, 4, 1, 5, 2, 6, 3))
    return tl.reshape(x, (BLOCK_H, 8 * x.shape[4]))


@triton.jit
def _as_cells(a, BLOCKS: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr):
    # the way back
    x = tl.reshape(a, (BLOCKS, WARPS, 2, 8, a.shape[1] // 8, 4, 2))
    return _take_columns(tl.permute(x, (0, 2, 4, 6, 1, 3, 5)), 3, EACH)


@triton.jit
def _at_units(x):
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
def _as_operand(x, BLOCK_H: tl.constexpr, ASSEMBLY: tl.constexpr):
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
        d = dv * _at_units(m.to(tl.float32))
    elif POOLING == "max":
        d = tl.where(peak == t - 1, dv, 0.0)
    else:
        d = tl.where(_at_units(length == t), dv, 0.0)
    if HAS_DOUTPUTS:
        pointers = doutputs_ptrs + _at_units(token) * stride
        d += 0.5 * _load_cells_where(pointers, _at_units(valid) & inside, 7)
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
    offs = (_at_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit
    inside = _at_units(live) & inside
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
        offs_other = (_at_units(other).to(tl.int64) * DIRECTIONS + direction) * H + unit
        own = _load_cells_where(vectors_ptr + offs, inside, 7)
        its = _load_cells_where(vectors_ptr + offs_other, inside, 7)
        sign = tl.where(own > its, 1.0, tl.where(own < its, -1.0, 0.0))
        dv += sign * _at_units(dpair)
    dv = 0.5 * dv
    peak = tl.full(dv.shape, -1, tl.int32)
    if POOLING == "max":
        peak = _turn(tl.load(_turn(peaks_ptr + offs, 7), _turn(inside, 7), -1), 7)
    return dv, peak


def launch(
    kernel: Any,
    dsim: Tensor | None,
    similarity: Tensor,
    scale: float,
    dpair: Tensor | None,
    dvectors: Tensor | None,
    doutputs: Tensor | None,
    vectors: Tensor,
    weight: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    states: Tensor,
    peaks: Tensor,
    steps: int,
    pooling: str,
    allow_tf32: bool,
) -> Tensor:
    """Carry the gradients of the pairs' L1, the vectors and all states back through time.

    Args:
        kernel: of the cell. It has a pointer to each record that the cell's forward kept.
        dsim: [B] float32 or None; it reaches L1 as dsim * similarity * -scale.
        similarity: [B] float32.
        scale: factor on L1.
        dpair: [B] float32, what reaches L1 besides, or None.
        dvectors: [N, P * H] or None.
        doutputs: [N, T, P * H] or None; what stands behind a sequence's end is not read.
        vectors: [N, P * H] sentence vectors.
        weight: what the cell's packing makes of weight_hh, [P, ...].
        lengths, mask, steps, pooling: as in the forward.
        gates, cells, states, peaks: the forward's records.

    Returns:
        Gate gradients in the packing's order and scaling; where no step was stands anything.
    """
    N, P = vectors.shape[0], weight.shape[0]
    H = vectors.shape[1] // P
    dgates = torch.empty_like(gates)
    if N == 0 or steps == 0:
        return dgates
    target = _tiling.target_of(vectors.device)
    how = _tiling.arithmetic(vectors.dtype, allow_tf32, target)
    load = _tiling.load_of(lengths, P, target)
    tile = _tiling.backward_tile(H, vectors.dtype, how, target, load)
    paired = dsim is not None or dpair is not None
    B = N // 2 if paired else N
    order = _tiling.pair_order(lengths, B, target, P)
    words = _packing.table_dtype(vectors.dtype)
    records = {"cells_ptr": cells.view(words), "states_ptr": states}
    kernel[(_tiling.cdiv(N, tile.sequences), P)](
        dsim_ptr=vectors if dsim is None else dsim,
        similarity_ptr=similarity,
        dpair_ptr=vectors if dpair is None else dpair,
        dvectors_ptr=vectors if dvectors is None else dvectors,
        doutputs_ptr=vectors if doutputs is None else doutputs,
        vectors_ptr=vectors,
        weight_ptr=weight,
        lengths_ptr=lengths,
        mask_ptr=lengths if mask is None else mask,
        order_ptr=lengths if order is None else order,
        gates_ptr=gates.view(words),
        **{name: record for name, record in records.items() if name in kernel.arg_names},
        peaks_ptr=peaks,
        dgates_ptr=dgates,
        scale=scale,
        B=B,
        T=steps,
        H=H,
        zero=0,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.sequences,
        WARPS=tile.num_warps,
        STREAM=tile.stream,
        DIRECTIONS=P,
        POOLING=pooling,
        PAIRED=paired,
        HAS_DSIM=dsim is not None,
        HAS_DPAIR=dpair is not None,
        HAS_DVECTORS=dvectors is not None,
        HAS_DOUTPUTS=doutputs is not None,
        HAS_ORDER=order is not None,
        OPERAND=in_triton(tile.operand),
        PARTS=tile.parts,
        WIDEN=how.WIDEN,
        ASSEMBLY=how.ASSEMBLY,
        num_warps=tile.num_warps,
        **_tiling.all_registers(target),
    )
    return dgates
