"""The GRU's recurrence backward through time, from exp(-L1) on: kernel, then launcher."""

import functools

import triton
import triton.language as tl

from fastsiam.kernels._backward import (
    _as_accumulator,
    _as_cells,
    _as_operand,
    _at_units,
    _gates,
    _load_gates,
    _scales,
    _upstream,
    _vector_gradient,
    launch,
)
from fastsiam.kernels._math import (
    _direction,
    _load_cells,
    _load_low,
    _load_weight,
    _parts,
    _product,
    _sequences,
    _store_cells,
)


@triton.jit
def _derivatives(z, n, h):
    # of twice the new state, by n's gate and by z's; h is twice the old one. docs/kernels.md
    # derives these: all that then waits for the gradient is a multiplication
    h_by_n = 1.0 - n * n
    h_by_n = h_by_n - h_by_n * z
    h_by_z = 0.5 * h - n
    return h_by_n, h_by_z - h_by_z * z * z


@triton.jit
def _cell_gradients(d, r, z, n_by_r, h_by_n, h_by_z):
    # of r, z, n and y; and what d gives to the gradient of the state before, past the product
    dn = d * h_by_n
    passed = d * (0.5 * z + 0.5)
    return dn * n_by_r, d * h_by_z, dn, dn * r + dn, passed


