"""Views of a forward tile, and the pooling and score at the end of a forward."""

import triton
import triton.language as tl

from fastsiam.kernels.tile import _fill_columns, _load_cells, _store_cells, _take_columns, _unpack


@triton.jit
def _gate_pairs(x, DTYPE: tl.constexpr):
    # what the table holds for a cell, as float32 with two gate axes: gate = 2 * first + second
    if DTYPE == tl.float32:
        return tl.reshape(x, x.shape[:6] + (2, 2))
    else:
        low, high = _unpack(x, DTYPE)
        return tl.join(low, high)


@triton.jit
def _fwd_accumulator(x, BLOCK_H: tl.constexpr):
    # [blocks, columns, each, warps, 8, 4, 2, 2] -> [4 * BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(x, 2), (6, 0, 3, 7, 4, 1, 5, 2))
    return tl.reshape(x, (4 * BLOCK_H, 8 * x.shape[5]))


@triton.jit
def _fwd_gates(a, BLOCKS: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr):
    # the way back, gates apart: cells of i, f, g, o
    x = tl.reshape(a, (2, BLOCKS, WARPS, 2, 8, a.shape[1] // 8, 4, 2))
    x = _take_columns(tl.permute(x, (1, 5, 7, 2, 4, 6, 3, 0)), 2, EACH)
    i_f, g_o = tl.split(x)
    i, f = tl.split(i_f)
    g, o = tl.split(g_o)
    return i, f, g, o


@triton.jit
def _fwd_operand(h, BLOCK_H: tl.constexpr):
    # cells [blocks, columns, each, warps, 8, 4] -> [BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(h, 2), (0, 3, 4, 1, 5, 2))
    return tl.reshape(x, (BLOCK_H, 8 * x.shape[3]))


@triton.jit
def _fwd_units(x):
    # [columns, each, 4] -> the same for every unit
    return tl.reshape(x, (1, x.shape[0], x.shape[1], 1, 1, 4))


@triton.jit
def _load_rows(table_ptrs, row, STRIDE: tl.constexpr):
    # multiplied last: only so is the offset seen to be a multiple of the stride
    offs = tl.expand_dims(_fwd_units(row), 6).to(tl.int64) * STRIDE
    return _load_cells(table_ptrs + offs, 6)


@triton.jit
def _row_at(t, ids_ptr, first_token, way, final, R, HAS_IDS: tl.constexpr):
    # the table's row of step t, inside the table whatever the ids hold
    t = way * tl.minimum(t, final)
    if HAS_IDS:
        row = tl.load(ids_ptr + (first_token + t)).to(tl.int32)
        # as unsigned a negative id is a large one
        return tl.minimum(row.to(tl.uint32), (R - 1).to(tl.uint32)).to(tl.int32)
    else:
        return first_token.to(tl.int32) + t


@triton.jit
def _pool(v, peak, h, t, last, mask_ptrs, POOLING: tl.constexpr, STORE_PEAKS: tl.constexpr):
    # twice the sentence vector, and the steps of its maxima, after step t; mask_ptrs is its tokens'
    if POOLING == "mask":
        inside = t <= last
        m = tl.load(mask_ptrs, mask=inside, other=0.0)
        v += _fwd_units(m.to(tl.float32)) * tl.where(_fwd_units(inside), h, 0.0)
    elif POOLING == "max":
        # so that a nan is the largest; the first of equal ones stays
        higher = _fwd_units(t <= last) & ~(h <= v)
        v = tl.where(higher, h, v)
        if STORE_PEAKS:
            peak = tl.where(higher, t, peak)
    else:
        v = tl.where(_fwd_units(t == last), h, v)
    return v, peak


@triton.jit
def _store_state(h, row, inside, states_ptrs, BLOCK_H: tl.constexpr):
    at = _fwd_units(row).to(tl.int64) * BLOCK_H
    _store_cells(states_ptrs + at, h, _fwd_units(inside), 6)


@triton.jit
def _by_side(x):
    # [..., each, 4] -> [..., side, pairs]
    return tl.reshape(x, x.shape[:-2] + (2, 2 * x.shape[-2]))


@triton.jit
def _similarity(distance, scale):
    # the Manhattan similarity; its gradient by the distance is -scale times itself
    return tl.exp(-scale * distance)


@triton.jit
def _finish(
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
    DIRECTIONS: tl.constexpr,
    POOLING: tl.constexpr,
    PAIRED: tl.constexpr,
    STORE_PEAKS: tl.constexpr,
):
    # store the vectors; of pairs also L1, and the similarity where one program has all of it
    if POOLING == "max":
        v = tl.where(_fwd_units(length > 0), v, 0.0)
    v = 0.5 * v
    offs = (_fwd_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit
    inside = _fwd_units(live) & (unit < H)
    tl.store(vectors_ptr + offs, v.to(vectors_ptr.dtype.element_ty), mask=inside)
    if POOLING == "max" and STORE_PEAKS:
        tl.store(peaks_ptr + offs, peak, mask=inside)
    if PAIRED:
        v = _by_side(tl.permute(v, (0, 1, 3, 4, 2, 5)))
        left, right = tl.split(tl.permute(v, (0, 1, 2, 3, 5, 4)))
        # blocks before warps: tiles of 4 warps and of 8 then add in one order
        distance = tl.sum(tl.sum(tl.sum(tl.abs(left - right), 3), 0), 1)
        # the left one of a pair's sequences has the pair's number
        pair = tl.min(_by_side(tl.minimum(seq, other)), 1)
        live = tl.max(_by_side(live.to(tl.int32)), 1) > 0
        tl.store(distance_ptr + direction * B + pair, distance, mask=live)
        if DIRECTIONS == 1:
            tl.store(similarity_ptr + pair, _similarity(distance, scale), mask=live)
