"""What the wide kernels share: the product of a slice of the weight with rows of memory."""

import triton
import triton.language as tl


@triton.jit
def _as_columns(x):
    # [columns, side, 4] -> [1, BLOCK_N], in the order of an accumulator's columns
    return tl.reshape(tl.permute(x, (0, 2, 1)), (1, x.shape[0] * 8))


@triton.jit
def _product_with_rows(
    weight_ptr,  # [M, K]
    x_ptrs,  # [1, N] where the K values of a column begin
    there,  # [1, N] whether they are there; else they are 0
    any_there,  # whether one of them may be
    a,  # [M, N] float32
    K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # a + weight @ x, in pieces of 128 bytes a row
    BLOCK_K: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + (tl.arange(0, a.shape[0])[:, None] * K + k[None, :])
    x_ptrs += k[:, None]
    for start in range(0, tl.where(any_there, K, 0), BLOCK_K):
        weight = tl.load(weight_ptrs + start)
        x = tl.load(x_ptrs + start, mask=there, other=0.0)
        if WIDEN:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        a = tl.dot(weight, x, a, input_precision=PRECISION)
    return a
