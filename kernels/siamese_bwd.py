"""Both towers' recurrence backward through time, from exp(-L1) on: kernel, then launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import _packing, _tiling
from fastsiam.kernels._math import (
    _direction,
    _load_cells,
    _load_cells_where,
    _load_weight,
    _product_streamed,
    _sequences,
    _store_cells,
    _turn,
    _unpack,
)


@triton.jit
def _as_accumulator(x, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    # cells [blocks, half, columns, side, warps, 8, 4] -> [BLOCK_H, BLOCK_N]
    return tl.reshape(tl.permute(x, (0, 4, 1, 5, 2, 6, 3)), (BLOCK_H, BLOCK_N))


@triton.jit
def _as_cells(a, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    # the way back
    x = tl.reshape(a, (BLOCKS, WARPS, 2, 8, COLUMNS, 4, 2))
    return tl.permute(x, (0, 2, 4, 6, 1, 3, 5))


@triton.jit
def _at_units(x):
    # [columns, side, 4] -> the same for every unit
    return tl.reshape(x, (1, 1, x.shape[0], 2, 1, 1, 4))


@triton.jit
def _load_gates(gates_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    return _load_cells(gates_ptrs + tl.expand_dims(row * STRIDE, 7), 7)


@triton.jit
def _load_states(cells_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        return _load_cells(cells_ptrs + tl.expand_dims(row * STRIDE, 7), 7)
    else:
        return _load_cells(cells_ptrs + row * STRIDE, 7)


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
def _states(x, DTYPE: tl.constexpr):
    # the derivative of 2h by the cell, less 1; the old cell
    if DTYPE == tl.float32:
        return tl.split(x)
    else:
        return _unpack(x, DTYPE)


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
def _as_operand(x, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, ASSEMBLY: tl.constexpr):
    # cells with two gates [blocks, half, columns, side, warps, 8, 4, 2] -> [2 * BLOCK_H, BLOCK_N]
    x = tl.permute(_opaque(x, ASSEMBLY), (7, 0, 4, 1, 5, 2, 6, 3))
    return tl.reshape(x, (2 * BLOCK_H, BLOCK_N))


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


@triton.jit(do_not_specialize=["B", "T", "H", "zero"])
def _siamese_bwd_kernel(
    # P is the number of directions
    dpair_ptr,  # [B] float32 gradient of the L1 of a pair (HAS_DPAIR)
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    weight_ptr,  # [P, 2, BLOCK_H, 2 * BLOCK_H] bits of weight_hh transposed
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which programs take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    cells_ptr,  # [P, N, T + 1, BLOCK_H, 2]
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out: gate gradients
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    BLOCK_H: tl.constexpr,  # 32, 64 or 128 >= H
    BLOCK_N: tl.constexpr,  # sequences of a program, a multiple of 8
    WARPS: tl.constexpr,
    STREAM: tl.constexpr,  # weight read every step
    PRECISION: tl.constexpr,  # these three: _tiling.Arithmetic
    WIDEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_H // (16 * WARPS)
    COLUMNS: tl.constexpr = BLOCK_N // 8
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    DOT_DTYPE: tl.constexpr = tl.float32 if WIDEN else DTYPE
    # elements of a unit in the records: half precision comes in words of two
    GATES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    STATES: tl.constexpr = GATES // 2
    HALF: tl.constexpr = 2 * BLOCK_H * BLOCK_H

    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, B, T, COLUMNS, PAIRED, HAS_ORDER
    )
    last = length - 1
    direction, way = _direction(DIRECTIONS)
    # records stand at the T + 1 gaps between tokens: a step's at the gap where it ends, its gate
    # gradients at the one where it began
    first_gap = seq * (T + 1) + direction * length
    last_gap = way * first_gap + last
    first_token = seq.to(tl.int64) * T + direction * last
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)

    # units of the cells, [blocks, half, 1, 1, warps, 8, 1]
    block = tl.arange(0, BLOCKS)[:, None, None, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, None, :, None, None]
    within = 16 * warp + tl.arange(0, 8)[None, None, None, None, None, :, None]
    unit = block * (16 * WARPS) + half * 8 + within
    # loads of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = block * (16 * WARPS) + half * 8 + (within ^ zero)
    # of the gap where a step began, what stands where it ended
    gates_ptr += (rows + way) * (GATES * BLOCK_H)
    cells_ptr += (rows + way) * (STATES * BLOCK_H)
    gates_ptrs = gates_ptr + (tl.expand_dims(unit, 7) * GATES + tl.arange(0, GATES))
    if STATES == 2:
        cells_ptrs = cells_ptr + (tl.expand_dims(unit, 7) * 2 + tl.arange(0, 2))
    else:
        cells_ptrs = cells_ptr + unit_apart
    dgates_ptr += rows * (4 * BLOCK_H)
    dgates_ptrs = dgates_ptr + (tl.expand_dims(unit, 7) * 4 + tl.arange(0, 4))
    weight_ptr += direction * (2 * HALF)
    doutputs_ptrs = doutputs_ptr + direction * H + unit_apart

    # gradient of the sentence vectors; of 2h, which is what the recurrence carries
    offs = (_at_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit_apart
    inside = _at_units(live) & (unit < H)
    dv = tl.zeros((BLOCKS, 2, COLUMNS, 2, WARPS, 8, 4), tl.float32)
    if HAS_DVECTORS:
        dv += _load_cells_where(dvectors_ptr + offs, inside, 7)
    if HAS_DPAIR:
        offs_other = (_at_units(other).to(tl.int64) * DIRECTIONS + direction) * H + unit_apart
        own = _load_cells_where(vectors_ptr + offs, inside, 7)
        its = _load_cells_where(vectors_ptr + offs_other, inside, 7)
        sign = tl.where(own > its, 1.0, tl.where(own < its, -1.0, 0.0))
        dpair = tl.load(dpair_ptr + (tl.minimum(seq, other)))
        dv += sign * _at_units(dpair)
    dv = 0.5 * dv
    peak = tl.full(dv.shape, -1, tl.int32)
    if POOLING == "max":
        peak = _turn(tl.load(_turn(peaks_ptr + offs, 7), _turn(inside, 7), -1), 7)

    # rows of steps behind a sequence's end are its last row's: finite, and its gradient is 0 there
    start = _at_units(way * last_gap).to(tl.int64)
    gates = _load_gates(gates_ptrs, start, GATES * BLOCK_H, DTYPE)
    states = _load_states(cells_ptrs, start, STATES * BLOCK_H, DTYPE)
    dc = tl.zeros((BLOCKS, 2, COLUMNS, 2, WARPS, 8, 4), tl.float32)
    dh = _upstream(
        steps,
        dv,
        peak,
        mask_ptr,
        doutputs_ptrs,
        first_token,
        way,
        length,
        DIRECTIONS * H,
        unit_apart < H,
        POOLING,
        HAS_DOUTPUTS,
    )
    dh = _as_accumulator(dh, BLOCK_H, BLOCK_N)
    dh_go = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    if not STREAM:
        weight_if = _load_weight(weight_ptr, BLOCK_H, 2 * BLOCK_H, DTYPE, DOT_DTYPE, zero)
        weight_go = _load_weight(weight_ptr + HALF, BLOCK_H, 2 * BLOCK_H, DTYPE, DOT_DTYPE, zero)
        # of 0: a use ahead of the loop keeps the weight's change of layout ahead of it
        nothing = tl.zeros((2 * BLOCK_H, BLOCK_N), DOT_DTYPE)
        dh = tl.dot(weight_if, nothing, dh, input_precision=PRECISION)
        dh_go = tl.dot(weight_go, nothing, input_precision=PRECISION)
    t = steps - 1
    gap = way * first_gap + t
    for _ in range(steps):
        before = _at_units(way * tl.minimum(gap - 1, last_gap)).to(tl.int64)
        gates_before = _load_gates(gates_ptrs, before, GATES * BLOCK_H, DTYPE)
        states_before = _load_states(cells_ptrs, before, STATES * BLOCK_H, DTYPE)
        i, f, g, h_by_o = _gates(gates, DTYPE)
        h_by_c, c_before = _states(states, DTYPE)
        d = _as_cells(dh, BLOCKS, COLUMNS, WARPS) + _as_cells(dh_go, BLOCKS, COLUMNS, WARPS)
        # docs/kernels.md derives these; dc is twice the gradient of the cell
        d_c = d * h_by_c + (0.5 * dc + d)
        do = d * h_by_o
        e = d_c * i + d_c
        p = e * g
        di = p - p * i
        dg = e - p * g
        dc = d_c * f + d_c
        r = dc * c_before
        df = r - r * f

        upstream = _upstream(
            t,
            dv,
            peak,
            mask_ptr,
            doutputs_ptrs,
            first_token,
            way,
            length,
            DIRECTIONS * H,
            unit_apart < H,
            POOLING,
            HAS_DOUTPUTS,
        )

        # two products, of half the gates each, for two chains of instructions; their sum waits for
        # the next step, as the compiler would chain them if they were added here
        d_if = tl.join(di, df).to(DTYPE)
        d_go = tl.join(dg, do).to(DTYPE)
        rows_if = _as_operand(d_if, BLOCK_H, BLOCK_N, ASSEMBLY).to(DOT_DTYPE)
        rows_go = _as_operand(d_go, BLOCK_H, BLOCK_N, ASSEMBLY).to(DOT_DTYPE)
        dh = _as_accumulator(upstream, BLOCK_H, BLOCK_N)
        if STREAM:
            weight = weight_ptr + t * zero
            dh = _product_streamed(
                weight, rows_if, dh, BLOCK_H, 2 * BLOCK_H, DTYPE, DOT_DTYPE, PRECISION
            )
            dh = _product_streamed(
                weight + HALF, rows_go, dh, BLOCK_H, 2 * BLOCK_H, DTYPE, DOT_DTYPE, PRECISION
            )
        else:
            dh = tl.dot(weight_if, rows_if, dh, input_precision=PRECISION)
            dh_go = tl.dot(weight_go, rows_go, input_precision=PRECISION)

        at = tl.expand_dims(_at_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
        da = tl.permute(tl.join(d_if, d_go), (0, 1, 2, 3, 4, 5, 6, 8, 7))
        da = tl.reshape(da, d.shape + (4,))
        _store_cells(dgates_ptrs + at, da, _at_units(t <= last), 7)
        t -= 1
        gap -= 1
        gates = gates_before
        states = states_before


def siamese_bwd(
    dpair: Tensor | None,
    dvectors: Tensor | None,
    doutputs: Tensor | None,
    vectors: Tensor,
    weight_hh: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    peaks: Tensor,
    steps: int,
    pooling: str,
    allow_tf32: bool,
) -> Tensor:
    """Carry the gradients of the pairs' L1, the vectors and all states back through time.

    Args:
        dpair: [B] float32 or None.
        dvectors: [N, P * H] or None.
        doutputs: [N, T, P * H] or None; what stands behind a sequence's end is not read.
        vectors: [N, P * H] sentence vectors.
        weight_hh: [P, 4H, H].
        lengths, mask, steps, pooling: as in the forward.
        gates, cells, peaks: the forward's records.

    Returns:
        Gate gradients in _packing's order and scaling, zero where no step was.
    """
    N, P, H = vectors.shape[0], weight_hh.shape[0], weight_hh.shape[2]
    dgates = torch.zeros_like(gates)
    if N == 0 or steps == 0:
        return dgates
    target = _tiling.target_of(vectors.device)
    how = _tiling.arithmetic(vectors.dtype, allow_tf32, target)
    tile = _tiling.backward_tile(H, vectors.dtype, how.PRECISION, target)
    paired = dpair is not None
    B = N // 2 if paired else N
    order = _tiling.pair_order(lengths, B, target)
    words = _packing.table_dtype(vectors.dtype)
    _siamese_bwd_kernel[(triton.cdiv(N, tile.sequences), P)](
        dpair_ptr=vectors if dpair is None else dpair,
        dvectors_ptr=vectors if dvectors is None else dvectors,
        doutputs_ptr=vectors if doutputs is None else doutputs,
        vectors_ptr=vectors,
        weight_ptr=_packing.pack_weight_bwd(weight_hh),
        lengths_ptr=lengths,
        mask_ptr=lengths if mask is None else mask,
        order_ptr=lengths if order is None else order,
        gates_ptr=gates.view(words),
        cells_ptr=cells.view(words),
        peaks_ptr=peaks,
        dgates_ptr=dgates,
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
        HAS_DPAIR=paired,
        HAS_DVECTORS=dvectors is not None,
        HAS_DOUTPUTS=doutputs is not None,
        HAS_ORDER=order is not None,
        PRECISION=how.PRECISION,
        WIDEN=how.WIDEN,
        ASSEMBLY=how.ASSEMBLY,
        num_warps=tile.num_warps,
    )
    return dgates
