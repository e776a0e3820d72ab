"""What the forward kernels of all cells share: views of a tile, pooling, and the launcher."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import _tiling
from fastsiam.kernels._math import (
    _fill_columns,
    _load_cells,
    _store_cells,
    _take_columns,
    _unpack,
    in_triton,
)


@triton.jit
def _gate_pairs(x, DTYPE: tl.constexpr):
    # what the table holds for a cell, as float32 with two gate axes: gate = 2 * first + second
    if DTYPE == tl.float32:
        return tl.reshape(x, x.shape[:6] + (2, 2))
    else:
        low, high = _unpack(x, DTYPE)
        return tl.join(low, high)


@triton.jit
def _as_accumulator(x, BLOCK_H: tl.constexpr):
    # [blocks, columns, each, warps, 8, 4, 2, 2] -> [4 * BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(x, 2), (6, 0, 3, 7, 4, 1, 5, 2))
    return tl.reshape(x, (4 * BLOCK_H, 8 * x.shape[5]))


@triton.jit
def _as_gates(a, BLOCKS: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr):
    # the way back, gates apart: cells of i, f, g, o
    x = tl.reshape(a, (2, BLOCKS, WARPS, 2, 8, a.shape[1] // 8, 4, 2))
    x = _take_columns(tl.permute(x, (1, 5, 7, 2, 4, 6, 3, 0)), 2, EACH)
    i_f, g_o = tl.split(x)
    i, f = tl.split(i_f)
    g, o = tl.split(g_o)
    return i, f, g, o


@triton.jit
def _as_operand(h, BLOCK_H: tl.constexpr):
    # cells [blocks, columns, each, warps, 8, 4] -> [BLOCK_H, 8 * columns]
    x = tl.permute(_fill_columns(h, 2), (0, 3, 4, 1, 5, 2))
    return tl.reshape(x, (BLOCK_H, 8 * x.shape[3]))


@triton.jit
def _at_units(x):
    # [columns, each, 4] -> the same for every unit
    return tl.reshape(x, (1, x.shape[0], x.shape[1], 1, 1, 4))


@triton.jit
def _load_rows(table_ptrs, row, STRIDE: tl.constexpr):
    # multiplied last: only so is the offset seen to be a multiple of the stride
    offs = tl.expand_dims(_at_units(row), 6).to(tl.int64) * STRIDE
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
        v += _at_units(m.to(tl.float32)) * tl.where(_at_units(inside), h, 0.0)
    elif POOLING == "max":
        # so that a nan is the largest; the first of equal ones stays
        higher = _at_units(t <= last) & ~(h <= v)
        v = tl.where(higher, h, v)
        if STORE_PEAKS:
            peak = tl.where(higher, t, peak)
    else:
        v = tl.where(_at_units(t == last), h, v)
    return v, peak


@triton.jit
def _store_state(h, row, inside, states_ptrs, BLOCK_H: tl.constexpr):
    at = _at_units(row).to(tl.int64) * BLOCK_H
    _store_cells(states_ptrs + at, h, _at_units(inside), 6)


@triton.jit
def _by_side(x):
    # [..., each, 4] -> [..., side, pairs]
    return tl.reshape(x, x.shape[:-2] + (2, 2 * x.shape[-2]))


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
    learned_scale_ptr,
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
    HAS_LEARNED_SCALE: tl.constexpr,
    STORE_PEAKS: tl.constexpr,
):
    # store the vectors; of pairs also L1, and the similarity where one program has all of it
    if POOLING == "max":
        v = tl.where(_at_units(length > 0), v, 0.0)
    v = 0.5 * v
    offs = (_at_units(seq).to(tl.int64) * DIRECTIONS + direction) * H + unit
    inside = _at_units(live) & (unit < H)
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
            if HAS_LEARNED_SCALE:
                scale = tl.load(learned_scale_ptr).to(tl.float32)
            tl.store(similarity_ptr + pair, tl.exp(-scale * distance), mask=live)


def new_results(
    vectors: Tensor,
    shapes: tuple[tuple[int, ...], ...],
    steps: int,
    pooling: str,
    store_records: bool,
    store_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what a forward may keep beside its vectors, [N, P * H]; what is not wanted is empty.

    Returns:
        outputs, gates, cells, states and peaks, as `launch` does; records of the given shapes.
    """
    N, columns = vectors.shape
    # zero behind a sequence's end, where no step writes
    outputs = vectors.new_zeros((N, steps, columns) if store_outputs else 0)
    gates, cells, states = (vectors.new_empty(shape) for shape in shapes)
    wants_peaks = store_records and pooling == "max"
    peaks = torch.empty_like(vectors if wants_peaks else vectors[:0, 0], dtype=torch.int32)
    return outputs, gates, cells, states, peaks


