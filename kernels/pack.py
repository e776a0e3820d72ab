"""A layer's weights in the kernels' row order, scaled, in one launch: kernel, then launcher.

Row order. In a table a unit's four gates stand together, i, f, g, o. The forward weight's rows are
[gate / 2][unit / 8][gate % 2][unit % 8], which makes a tensor-core accumulator hold a unit's four
gates in one thread; where H is wide, so within each slice of units. docs/kernels.md has the
drawing. The backward has the same weight transposed, with other factors; training packs both at
once. A GRU's gates are r, z, n, y: of its weights n has none for the state, y none for the input.
There, and in units past H, stands 0.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels.tile import _low
from fastsiam.kernels.tiling import FORWARD_UNITS, NARROW, block_h, cdiv

# columns of the input's weight that a program packs, and units at most
COLUMNS = 64
UNITS = 64
WARPS = 8


class Operand(NamedTuple):
    """How a product has an element of weight_hh."""

    dtype: torch.dtype  # what it is rounded to
    parts: int  # 1, or 2 for what was rounded away too; see `tile._low`


@triton.jit
def _scaled(x, factor):
    return (x.to(tl.float32) * factor).to(x.dtype)


@triton.jit
def _store_operand(pointers, x, mask, PARTS: tl.constexpr, SIZE: tl.constexpr):
    # SIZE: elements from a part to the next
    OPERAND: tl.constexpr = pointers.dtype.element_ty
    if OPERAND == x.dtype:
        tl.store(pointers, x, mask=mask)
    else:
        # kept within float16's range, unless not finite
        within = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        x = tl.where(tl.abs(x) < float("inf"), within, x)
        tl.store(pointers, x.to(OPERAND), mask=mask)
        if PARTS == 2:
            tl.store(pointers + SIZE, _low(within, within.to(OPERAND)), mask=mask)


@triton.jit
def _pack_kernel(
    # P is the number of directions
    weight_ih_ptr,  # [P, GATES * H, D] (HAS_INPUT)
    weight_hh_ptr,  # [P, GATES * H, H] (AHEAD, BACK)
    bias_ptr,  # [P, 4 * H] (HAS_BIAS)
    factors_ptr,  # [4] float32, of the gates; behind them the backward's, [4] (BACK)
    packed_ih_ptr,  # [P, BLOCK_H, 4, D] out
    packed_bias_ptr,  # [P, BLOCK_H, 4] out
    # weight_hh for the forward and for the backward, see `packed_shape`
    ahead_ptr,  # [P, AHEAD_PARTS, ...] out (AHEAD)
    back_ptr,  # [P, BACK_PARTS, ...] out (BACK)
    D,
    H,
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program, and columns of the recurrent weight
    SLICE: tl.constexpr,  # units whose rows stand together in the forward
    COLUMNS: tl.constexpr,
    GATES: tl.constexpr,  # of a unit in the weights: 4, or 3 in a GRU's
    BY_UNIT: tl.constexpr,  # columns for the backward as records have them: unit, gate
    HAS_INPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    AHEAD_PARTS: tl.constexpr,
    BACK: tl.constexpr,
    BACK_PARTS: tl.constexpr,
):
    SQUARE: tl.constexpr = BLOCK_H * BLOCK_H
    # axis 1 of the grid: columns of the recurrent weight, the first with the bias, then columns of
    # the input's weight
    RECURRENT: tl.constexpr = BLOCK_H // UNITS if AHEAD or BACK else 0
    direction = tl.program_id(0) // 4
    gate = tl.program_id(0) % 4
    unit = tl.program_id(2) * UNITS + tl.arange(0, UNITS)
    factor = tl.load(factors_ptr + gate)
    weight_row = direction.to(tl.int64) * (GATES * H) + unit
    packed_row = (direction.to(tl.int64) * BLOCK_H + unit) * 4 + gate
    if tl.program_id(1) < RECURRENT:
        k = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        there = unit < H
        if GATES == 3:
            there = there & (gate != 2)
        hh_ptrs = weight_hh_ptr + ((weight_row + tl.minimum(gate, GATES - 1) * H)[:, None] * H + k)
        hh = tl.load(hh_ptrs, mask=there[:, None] & (k < H), other=0.0)
        # halved, both ahead and back, because the kernels keep 2h
        if AHEAD:
            within = unit % SLICE
            row = gate // 2 * (2 * SLICE) + within // 8 * 16 + gate % 2 * 8 + within % 8
            row += unit // SLICE * (4 * SLICE)
            ahead_ptr += direction * (AHEAD_PARTS * 4 * SQUARE)
            ahead_ptrs = ahead_ptr + (row[:, None] * BLOCK_H + k)
            _store_operand(ahead_ptrs, _scaled(hh, 0.5 * factor), None, AHEAD_PARTS, 4 * SQUARE)
        if BACK:
            hh = _scaled(hh, 0.5 * tl.load(factors_ptr + 4 + gate))
            # n's columns stand in it where records have them, and hold 0
            SIZE: tl.constexpr = (4 if BY_UNIT else GATES) * SQUARE
            back_ptr += direction * (BACK_PARTS * SIZE)
            if BY_UNIT:
                back_ptrs = back_ptr + (k * (4 * BLOCK_H) + (unit * 4 + gate)[:, None])
                _store_operand(back_ptrs, hh, None, BACK_PARTS, SIZE)
            else:
                back_ptr += gate // 2 * (2 * SQUARE)
                column = gate % 2 * BLOCK_H + unit
                width = 2 * BLOCK_H
                kept = None
                if GATES == 3:
                    # y has a place to itself, and n none
                    width = tl.where(gate == 3, BLOCK_H, 2 * BLOCK_H)
                    column = tl.where(gate == 3, unit, column)
                    kept = ((gate != 2) & (unit < BLOCK_H))[:, None]
                back_ptrs = back_ptr + (k * width + column[:, None])
                _store_operand(back_ptrs, hh, kept, BACK_PARTS, SIZE)
        if HAS_BIAS and tl.program_id(1) == 0:
            bias = tl.load(bias_ptr + (direction * 4 + gate) * H + unit, mask=unit < H, other=0.0)
            tl.store(packed_bias_ptr + packed_row, _scaled(bias, factor))
    elif HAS_INPUT:
        d = (tl.program_id(1) - RECURRENT) * COLUMNS + tl.arange(0, COLUMNS)
        ih_ptrs = weight_ih_ptr + ((weight_row + gate * H)[:, None] * D + d)
        inside = ((unit < H) & (gate < GATES))[:, None] & (d < D)
        ih = tl.load(ih_ptrs, mask=inside, other=0.0)
        packed_ih_ptrs = packed_ih_ptr + (packed_row[:, None] * D + d)
        tl.store(packed_ih_ptrs, _scaled(ih, factor), mask=(d < D)[None, :])


def packed_shape(P: int, gates: int, H: int, parts: int, transposed: bool) -> tuple[int, ...]:
    """Return the shape of weight_hh packed, for `a + W h` [P, parts, 4 * block, block].

    Transposed it is [P, parts, 2, block, 2 * block], columns i, f and g, o; of a GRU [P, parts,
    3 * block * block], in them r and z, [block, 2 * block], and y, [block, block]; of a wide H
    [P, parts, block, 4 * block], columns by unit and gate, those of a GRU's n 0.
    """
    block = block_h(H)
    if not transposed:
        return P, parts, 4 * block, block
    if H > NARROW:
        return P, parts, block, 4 * block
    if gates == 4:
        return P, parts, 2, block, 2 * block
    return P, parts, 3 * block * block


def pack(
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    ahead: Operand | None = None,
    back: Operand | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack the weights of a layer that runs P directions.

    Args:
        weight_ih: [P, 4H, D], of a GRU [P, 3H, D], or None.
        weight_hh: [P, 4H, H], of a GRU [P, 3H, H].
        bias: [P, 4H] or None; it comes with weight_hh.
        factors: [4] float32, powers of two: what each gate's rows are multiplied by; with `back`
            [2, 4], the second row for that.
        ahead: how the forward wants weight_hh, or None where it does not.
        back: how the backward wants it, or None.

    Returns:
        weight_ih as [P, 4 * block, D], the bias as [P, 4 * block], and weight_hh for the forward
        and for the backward, in `packed_shape`. What was not given or asked for is empty.
    """
    P, rows, H = weight_hh.shape
    gates, block = rows // H, block_h(H)
    units, wide = math.gcd(block, UNITS), H > NARROW
    ahead_hh, back_hh = (
        weight_hh.new_empty(0)
        if operand is None
        else weight_hh.new_empty(
            packed_shape(P, gates, H, operand.parts, transposed), dtype=operand.dtype
        )
        for operand, transposed in ((ahead, False), (back, True))
    )
    D = 0 if weight_ih is None else weight_ih.shape[2]
    packed_ih = weight_hh.new_empty(P, 4 * block, D)
    packed_bias = weight_hh.new_empty((P, 4 * block) if bias is not None else 0)
    columns = cdiv(D, COLUMNS) + (0 if ahead is None and back is None else block // units)
    _pack_kernel[(4 * P, columns, block // units)](
        weight_ih_ptr=weight_hh if weight_ih is None else weight_ih.contiguous(),
        weight_hh_ptr=weight_hh.contiguous(),
        bias_ptr=weight_hh if bias is None else bias.contiguous(),
        factors_ptr=factors,
        packed_ih_ptr=packed_ih,
        packed_bias_ptr=packed_bias,
        ahead_ptr=ahead_hh,
        back_ptr=back_hh,
        D=D,
        H=H,
        BLOCK_H=block,
        UNITS=units,
        SLICE=FORWARD_UNITS if wide else block,
        COLUMNS=COLUMNS,
        GATES=gates,
        BY_UNIT=wide,
        HAS_INPUT=weight_ih is not None,
        HAS_BIAS=bias is not None,
        AHEAD=ahead is not None,
        AHEAD_PARTS=1 if ahead is None else ahead.parts,
        BACK=back is not None,
        BACK_PARTS=1 if back is None else back.parts,
        num_warps=WARPS,
    )
    return packed_ih, packed_bias, ahead_hh, back_hh
