"""Gradients of a layer's weights from the records of its steps: kernels, then launcher.

They are one product, of the gate gradients of all tokens with what the gates were made of:

    sums[gate row, column] = sum over tokens of dgates[token, gate row] * input[token, column]

with the columns of the state before the token, then of the token's row of x, then a 1, which gives
the bias. It reads what a sequence's tokens have and nothing behind its end, so the records need not
be cleared, and rows of x are gathered as they are needed. Tokens are split over programs; a second
kernel adds the parts in one order, so that equal inputs give equal bits, and writes the weights'
gradients in PyTorch's order and size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels import tiling

# of a tile of the product: gate rows and columns; and of the tokens that it adds at a time, so many
# steps of as many sequences as give TOKENS
ROWS, COLUMNS, TOKENS, STEPS = 128, 64, 32, 8
WARPS = 8
# of the second kernel: units and columns of a program
UNITS = 16


@triton.jit
def _tokens(lengths_ptr, group, time, N, T, TOKENS: tl.constexpr, STEPS: tl.constexpr):
    # sequence and step of each token of a block, and whether there is one
    place = tl.arange(0, TOKENS)
    n = group * (TOKENS // STEPS) + place // STEPS
    length = tl.load(lengths_ptr + n, mask=n < N, other=0).to(tl.int32)
    t = time + place % STEPS
    return n, t, tl.minimum(length, T)


@triton.jit
def _product_of_tokens(
    dgates_ptr,
    input_ptr,
    ids_ptr,
    lengths_ptr,
    dgates_offs,  # of the tile's gate rows
    column,
    width,  # columns of the input
    direction,
    N,
    T,
    R,
    splits_of_sequences,
    splits_of_time,
    ROW: tl.constexpr,  # of dgates
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    OF_STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GROUP: tl.constexpr = TOKENS // STEPS
    part = tl.program_id(1)
    sums = tl.zeros((dgates_offs.shape[0], column.shape[0]), tl.float32)
    inside = (column < width)[None, :]
    for group in range(part % splits_of_sequences, tl.cdiv(N, GROUP), splits_of_sequences):
        _, _, length = _tokens(lengths_ptr, group, 0, N, T, TOKENS, STEPS)
        begin = part // splits_of_sequences * STEPS
        for time in range(begin, tl.max(length, 0), splits_of_time * STEPS):
            n, t, length = _tokens(lengths_ptr, group, time, N, T, TOKENS, STEPS)
            valid = t < length
            # the gap where the token's step began
            gap = n.to(tl.int64) * (T + 1) + t + direction
            dgates = tl.load(
                dgates_ptr + (gap[:, None] * ROW + dgates_offs[None, :]),
                mask=valid[:, None],
                other=0.0,
            )
            if OF_STATES:
                # no step wrote the state that a sequence begins with, which is 0
                begun = tl.where(direction == 1, t < length - 1, t > 0)
                offs = gap[:, None] * width + column[None, :]
                given = tl.load(input_ptr + offs, mask=(valid & begun)[:, None] & inside, other=0.0)
            else:
                row = n.to(tl.int64) * T + t
                if HAS_IDS:
                    row = tl.load(ids_ptr + row, mask=valid, other=0).to(tl.int64)
                    row = tl.minimum(tl.maximum(row, 0), R - 1)
                offs = row[:, None] * width + column[None, :]
                given = tl.load(input_ptr + offs, mask=valid[:, None] & inside, other=0.0)
                given = tl.where((column == width)[None, :], 1.0, given.to(tl.float32))
                given = given.to(dgates.dtype)
            if WIDEN:
                dgates = dgates.to(tl.float32)
                given = given.to(tl.float32)
            sums = tl.dot(tl.trans(dgates), given, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["N", "T", "R", "splits_of_sequences", "splits_of_time"])
def _weight_gradients_kernel(
    # P is the number of directions, axis 2 of the grid
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] gate gradients, at the gap where a step began
    states_ptr,  # [P, N, T + 1, BLOCK_H] states, at the gap where a step ended
    x_ptr,  # [R, D]
    ids_ptr,  # [N, T] rows of x (HAS_IDS); else row n * T + t is the token's own
    lengths_ptr,  # [N] valid steps
    sums_ptr,  # [parts, P, 4 * BLOCK_H, tiles of columns * COLUMNS] out
    N,
    T,
    R,
    D,
    splits_of_sequences,  # parts of the sequences, and of the time: axis 1 of the grid
    splits_of_time,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32 whatever was loaded
    PRECISION: tl.constexpr,  # of float32 products
):
    TALL: tl.constexpr = 4 * BLOCK_H // ROWS
    OF_STATES: tl.constexpr = (BLOCK_H + COLUMNS - 1) // COLUMNS
    direction = tl.program_id(2)
    tile = tl.program_id(0) // TALL
    rows = tl.program_id(0) % TALL * ROWS + tl.arange(0, ROWS)
    gaps = direction * N.to(tl.int64) * (T + 1)
    dgates_ptr += gaps * (4 * BLOCK_H)
    column = tl.arange(0, COLUMNS)
    if tile < OF_STATES:
        sums = _product_of_tokens(
            dgates_ptr,
            states_ptr + gaps * BLOCK_H,
            ids_ptr,
            lengths_ptr,
            rows,
            tile * COLUMNS + column,
            BLOCK_H,
            direction,
            N,
            T,
            R,
            splits_of_sequences,
            splits_of_time,
            4 * BLOCK_H,
            TOKENS,
            STEPS,
            True,
            HAS_IDS,
            WIDEN,
            PRECISION,
        )
    else:
        sums = _product_of_tokens(
            dgates_ptr,
            x_ptr,
            ids_ptr,
            lengths_ptr,
            rows,
            (tile - OF_STATES) * COLUMNS + column,
            D,
            direction,
            N,
            T,
            R,
            splits_of_sequences,
            splits_of_time,
            4 * BLOCK_H,
            TOKENS,
            STEPS,
            False,
            HAS_IDS,
            WIDEN,
            PRECISION,
        )
    row = (tl.program_id(1) * tl.num_programs(2) + direction) * (4 * BLOCK_H) + rows
    width = tl.num_programs(0) // TALL * COLUMNS
    offs = row.to(tl.int64)[:, None] * width + (tile * COLUMNS + column)[None, :]
    tl.store(sums_ptr + offs, sums)


@triton.jit(do_not_specialize=["P"])
def _collect_kernel(
    sums_ptr,  # [PARTS, P, 4 * BLOCK_H, tiles of columns * COLUMNS]
    factors_ptr,  # [4] float32, what a stored gradient of a gate counts
    dweight_ih_ptr,  # [P, GATES * H, D] out
    dweight_hh_ptr,  # [P, GATES * H, H] out
    dbias_ptr,  # [P, 4 * H] out
    D,
    H,
    P,
    BLOCK_H: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    GATES: tl.constexpr,  # of a unit in the weights: 4, or 3 in a GRU's
):
    OF_STATES: tl.constexpr = (BLOCK_H + COLUMNS - 1) // COLUMNS
    direction = tl.program_id(0) // 4
    gate = tl.program_id(0) % 4
    tile = tl.program_id(1)
    unit = tl.program_id(2) * UNITS + tl.arange(0, UNITS)
    width = tl.num_programs(1) * COLUMNS
    row = (direction * BLOCK_H + unit) * 4 + gate
    offs = row.to(tl.int64)[:, None] * width + (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    sums = tl.zeros((UNITS, COLUMNS), tl.float32)
    for part in tl.static_range(PARTS):
        sums += tl.load(sums_ptr + offs + part * (P * (4 * BLOCK_H)).to(tl.int64) * width)
    sums *= tl.load(factors_ptr + gate)
    there = (unit < H)[:, None]
    if tile < OF_STATES:
        # a GRU has r, z, y for the state
        of_state = (direction * GATES + tl.minimum(gate, GATES - 1)) * H + unit
        column = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = there & (column < H)
        if GATES == 3:
            inside = inside & (gate != 2)
        # halved because the states are 2h
        dweight_hh_ptrs = dweight_hh_ptr + (of_state.to(tl.int64)[:, None] * H + column)
        tl.store(dweight_hh_ptrs, (0.5 * sums).to(dweight_hh_ptr.dtype.element_ty), mask=inside)
    else:
        # and r, z, n for the input
        of_input = (direction * GATES + gate) * H + unit
        feature = ((tile - OF_STATES) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = there & (feature < D) & (gate < GATES)
        dweight_ih_ptrs = dweight_ih_ptr + (of_input.to(tl.int64)[:, None] * D + feature)
        tl.store(dweight_ih_ptrs, sums.to(dweight_ih_ptr.dtype.element_ty), mask=inside)
        dbias_ptrs = dbias_ptr + ((direction * 4 + gate) * H + unit)[:, None] + 0 * feature
        tl.store(dbias_ptrs, sums.to(dbias_ptr.dtype.element_ty), mask=there & (feature == D))


def products_over_tokens(
    dgates: Tensor,
    states: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    steps: int,
    factors: Tensor,
    weight_shape: tuple[int, int],
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the weights from gate gradients by token.

    Args:
        dgates: [P, N * (T + 1), block, 4]; what stands where no step was is not read.
        states: [P, N * (T + 1), block] states, twice as large.
        x: [R, D] in dgates' dtype.
        ids: [N, T] rows of x, or None where row n * T + t is the token's own.
        lengths: [N].
        steps: T.
        factors: [4] float32: what a stored gradient counts, gate by gate.
        weight_shape: gates of the weights, 4, or 3 in a GRU's; and H.
        allow_tf32: whether float32 products may be rounded to tf32.

    Returns:
        dweight_ih [P, gates * H, D], dweight_hh [P, gates * H, H] and dbias [P, 4 * H].
    """
    gates, H = weight_shape
    P, N, D, block = dgates.shape[0], lengths.shape[0], x.shape[1], dgates.shape[2]
    new = torch.zeros if N == 0 or steps == 0 else torch.empty
    dweight_ih, dweight_hh, dbias = (
        new(shape, device=x.device, dtype=x.dtype)
        for shape in ((P, gates * H, D), (P, gates * H, H), (P, 4 * H))
    )
    if N == 0 or steps == 0:
        return dweight_ih, dweight_hh, dbias
    target = tiling.target_of(x.device)
    how = tiling.arithmetic(x.dtype, allow_tf32, target)
    tall, wide = 4 * block // ROWS, tiling.cdiv(block, COLUMNS) + tiling.cdiv(D + 1, COLUMNS)
    groups, times = tiling.cdiv(N, TOKENS // STEPS), tiling.cdiv(steps, STEPS)
    parts = tiling.parts_of_tokens(x.device, target, tall * wide * P, groups * times)
    of_sequences = min(parts, tiling.power_of_two_below(groups))
    sums = x.new_empty((parts, P, 4 * block, wide * COLUMNS), dtype=torch.float32)
    _weight_gradients_kernel[(tall * wide, parts, P)](
        dgates_ptr=dgates,
        states_ptr=states,
        x_ptr=x.contiguous(),
        ids_ptr=lengths if ids is None else ids,
        lengths_ptr=lengths,
        sums_ptr=sums,
        N=N,
        T=steps,
        R=x.shape[0],
        D=D,
        splits_of_sequences=of_sequences,
        splits_of_time=parts // of_sequences,
        BLOCK_H=block,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        TOKENS=TOKENS,
        STEPS=STEPS,
        HAS_IDS=ids is not None,
        WIDEN=how.WIDEN,
        PRECISION=tiling.product_precision(x.dtype, allow_tf32, target),
        num_warps=WARPS,
    )
    _collect_kernel[(4 * P, wide, tiling.cdiv(H, UNITS))](
        sums_ptr=sums,
        factors_ptr=factors,
        dweight_ih_ptr=dweight_ih,
        dweight_hh_ptr=dweight_hh,
        dbias_ptr=dbias,
        D=D,
        H=H,
        P=P,
        BLOCK_H=block,
        UNITS=UNITS,
        COLUMNS=COLUMNS,
        PARTS=parts,
        GATES=gates,
        num_warps=WARPS,
    )
    return dweight_ih, dweight_hh, dbias
