"""Search: the rows of a corpus nearest to queries, in bounded memory.

A distance and the index of its row are one 64-bit key: the bits of a float32 of 0 or more have the
order of the float. So no two keys are equal, and the smallest k keys do not depend on the pieces
that the corpus is read in. Equal distances come in the order of their indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsiam.checks import check_scale, check_tensor
from fastsiam.engine.layer import without_autocast
from fastsiam.engine.select import takes_triton
from fastsiam.engine.similarity import MANHATTAN, SIMILARITIES, Similarity

__all__ = ["manhattan_topk", "nearest_rows"]

# pairs computed at once, on the CPU what a core's own cache holds; and numbers in the piece of the
# corpus they are computed from, of which there may be a copy
LIMITS = {"cpu": (2**18, 2**22)}
LIMITS_ELSEWHERE = (2**24, 2**26)
# queries at once, so that a piece of the corpus is long where there are many of both
QUERIES = 1024


def manhattan_topk(
    queries: Tensor,
    corpus: Tensor,
    k: int,
    *,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k rows of a corpus most similar to each query by exp(-scale * L1).

    Memory beside the inputs and results is bounded: the matrix of all pairs is never made.

    Args:
        queries: [Q, F], floating point.
        corpus: [M, F], of the queries' dtype and device.
        k: 1 <= k <= M.
        scale: factor on L1, > 0 and finite: a number or a tensor of one element.
        backend: "auto", "triton" or "torch".

    Returns:
        Similarities [Q, k] in (0, 1], float32, descending, and row numbers [Q, k], int64. Of equal
        distances the smaller row number comes first; rows with a NaN come last. L1 is summed in
        float32 (float64 for float64) and compared in float32. Neither result carries a gradient:
        where one is wanted, score the rows that were found with `manhattan_similarity`.

    Raises:
        TypeError: queries or corpus is no tensor, but an array or a list.
        ValueError: an argument of the wrong shape, dtype, device or range.
        ImportError: backend "triton" without triton.
    """
    check_tensor("manhattan_topk", "queries", queries)
    scale = check_scale("manhattan_topk", scale, queries.device)
    distance, index = nearest_rows("manhattan_topk", queries, corpus, k, backend=backend)
    with torch.no_grad():
        return MANHATTAN.value(distance, scale).float(), index


def nearest_rows(
    who: str,
    queries: Tensor,
    corpus: Tensor,
    k: int,
    similarity: Similarity = MANHATTAN,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return distances, [Q, k] float32, and indices of the k rows of corpus nearest to each query.

    `Similarity.value` makes similarities of the distances; of large ones they are all 0. Arguments
    and errors are those of `manhattan_topk`; messages name `who`.
    """
    check_tensor(who, "queries", queries)
    check_tensor(who, "corpus", corpus)
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(
            f"{who}: queries and corpus must be [Q, F] and [M, F], "
            f"got {list(queries.shape)} and {list(corpus.shape)}"
        )
    if queries.dtype != corpus.dtype or not queries.is_floating_point():
        raise ValueError(
            f"{who}: queries and corpus must have one floating-point dtype, "
            f"got {queries.dtype} and {corpus.dtype}"
        )
    if queries.device != corpus.device:
        raise ValueError(
            f"{who}: queries and corpus must be on one device, "
            f"got {queries.device} and {corpus.device}"
        )
    if not 1 <= k <= corpus.shape[0]:
        raise ValueError(
            f"{who}: k must be between 1 and the {corpus.shape[0]} rows of corpus, got {k}"
        )
    triton = takes_triton(who, backend, queries.device, queries.dtype) and similarity.fused
    with torch.no_grad(), without_autocast(queries.device.type):
        # torch.compile and fake tensors do not look into a kernel's launcher
        traced = torch.compiler.is_compiling() or type(queries) is not Tensor
        return (_nearest_op if traced else _nearest)(queries, corpus, k, similarity.name, triton)


def _nearest(
    queries: Tensor, corpus: Tensor, k: int, similarity: str, triton: bool
) -> tuple[Tensor, Tensor]:
    """Return distances, [Q, k] float32 ascending, NaN last, and row numbers, [Q, k] int64.

    With `triton` the distances come from the Triton kernel.
    """
    if triton:
        from fastsiam.kernels.pairwise import manhattan_pairs as pairs
    else:
        pairs = SIMILARITIES[similarity].distances
    Q, M, F = queries.shape[0], *corpus.shape
    device = queries.device
    together, numbers = LIMITS.get(device.type, LIMITS_ELSEWHERE)
    rows = max(1, min(Q, QUERIES, together // k))
    span = max(1, min(together // rows, numbers // max(1, F)))
    best = torch.empty(Q, k, device=device, dtype=torch.int64)
    for first in range(0, Q, rows):
        some = queries[first : first + rows]
        kept = best.new_empty(some.shape[0], 0)
        for start in range(0, M, span):
            distance = pairs(some, corpus[start : start + span])
            key = distance.view(torch.int32).long().bitwise_left_shift_(32)
            key += torch.arange(start, start + key.shape[1], device=device)
            key = torch.cat((kept, key), dim=1)
            kept = key.topk(min(k, key.shape[1]), dim=1, largest=False).values
        best[first : first + rows] = kept
    distance = best.bitwise_right_shift(32).int().view(torch.float32)
    return distance, best.bitwise_and_(2**32 - 1)


_nearest_op = torch.library.custom_op("fastsiam::nearest_rows", _nearest, mutates_args=())


@_nearest_op.register_fake
def _(
    queries: Tensor, corpus: Tensor, k: int, similarity: str, triton: bool
) -> tuple[Tensor, Tensor]:
    del corpus, similarity, triton  # a fake has its operator's arguments
    distance = queries.new_empty(queries.shape[0], k, dtype=torch.float32)
    return distance, torch.empty_like(distance, dtype=torch.int64)
