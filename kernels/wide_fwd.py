"""The wide forward: several programs share the units of a sequence.

A program has a slice of the units, and its part of the weight stays on chip. All steps are one
launch: before each step a program waits until the other slices of its tile have done the last one.
"""

import triton
import triton.language as tl

from fastsiam.kernels.cells import _step, _store_records
from fastsiam.kernels.forward_tile import (
    _fwd_accumulator,
    _fwd_gates,
    _fwd_units,
    _gate_pairs,
    _load_rows,
    _pool,
    _row_at,
    _similarity,
    _store_state,
)
from fastsiam.kernels.tile import _direction, _sequences, _store_cells
from fastsiam.kernels.wide import (
    _arrive,
    _as_columns,
    _load_slice,
    _product_with_rows,
    _slots,
    _wait,
)


@triton.jit(do_not_specialize=["tiles", "B", "T", "R", "H", "zero"])
def wide_fwd_kernel(
    # P is the number of directions, S that of slots: the columns of all tiles
    table_ptr,  # [R, P, BLOCK_H, 4] input gates of a row; half precision: 2 words of two a unit
    weight_ptr,  # [P, 4 * BLOCK_H, BLOCK_H] weight_hh
    ids_ptr,  # [N, T] rows of the table (HAS_IDS); else row n * T + t is the token's own
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which tiles take them
    pooled_ptr,  # [N, P, H] float32 out: twice the sentence vectors
    outputs_ptr,  # [N, T, P, H] out: h by token (STORE_OUTPUTS)
    # what the backward needs (STORE_RECORDS), see docs/kernels.md
    # tanh values i, f, g, and the derivative of 2h by o's gate; or r, z, n, and that of n's by r's
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out
    # derivative of 2h by the cell, less 1; the old cell
    cells_ptr,  # [P, N, T + 1, BLOCK_H, 2] out (CELL "lstm")
    states_ptr,  # [P, N, T + 1, BLOCK_H] out: 2h
    peaks_ptr,  # [N, P, H] out: step of the maximum (POOLING "max")
    # the states that programs exchange: of even steps and of odd ones (not STORE_RECORDS)
    carried_h_ptr,  # [2, P, S, BLOCK_H] in, out: 2h
    arrived_ptr,  # [tiles, P] in, out: parts of steps that are done, 0 at first
    tiles,
    B,  # pairs; sequences where not PAIRED
    T,
    R,
    H,
    zero,  # 0
    CELL: tl.constexpr,  # "lstm" or "gru"
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program: axis 2 of the grid has the slices
    BLOCK_N: tl.constexpr,  # sequences of a tile, a multiple of 8: axis 0 shares out the tiles
    BLOCK_K: tl.constexpr,  # columns of a slice of the weight: a power of two >= BLOCK_H
    PRECISION: tl.constexpr,  # of tl.dot
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
    # that the units fill
    WARPS: tl.constexpr = UNITS // 8
    COLUMNS: tl.constexpr = BLOCK_N // 8
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WORDS: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    ROW: tl.constexpr = DIRECTIONS * WORDS * BLOCK_H
    SLICES: tl.constexpr = BLOCK_H // UNITS

    direction, way = _direction(DIRECTIONS)
    first_unit = tl.program_id(2) * UNITS
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)
    # of one of the two states that are carried
    slots = DIRECTIONS * tiles * BLOCK_N
    # units of the cells, [1, 1, 1, warps, 8, 1]
    warp = tl.arange(0, WARPS)[None, None, None, :, None, None]
    within = warp * 8 + tl.arange(0, 8)[None, None, None, None, :, None]
    unit = first_unit + within
    # stores of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = first_unit + (within ^ zero)
    table_ptr += direction * (WORDS * BLOCK_H)
    table_ptrs = table_ptr + (tl.expand_dims(unit, 6) * WORDS + tl.arange(0, WORDS))
    gates_ptrs = gates_ptr + rows * (4 * BLOCK_H) + (tl.expand_dims(unit, 6) * 4 + tl.arange(0, 4))
    cells_ptrs = cells_ptr + rows * (2 * BLOCK_H) + (tl.expand_dims(unit, 6) * 2 + tl.arange(0, 2))
    states_ptr += rows * BLOCK_H
    states_ptrs = states_ptr + unit_apart
    outputs_ptrs = outputs_ptr + direction * H + unit_apart
    weight = weight_ptr + (direction * BLOCK_H + first_unit).to(tl.int64) * (4 * BLOCK_H)
    weight = _load_slice(weight, 4 * UNITS, BLOCK_H, BLOCK_K, WIDEN)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # sequences, tokens, gaps and rows of records as in recurrence_fwd.py
        seq, _, live, length, steps = _sequences(
            lengths_ptr, order_ptr, tile, B, T, BLOCK_N, PAIRED, HAS_ORDER
        )
        last = length - 1
        first_token = seq.to(tl.int64) * T + direction * tl.maximum(last, 0)
        final = T - 1 if DIRECTIONS == 1 else tl.maximum(last, 0)
        first_gap = seq * (T + 1) + direction * length
        slot = _slots(tile, tiles, direction, BLOCK_N)
        at_vector = (_fwd_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit_apart
        in_vector = _fwd_units(live) & (unit_apart < H)
        pooled_ptrs = pooled_ptr + at_vector
        # of the columns of a product, where ahead of the loop a change of layout costs little
        columns_last = _as_columns(last)
        columns_row = _as_columns(first_gap if STORE_RECORDS else slot)
        arrived_ptr_of_tile = arrived_ptr + (tile * DIRECTIONS + direction)

        carried = tl.zeros((1, COLUMNS, 2, WARPS, 8, 4), tl.float32)
        v = carried - 3.0 if POOLING == "max" else carried
        peak = tl.full(carried.shape, -1, tl.int32)
        if STORE_RECORDS and CELL == "gru":
            # the state that a sequence begins with: no step writes it, and the backward reads it
            _store_state(carried, first_gap, live, states_ptrs, BLOCK_H)
        for t in range(steps):
            row = _row_at(t, ids_ptr, first_token, way, final, R, HAS_IDS)
            # on its way while the program waits
            x = _load_rows(table_ptrs, row, ROW)
            _wait(arrived_ptr_of_tile, t * SLICES)
            if STORE_RECORDS:
                # the state that a step begins with stands at its first gap
                h_ptr = states_ptr
                h_row = columns_row + way * t
            else:
                h_ptr = carried_h_ptr
                h_row = columns_row + (t + 1) % 2 * slots
            a = _product_with_rows(
                weight,
                h_ptr + h_row.to(tl.int64) * BLOCK_H,
                (t > 0) & (t <= columns_last),
                BLOCK_H,
                WIDEN,
                PRECISION,
            )
            a += _fwd_accumulator(_gate_pairs(x, DTYPE), UNITS)

            p, q, r, s = _fwd_gates(a, 1, 2, WARPS)
            h, carried, record = _step(p, q, r, s, carried, CELL, APPROXIMATE, ASSEMBLY)
            # the state before all else: others wait for it
            if STORE_RECORDS:
                gap = first_gap + way * (t + 1)
                _store_state(h, gap, t <= last, states_ptrs, BLOCK_H)
            else:
                place = slot + t % 2 * slots
                _store_state(h, place, t <= last, carried_h_ptr + unit_apart, BLOCK_H)
            _arrive(arrived_ptr_of_tile)
            if STORE_RECORDS:
                _store_records(record, h, gap, t <= last, gates_ptrs, cells_ptrs, BLOCK_H, CELL)
            if POOLING == "last":
                _store_cells(pooled_ptrs, h, _fwd_units(t == last) & in_vector, 6)
            else:
                token_weights = mask_ptr + (first_token + way * t)
                v, peak = _pool(v, peak, h, t, last, token_weights, POOLING, STORE_RECORDS)
            if STORE_OUTPUTS:
                inside = _fwd_units(t <= last) & (unit_apart < H)
                at = _fwd_units(first_token + way * t) * (DIRECTIONS * H)
                _store_cells(outputs_ptrs + at, 0.5 * h, inside, 6)

        if POOLING != "last":
            _store_cells(pooled_ptrs, v, in_vector, 6)
            if POOLING == "max" and STORE_RECORDS:
                _store_cells(peaks_ptr + at_vector, peak, in_vector, 6)


@triton.jit(do_not_specialize=["B", "F"])
def score_kernel(
    pooled_ptr,  # [N, F] float32 twice the sentence vectors; anything of sequences without steps
    lengths_ptr,  # [N]
    similarity_ptr,  # [B] out: exp(-scale * L1) (PAIRED)
    distance_ptr,  # [B] out: L1 (PAIRED)
    vectors_ptr,  # [N, F] out: sentence vectors
    scale,
    B,  # pairs, N = 2B; sequences where not PAIRED
    F,  # P * H
    BLOCK_F: tl.constexpr,
    PAIRED: tl.constexpr,
):
    pair = tl.program_id(0)
    distances = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        left = _vector(pooled_ptr, lengths_ptr, vectors_ptr, pair, f, F)
        if PAIRED:
            right = _vector(pooled_ptr, lengths_ptr, vectors_ptr, pair + B, f, F)
            distances += tl.abs(left - right)
    if PAIRED:
        distance = tl.sum(distances, 0)
        tl.store(distance_ptr + pair, distance)
        tl.store(similarity_ptr + pair, _similarity(distance, scale))


@triton.jit
def _vector(pooled_ptr, lengths_ptr, vectors_ptr, seq, f, F):
    # load, store and return a part of a sentence vector
    at = seq.to(tl.int64) * F + f
    has_steps = tl.load(lengths_ptr + seq) > 0
    v = 0.5 * tl.load(pooled_ptr + at, mask=(f < F) & has_steps, other=0.0)
    tl.store(vectors_ptr + at, v.to(vectors_ptr.dtype.element_ty), mask=f < F)
    return v
