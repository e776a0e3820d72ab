"""Device functions the kernels share: activations, and views of a tile that cost no exchange.

docs/kernels.md draws the tiles. A "cell tile" holds one number per (unit, sequence) of a program;
its axes are chosen so that the compiler's default layout of a load is a tensor-core accumulator's.
"""

import torch
import triton
import triton.language as tl

# compilers before 3.7 give lanes to the first of equally contiguous axes of a tile, later ones to
# the last: there the axes are turned round for each load and store
TURNED = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))

# the interpreter reduces an axis by numpy only where it knows the function, else in Python
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# of the low part of a value in two of float16: without it the low one's exponent may be too small
LOW_SCALE = tl.constexpr(2048.0)


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr, ASSEMBLY: tl.constexpr):
    if APPROXIMATE:
        # one instruction, relative error 2^-11, below the rounding of the operands it is used with
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # exp may overflow to inf, which gives -1, never inf / inf; near 0 the difference would
        # cancel, and five terms of the series are right to a unit in the last place
        s = x * x
        series = s * (-17.0 / 315.0 + s * (62.0 / 2835.0))
        series = x + x * (s * (-1.0 / 3.0 + s * (2.0 / 15.0 + series)))
        if ASSEMBLY:
            # two units in the last place each, without the steps that keep subnormals
            inverse = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 1.0; rcp.approx.ftz.f32 $0, $0;",
                "=f,f",
                [x * -2.885390081777927],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            inverse = 1.0 / (1.0 + tl.exp(-2.0 * x))
        return tl.where(s < 0.0625, series, 2.0 * inverse - 1.0)


@triton.jit
def _direction(DIRECTIONS: tl.constexpr):
    # the direction that this program runs, and its way through the tokens: 1 ahead, -1 back
    if DIRECTIONS == 2:
        direction = tl.program_id(1)
        return direction, 1 - 2 * direction
    else:
        return 0, 1


