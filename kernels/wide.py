"""What the wide kernels share: the product with a slice of the weight, and waiting for others."""

import triton
import triton.language as tl


@triton.jit
def _as_columns(x):
    # [columns, each, 4] -> [1, BLOCK_N], in the order of an accumulator's columns
    return tl.reshape(tl.permute(x, (0, 2, 1)), (1, x.shape[0] * 8))


@triton.jit
def _slots(tile, tiles, direction, BLOCK_N: tl.constexpr):
    # the places of a tile's columns, [columns, each, 4], in the states that pass between programs
    column = 8 * tl.arange(0, BLOCK_N // 8)[:, None, None] + 2 * tl.arange(0, 4)[None, None, :]
    return (direction * tiles + tile) * BLOCK_N + column + tl.arange(0, 2)[None, :, None]


@triton.jit
def _load_slice(
    weight_ptr,  # [M, K]
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # a slice of the weight, [M, BLOCK_K], to stay on chip; columns behind the K are 0
    k = tl.arange(0, BLOCK_K)[None, :]
    weight_ptrs = weight_ptr + (tl.arange(0, M)[:, None] * K + k)
    weight = tl.load(weight_ptrs, mask=k < K, other=0.0) if BLOCK_K > K else tl.load(weight_ptrs)
    return weight.to(tl.float32) if WIDEN else weight


@triton.jit
def _product_with_rows(
    weight,  # what `_load_slice` gives, [M, BLOCK_K]
    x_ptrs,  # [1, N] where the K values of a column begin
    there,  # [1, N] whether they are there; else they are 0
    K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # weight @ x, [M, N] float32
    BLOCK_K: tl.constexpr = weight.shape[1]
    k = tl.arange(0, BLOCK_K)[:, None]
    if BLOCK_K > K:
        there = there & (k < K)
    # past the multiprocessor's own cache, which does not see what others write
    x = tl.load(x_ptrs + k, mask=there, other=0.0, cache_modifier=".cg")
    x = x.to(tl.float32) if WIDEN else x
    a = tl.zeros((weight.shape[0], x.shape[1]), tl.float32)
    return tl.dot(weight, x, a, input_precision=PRECISION)


@triton.jit
def _arrive(arrived_ptr):
    # say that this program's part of a step is in memory: all of its threads' stores, and then one
    # thread's addition, which nobody sees before them
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(arrived_ptr, count):
    # until so many parts are. One thread asks, and the barrier holds the others
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()
