"""L1 of all pairs of rows, for search: kernel, then launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["Q", "M", "F"])
def _manhattan_pairs_kernel(
    queries_ptr,  # [F, stride_qf] float32, transposed, padded to whole blocks
    corpus_ptr,  # [F, stride_cf] the same
    distance_ptr,  # [Q, M] out: L1, float32
    stride_qf,
    stride_cf,
    Q,
    M,
    F,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    distance = tl.zeros((BLOCK_Q, BLOCK_M), tl.float32)
    for _ in range(F):
        distance += tl.abs(tl.load(queries_ptr + offs_q) - tl.load(corpus_ptr + offs_m))
        queries_ptr += stride_qf
        corpus_ptr += stride_cf
    offs = offs_q.to(tl.int64) * M + offs_m
    tl.store(distance_ptr + offs, distance, mask=(offs_q < Q) & (offs_m < M))


def manhattan_pairs(queries: Tensor, corpus: Tensor) -> Tensor:
    """Return L1 of each row of queries, [Q, F], and each of corpus, [M, F], as [Q, M] float32."""
    Q, F = queries.shape
    M = corpus.shape[0]
    distance = torch.empty(Q, M, device=queries.device, dtype=torch.float32)
    if Q == 0 or M == 0:
        return distance
    # a thread has up to 16 x 4 pairs: their 128 additions a feature hide 17 loads
    block_q, block_m = min(64, triton.next_power_of_2(Q)), 128
    queries, corpus = _columns(queries, block_q), _columns(corpus, block_m)
    _manhattan_pairs_kernel[(triton.cdiv(M, block_m), triton.cdiv(Q, block_q))](
        queries_ptr=queries,
        corpus_ptr=corpus,
        distance_ptr=distance,
        stride_qf=queries.stride(0),
        stride_cf=corpus.stride(0),
        Q=Q,
        M=M,
        F=F,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        num_warps=4,
    )
    return distance


def _columns(x: Tensor, block: int) -> Tensor:
    """Return x, [R, F], transposed as float32; whole blocks of R, so that loads need no mask."""
    R, F = x.shape
    columns = x.new_zeros(F, triton.cdiv(R, block) * block, dtype=torch.float32)
    columns[:, :R] = x.T
    return columns
