"""The way back through time where several programs share the units: kernel, then launcher.

As in `siamese_wide_fwd.py` a program has a slice of the units, and a step is a launch.
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
from fastsiam.kernels._math import _direction, _load_cells_where, _sequences, _store_cells
from fastsiam.kernels._wide import _as_columns, _product_with_rows
from fastsiam.kernels.siamese_bwd import _cell_gradients, _load_states, _states


@triton.jit(do_not_specialize=["begin", "end", "B", "T", "H", "zero"])
def _siamese_wide_bwd_kernel(
    # P is the number of directions, S that of slots: the columns of all tiles
    dpair_ptr,  # [B] float32 gradient of the L1 of a pair (HAS_DPAIR)
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    weight_ptr,  # [P, BLOCK_H, 4 * BLOCK_H] weight_hh transposed, columns by unit and gate
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which tiles take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    cells_ptr,  # [P, N, T + 1, BLOCK_H, 2]
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] in, out: gate gradients
    carried_dc_ptr,  # [P, S, BLOCK_H] float32 in, out: twice the gradient of the cell
    begin,  # the first step of this launch, which is its last one back through time
    end,  # the one behind its last
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program: axis 2 of the grid has the slices
    BLOCK_N: tl.constexpr,  # sequences of a program, a multiple of 8: axis 0 has the tiles
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot
    WIDEN: tl.constexpr,  # of _tiling.Arithmetic
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    BLOCKS: tl.constexpr = UNITS // (16 * WARPS)
    COLUMNS: tl.constexpr = BLOCK_N // 8
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    # elements of a unit in the records: half precision comes in words of two
    GATES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    STATES: tl.constexpr = GATES // 2

    tile = tl.program_id(0)
    direction, way = _direction(DIRECTIONS)
    first_unit = tl.program_id(2) * UNITS
    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, tile, B, T, COLUMNS, PAIRED, HAS_ORDER
    )
    behind = tl.minimum(end, steps)
    if begin >= behind:
        return
    # tokens, gaps and rows of records as in siamese_bwd.py
    last = length - 1
    first_gap = seq * (T + 1) + direction * length
    last_gap = way * first_gap + last
    first_token = seq.to(tl.int64) * T + direction * last
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)
    slots = tl.num_programs(0) * BLOCK_N
    column = 8 * tl.arange(0, COLUMNS)[:, None, None] + 2 * tl.arange(0, 4)[None, None, :]
    slot = direction * slots + tile * BLOCK_N + column + tl.arange(0, 2)[None, :, None]

    # units of the cells, [blocks, half, 1, 1, warps, 8, 1]
    block = tl.arange(0, BLOCKS)[:, None, None, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, None, :, None, None]
    within = 16 * warp + tl.arange(0, 8)[None, None, None, None, None, :, None]
    unit = first_unit + block * (16 * WARPS) + half * 8 + within
    # loads of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = first_unit + block * (16 * WARPS) + half * 8 + (within ^ zero)
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
    weight_ptr += (direction * BLOCK_H + first_unit).to(tl.int64) * (4 * BLOCK_H)
    doutputs_ptrs = doutputs_ptr + direction * H + unit_apart
    carried_dc_ptrs = carried_dc_ptr + (_at_units(slot).to(tl.int64) * BLOCK_H + unit_apart)

    inside = unit_apart < H
    # of the last states, those of other launches are not loaded
    reached = live & (last >= begin) & (last < behind) if POOLING == "last" else live
    dv, peak = _vector_gradient(
        dpair_ptr,
        dvectors_ptr,
        vectors_ptr,
        peaks_ptr,
        seq,
        other,
        reached,
        direction,
        unit_apart,
        inside,
        H,
        DIRECTIONS,
        POOLING,
        HAS_DPAIR,
        HAS_DVECTORS,
    )
    began = tl.zeros((BLOCKS, 2, COLUMNS, 2, WARPS, 8, 4), tl.int1) | (behind < steps)
    dc = _load_cells_where(carried_dc_ptrs, began, 7)
    for back in range(begin, behind):
        t = behind - 1 - (back - begin)
        gap = way * first_gap + t
        # the gate gradients of the step after, at the gap where it began
        after_ptrs = dgates_ptr + _as_columns(way * (gap + 1)).to(tl.int64) * (4 * BLOCK_H)
        dh = _product_with_rows(
            weight_ptr,
            after_ptrs,
            _as_columns(t < last),
            t + 1 < steps,
            tl.zeros((UNITS, BLOCK_N), tl.float32),
            4 * BLOCK_H,
            WIDEN,
            PRECISION,
        )
        upstream = _upstream(
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
        d = _as_cells(dh, BLOCKS, COLUMNS, WARPS) + upstream
        # rows of steps behind a sequence's end are its last row's: no more than its own is read
        row = _at_units(way * tl.minimum(gap, last_gap)).to(tl.int64)
        gates = _load_gates(gates_ptrs, row, GATES * BLOCK_H, DTYPE)
        states = _load_states(cells_ptrs, row, STATES * BLOCK_H, DTYPE)
        i, f, g, h_by_o = _gates(gates, DTYPE)
        h_by_c, c_before = _states(states, DTYPE)
        di, df, dg, do, dc = _cell_gradients(d, dc, i, f, g, h_by_o, h_by_c, c_before)
        # what a record that no step wrote may hold must not come back with the sequence's own
        dc = tl.where(_at_units(t <= last), dc, 0.0)
        da = tl.permute(tl.join(tl.join(di, df), tl.join(dg, do)), (0, 1, 2, 3, 4, 5, 6, 8, 7))
        da = tl.reshape(da, d.shape + (4,)).to(DTYPE)
        at = tl.expand_dims(_at_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
        _store_cells(dgates_ptrs + at, da, _at_units(t <= last), 7)

    everywhere = tl.full(dc.shape, 1, tl.int1)
    _store_cells(carried_dc_ptrs, dc, everywhere, 7)


def siamese_wide_bwd(
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
    """Carry gradients back through time; arguments and result are those of `_backward.launch`."""
    N, P = vectors.shape[0], weight.shape[0]
    H, dtype = vectors.shape[1] // P, vectors.dtype
    block = _tiling.block_h(H)
    dgates = torch.zeros_like(gates)
    if N == 0:
        return dgates
    target = _tiling.target_of(vectors.device)
    multiprocessors = _tiling._multiprocessors(vectors.device, target)
    tile = _tiling_wide.backward_tile(N, P, H, multiprocessors)
    tiles = triton.cdiv(N, tile.sequences)
    paired = dpair is not None
    B = N // 2 if paired else N
    order = _tiling.longest_first(lengths, B) if tiles > 1 else None
    words = _packing.table_dtype(dtype)
    carried_dc = vectors.new_empty((P, tiles * tile.sequences, block), dtype=torch.float32)
    for t in reversed(range(steps)):
        _siamese_wide_bwd_kernel[(tiles, P, block // tile.units)](
            dpair_ptr=vectors if dpair is None else dpair,
            dvectors_ptr=vectors if dvectors is None else dvectors,
            doutputs_ptr=vectors if doutputs is None else doutputs,
            vectors_ptr=vectors,
            weight_ptr=weight.view(dtype),
            lengths_ptr=lengths,
            mask_ptr=lengths if mask is None else mask,
            order_ptr=lengths if order is None else order,
            gates_ptr=gates.view(words),
            cells_ptr=cells.view(words),
            peaks_ptr=peaks,
            dgates_ptr=dgates,
            carried_dc_ptr=carried_dc,
            begin=t,
            end=t + 1,
            B=B,
            T=steps,
            H=H,
            zero=0,
            BLOCK_H=block,
            UNITS=tile.units,
            BLOCK_N=tile.sequences,
            WARPS=tile.num_warps,
            PRECISION=_tiling.product_precision(dtype, allow_tf32, target),
            WIDEN=_tiling.arithmetic(dtype, allow_tf32, target).WIDEN,
            DIRECTIONS=P,
            POOLING=pooling,
            PAIRED=paired,
            HAS_DPAIR=paired,
            HAS_DVECTORS=dvectors is not None,
            HAS_DOUTPUTS=doutputs is not None,
            HAS_ORDER=order is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return dgates