@triton.jit(do_not_specialize=["B", "T", "H", "zero"])
def _siamese_gru_bwd_kernel(
    # P is the number of directions
    # gradient of the L1 of a pair: dsim * similarity * -scale (HAS_DSIM) and dpair (HAS_DPAIR)
    dsim_ptr,  # [B] float32
    similarity_ptr,  # [B] float32
    dpair_ptr,  # [B] float32
    dvectors_ptr,  # [N, P, H] gradient of the sentence vectors (HAS_DVECTORS)
    doutputs_ptr,  # [N, T, P, H] gradient of all states, by token (HAS_DOUTPUTS)
    vectors_ptr,  # [N, P, H] sentence vectors
    # bits of weight_hh transposed: r and z, then y
    weight_ptr,  # [P, PARTS, [BLOCK_H, 2 * BLOCK_H] and [BLOCK_H, BLOCK_H]]
    lengths_ptr,  # [N] valid steps
    mask_ptr,  # [N, T] weights of the tokens (POOLING "mask")
    order_ptr,  # [B] pairs in the order in which programs take them (HAS_ORDER)
    # the forward's records, half precision in words of two
    gates_ptr,  # [P, N, T + 1, BLOCK_H, 4]
    states_ptr,  # [P, N, T + 1, BLOCK_H], not as words
    peaks_ptr,  # [N, P, H] step of the maximum (POOLING "max")
    dgates_ptr,  # [P, N, T + 1, BLOCK_H, 4] out: gate gradients
    scale,  # factor on L1 (HAS_DSIM)
    B,  # pairs; sequences where not PAIRED
    T,
    H,
    zero,  # 0
    BLOCK_H: tl.constexpr,  # 32, 64 or 128 >= H
    BLOCK_N: tl.constexpr,  # sequences of a program, 4, or a multiple of 8
    WARPS: tl.constexpr,
    STREAM: tl.constexpr,  # weight read every step
    OPERAND: tl.constexpr,  # dtype of weight_hh and of gate gradients in their product
    PARTS: tl.constexpr,  # of each, 1 or 2
    WIDEN: tl.constexpr,  # these two: _tiling.Arithmetic
    ASSEMBLY: tl.constexpr,
    DIRECTIONS: tl.constexpr,  # P, 1 or 2: axis 1 of the grid
    POOLING: tl.constexpr,  # "last", "mask" or "max"
    PAIRED: tl.constexpr,
    HAS_DSIM: tl.constexpr,
    HAS_DPAIR: tl.constexpr,
    HAS_DVECTORS: tl.constexpr,
    HAS_DOUTPUTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_H // (16 * WARPS)
    COLUMNS: tl.constexpr = (BLOCK_N + 7) // 8
    EACH: tl.constexpr = BLOCK_N // (4 * COLUMNS)
    DTYPE: tl.constexpr = vectors_ptr.dtype.element_ty
    # elements of a unit in the records: half precision comes in words of two
    GATES: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    SQUARE: tl.constexpr = BLOCK_H * BLOCK_H
    # a gate gradient may be smaller than all that float16 holds
    SCALED: tl.constexpr = DTYPE == tl.float32 and OPERAND == tl.float16

    seq, other, live, length, steps = _sequences(
        lengths_ptr, order_ptr, tl.program_id(0), B, T, BLOCK_N, PAIRED, HAS_ORDER
    )
    last = length - 1
    direction, way = _direction(DIRECTIONS)
    # records stand at the T + 1 gaps between tokens: a step's at the gap where it ends, its gate
    # gradients at the one where it began
    first_gap = seq * (T + 1) + direction * length
    begin = way * first_gap
    last_gap = begin + last
    first_token = seq.to(tl.int64) * T + direction * last
    rows = direction * (2 * B if PAIRED else B).to(tl.int64) * (T + 1)

    # units of the cells, [blocks, half, 1, 1, warps, 8, 1]
    block = tl.arange(0, BLOCKS)[:, None, None, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, None, :, None, None]
    within = 16 * warp + tl.arange(0, 8)[None, None, None, None, None, :, None]
    unit = block * (16 * WARPS) + half * 8 + within
    # loads of one value a cell would get a layout of their own if units were seen to be adjacent
    unit_apart = block * (16 * WARPS) + half * 8 + (within ^ zero)
    # of the gap where a step began, what stands where it ended
    gates_ptr += (rows + way) * (GATES * BLOCK_H)
    gates_ptrs = gates_ptr + (tl.expand_dims(unit, 7) * GATES + tl.arange(0, GATES))
    states_ptrs = states_ptr + rows * BLOCK_H + unit_apart
    dgates_ptr += rows * (4 * BLOCK_H)
    dgates_ptrs = dgates_ptr + (tl.expand_dims(unit, 7) * 4 + tl.arange(0, 4))
    weight_ptr += direction * (PARTS * 3 * SQUARE)
    doutputs_ptrs = doutputs_ptr + direction * H + unit_apart

    inside = unit_apart < H
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

    upstream = _upstream(
        steps,
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
    # of scaled gate gradients the product cannot begin with what comes from outside
    dh = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
    dh = dh if SCALED else _as_accumulator(upstream, BLOCK_H)
    unscale = tl.full((1, 1, COLUMNS, EACH, 1, 1, 4), 1.0, tl.float32)
    dh_y = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
    # what a step's gradient gives to that of the state before it, past the product
    passed = tl.zeros((BLOCKS, 2, COLUMNS, EACH, WARPS, 8, 4), tl.float32)
    if STREAM:
        weight_rz, weight_y = weight_ptr, weight_ptr + 2 * SQUARE
        low_rz, low_y = weight_ptr + 3 * SQUARE, weight_ptr + 5 * SQUARE
    else:
        # products of 0: a use ahead of the loop keeps a weight's change of layout ahead of it
        weight_rz = _load_weight(weight_ptr, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN, zero, True)
        nothing = tl.zeros((2 * BLOCK_H, 8 * COLUMNS), weight_rz.dtype)
        dh = tl.dot(weight_rz, nothing, dh)
        weight_y = _load_weight(
            weight_ptr + 2 * SQUARE, BLOCK_H, BLOCK_H, OPERAND, WIDEN, zero, True
        )
        dh_y = tl.dot(weight_y, tl.zeros((BLOCK_H, 8 * COLUMNS), weight_y.dtype))
        low_rz, low_y = weight_rz, weight_y
        if PARTS == 2:
            low_rz = _load_low(weight_ptr + 3 * SQUARE, BLOCK_H, 2 * BLOCK_H, OPERAND, WIDEN)
            low_y = _load_low(weight_ptr + 5 * SQUARE, BLOCK_H, BLOCK_H, OPERAND, WIDEN)
    # rows of steps behind a sequence's end are its last row's: finite, and its gradient is 0 there
    start = _at_units(way * tl.maximum(last_gap, begin)).to(tl.int64)
    gates = _load_gates(gates_ptrs, start, GATES * BLOCK_H, DTYPE)
    states = _load_cells(states_ptrs + start * BLOCK_H, 7)
    t = steps - 1
    gap = begin + t
    for _ in range(steps):
        before = tl.maximum(tl.minimum(gap - 1, last_gap), begin)
        before = _at_units(way * before).to(tl.int64)
        gates_before = _load_gates(gates_ptrs, before, GATES * BLOCK_H, DTYPE)
        states_before = _load_cells(states_ptrs + before * BLOCK_H, 7)
        r, z, n, n_by_r = _gates(gates, DTYPE)
        h_by_n, h_by_z = _derivatives(z, n, states.to(tl.float32))
        d = _as_cells(dh, BLOCKS, EACH, WARPS) + _as_cells(dh_y, BLOCKS, EACH, WARPS)
        # scaled, this step's, or the next one's
        upstream = _upstream(
            t + 1 if SCALED else t,
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
        if SCALED:
            d = d * unscale + (upstream + passed)
        dr, dz, dn, dy, passed = _cell_gradients(d, r, z, n_by_r, h_by_n, h_by_z)

        # two products for two chains of instructions; their sum waits for the next step, as the
        # compiler would chain them if they were added here. What enters n from x has no part in it
        d_rz = tl.join(dr, dz).to(DTYPE)
        d_y = dy.to(DTYPE)
        x_rz, x_y = d_rz, d_y
        if SCALED:
            largest = tl.maximum(tl.maximum(tl.abs(dr), tl.abs(dz)), tl.abs(d_y))
            rescale, unscale = _scales(largest)
            x_rz *= tl.expand_dims(rescale, 7)
            x_y *= rescale
        x_rz = _as_operand(x_rz, BLOCK_H, ASSEMBLY)
        x_y = _as_accumulator(x_y, BLOCK_H)
        x_rz, low_x_rz = _parts(x_rz, OPERAND, PARTS, WIDEN)
        x_y, low_x_y = _parts(x_y, OPERAND, PARTS, WIDEN)
        dh_y = tl.zeros((BLOCK_H, 8 * COLUMNS), tl.float32)
        dh = dh_y if SCALED else _as_accumulator(upstream + passed, BLOCK_H)
        dh = _product(
            weight_rz, low_rz, x_rz, low_x_rz, dh, t * zero, OPERAND, PARTS, WIDEN, STREAM
        )
        dh_y = _product(
            weight_y, low_y, x_y, low_x_y, dh_y, t * zero, OPERAND, PARTS, WIDEN, STREAM
        )

        at = tl.expand_dims(_at_units(way * gap), 7).to(tl.int64) * (4 * BLOCK_H)
        d_ny = tl.join(dn.to(DTYPE), d_y)
        da = tl.permute(tl.join(d_rz, d_ny), (0, 1, 2, 3, 4, 5, 6, 8, 7))
        da = tl.reshape(da, d.shape + (4,))
        _store_cells(dgates_ptrs + at, da, _at_units(t <= last), 7)
        t -= 1
        gap -= 1
        gates = gates_before
        states = states_before


siamese_gru_bwd = functools.partial(launch, _siamese_gru_bwd_kernel)
