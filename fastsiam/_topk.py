"""The rows of a corpus nearest to queries by L1, in bounded memory.

A pair's L1 and the corpus row's index are one 64-bit number: bits of a float32 that is not negative
order as the float does. So no two candidates are equal, and the smallest k are the same whichever
pieces the corpus comes in: equal distances stand by index.
"""

from __future__ import annotations

import torch
from torch import Tensor

# pairs computed at once, on the CPU what a core's own cache holds; and numbers in the piece of the
# corpus they are computed from, of which there may be a copy
LIMITS = {"cpu": (2**18, 2**22)}
LIMITS_ELSEWHERE = (2**24, 2**26)
# queries at once, so that a piece of the corpus is long where there are many of both
QUERIES = 1024
# features from which three passes over rows in cache beat torch.cdist on the CPU, and the numbers
# that these work on
WIDE = 128
CACHED = 2**19


def manhattan_pairs(queries: Tensor, corpus: Tensor) -> Tensor:
    """Return L1 of each row of queries, [Q, F], and each of corpus, [M, F], as [Q, M] float32.

    A pair's number does not depend on the other rows.
    """
    if queries.dtype != torch.float64:
        queries, corpus = queries.float(), corpus.float()
    F = queries.shape[1]
    if F < WIDE or queries.device.type != "cpu":
        return torch.cdist(queries, corpus, p=1).float()
    distance = queries.new_empty(queries.shape[0], corpus.shape[0])
    rows = max(1, CACHED // F)
    for some, out in zip(corpus.split(rows), distance.split(rows, dim=1), strict=True):
        difference = torch.empty_like(some)
        for query, its in zip(queries, out, strict=True):
            torch.sub(some, query, out=difference)
            torch.sum(difference.abs_(), dim=1, out=its)
    return distance.float()


def manhattan_topk(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return L1 of the k rows of corpus nearest to each query, and which these are.

    Args:
        queries: [Q, F].
        corpus: [M, F].
        k: 1 <= k <= M.
        backend: "torch" or "triton".

    Returns:
        [Q, k] float32 ascending, NaN last, and [Q, k] int64.
    """
    pairs = manhattan_pairs
    if backend == "triton":
        from fastsiam.kernels.pairwise import manhattan_pairs as pairs
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
