"""The way back through time where several programs share the units: kernel, then launcher.

As in `siamese_wide_fwd.py` a program has a slice of the units, and a step is a launch or waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import _packing, _tiling, _tiling_wide
from fastsiam.kernels._backward import (
    _as_cells,
    _at_units,
    _gates,
    _load_gates,
    _upstream,
    _vector_gradient,
)
from fastsiam.kernels._math import (
    _direction,
    _load_cells,
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
from fastsiam.kernels.siamese_bwd import _cell_gradients, _load_states, _states
from fastsiam.kernels.siamese_gru_bwd import _cell_gradients as _gru_gradients
from fastsiam.kernels.siamese_gru_bwd import _derivatives as _gru_derivatives


@triton.jit
def _load_before(before_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr, CELL: tl.constexpr):
    # what a step began with: of an LSTM the cell, beside the derivative by the new one; of a GRU 2h
    if CELL == "lstm":
        return _load_states(before_ptrs, row, STRIDE, DTYPE)
    else:
        return _load_cells(before_ptrs + row * STRIDE, 7)


@triton.jit(do_not_specialize=["begin", "end", "tiles", "B", "T", "H", "zero"])
def _siamese_wide_bwd_kernel(
    # P is the number of directions, S that of slots: the columns of all tiles
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
    # an LSTM's: twice the cell's gradient; a GRU's: what reaches 2h past the product
    carried_ptr,  # [P, S, BLOCK_H] float32 in, out (not RESIDENT)
    arrived_ptr,  # [tiles, P] in, out: parts of steps that are done, 0 at first (RESIDENT)
    scale,  # factor on L1 (HAS_DSIM)
    begin,  # the step at which this launch ends its way back; 0 where RESIDENT
    end,  # the one behind that at which it begins; T where RESIDENT
    tiles,
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    CELL: tl.constexpr,  # "lstm" or "gru"
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program: axis 2 of the grid has the slices
    BLOCK_N: tl.constexpr,  # sequences of a tile, a multiple of 8: axis 0 shares out the tiles
    BLOCK_K: tl.constexpr,  # gates of a product at a time; all of them, where RESIDENT
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot
    WIDEN: tl.constexpr,  # of _tiling.Arithmetic
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
    if RESIDENT:
        weight = _load_slice(weight, UNITS, 4 * BLOCK_H, BLOCK_K, WIDEN)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # sequences, tokens, gaps and rows of records as in siamese_bwd.py
        seq, other, live, length, steps = _sequences(
            lengths_ptr, order_ptr, tile, B, T, BLOCK_N, PAIRED, HAS_ORDER
        )
        last = length - 1
        first_gap = seq * (T + 1) + direction * length
        # without a step a GRU's sequence has the row that it would begin with
        last_gap = way * first_gap + (last if CELL == "lstm" else tl.maximum(last, 0))
        first_token = seq.to(tl.int64) * T + direction * last
        slot = _slots(tile, tiles, direction, BLOCK_N)
        carried_ptrs = carried_ptr + (_at_units(slot).to(tl.int64) * BLOCK_H + unit_apart)
        # of the columns of a product, where ahead of the loop a change of layout costs little
        columns_last = _as_columns(last)
        columns_gap = _as_columns(first_gap)
        arrived_ptr_of_tile = arrived_ptr + (tile * DIRECTIONS + direction)

        behind = tl.minimum(end, steps)
        # what reaches last states of other launches' steps is not loaded
        reached = live & (begin < behind)
        if POOLING == "last":
            reached = reached & (last >= begin) & (last < behind)
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
            reached,
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
        # whether this launch has a step of the tile, and whether one before it had
        goes_on = (carried == 0.0) & (begin < steps)
        if not RESIDENT:
            carried = _load_cells_where(carried_ptrs, goes_on & (end < steps), 7)
        for back in range(begin, behind):
            t = behind - 1 - (back - begin)
            gap = way * first_gap + t
            # rows of steps behind a sequence's end are its last row's: it reads no other's
            row = _at_units(way * tl.minimum(gap, last_gap)).to(tl.int64)
            if RESIDENT:
                # on their way while the program waits
                gates = _load_gates(gates_ptrs, row, GATES * BLOCK_H, DTYPE)
                before = _load_before(before_ptrs, row, BEFORE * BLOCK_H, DTYPE, CELL)
                _wait(arrived_ptr_of_tile, (back - begin) * SLICES)
            # the gate gradients of the step after stand at the gap where it began
            dh = _product_with_rows(
                weight,
                dgates_ptr + (columns_gap + way * (t + 1)).to(tl.int64) * (4 * BLOCK_H),
                t < columns_last,
                tl.where(t + 1 < steps, 4 * BLOCK_H + zero, 0),
                UNITS,
                4 * BLOCK_H,
                BLOCK_K,
                RESIDENT,
                WIDEN,
                PRECISION,
            )
            d = _as_cells(dh, 1, 2, WARPS)
            if CELL == "gru":
                # before the loads, which then have its registers
                d += carried
            if not RESIDENT:
                # not before the product, which needs the registers
                gates = _load_gates(gates_ptrs, row, GATES * BLOCK_H, DTYPE)
                before = _load_before(before_ptrs, row, BEFORE * BLOCK_H, DTYPE, CELL)
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
            if CELL == "lstm":
                i, f, g, h_by_o = _gates(gates, DTYPE)
                h_by_c, c_before = _states(before, DTYPE)
                di, df, dg, do, carried = _cell_gradients(
                    d, carried, i, f, g, h_by_o, h_by_c, c_before
                )
                da = tl.join(tl.join(di, df), tl.join(dg, do))
            else:
                r, z, n, n_by_r = _gates(gates, DTYPE)
                h_by_n, h_by_z = _gru_derivatives(z, n, before.to(tl.float32))
                dr, dz, dn, dy, carried = _gru_gradients(d, r, z, n_by_r, h_by_n, h_by_z)
                # columns of 0 in the weight keep dn out of the product
                da = tl.join(tl.join(dr, dz), tl.join(dn, dy))
            # before its last step a sequence has no gradient, whatever memory held for one
            carried = tl.where(_at_units(t <= last), carried, 0.0)
            da = tl.permute(da, (0, 1, 2, 3, 4, 5, 6, 8, 7))
            da = tl.reshape(da, d.shape + (4,)).to(DTYPE)
            at = tl.expand_dims(_at_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
            _store_cells(dgates_ptrs + at, da, _at_units(t <= last), 7)
            if RESIDENT:
                _arrive(arrived_ptr_of_tile)

        if not RESIDENT:
            _store_cells(carried_ptrs, carried, goes_on, 7)


def siamese_wide_bwd(
    cell: str,
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
    """Carry gradients back through time, of a cell "lstm" or "gru"; see `_backward.launch`."""
    N, P = vectors.shape[0], weight.shape[0]
    H, dtype = vectors.shape[1] // P, vectors.dtype
    block = _tiling.block_h(H)
    dgates = torch.empty_like(gates)
    if N == 0:
        return dgates
    target = _tiling.target_of(vectors.device)
    multiprocessors = _tiling.multiprocessors(vectors.device, target)
    precision = _tiling.product_precision(dtype, allow_tf32, target)
    tile = _tiling_wide.backward_tile(N, P, H, dtype, precision, target, multiprocessors)
    tiles = _tiling.cdiv(N, tile.sequences)
    paired = dsim is not None or dpair is not None
    B = N // 2 if paired else N
    order = _tiling.longest_first(lengths, B) if tiles > 1 else None
    words = _packing.table_dtype(dtype)
    slots = tiles * tile.sequences
    carried = torch.empty(
        0 if tile.resident else (P, slots, block), device=vectors.device, dtype=torch.float32
    )
    arrived = torch.zeros(tiles, P, device=vectors.device, dtype=torch.int32)
    for begin, end in reversed(tile.launches(steps)):
        _siamese_wide_bwd_kernel[(min(tile.groups, tiles), P, block // tile.units)](
            dsim_ptr=vectors if dsim is None else dsim,
            similarity_ptr=similarity,
            dpair_ptr=vectors if dpair is None else dpair,
            dvectors_ptr=vectors if dvectors is None else dvectors,
            doutputs_ptr=vectors if doutputs is None else doutputs,
            vectors_ptr=vectors,
            weight_ptr=weight.view(dtype),
            lengths_ptr=lengths,
            mask_ptr=lengths if mask is None else mask,
            order_ptr=lengths if order is None else order,
            gates_ptr=gates.view(words),
            before_ptr=cells.view(words) if cell == "lstm" else states,
            peaks_ptr=peaks,
            dgates_ptr=dgates,
            carried_ptr=carried,
            arrived_ptr=arrived,
            scale=scale,
            begin=begin,
            end=end,
            tiles=tiles,
            B=B,
            T=steps,
            H=H,
            zero=0,
            CELL=cell,
            BLOCK_H=block,
            UNITS=tile.units,
            BLOCK_N=tile.sequences,
            BLOCK_K=tile.block_k,
            RESIDENT=tile.resident,
            PRECISION=precision,
            WIDEN=_tiling.arithmetic(dtype, allow_tf32, target).WIDEN,
            DIRECTIONS=P,
            POOLING=pooling,
            PAIRED=paired,
            HAS_DSIM=dsim is not None,
            HAS_DPAIR=dpair is not None,
            HAS_DVECTORS=dvectors is not None,
            HAS_DOUTPUTS=doutputs is not None,
            HAS_ORDER=order is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            launch_cooperative_grid=tile.resident,
        )
    return dgates
