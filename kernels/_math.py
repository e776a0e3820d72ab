"""Device functions the kernels share: activations, and views of a tile that cost no exchange.

docs/kernels.md draws the tiles. A "cell tile" holds one number per (unit, sequence) of a program;
its axes are chosen so that the compiler's default layout of a load is a tensor-core accumulator's.
"""

import triton
import triton.language as tl

# compilers before 3.7 give lanes to the first of equally contiguous axes of a tile, later ones to
# the last: there the axes are turned round for each load and store
TURNED = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
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
        return tl.where(s < 0.0625, series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


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
    B,
    T,
    COLUMNS: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    # the sequences of this program's columns, [columns, side, 4], and of the other side of each;
    # whether they are there; their lengths; the longest. The sides of a pair are neighbours
    column = tl.arange(0, COLUMNS)[:, None, None]
    side = tl.arange(0, 2)[None, :, None]
    lane = tl.arange(0, 4)[None, None, :]
    first = tl.program_id(0) * (4 * COLUMNS)
    if PAIRED:
        slot = first + 4 * column + lane + 0 * side
    else:
        slot = 2 * (first + 4 * column + lane) + side
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


@triton.constexpr_function
def _operand_dtype(dtype, bits):
    # of a product's operands: float32 may come with a weight rounded to float16
    return tl.float16 if dtype == tl.float32 and bits == tl.int16 else dtype


@triton.jit
def _load_weight(
    weight_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    zero,
    BY_FLOAT: tl.constexpr,
):
    # weights come as bits, and are widened before use: the compiler then brings the narrow value
    # into the operand's layout once, ahead of the loop, and keeps it in registers. Given the dot
    # operand itself it would sink the conversion into the loop and read shared memory every step
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return _from_bits(tl.load(weight_ptr + offs), DTYPE, zero, BY_FLOAT).to(DOT_DTYPE)


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
def _product_streamed(
    weight_ptr,  # [M, K] bits; a pointer that the loop changes, or all pieces are read ahead of it
    x,  # [K, N]
    a,  # [M, N]
    M: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # a + weight @ x, reading the weight from L2 in pieces of 64 bytes a row
    COLS: tl.constexpr = 64 // (DTYPE.primitive_bitwidth // 8)
    offs = tl.arange(0, M)[:, None] * K + tl.arange(0, COLS)[None, :]
    for part in tl.static_range(K // COLS):
        piece = tl.load(weight_ptr + offs + part * COLS).to(DTYPE, bitcast=True).to(DOT_DTYPE)
        rows = _rows(x, part, K // COLS, K, x.shape[1])
        a = tl.dot(piece, rows, a, input_precision=PRECISION)
        # keeps the compiler from fetching the pieces all at once: they would not fit
        tl.debug_barrier()
    return a
