"""A layer's weights in the kernels' row order, scaled, in one launch: kernel, then launcher.

Row order. In a table a unit's four gates stand together, i, f, g, o. The forward weight's rows are
[gate / 2][unit / 8][gate % 2][unit % 8], which makes a tensor-core accumulator hold a unit's four
gates in one thread; where H is wide, so within each slice of units. docs/kernels.md has the
drawing. A GRU's gates are r, z, n, y: of its weights n has none for the state, y none for the
input. There, and in units past H, stands 0.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsiam.kernels._math import _low
from fastsiam.kernels._tiling import NARROW, block_h, cdiv
from fastsiam.kernels._tiling_wide import forward_units

# columns of the input's weight that a program packs, and units at most
COLUMNS = 64
UNITS = 64
WARPS = 8


@triton.jit
def _scaled(pointers, mask, factor):
    x = tl.load(pointers, mask=mask, other=0.0)
    return (x.to(tl.float32) * factor).to(x.dtype)


@triton.jit
def _pack_kernel(
    # P is the number of directions
    weight_ih_ptr,  # [P, GATES * H, D] (HAS_INPUT)
    weight_hh_ptr,  # [P, GATES * H, H]
    bias_ptr,  # [P, 4 * H] (HAS_BIAS)
    factors_ptr,  # [4] float32, of the gates
    packed_ih_ptr,  # [P, BLOCK_H, 4, D] out
    packed_hh_ptr,  # [P, PARTS, ...] out; see `pack`
    packed_bias_ptr,  # [P, BLOCK_H, 4] out
    D,
    H,
    BLOCK_H: tl.constexpr,  # H with its padding
    UNITS: tl.constexpr,  # of a program, and columns of the recurrent weight
    SLICE: tl.constexpr,  # units whose rows stand together in the forward
    COLUMNS: tl.constexpr,
    GATES: tl.constexpr,  # of a unit in the weights: 4, or 3 in a GRU's
    TRANSPOSED: tl.constexpr,
    BY_UNIT: tl.constexpr,  # columns of the transposed weight as records have them: unit, gate
    HAS_INPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,  # of an element of weight_hh, 1 or 2
):
    SQUARE: tl.constexpr = BLOCK_H * BLOCK_H
    direction = tl.program_id(0) // 4
    gate = tl.program_id(0) % 4
    unit = tl.program_id(2) * UNITS + tl.arange(0, UNITS)
    factor = tl.load(factors_ptr + gate)
    weight_row = direction.to(tl.int64) * (GATES * H) + unit
    packed_row = (direction.to(tl.int64) * BLOCK_H + unit) * 4 + gate
    # axis 1 of the grid: columns of the recurrent weight, the first with the bias, then columns of
    # the input's weight
    if tl.program_id(1) < BLOCK_H // UNITS:
        k = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        there = unit < H
        if GATES == 3:
            there = there & (gate != 2)
        hh_ptrs = weight_hh_ptr + ((weight_row + tl.minimum(gate, GATES - 1) * H)[:, None] * H + k)
        # halved once more because the kernels keep 2h
        hh = _scaled(hh_ptrs, there[:, None] & (k < H), 0.5 * factor)
        kept = None
        if TRANSPOSED and BY_UNIT:
            packed_hh_ptr += direction * (PARTS * 4 * SQUARE)
            packed_hh_ptrs = packed_hh_ptr + (k * (4 * BLOCK_H) + (unit * 4 + gate)[:, None])
        elif TRANSPOSED:
            packed_hh_ptr += direction * (PARTS * GATES * SQUARE) + gate // 2 * (2 * SQUARE)
            column = gate % 2 * BLOCK_H + unit
            width = 2 * BLOCK_H
            if GATES == 3:
                # y has a place to itself, and n none
                width = tl.where(gate == 3, BLOCK_H, 2 * BLOCK_H)
                column = tl.where(gate == 3, unit, column)
                kept = ((gate != 2) & (unit < BLOCK_H))[:, None]
            packed_hh_ptrs = packed_hh_ptr + (k * width + column[:, None])
        else:
            within = unit % SLICE
            row = gate // 2 * (2 * SLICE) + within // 8 * 16 + gate % 2 * 8 + within % 8
            row += unit // SLICE * (4 * SLICE)
            packed_hh_ptr += direction * (PARTS * 4 * SQUARE)
            packed_hh_ptrs = packed_hh_ptr + (row[:, None] * BLOCK_H + k)
        OPERAND: tl.constexpr = packed_hh_ptr.dtype.element_ty
        if OPERAND == hh.dtype:
            tl.store(packed_hh_ptrs, hh, mask=kept)
        else:
            # kept within float16's range, unless not finite
            within = tl.minimum(tl.maximum(hh, -65504.0), 65504.0)
            hh = tl.where(tl.abs(hh) < float("inf"), within, hh)
            tl.store(packed_hh_ptrs, hh.to(OPERAND), mask=kept)
            if PARTS == 2:
                packed_hh_ptrs += (GATES if TRANSPOSED else 4) * SQUARE
                low = _low(within, within.to(OPERAND))
                tl.store(packed_hh_ptrs, low, mask=kept)
        if HAS_BIAS and tl.program_id(1) == 0:
            bias = _scaled(bias_ptr + (direction * 4 + gate) * H + unit, unit < H, factor)
            tl.store(packed_bias_ptr + packed_row, bias)
    elif HAS_INPUT:
        d = (tl.program_id(1) - BLOCK_H // UNITS) * COLUMNS + tl.arange(0, COLUMNS)
        ih_ptrs = weight_ih_ptr + ((weight_row + gate * H)[:, None] * D + d)
        ih = _scaled(ih_ptrs, ((unit < H) & (gate < GATES))[:, None] & (d < D), factor)
        tl.store(packed_ih_ptr + (packed_row[:, None] * D + d), ih, mask=(d < D)[None, :])


def pack(
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    transposed: bool,
    operand: torch.dtype,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the weights of a layer that runs P directions.

    Args:
        weight_ih: [P, 4H, D], of a GRU [P, 3H, D], or None.
        weight_hh: [P, 4H, H], of a GRU [P, 3H, H].
        bias: [P, 4H] or None.
        factors: [4] float32, powers of two: what each gate's rows are multiplied by.
        transposed: whether to lay weight_hh out for the backward.
        operand: what weight_hh is rounded to.
        parts: 1, or 2 for what was rounded away too; see `_math._low`.

    Returns:
        weight_ih as [P, 4 * block, D], weight_hh as [P, parts, 4 * block, block] for `a + W h`, the
        bias as [P, 4 * block]. Transposed, weight_hh is [P, parts, 2, block, 2 * block], columns i,
        f and g, o; of a GRU [P, parts, 3 * block * block], in them r and z, [block, 2 * block], and
        y, [block, block]; of a wide H [P, parts, block, 4 * block], columns by unit and gate. What
        was not given is empty.
    """
    P, rows, H = weight_hh.shape
    gates, block = rows // H, block_h(H)
    units, wide = math.gcd(block, UNITS), H > NARROW
    if not transposed:
        shape: tuple[int, ...] = (P, parts, 4 * block, block)
    elif wide:
        shape = (P, parts, block, 4 * block)
    elif gates == 4:
        shape = (P, parts, 2, block, 2 * block)
    else:
        shape = (P, parts, 3 * block * block)
    packed_hh = weight_hh.new_empty(shape, dtype=operand)
    D = 0 if weight_ih is None else weight_ih.shape[2]
    packed_ih = weight_hh.new_empty(P, 4 * block, D)
    packed_bias = weight_hh.new_empty((P, 4 * block) if bias is not None else 0)
    _pack_kernel[(4 * P, block // units + cdiv(D, COLUMNS), block // units)](
        weight_ih_ptr=weight_hh if weight_ih is None else weight_ih.contiguous(),
        weight_hh_ptr=weight_hh.contiguous(),
        bias_ptr=weight_hh if bias is None else bias.contiguous(),
        factors_ptr=factors,
        packed_ih_ptr=packed_ih,
        packed_hh_ptr=packed_hh,
        packed_bias_ptr=packed_bias,
        D=D,
        H=H,
        BLOCK_H=block,
        UNITS=units,
        SLICE=forward_units() if wide else block,
        COLUMNS=COLUMNS,
        GATES=gates,
        TRANSPOSED=transposed,
        BY_UNIT=wide,
        HAS_INPUT=weight_ih is not None,
        HAS_BIAS=bias is not None,
        PARTS=parts,
        num_warps=WARPS,
    )
    return packed_ih, packed_hh, packed_bias
