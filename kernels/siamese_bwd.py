"""Both towers' recurrence backward through time, from exp(-L1) on: kernel, then launcher."""

import functools

import triton
import triton.language as tl

from fastsiam.kernels._backward import (
    _as_accumulator,
    _as_cells,
    _as_operand,
    _at_units,
    _gates,
    _load_gates,
    _scales,
    _upstream,
    _vector_gradient,
    launch,
)
from fastsiam.kernels._math import (
    _direction,
    _load_cells,
    _load_low,
    _load_weight,
    _parts,
    _product,
    _sequences,
    _store_cells,
    _unpack,
)


@triton.jit
def _load_states(cells_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        return _load_cells(cells_ptrs + tl.expand_dims(row * STRIDE, 7), 7)
    else:
        return _load_cells(cells_ptrs + row * STRIDE, 7)


@triton.jit
def _states(x, DTYPE: tl.constexpr):
    # the derivative of 2h by the cell, less 1; the old cell
    if DTYPE == tl.float32:
        return tl.split(x)
    else:
        return _unpack(x, DTYPE)


@triton.jit
def _cell_gradients(d, dc, i, f, g, h_by_o, h_by_c, c_before):
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
    return di, df, dg, do, dc


@triton.jit(do_not_specialize=["B", "T", "H", "zero"])
def _siamese_bwd_kernel(
    # P is the number of directions
    # gradient of the L1 of a pair: dsim * similarity * -scale (HAS_DSIM) and dpair (HAS_DPAIR)
    dsim_ptr,  # [B] float32
    similarity_ptr,  # [B] float32
    dpair_ptr,  # [B] float32
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    weight_ptr,  # [P, PARTS, 2, BLOCK_H, 2 * BLOCK_H] bits of weight_hh transposed
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which programs take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    cells_ptr,  # [P, N, T + 1, BLOCK_H, 2]
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out: gate gradients
    scale,  # factor on L1 (HAS_DSIM)
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    BLOCK_H: tl.constexpr,  # 32, 64 or 128 >= H
    BLOCK_N: tl.constexpr,  # sequences of a program, 4, or a multiple of 8
    WARPS: tl.constexpr,
    STREAM: tl.constexpr,  # weight read every step
    OPERAND: tl.constexpr,  # dtype of weight_hh and of gate gradients in their product
    PARTS: tl.constexpr,  # of each, 1 or 2
    WIDEN: tl.constexpr,  # these two: _tiling.Arithmetic
    ASSEMBLY: tl.constexpr,
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_DSIM: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_H // (16 * WARPS)
    COLUMNS: tl.constexpr = (BLOCK_N + 7) // 8
    EACH: tl.constexpr = BLOCK_N // (4 * COLUMNS)
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    # elements of a unit in the records: half precision comes in words of two
    GATES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    STATES: tl.constexpr = GATES // 2
    # a gate gradient may be smaller than all that float16 holds
    SCALED: tl.constexpr = DTYPE == tl.float32 and OPERAND == tl.float16
    HALF: tl.constexpr = 2 * BLOCK_H * BLOCK_H

    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, tl.program_id(0), B, T, BLOCK_N, PAIRED, HAS_ORDER
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
    weight_ptr += direction * (PARTS * 2 * HALF)
    doutputs_ptrs = doutputs_ptr + direction * H + unit_apart

    inside = unit_apart < H
    dv, peak = _vector_gradient(
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
        unit_apart,
        inside,
        H,
        DIRECTIONS,
        POOLING,
        HAS_DSIM,
        HAS_DPAIR,
        HAS_DVECTORS,
    )

    dc = tl.zeros((BLOCKS, 2, COLUMNS, EACH, WARPS, 8, 4), tl.float32)
    upstream = _upstream(
        steps,
        dv,
        peak,
        mask_ptr,
        doutputs_ptrs,
        first_token,
        way,
        length,
        DIRECTIONS * H,
        inside,
        POOLING,
        HAS_DOUTPUTS,
    )
    # of scaled gate gradients the product cannot begin with what comes from outside
    dh = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
    dh = dh if SCALED else _as_accumulator(upstream, BLOCK_H)
    unscale = tl.full((1, 1, COLUMNS, EACH, 1, 1, 4), 1.0, tl.float32)
    dh_go = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
    if STREAM:
        weight_if, weight_go = weight_ptr, weight_ptr + HALF
        low_if, low_go = weight_ptr + 2 * HALF, weight_ptr + 3 * HALF
    else:
        # products of 0: a use ahead of the loop keeps a weight's change of layout ahead of it
        weight_if = _load_weight(weight_ptr, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN, zero, True)
        nothing = tl.zeros((2 * BLOCK_H, 8 * COLUMNS), weight_if.dtype)
        dh = tl.dot(weight_if, nothing, dh)
        weight_go = _load_weight(
            weight_ptr + HALF, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN, zero, True
        )
        dh_go = tl.dot(weight_go, nothing)
        low_if, low_go = weight_if, weight_go
        if PARTS == 2:
            low_if = _load_low(weight_ptr + 2 * HALF, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN)
            low_go = _load_low(weight_ptr + 3 * HALF, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN)
    # rows of steps behind a sequence's end are its last row's: finite, and its gradient is 0 there
    start = _at_units(way * last_gap).to(tl.int64)
    gates = _load_gates(gates_ptrs, start, GATES * BLOCK_H, DTYPE)
    states = _load_states(cells_ptrs, start, STATES * BLOCK_H, DTYPE)
    t = steps - 1
    gap = way * first_gap + t
    for _ in range(steps):
        before = _at_units(way * tl.minimum(gap - 1, last_gap)).to(tl.int64)
        gates_before = _load_gates(gates_ptrs, before, GATES * BLOCK_H, DTYPE)
        states_before = _load_states(cells_ptrs, before, STATES * BLOCK_H, DTYPE)
        i, f, g, h_by_o = _gates(gates, DTYPE)
        h_by_c, c_before = _states(states, DTYPE)
        d = _as_cells(dh, BLOCKS, EACH, WARPS) + _as_cells(dh_go, BLOCKS, EACH, WARPS)
        # scaled, this step's, or the next one's
        upstream = _upstream(
            t + 1 if SCALED else t,
            dv,
            peak,
            mask_ptr,
            doutputs_ptrs,
            first_token,
            way,
            length,
            DIRECTIONS * H,
            inside,
            POOLING,
            HAS_DOUTPUTS,
        )
        if SCALED:
            d = d * unscale + upstream
        di, df, dg, do, dc = _cell_gradients(d, dc, i, f, g, h_by_o, h_by_c, c_before)

        # two products, of half the gates each, for two chains of instructions; their sum waits for
        # the next step, as the compiler would chain them if they were added here
        d_if = tl.join(di, df).to(DTYPE)
        d_go = tl.join(dg, do).to(DTYPE)
        x_if, x_go = d_if, d_go
        if SCALED:
            largest = tl.maximum(
                tl.maximum(tl.abs(di), tl.abs(df)), tl.maximum(tl.abs(dg), tl.abs(do))
            )
            rescale, unscale = _scales(largest)
            x_if *= tl.expand_dims(rescale, 7)
            x_go *= tl.expand_dims(rescale, 7)
        x_if = _as_operand(x_if, BLOCK_H, ASSEMBLY)
        x_go = _as_operand(x_go, BLOCK_H, ASSEMBLY)
        x_if, low_x_if = _parts(x_if, OPERAND, PARTS, WIDEN)
        x_go, low_x_go = _parts(x_go, OPERAND, PARTS, WIDEN)
        dh_go = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
        dh = dh_go if SCALED else _as_accumulator(upstream, BLOCK_H)
        dh = _product(
            weight_if, low_if, x_if, low_x_if, dh, t * zero, OPERAND, PARTS, WIDEN, STREAM
        )
        dh_go = _product(
            weight_go, low_go, x_go, low_x_go, dh_go, t * zero, OPERAND, PARTS, WIDEN, STREAM
        )

        at = tl.expand_dims(_at_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
        da = tl.permute(tl.join(d_if, d_go), (0, 1, 2, 3, 4, 5, 6, 8, 7))
        da = tl.reshape(da, d.shape + (4,))
        _store_cells(dgates_ptrs + at, da, _at_units(t <= last), 7)
        t -= 1
        gap -= 1
        gates = gates_before
        states = states_before


siamese_bwd = functools.partial(launch, _siamese_bwd_kernel)
