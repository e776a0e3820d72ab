"""The forward of an LSTM or GRU whose units several programs share: kernels, then launcher.

A program has a slice of the units, and every step waits for all slices of the step before. Either a
step is a launch, and what a sequence carries from one to the next is in memory; or there is one
launch (RESIDENT), in which the weight stays on chip and the programs of a tile wait for each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import _packing, _packing_gru, _tiling, _tiling_wide
from fastsiam.kernels._forward import (
    _as_accumulator,
    _as_gates,
    _at_units,
    _gate_pairs,
    _load_rows,
    _pool,
    _row_at,
    _store_state,
    new_results,
)
from fastsiam.kernels._math import (
    _direction,
    _load_cells_where,
    _sequences,
    _store_cells,
)
from fastsiam.kernels._wide import (
    _arrive,
    _as_columns,
    _load_slice,
    _product_with_rows,
    _slots,
    _wait,
)
from fastsiam.kernels.siamese_fwd import _cell, _store_gates
from fastsiam.kernels.siamese_gru_fwd import _cell as _gru_cell
from fastsiam.kernels.siamese_gru_fwd import _store_gates as _store_gru_gates


@triton.jit(do_not_specialize=["begin", "end", "tiles", "B", "T", "R", "H", "zero"])
def _siamese_wide_fwd_kernel(
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
    # what a step leaves to the next
    carried_ptr,  # [P, S, BLOCK_H] float32 in, out: an LSTM's cell, a GRU's 2h (not RESIDENT)
    carried_h_ptr,  # [2, P, S, BLOCK_H] in, out: 2h, of even steps and of odd (not STORE_RECORDS)
    arrived_ptr,  # [tiles, P] in, out: parts of steps that are done, 0 at first (RESIDENT)
    begin,  # the first step of this launch; 0 where RESIDENT
    end,  # the one behind its last; T where RESIDENT
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
    BLOCK_K: tl.constexpr,  # units of a product at a time; all of them, where RESIDENT
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot
    APPROXIMATE: tl.constexpr,  # these three: _tiling.Arithmetic
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
    if RESIDENT:
        weight = _load_slice(weight, 4 * UNITS, BLOCK_H, BLOCK_K, WIDEN)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # sequences, tokens, gaps and rows of records as in siamese_fwd.py
        seq, _, live, length, steps = _sequences(
            lengths_ptr, order_ptr, tile, B, T, BLOCK_N, PAIRED, HAS_ORDER
        )
        last = length - 1
        first_token = seq.to(tl.int64) * T + direction * tl.maximum(last, 0)
        final = T - 1 if DIRECTIONS == 1 else tl.maximum(last, 0)
        first_gap = seq * (T + 1) + direction * length
        slot = _slots(tile, tiles, direction, BLOCK_N)
        at_vector = (_at_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit_apart
        in_vector = _at_units(live) & (unit_apart < H)
        pooled_ptrs = pooled_ptr + at_vector
        carried_ptrs = carried_ptr + (_at_units(slot).to(tl.int64) * BLOCK_H + unit_apart)
        # of the columns of a product, where ahead of the loop a change of layout costs little
        columns_last = _as_columns(last)
        columns_row = _as_columns(first_gap if STORE_RECORDS else slot)
        arrived_ptr_of_tile = arrived_ptr + (tile * DIRECTIONS + direction)

        carried = tl.zeros((1, COLUMNS, 2, WARPS, 8, 4), tl.float32)
        v = carried - 3.0 if POOLING == "max" else carried
        peak = tl.full(carried.shape, -1, tl.int32)
        # whether a launch before this one began the tile, and whether this one goes on with it
        goes_on = (carried == 0.0) & (begin < steps)
        if not RESIDENT:
            began = goes_on & (begin > 0)
            # not turned round: Triton 3.6 makes no code of that for gfx942
            carried = tl.load(carried_ptrs, mask=began, other=0.0)
            if POOLING != "last":
                before = _load_cells_where(pooled_ptrs, began & in_vector, 6)
                v = tl.where(began, before, v)
                if POOLING == "max" and STORE_RECORDS:
                    before = _load_cells_where(peaks_ptr + at_vector, began & in_vector, 6)
                    peak = tl.where(began, before.to(tl.int32), peak)
        if STORE_RECORDS and CELL == "gru":
            # the state that a sequence begins with: no step writes it, and the backward reads it
            _store_state(carried, first_gap, live & (begin == 0), states_ptrs, BLOCK_H)
        for t in range(begin, tl.minimum(end, steps)):
            row = _row_at(t, ids_ptr, first_token, way, final, R, HAS_IDS)
            if RESIDENT:
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
                # unrolled, if the compiler knew its length, the loop would be long
                tl.where(t > 0, BLOCK_H + zero, 0),
                4 * UNITS,
                BLOCK_H,
                BLOCK_K,
                RESIDENT,
                WIDEN,
                PRECISION,
            )
            if not RESIDENT:
                # not before the product, which needs the registers
                x = _load_rows(table_ptrs, row, ROW)
            a += _as_accumulator(_gate_pairs(x, DTYPE), UNITS)

            if CELL == "lstm":
                i, f, g, o = _as_gates(a, 1, 2, WARPS)
                c_before = carried
                i, f, g, o, carried, tanh_c, h = _cell(i, f, g, o, c_before, APPROXIMATE, ASSEMBLY)
            else:
                r, z, n, y = _as_gates(a, 1, 2, WARPS)
                r, z, n, n_by_r, h = _gru_cell(r, z, n, y, carried, APPROXIMATE, ASSEMBLY)
                carried = h
            # the state before all else: others wait for it
            if STORE_RECORDS:
                gap = first_gap + way * (t + 1)
                _store_state(h, gap, t <= last, states_ptrs, BLOCK_H)
            else:
                place = slot + t % 2 * slots
                _store_state(h, place, t <= last, carried_h_ptr + unit_apart, BLOCK_H)
            if RESIDENT:
                _arrive(arrived_ptr_of_tile)
            if STORE_RECORDS:
                if CELL == "lstm":
                    _store_gates(
                        i,
                        f,
                        g,
                        o,
                        c_before,
                        tanh_c,
                        h,
                        gap,
                        t <= last,
                        gates_ptrs,
                        cells_ptrs,
                        BLOCK_H,
                    )
                else:
                    _store_gru_gates(r, z, n, n_by_r, gap, t <= last, gates_ptrs, BLOCK_H)
            if POOLING == "last":
                _store_cells(pooled_ptrs, h, _at_units(t == last) & in_vector, 6)
            else:
                token_weights = mask_ptr + (first_token + way * t)
                v, peak = _pool(v, peak, h, t, last, token_weights, POOLING, STORE_RECORDS)
            if STORE_OUTPUTS:
                inside = _at_units(t <= last) & (unit_apart < H)
                at = _at_units(first_token + way * t) * (DIRECTIONS * H)
                _store_cells(outputs_ptrs + at, 0.5 * h, inside, 6)

        if not RESIDENT:
            _store_cells(carried_ptrs, carried, goes_on, 6)
        if POOLING != "last":
            _store_cells(pooled_ptrs, v, in_vector & goes_on, 6)
            if POOLING == "max" and STORE_RECORDS:
                _store_cells(peaks_ptr + at_vector, peak, in_vector & goes_on, 6)


@triton.jit(do_not_specialize=["B", "F"])
def _score_kernel(
    pooled_ptr,  # [N, F] float32 twice the sentence vectors; anything of sequences without steps
    lengths_ptr,  # [N]
    learned_scale_ptr,  # [1] factor on L1 (HAS_LEARNED_SCALE)
    similarity_ptr,  # [B] out: exp(-scale * L1) (PAIRED)
    distance_ptr,  # [B] out: L1 (PAIRED)
    vectors_ptr,  # [N, F] out: sentence vectors
    scale,
    B,  # pairs, N = 2B; sequences where not PAIRED
    F,  # P * H
    BLOCK_F: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_LEARNED_SCALE: tl.constexpr,
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
        if HAS_LEARNED_SCALE:
            scale = tl.load(learned_scale_ptr).to(tl.float32)
        tl.store(distance_ptr + pair, distance)
        tl.store(similarity_ptr + pair, tl.exp(-scale * distance))


@triton.jit
def _vector(pooled_ptr, lengths_ptr, vectors_ptr, seq, f, F):
    # load, store and return a part of a sentence vector
    at = seq.to(tl.int64) * F + f
    has_steps = tl.load(lengths_ptr + seq) > 0
    v = 0.5 * tl.load(pooled_ptr + at, mask=(f < F) & has_steps, other=0.0)
    tl.store(vectors_ptr + at, v.to(vectors_ptr.dtype.element_ty), mask=f < F)
    return v


def siamese_wide_fwd(
    cell: str,
    table: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    learned_scale: Tensor | None,
    scale: float,
    H: int,
    steps: int,
    pooling: str,
    paired: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    store_records: bool,
    store_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all sequences of a cell, "lstm" or "gru"; the rest is as in `_forward.launch`."""
    N, P = lengths.shape[0], table.shape[1]
    B = N // 2 if paired else N
    block = _tiling.block_h(H)
    target = _tiling.target_of(table.device)
    multiprocessors = _tiling.multiprocessors(table.device, target)
    precision = _tiling.product_precision(dtype, allow_tf32, target)
    tile = _tiling_wide.forward_tile(N, P, H, dtype, precision, target, multiprocessors)
    tiles = _tiling.cdiv(N, tile.sequences)
    vectors = table.new_empty((N, P * H), dtype=dtype)
    # a sequence without steps is looked at by nobody
    pooled = torch.empty_like(vectors, dtype=torch.float32)
    similarity = pooled.new_empty(B if paired else 0)
    distance = torch.empty_like(similarity)
    packing = _packing if cell == "lstm" else _packing_gru
    shapes = packing.record_shapes(N, steps, H, P) if store_records else ((0,),) * 3
    kept = new_results(vectors, shapes, steps, pooling, store_records, store_outputs)
    outputs, gates, cells, states, peaks = kept
    results = similarity, distance, vectors, *kept
    if N == 0:
        return results
    slots = tiles * tile.sequences
    carried = pooled.new_empty(0 if tile.resident else (P, slots, block))
    carried_h = vectors.new_empty(0 if store_records else (2, P, slots, block))
    arrived = torch.zeros(tiles, P, device=table.device, dtype=torch.int32)
    order = _tiling.longest_first(lengths, B) if tiles > 1 else None
    for begin, end in tile.launches(steps):
        _siamese_wide_fwd_kernel[(min(tile.groups, tiles), P, block // tile.units)](
            table_ptr=table,
            weight_ptr=weight.view(dtype),
            ids_ptr=lengths if ids is None else ids,
            lengths_ptr=lengths,
            mask_ptr=lengths if mask is None else mask,
            order_ptr=lengths if order is None else order,
            pooled_ptr=pooled,
            outputs_ptr=outputs,
            gates_ptr=gates,
            cells_ptr=cells,
            states_ptr=states,
            peaks_ptr=peaks,
            carried_ptr=carried,
            carried_h_ptr=carried_h,
            arrived_ptr=arrived,
            begin=begin,
            end=end,
            tiles=tiles,
            B=B,
            T=steps,
            R=table.shape[0],
            H=H,
            zero=0,
            CELL=cell,
            BLOCK_H=block,
            UNITS=tile.units,
            BLOCK_N=tile.sequences,
            BLOCK_K=tile.block_k,
            RESIDENT=tile.resident,
            PRECISION=precision,
            DIRECTIONS=P,
            POOLING=pooling,
            PAIRED=paired,
            HAS_IDS=ids is not None,
            HAS_ORDER=order is not None,
            STORE_RECORDS=store_records,
            STORE_OUTPUTS=store_outputs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            launch_cooperative_grid=tile.resident,
            **_tiling.arithmetic(dtype, allow_tf32, target)._asdict(),
        )
    _score_kernel[(B,)](
        pooled_ptr=pooled,
        lengths_ptr=lengths if steps else torch.zeros_like(lengths),
        learned_scale_ptr=similarity if learned_scale is None else learned_scale,
        similarity_ptr=similarity,
        distance_ptr=distance,
        vectors_ptr=vectors,
        scale=scale,
        B=B,
        F=P * H,
        BLOCK_F=512,
        PAIRED=paired,
        HAS_LEARNED_SCALE=learned_scale is not None,
    )
    return results
