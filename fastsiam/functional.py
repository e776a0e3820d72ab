"""Public functions over weights: check, pick the backend, call the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam import _ops, reference
from fastsiam._backend import resolve_backend
from fastsiam._checks import Lengths, Weights, check_ids, check_side, check_table, check_tensor
from fastsiam._layer import without_autocast
from fastsiam._network import Prepared, explain, first_of, make_network, run, stack_layer

__all__ = [
    "Lengths",
    "Prepared",
    "Weights",
    "explain",
    "manhattan_similarity",
    "manhattan_topk",
    "prepare",
    "siamese_encode",
    "siamese_similarity",
]


def siamese_similarity(
    left: Tensor,
    right: Tensor,
    weights: Weights | Sequence[Weights],
    *,
    cell: str = "lstm",
    bidirectional: bool = False,
    pooling: str = "last",
    dropout: float = 0.0,
    recompute: bool = False,
    embedding: Tensor | None = None,
    left_lengths: Lengths = None,
    right_lengths: Lengths = None,
    left_mask: Tensor | None = None,
    right_mask: Tensor | None = None,
    scale: float | Tensor = 1.0,
    log: bool = False,
    backend: str = "auto",
    prepared: Prepared | None = None,
    validate: bool = False,
) -> Tensor:
    """Score pairs of sequences by exp(-scale * L1) of their vectors (MaLSTM, AAAI 2016).

    Args:
        left: [B, T, D] inputs in the weights' dtype, or [B, T] integer ids where `embedding` is
            given. What stands behind a sequence's end has no effect and may be anything.
        right: the same; its T may differ from left's.
        weights: of the one network both sides run through; several layers or directions as
            nn.LSTM orders them: layer 0, layer 0 reverse, layer 1, and so on.
        cell: "lstm" or "gru" (nn.GRU's equations: the reset gate acts after the product).
        bidirectional: whether each layer also runs from the last valid step to the first.
        pooling: "last", a sequence's state after the last step each direction reads, as in
            nn.LSTM's h_n of packed input; "mean" or "max" of each unit over the valid steps. Of
            equal maxima the one that its direction reads first has the gradient.
        dropout: probability, 0 <= p < 1, with which a layer's outputs are dropped before the next
            layer. A pair has one mask for both sides and all steps: with two, equal sentences
            would differ.
        recompute: keep no activations for the backward, which then runs each layer again, some
            thousand sequences at a time: less memory for about one more forward.
        embedding: [V, D] vectors that ids point into.
        left_lengths: [B] valid steps of each sequence, 0 <= length <= T: int32 or int64 tensor on
            any device, or a list. None: all T. A sequence of length 0 has the vector 0.
        right_lengths: the same for the right side.
        left_mask: [B, T] weights of the steps; the vector is then sum_t mask[b, t] h_t over valid
            steps whatever `pooling` says. It carries no gradient.
        right_mask: the same for the right side; both or neither.
        scale: factor on L1, > 0 and finite: a number, or a tensor of one element, which may require
            grad and whose value is not checked.
        log: return -scale * L1 instead, which does not underflow.
        backend: "auto", "triton", "torch", "lstm" or "reference".
        prepared: what `prepare` returned for these weights and this embedding.
        validate: check lengths and ids on CUDA too, at the price of a synchronisation.
            CPU tensors are always checked.

    Returns:
        [B] similarities in (0, 1], float32 (float64 for float64 weights), or their logarithms.

    Raises:
        TypeError: an input, a mask, a weight or the embedding is no tensor, but an array or a list.
        ValueError: an argument of the wrong shape, dtype or range; the message names it.
        ImportError: backend "triton" without triton.
    """
    who = "siamese_similarity"
    check_tensor(who, "left", left)
    check_tensor(who, "right", right)
    network = make_network(
        who,
        weights,
        cell,
        bidirectional,
        pooling,
        dropout,
        left.device,
        backend,
        prepared,
        recompute,
    )
    weight = first_of(weights).weight_ih
    left_lengths = check_side(
        who, "left", left, left_lengths, left_mask, weight, embedding, validate
    )
    right_lengths = check_side(
        who, "right", right, right_lengths, right_mask, weight, embedding, validate
    )
    if left.shape[0] != right.shape[0]:
        raise ValueError(
            f"{who}: left and right must have the same number of rows, "
            f"got {left.shape[0]} and {right.shape[0]}"
        )
    if left.device != right.device:
        raise ValueError(
            f"{who}: left and right must be on one device, got {left.device} and {right.device}"
        )
    if (left_mask is None) != (right_mask is None):
        raise ValueError(f"{who}: left_mask and right_mask must be given together or not at all")
    scale = _factor(who, scale, left.device)
    mask = None
    if left_mask is not None and right_mask is not None:
        mask = _join(left_mask, right_mask)
    x = _join(left, right)
    lengths = _stack(left_lengths, right_lengths)
    if embedding is not None:
        check_ids(who, ("left", "right"), x, lengths, embedding.shape[0], validate)
    similarity, distance, _ = run(network, x, lengths, mask, embedding, scale, True)
    return -scale * distance if log else similarity


def siamese_encode(
    x: Tensor,
    weights: Weights | Sequence[Weights],
    *,
    cell: str = "lstm",
    bidirectional: bool = False,
    pooling: str = "last",
    dropout: float = 0.0,
    recompute: bool = False,
    embedding: Tensor | None = None,
    lengths: Lengths = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    prepared: Prepared | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the vectors of sequences, [B, P * H] in the weights' dtype for P directions.

    The arguments are those of one side of `siamese_similarity`, and so are the errors.
    """
    who = "siamese_encode"
    check_tensor(who, "x", x)
    network = make_network(
        who,
        weights,
        cell,
        bidirectional,
        pooling,
        dropout,
        x.device,
        backend,
        prepared,
        recompute,
    )
    weight = first_of(weights).weight_ih
    lengths = check_side(who, "x", x, lengths, mask, weight, embedding, validate)
    if embedding is not None:
        check_ids(who, ("x",), x, lengths, embedding.shape[0], validate)
    return run(network, x, lengths, mask, embedding, 1.0, False)[2]


def manhattan_similarity(u: Tensor, v: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return exp(-scale * L1) of the rows of u and v, [B, H] each, as [B] in (0, 1].

    Raises:
        TypeError: u or v is no tensor.
        ValueError: they are not [B, H] of one shape, or the scale is out of range.
    """
    who = "manhattan_similarity"
    check_tensor(who, "u", u)
    check_tensor(who, "v", v)
    if u.ndim != 2 or u.shape != v.shape:
        raise ValueError(
            f"{who}: u and v must be [B, H] of one shape, got {list(u.shape)} and {list(v.shape)}"
        )
    scale = _factor(who, scale, u.device)
    return torch.exp(-scale * reference.manhattan_distance(u, v))


def prepare(
    weights: Weights | Sequence[Weights],
    embedding: Tensor,
    backend: str = "auto",
    *,
    cell: str = "lstm",
    bidirectional: bool = False,
) -> Prepared | None:
    """Project all of `embedding`, [V, D], once, for any number of calls without gradients.

    Args:
        weights: as for `siamese_similarity`; only the first layer reads the embedding.

    Returns:
        What to hand to `siamese_similarity` or `siamese_encode` as `prepared` until a weight
        changes, or None where the backend has no use for it ("lstm" and "reference").

    Raises:
        TypeError: the embedding is no tensor.
        ValueError: it does not fit the weights, or these do not fit each other.
        ImportError: backend "triton" without triton.
    """
    check_tensor("prepare", "embedding", embedding)
    with torch.no_grad():
        network = make_network(
            "prepare",
            weights,
            cell,
            bidirectional,
            "last",
            0.0,
            embedding.device,
            backend,
            None,
            False,
        )
        check_table("prepare", embedding, first_of(weights).weight_ih)
        if network.backend not in ("torch", "triton"):
            return None
        with without_autocast(embedding.device.type):
            table, weight = _ops.siamese_prepare(
                embedding.to(network.dtype),
                *stack_layer(network, network.layers[0]),
                cell,
                network.backend,
            )
    return Prepared(network.backend, cell, table, weight)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Stack two sides, [B, T, ...] each, as [2B, max T, ...]."""
    steps = max(left.shape[1], right.shape[1])
    if left.shape[1] != right.shape[1]:
        left, right = (
            F.pad(side, (0, 0) * (side.ndim - 2) + (0, steps - side.shape[1]))
            for side in (left, right)
        )
    return _stack(left, right)


def _stack(left: Tensor, right: Tensor) -> Tensor:
    """Return both, [B, ...] each, as [2B, ...]; halves of one tensor without a copy."""
    both = None if torch.compiler.is_compiling() else left._base
    if (
        both is not None
        and both is right._base
        and both.shape == (2, *left.shape)
        and left.shape == right.shape
        and both.is_contiguous()
        and left.is_contiguous()
        and right.is_contiguous()
        and left.storage_offset() == both.storage_offset()
        and right.storage_offset() == both.storage_offset() + left.numel()
        and not (left.requires_grad or right.requires_grad)
    ):
        return both.flatten(0, 1)
    return torch.cat((left, right))


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
    scale = _factor("manhattan_topk", scale, queries.device)
    distance, index = nearest_rows("manhattan_topk", queries, corpus, k, backend)
    with torch.no_grad():
        return torch.exp(distance * -scale).float(), index


def nearest_rows(
    who: str, queries: Tensor, corpus: Tensor, k: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return L1, [Q, k] float32, and indices of the k rows of corpus nearest to each query.

    What `manhattan_topk` does before it makes similarities, of which those of large distances are
    all 0. Arguments and errors are its own; `who` is named in them.
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
    choice = resolve_backend(who, backend, queries.device, queries.dtype, H=1, otherwise="torch")
    if choice.backend not in ("torch", "triton"):
        raise ValueError(
            f"{who}: backend must be auto, triton or torch, got {backend!r}; pass backend='torch'"
        )
    with torch.no_grad(), without_autocast(queries.device.type):
        found: tuple[Tensor, Tensor] = _ops.manhattan_topk(queries, corpus, k, choice.backend)
    return found


def _factor(who: str, scale: float | Tensor, device: torch.device) -> float | Tensor:
    """Return the factor on L1 as a float, or as a tensor without dimensions on a device."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{who}: scale must have one element, got {list(scale.shape)}")
        return scale.reshape(()).to(device)
    if not 0 < scale < math.inf:
        raise ValueError(f"{who}: scale must be positive and finite, got {scale}")
    return float(scale)
