"""The wide backward: programs have slices of the units, as in wide_fwd.py, and wait likewise."""

import triton
import triton.language as tl

from fastsiam.kernels.backward_tile import (
    _bwd_cells,
    _bwd_units,
    _gates,
    _load_gates,
    _upstream,
    _vector_gradient,
)
from fastsiam.kernels.cells import _load_before, _step_gradients
from fastsiam.kernels.tile import _direction, _sequences, _store_cells
from fastsiam.kernels.wide import _arrive, _as_columns, _load_slice, _product_with_rows, _wait


@triton.jit(do_not_specialize=["tiles", "B", "T", "H", "zero"])
def wide_bwd_kernel(
    # P is the number of directions
    # gradient of the L1 of a pair: dsim * similarity * -scale (HAS_DSIM) and dpair (HAS_DPAIR)
    dsim_ptr,  # [B] float32
    similarity_ptr,  # [B] float32
    dpair_ptr,  # [B] float32
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    weight_ptr,  # [P, BLOCK_H, 4 * BLOCK_H] weight_hh transposed, columns by unit and gate
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which tiles take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    before_ptr,  # an LSTM's cells, [P, N, T + 1, BLOCK_H, 2]; a GRU's states, not as words
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] in, out: gate gradients
    arrived_ptr,  # [tiles, P] in, out: parts of steps that are done, 0 at first
    scale,  # factor on L1 (HAS_DSIM)
    tiles,
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    CELL: tl.constexpr,  # "lstm" or "gru"
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program: axis 2 of the grid has the slices
    BLOCK_N: tl.constexpr,  # sequences of a tile, a multiple of 8: axis 0 shares out the tiles
    BLOCK_K: tl.constexpr,  # columns of a slice of the weight: a power of two >= 4 * BLOCK_H
    PRECISION: tl.constexpr,  # of tl.dot
    WIDEN: tl.constexpr,  # of tiling.Arithmetic
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_DSIM: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    # that the units fill
    WARPS: tl.constexpr = UNITS // 16
    COLUMNS: tl.constexpr = BLOCK_N // 8
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    # elements of a unit in the records: half precision comes in words of two
    GATES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    BEFORE: tl.constexpr = GATES // 2 if CELL == "lstm" else 1
    SLICES: tl.constexpr = BLOCK_H // UNITS

    direction, way = _direction(DIRECTIONS)
    first_unit = tl.program_id(2) * UNITS
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)
    # units of the cells, [1, half, 1, 1, warps, 8, 1]
    half = tl.arange(0, 2)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, None, :, None, None]
    within = 16 * warp + tl.arange(0, 8)[None, None, None, None, None, :, None]
    unit = first_unit + half * 8 + within
    # loads of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = first_unit + half * 8 + (within ^ zero)
    inside = unit_apart < H
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
    doutputs_ptrs = doutputs_ptr + direction * H + unit_apart
    weight = weight_ptr + (direction * BLOCK_H + first_unit).to(tl.int64) * (4 * BLOCK_H)
    weight = _load_slice(weight, UNITS, 4 * BLOCK_H, BLOCK_K, WIDEN)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # sequences, tokens, gaps and rows of records as in recurrence_bwd.py
        seq, other, live, length, steps = _sequences(
            lengths_ptr, order_ptr, tile, B, T, BLOCK_N, PAIRED, HAS_ORDER
        )
        last = length - 1
        first_gap = seq * (T + 1) + direction * length
        # without a step a GRU's sequence has the row that it would begin with
        last_gap = way * first_gap + (last if CELL == "lstm" else tl.maximum(last, 0))
        first_token = seq.to(tl.int64) * T + direction * last
        # of the columns of a product, where ahead of the loop a change of layout costs little
        columns_last = _as_columns(last)
        columns_gap = _as_columns(first_gap)
        arrived_ptr_of_tile = arrived_ptr + (tile * DIRECTIONS + direction)

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
        carried = tl.zeros((1, 2, COLUMNS, 2, WARPS, 8, 4), tl.float32)
        # carried: to compute it from `back` takes 25 instructions a step more (Triton 3.7.1)
        t = steps - 1
        for back in range(steps):
            gap = way * first_gap + t
            # rows of steps behind a sequence's end are its last row's: it reads no other's
            row = _bwd_units(way * tl.minimum(gap, last_gap)).to(tl.int64)
            # on their way while the program waits
            gates = _load_gates(gates_ptrs, row, GATES * BLOCK_H, DTYPE)
            before = _load_before(before_ptrs, row, BEFORE * BLOCK_H, DTYPE, CELL)
            _wait(arrived_ptr_of_tile, back * SLICES)
            # the gate gradients of the step after stand at the gap where it began
            dh = _product_with_rows(
                weight,
                dgates_ptr + (columns_gap + way * (t + 1)).to(tl.int64) * (4 * BLOCK_H),
                t < columns_last,
                4 * BLOCK_H,
                WIDEN,
                PRECISION,
            )
            d = _bwd_cells(dh, 1, 2, WARPS)
            if CELL == "gru":
                d += carried
            d += _upstream(
                t + 1,
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
            p, q, r, s = _gates(gates, DTYPE)
            d1, d2, d3, d4, carried = _step_gradients(d, carried, p, q, r, s, before, CELL, DTYPE)
            # columns of 0 in the weight keep a GRU's n out of the product
            da = tl.join(tl.join(d1, d2), tl.join(d3, d4))
            # before its last step a sequence has no gradient, whatever memory held for one
            carried = tl.where(_bwd_units(t <= last), carried, 0.0)
            da = tl.permute(da, (0, 1, 2, 3, 4, 5, 6, 8, 7))
            da = tl.reshape(da, d.shape + (4,)).to(DTYPE)
            at = tl.expand_dims(_bwd_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
            _store_cells(dgates_ptrs + at, da, _bwd_units(t <= last), 7)
            _arrive(arrived_ptr_of_tile)
            t -= 1