@triton.jit
def _sequences(
    lengths_ptr,
    order_ptr,
    tile,
    B,
    T,
    BLOCK_N: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    # the sequences of a tile, [columns, each, 4], and the other side of each; whether they are
    # there; their lengths; the longest. A pair's sides are one thread's, or of EACH 1 two lanes'
    COLUMNS: tl.constexpr = (BLOCK_N + 7) // 8
    EACH: tl.constexpr = BLOCK_N // (4 * COLUMNS)
    column = tl.arange(0, COLUMNS)[:, None, None]
    within = 4 * tl.arange(0, EACH)[None, :, None] + tl.arange(0, 4)[None, None, :]
    if PAIRED:
        side = within // (2 * EACH)
        slot = tile * (BLOCK_N // 2) + 2 * EACH * column + within % (2 * EACH)
    else:
        slot = tile * BLOCK_N + 4 * EACH * column + within
    live = slot < B
    slot = tl.minimum(slot, B - 1)
    if HAS_ORDER:
        slot = tl.load(order_ptr + slot).to(tl.int32)
    if PAIRED:
        seq = slot + side * B
        other = slot + (1 - side) * B
    else:
        seq = slot
        other = slot
    length = tl.load(lengths_ptr + seq).to(tl.int32)
    length = tl.where(live, tl.minimum(tl.maximum(length, 0), T), 0)
    return seq, other, live, length, tl.max(tl.max(tl.max(length, 2), 1), 0)


@triton.jit
def _fill_columns(x, AXIS: tl.constexpr):
    # a thread has two columns of a product: one sequence fills both
    return tl.broadcast_to(x, x.shape[:AXIS] + (2,) + x.shape[AXIS + 1 :])


@triton.jit
def _take_columns(x, AXIS: tl.constexpr, EACH: tl.constexpr):
    # the way back
    if EACH == 2:
        return x
    elif INTERPRETED:
        return 0.5 * tl.sum(x, AXIS, keep_dims=True)
    else:
        # costs nothing. A split would leave the compiler a choice of layouts, and it takes them all
        return tl.reduce(x, AXIS, _first, keep_dims=True)


@triton.jit
def _first(x, y):
    return x


@triton.jit
def _turn(x, AXES: tl.constexpr):
    # reverse the cell axes; one more axis, contiguous in memory, stays the last
    if not TURNED:
        return x
    elif AXES == 6:
        if len(x.shape) == 6:
            return tl.permute(x, (5, 4, 3, 2, 1, 0))
        else:
            return tl.permute(x, (5, 4, 3, 2, 1, 0, 6))
    else:
        if len(x.shape) == 7:
            return tl.permute(x, (6, 5, 4, 3, 2, 1, 0))
        else:
            return tl.permute(x, (6, 5, 4, 3, 2, 1, 0, 7))


@triton.jit
def _load_cells(pointers, AXES: tl.constexpr):
    return _turn(tl.load(_turn(pointers, AXES)), AXES)


@triton.jit
def _load_cells_where(pointers, mask, AXES: tl.constexpr):
    x = tl.load(_turn(pointers, AXES), mask=_turn(mask, AXES), other=0.0)
    return _turn(x, AXES).to(tl.float32)


@triton.jit
def _store_cells(pointers, x, mask, AXES: tl.constexpr):
    if len(x.shape) > AXES:
        mask = tl.expand_dims(mask, AXES)
    mask = tl.broadcast_to(mask, x.shape)
    x = x.to(pointers.dtype.element_ty)
    tl.store(_turn(pointers, AXES), _turn(x, AXES), mask=_turn(mask, AXES))


def in_triton(dtype: torch.dtype) -> tl.dtype:
    """Return a dtype's name in a kernel, as a compile-time argument."""
    found: tl.dtype = getattr(tl, str(dtype).removeprefix("torch."))
    return found


@triton.jit
def _low(x, high):
    # the second part of x: what the first, `high`, leaves of it
    return ((x - high.to(tl.float32)) * LOW_SCALE).to(high.dtype)


@triton.jit
def _load_weight(
    weight_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
    zero,
    BY_FLOAT: tl.constexpr,
):
    # weights come as bits, and are widened before use: the compiler then brings the narrow value
    # into the operand's layout once, ahead of the loop, and keeps it in registers. Given the dot
    # operand itself it would sink the conversion into the loop and read shared memory every step
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    weight = _from_bits(tl.load(weight_ptr + offs), OPERAND, zero, BY_FLOAT)
    return weight.to(tl.float32) if WIDEN else weight


@triton.jit
def _load_low(
    weight_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # the low part of a weight, for the compiler to keep in shared memory and to read every step:
    # registers hold the high one. Without the barrier it would be fetched before they do
    tl.debug_barrier()
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    weight = tl.load(weight_ptr.to(tl.pointer_type(OPERAND), bitcast=True) + offs)
    return weight.to(tl.float32) if WIDEN else weight


@triton.jit
def _from_bits(x, DTYPE: tl.constexpr, zero, BY_FLOAT: tl.constexpr):
    # `zero` is 0 at run time, which the compiler cannot know. A bfloat16 can be widened to float32
    # as well: in half the shared memory, but with more registers
    if DTYPE == tl.bfloat16 and BY_FLOAT:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)
    elif DTYPE == tl.float32:
        return (x.to(tl.int64) + zero).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (x.to(tl.int32) + zero).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _unpack(x, DTYPE: tl.constexpr):
    # two halves of a 32-bit word, low and high, as float32
    if DTYPE == tl.bfloat16:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
    else:
        low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _rows(x, PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    # part PART of PARTS, a power of two, of the rows of x, [ROWS, COLS], by halving
    if PARTS == 1:
        return x
    else:
        upper, lower = tl.split(tl.permute(tl.reshape(x, (2, ROWS // 2, COLS)), (1, 2, 0)))
        if PART < PARTS // 2:
            return _rows(upper, PART, PARTS // 2, ROWS // 2, COLS)
        else:
            return _rows(lower, PART - PARTS // 2, PARTS // 2, ROWS // 2, COLS)


@triton.jit
def _parts(x, OPERAND: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    # an operand of `_product`: x rounded, and what that leaves of it (PARTS 2)
    high = x.to(OPERAND)
    low = _low(x, high) if PARTS == 2 else high
    if WIDEN:
        return high.to(tl.float32), low.to(tl.float32)
    else:
        return high, low


@triton.jit
def _product(
    weight,  # [M, K], or where STREAM a pointer to its bits
    weight_low,  # likewise (PARTS 2)
    x,  # [K, N]
    x_low,  # (PARTS 2)
    a,  # [M, N] float32
    nothing,  # 0 that a loop changes: else all of a streamed weight is read ahead of the loop
    OPERAND: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    STREAM: tl.constexpr,
):
    # a + weight @ x. In two parts it is three products: low times low is below all rounding
    if STREAM:
        weight += nothing
        weight_low += nothing
    if PARTS == 2:
        a = _product_of(weight, x, a, OPERAND, WIDEN, STREAM)
        small = tl.zeros(a.shape, tl.float32)
        small = _product_of(weight_low, x, small, OPERAND, WIDEN, STREAM)
        small = _product_of(weight, x_low, small, OPERAND, WIDEN, STREAM)
        return a + small * (1.0 / LOW_SCALE)
    else:
        return _product_of(weight, x, a, OPERAND, WIDEN, STREAM)


@triton.jit
def _product_of(weight, x, a, OPERAND: tl.constexpr, WIDEN: tl.constexpr, STREAM: tl.constexpr):
    if not STREAM:
        return tl.dot(weight, x, a)
    else:
        # the weight is read from L2 in pieces of 64 bytes a row
        M: tl.constexpr = a.shape[0]
        K: tl.constexpr = x.shape[0]
        COLS: tl.constexpr = 64 // (OPERAND.primitive_bitwidth // 8)
        offs = tl.arange(0, M)[:, None] * K + tl.arange(0, COLS)[None, :]
        for part in tl.static_range(K // COLS):
            piece = tl.load(weight + offs + part * COLS).to(OPERAND, bitcast=True)
            piece = piece.to(tl.float32) if WIDEN else piece
            rows = _rows(x, part, K // COLS, K, x.shape[1])
            a = tl.dot(piece, rows, a)
            # keeps the compiler from fetching the pieces all at once: they would not fit
            tl.debug_barrier()
        return a
