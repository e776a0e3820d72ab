"""The narrow forward: both towers' recurrence, from gathered gate rows to exp(-L1)."""

import triton
import triton.language as tl

from fastsiam.kernels.cells import _step, _store_records
from fastsiam.kernels.forward_tile import (
    _finish,
    _fwd_accumulator,
    _fwd_gates,
    _fwd_operand,
    _fwd_units,
    _gate_pairs,
    _load_rows,
    _pool,
    _row_at,
    _store_state,
)
from fastsiam.kernels.tile import (
    _direction,
    _load_low,
    _load_weight,
    _parts,
    _product,
    _sequences,
    _store_cells,
)


@triton.jit(do_not_specialize=["B", "T", "R", "H", "zero"])
def recurrence_fwd_kernel(
    # P is the number of directions
    table_ptr,  # [R, P, BLOCK_H, 4] input gates of a row; half precision: 2 words of two a unit
    weight_ptr,  # [P, parts, 4 * BLOCK_H, BLOCK_H] bits of weight_hh, in two parts if float32
    ids_ptr,  # [N, T] rows of the table (HAS_IDS); else row n * T + t is the token's own
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which programs take them (HAS_ORDER)
    similarity_ptr,  # [B] out: exp(-scale * L1) (PAIRED, P = 1)
    distance_ptr,  # [P, B] out: L1 (PAIRED)
    vectors_ptr,  # [N, P, H] out: sentence vectors
    outputs_ptr,  # [N, T, P, H] out: h by token (STORE_OUTPUTS)
    # what the backward needs (STORE_RECORDS), see docs/kernels.md
    # tanh values i, f, g, and the derivative of 2h by o's gate; or r, z, n, and that of n's by r's
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out
    # derivative of 2h by the cell, less 1; the old cell
    cells_ptr,  # [P, N, T + 1, BLOCK_H, 2] out (CELL "lstm")
    states_ptr,  # [P, N, T + 1, BLOCK_H] out: 2h
    peaks_ptr,  # [N, P, H] out: step of the maximum (POOLING "max")
    scale,
    B,  # pairs; sequences where not PAIRED
    T,
    R,
    H,
    zero,  # 0
    CELL: tl.constexpr,  # "lstm" or "gru"
    BLOCK_H: tl.constexpr,  # 32, 64 or 128 >= H
    BLOCK_N: tl.constexpr,  # sequences of a program, 4, or a multiple of 8
    WARPS: tl.constexpr,
    STREAM: tl.constexpr,  # weight read every step
    OPERAND: tl.constexpr,  # dtype of weight_hh and h in their product
    PARTS: tl.constexpr,  # of each that are used, 1 or 2
    APPROXIMATE: tl.constexpr,  # these three: tiling.Arithmetic
    WIDEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    STORE_RECORDS: tl.constexpr,
    STORE_OUTPUTS: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_H // (8 * WARPS)
    COLUMNS: tl.constexpr = (BLOCK_N + 7) // 8
    EACH: tl.constexpr = BLOCK_N // (4 * COLUMNS)
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    WORDS: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    WEIGHT: tl.constexpr = 4 * BLOCK_H * BLOCK_H
    ROW: tl.constexpr = DIRECTIONS * WORDS * BLOCK_H
    # where a step is short, rows go straight to the registers that the ones before them leave: it
    # saves their moves, and the time of a step is enough for them. Not beside the records' stores,
    # unless three products of an LSTM's step need those registers, and give the time
    EARLY: tl.constexpr = CELL == "lstm" and PARTS == 2
    DIRECT: tl.constexpr = EARLY or (BLOCK_H <= 64 and not STORE_RECORDS)

    direction, way = _direction(DIRECTIONS)
    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, tl.program_id(0), B, T, BLOCK_N, PAIRED, HAS_ORDER
    )
    last = length - 1
    # a finished sequence runs on, unseen, so that no load in the loop has a mask: over what stands
    # behind its end; backwards over its first token, as before it may be no memory of ours
    first_token = seq.to(tl.int64) * T + direction * tl.maximum(last, 0)
    final = T - 1 if DIRECTIONS == 1 else tl.maximum(last, 0)
    token = first_token.to(tl.int32)
    # records stand at the T + 1 gaps between tokens: a step's at the gap where it ends
    gap = seq * (T + 1) + direction * length + way
    # of the records before this direction's
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)

    # units of the cells, [blocks, 1, 1, warps, 8, 1]
    block = tl.arange(0, BLOCKS)[:, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, :, None, None]
    within = warp * 8 + tl.arange(0, 8)[None, None, None, None, :, None]
    unit = block * (8 * WARPS) + within
    # stores of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = block * (8 * WARPS) + (within ^ zero)
    table_ptr += direction * (WORDS * BLOCK_H)
    weight_ptr += direction * ((2 if DTYPE == tl.float32 else 1) * WEIGHT)
    table_ptrs = table_ptr + (tl.expand_dims(unit, 6) * WORDS + tl.arange(0, WORDS))
    gates_ptrs = gates_ptr + rows * (4 * BLOCK_H) + (tl.expand_dims(unit, 6) * 4 + tl.arange(0, 4))
    cells_ptrs = cells_ptr + rows * (2 * BLOCK_H) + (tl.expand_dims(unit, 6) * 2 + tl.arange(0, 2))
    states_ptrs = states_ptr + rows * BLOCK_H + unit_apart
    outputs_ptrs = outputs_ptr + direction * H + unit_apart

    carried = tl.zeros((BLOCKS, COLUMNS, EACH, WARPS, 8, 4), tl.float32)
    v = carried - 3.0 if POOLING == "max" else carried
    peak = tl.full(carried.shape, -1, tl.int32)
    if STORE_RECORDS and CELL == "gru":
        # the state that a sequence begins with: no step writes it, and the backward reads it
        at = _fwd_units(gap - way).to(tl.int64) * BLOCK_H
        _store_cells(states_ptrs + at, carried, _fwd_units(live), 6)
    # a step's gates are complete before it begins: h's product stands at the end of the step
    # before, so that rows of the table have a step to arrive and ids have two
    x = _load_rows(table_ptrs, _row_at(0, ids_ptr, first_token, way, final, R, HAS_IDS), ROW)
    x_next = _load_rows(table_ptrs, _row_at(1, ids_ptr, first_token, way, final, R, HAS_IDS), ROW)
    row = _row_at(2, ids_ptr, first_token, way, final, R, HAS_IDS)
    a = _fwd_accumulator(_gate_pairs(x, DTYPE), BLOCK_H)
    if STREAM:
        weight, low = weight_ptr, weight_ptr + WEIGHT
    else:
        weight = _load_weight(weight_ptr, 4 * BLOCK_H, BLOCK_H, OPERAND, WIDEN, zero, False)
        # of h = 0: a use ahead of the loop keeps the weight's change of layout ahead of it
        a = tl.dot(weight, tl.zeros((BLOCK_H, 8 * COLUMNS), weight.dtype), a)
        low = weight
        if PARTS == 2:
            low = _load_low(weight_ptr + WEIGHT, 4 * BLOCK_H, BLOCK_H, OPERAND, WIDEN)
    for t in range(steps):
        if not DIRECT:
            x_after = _load_rows(table_ptrs, row, ROW)
            row = _row_at(t + 3, ids_ptr, first_token, way, final, R, HAS_IDS)

        p, q, r, s = _fwd_gates(a, BLOCKS, EACH, WARPS)
        h, carried, record = _step(p, q, r, s, carried, CELL, APPROXIMATE, ASSEMBLY)
        token_weights = mask_ptr + (first_token + way * t)
        v, peak = _pool(v, peak, h, t, last, token_weights, POOLING, STORE_RECORDS)

        if STORE_RECORDS and EARLY:
            # before the products, which leave no register for them
            _store_records(record, h, gap, t <= last, gates_ptrs, cells_ptrs, BLOCK_H, CELL)
            _store_state(h, gap, t <= last, states_ptrs, BLOCK_H)
        a = _fwd_accumulator(_gate_pairs(x_next, DTYPE), BLOCK_H)
        if DIRECT:
            x_next = _load_rows(table_ptrs, row, ROW)
            row = _row_at(t + 3, ids_ptr, first_token, way, final, R, HAS_IDS)
        else:
            x_next = x_after
        h_rows, h_low = _parts(_fwd_operand(h, BLOCK_H), OPERAND, PARTS, WIDEN)
        a = _product(weight, low, h_rows, h_low, a, t * zero, OPERAND, PARTS, WIDEN, STREAM)

        if STORE_RECORDS:
            if not EARLY:
                _store_records(record, h, gap, t <= last, gates_ptrs, cells_ptrs, BLOCK_H, CELL)
                _store_state(h, gap, t <= last, states_ptrs, BLOCK_H)
            gap += way
        if STORE_OUTPUTS:
            inside = _fwd_units(t <= last) & (unit_apart < H)
            at = _fwd_units(token).to(tl.int64) * (DIRECTIONS * H)
            _store_cells(outputs_ptrs + at, 0.5 * h, inside, 6)
            token += way

    _finish(
        v,
        peak,
        seq,
        other,
        live,
        length,
        direction,
        unit,
        similarity_ptr,
        distance_ptr,
        vectors_ptr,
        peaks_ptr,
        scale,
        B,
        H,
        DIRECTIONS,
        POOLING,
        PAIRED,
        STORE_RECORDS,
    )