def launch(
    kernel: Any,
    record_shapes: Callable[[int, int, int, int], tuple[tuple[int, ...], ...]],
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
    """Run all sequences through a cell's kernel; see `fastsiam._layer.forward` for the tensors.

    Args:
        kernel: of the cell. It has a pointer to each record that the cell keeps.
        record_shapes: of the cell's packing.

    Returns:
        Similarity and L1 of the pairs, [B] float32; vectors [N, P * H] and outputs [N, T, P * H] of
        dtype; gates, cells and states for the backward; peaks [N, P * H] int32, the steps of the
        maxima. What is not wanted is empty.
    """
    N, P = lengths.shape[0], table.shape[1]
    B = N // 2 if paired else N
    nothing = N == 0 or steps == 0
    new = torch.zeros if nothing else torch.empty
    vectors = new((N, P * H), device=table.device, dtype=dtype)
    distance = new((P, B if paired else 0), device=vectors.device, dtype=torch.float32)
    similarity = torch.exp(distance[0]) if nothing else torch.empty_like(distance[0])
    shapes = record_shapes(N, steps, H, P) if store_records else ((0,),) * 3
    kept = new_results(vectors, shapes, steps, pooling, store_records, store_outputs)
    outputs, gates, cells, states, peaks = kept
    if nothing:
        return similarity, distance[0], vectors, outputs, gates, cells, states, peaks
    target = _tiling.target_of(vectors.device)
    how = _tiling.arithmetic(dtype, allow_tf32, target)
    load = _tiling.load_of(lengths, P, target)
    tile = _tiling.forward_tile(H, dtype, how, target, load)
    order = _tiling.pair_order(lengths, B, target, P)
    records = {"gates_ptr": gates, "cells_ptr": cells, "states_ptr": states}
    kernel[(_tiling.cdiv(N, tile.sequences), P)](
        table_ptr=table,
        weight_ptr=weight,
        ids_ptr=lengths if ids is None else ids,
        lengths_ptr=lengths,
        mask_ptr=lengths if mask is None else mask,
        order_ptr=lengths if order is None else order,
        learned_scale_ptr=similarity if learned_scale is None else learned_scale,
        similarity_ptr=similarity,
        distance_ptr=distance,
        vectors_ptr=vectors,
        outputs_ptr=outputs,
        **{name: record for name, record in records.items() if name in kernel.arg_names},
        peaks_ptr=peaks,
        scale=scale,
        B=B,
        T=steps,
        R=table.shape[0],
        H=H,
        zero=0,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.sequences,
        WARPS=tile.num_warps,
        STREAM=tile.stream,
        OPERAND=in_triton(tile.operand),
        PARTS=tile.parts,
        DIRECTIONS=P,
        POOLING=pooling,
        PAIRED=paired,
        HAS_IDS=ids is not None,
        HAS_ORDER=order is not None,
        HAS_LEARNED_SCALE=learned_scale is not None,
        STORE_RECORDS=store_records,
        STORE_OUTPUTS=store_outputs,
        num_warps=tile.num_warps,
        **how._asdict(),
        **_tiling.forward_options(target, ids is not None, store_records),
    )
    if P == 1:
        return similarity, distance[0], vectors, outputs, gates, cells, states, peaks
    # no program has both directions of a pair
    total = distance.sum(dim=0)
    similarity = torch.exp(-(scale if learned_scale is None else learned_scale) * total)
    return similarity, total, vectors, outputs, gates, cells, states, peaks
