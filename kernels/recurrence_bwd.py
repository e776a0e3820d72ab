"""The narrow backward: both towers' recurrence back through time, from exp(-L1) on."""

import triton
import triton.language as tl

from fastsiam.kernels.backward_tile import (
    _bwd_accumulator,
    _bwd_cells,
    _bwd_operand,
    _bwd_units,
    _gates,
    _load_gates,
    _scales,
    _upstream,
    _vector_gradient,
)
from fastsiam.kernels.cells import _load_before, _step_gradients
from fastsiam.kernels.tile import (
    _direction,
    _load_low,
    _load_weight,
    _parts,
    _product,
    _sequences,
    _store_cells,
)


@triton.jit(do_not_specialize=["B", "T", "H", "zero"])
def recurrence_bwd_kernel(
    # P is the number of directions
    # gradient of the L1 of a pair: dsim * similarity * -scale (HAS_DSIM) and dpair (HAS_DPAIR)
    dsim_ptr,  # [B] float32
    similarity_ptr,  # [B] float32
    dpair_ptr,  # [B] float32
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    # bits of weight_hh transposed: i and f, g and o, [BLOCK_H, 2 * BLOCK_H] each; or r and z, and
    # y, [BLOCK_H, BLOCK_H]
    weight_ptr,  # [P, PARTS, first and second]
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which programs take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    before_ptr,  # an LSTM's cells, [P, N, T + 1, BLOCK_H, 2]; a GRU's states, not as words
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out: gate gradients
    scale,  # factor on L1 (HAS_DSIM)
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    CELL: tl.constexpr,  # "lstm" or "gru"
    BLOCK_H: tl.constexpr,  # 32, 64 or 128 >= H
    BLOCK_N: tl.constexpr,  # sequences of a program, 4, or a multiple of 8
    WARPS: tl.constexpr,
    STREAM: tl.constexpr,  # weight read every step
    OPERAND: tl.constexpr,  # dtype of weight_hh and of gate gradients in their product
    PARTS: tl.constexpr,  # of each, 1 or 2
    WIDEN: tl.constexpr,  # these two: tiling.Arithmetic
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
    BEFORE: tl.constexpr = GATES // 2 if CELL == "lstm" else 1
    # a gate gradient may be smaller than all that float16 holds
    SCALED: tl.constexpr = DTYPE == tl.float32 and OPERAND == tl.float16
    # the weight in two, for two products a step, and where the second begins
    FIRST: tl.constexpr = 2 * BLOCK_H * BLOCK_H
    COLUMNS_2: tl.constexpr = 2 * BLOCK_H if CELL == "lstm" else BLOCK_H
    SIZE: tl.constexpr = FIRST + BLOCK_H * COLUMNS_2

    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, tl.program_id(0), B, T, BLOCK_N, PAIRED, HAS_ORDER
    )
    last = length - 1
    direction, way = _direction(DIRECTIONS)
    # records stand at the T + 1 gaps between tokens: a step's at the gap where it ends, its gate
    # gradients at the one where it began
    first_gap = seq * (T + 1) + direction * length
    begin = way * first_gap
    last_gap = begin + last
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
    # a GRU's state stands where it began
    before_ptr += (rows + (way if CELL == "lstm" else 0)) * (BEFORE * BLOCK_H)
    gates_ptrs = gates_ptr + (tl.expand_dims(unit, 7) * GATES + tl.arange(0, GATES))
    if BEFORE == 2:
        before_ptrs = before_ptr + (tl.expand_dims(unit, 7) * 2 + tl.arange(0, 2))
    else:
        before_ptrs = before_ptr + unit_apart
    dgates_ptr += rows * (4 * BLOCK_H)
    dgates_ptrs = dgates_ptr + (tl.expand_dims(unit, 7) * 4 + tl.arange(0, 4))
    weight_ptr += direction * (PARTS * SIZE)
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

    carried = tl.zeros((BLOCKS, 2, COLUMNS, EACH, WARPS, 8, 4), tl.float32)
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
    dh = dh if SCALED else _bwd_accumulator(upstream, BLOCK_H)
    unscale = tl.full((1, 1, COLUMNS, EACH, 1, 1, 4), 1.0, tl.float32)
    dh_2 = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
    if STREAM:
        weight_1, weight_2 = weight_ptr, weight_ptr + FIRST
        low_1, low_2 = weight_ptr + SIZE, weight_ptr + SIZE + FIRST
    else:
        # products of 0: a use ahead of the loop keeps a weight's change of layout ahead of it
        weight_1 = _load_weight(weight_ptr, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN, zero, True)
        dh = tl.dot(weight_1, tl.zeros((2 * BLOCK_H, 8 * COLUMNS), weight_1.dtype), dh)
        weight_2 = _load_weight(weight_ptr + FIRST, BLOCK_H, COLUMNS_2, OPERAND, WIDEN, zero, True)
        dh_2 = tl.dot(weight_2, tl.zeros((COLUMNS_2, 8 * COLUMNS), weight_2.dtype))
        low_1, low_2 = weight_1, weight_2
        if PARTS == 2:
            low_1 = _load_low(weight_ptr + SIZE, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN)
            low_2 = _load_low(weight_ptr + SIZE + FIRST, BLOCK_H, COLUMNS_2, OPERAND, WIDEN)
    # rows of steps behind a sequence's end are its last row's: finite, and its gradient is 0 there
    start = last_gap
    if CELL == "gru":
        # without a step a GRU's sequence has the row that it would begin with
        start = tl.maximum(last_gap, begin)
    start = _bwd_units(way * start).to(tl.int64)
    gates = _load_gates(gates_ptrs, start, GATES * BLOCK_H, DTYPE)
    before = _load_before(before_ptrs, start, BEFORE * BLOCK_H, DTYPE, CELL)
    t = steps - 1
    gap = begin + t
    for _ in range(steps):
        row = tl.minimum(gap - 1, last_gap)
        if CELL == "gru":
            row = tl.maximum(row, begin)
        row = _bwd_units(way * row).to(tl.int64)
        next_gates = _load_gates(gates_ptrs, row, GATES * BLOCK_H, DTYPE)
        next_before = _load_before(before_ptrs, row, BEFORE * BLOCK_H, DTYPE, CELL)
        p, q, r, s = _gates(gates, DTYPE)
        d = _bwd_cells(dh, BLOCKS, EACH, WARPS) + _bwd_cells(dh_2, BLOCKS, EACH, WARPS)
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
            d = d * unscale + (upstream + carried if CELL == "gru" else upstream)
        d1, d2, d3, d4, carried = _step_gradients(d, carried, p, q, r, s, before, CELL, DTYPE)

        # two products for two chains of instructions; their sum waits for the next step, as the
        # compiler would chain them if they were added here. A GRU's n has no part in them
        first = tl.join(d1, d2).to(DTYPE)
        second = tl.join(d3, d4).to(DTYPE) if CELL == "lstm" else d4.to(DTYPE)
        x_1, x_2 = first, second
        if SCALED:
            largest = tl.maximum(tl.abs(d1), tl.abs(d2))
            if CELL == "lstm":
                largest = tl.maximum(largest, tl.maximum(tl.abs(d3), tl.abs(d4)))
            else:
                largest = tl.maximum(largest, tl.abs(d4))
            rescale, unscale = _scales(largest)
            x_1 *= tl.expand_dims(rescale, 7)
            x_2 *= tl.expand_dims(rescale, 7) if CELL == "lstm" else rescale
        x_1 = _bwd_operand(x_1, BLOCK_H, ASSEMBLY)
        if CELL == "lstm":
            x_2 = _bwd_operand(x_2, BLOCK_H, ASSEMBLY)
        else:
            x_2 = _bwd_accumulator(x_2, BLOCK_H)
        x_1, low_x_1 = _parts(x_1, OPERAND, PARTS, WIDEN)
        x_2, low_x_2 = _parts(x_2, OPERAND, PARTS, WIDEN)
        dh_2 = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
        if SCALED:
            dh = dh_2
        else:
            outside = upstream + carried if CELL == "gru" else upstream
            dh = _bwd_accumulator(outside, BLOCK_H)
        dh = _product(weight_1, low_1, x_1, low_x_1, dh, t * zero, OPERAND, PARTS, WIDEN, STREAM)
        dh_2 = _product(
            weight_2, low_2, x_2, low_x_2, dh_2, t * zero, OPERAND, PARTS, WIDEN, STREAM
        )

        at = tl.expand_dims(_bwd_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
        if CELL == "gru":
            second = tl.join(d3.to(DTYPE), second)
        da = tl.permute(tl.join(first, second), (0, 1, 2, 3, 4, 5, 6, 8, 7))
        da = tl.reshape(da, d.shape + (4,))
        _store_cells(dgates_ptrs + at, da, _bwd_units(t <= last), 7)
        t -= 1
        gap -= 1
        gates = next_gates
        before = next_before
