"""Public functions over weights: check the arguments, then call the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.checks import (
    Lengths,
    check_ids,
    check_network,
    check_projection,
    check_scale,
    check_side,
    check_table,
    check_tensor,
    choice_of,
)
from fastsiam.engine import network as engine
from fastsiam.engine.layer import Projection, Weights, stack_weights, without_autocast
from fastsiam.engine.network import Batch
from fastsiam.engine.similarity import MANHATTAN, SIMILARITIES
from fastsiam.search import manhattan_topk

__all__ = [
    "Lengths",
    "Projection",
    "Weights",
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
    similarity: str = "manhattan",
    scale: float | Tensor = 1.0,
    log: bool = False,
    backend: str = "auto",
    prepared: Projection | None = None,
    validate: bool = False,
) -> Tensor:
    """Score pairs of sequences by the similarity of their vectors; exp(-scale * L1) is MaLSTM.

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
        similarity: "manhattan", exp(-scale * L1) (MaLSTM, AAAI 2016), or "cosine", (1 + cos) / 2.
        scale: factor on L1, > 0 and finite: a number, or a tensor of one element, which may require
            grad and whose value is not checked. It has no effect on "cosine".
        log: return the logarithm instead, -scale * L1 for "manhattan", which does not underflow.
        backend: "auto"; "triton"; "torch", which is "cpu" (the compiled library) where that takes
            the call and else "batched" (tensor operations); "lstm" (nn.LSTM's own); "reference".
        prepared: what `prepare` returned for these weights and this embedding.
        validate: check lengths and ids on CUDA too, at the price of a synchronisation.
            CPU tensors are always checked.

    Returns:
        [B] similarities from 0 to 1, float32 (float64 for float64 weights), or their logarithms.

    Raises:
        TypeError: an input, a mask, a weight or the embedding is no tensor, but an array or a list.
        ValueError: an argument of the wrong shape, dtype or range; the message names it.
        ImportError: backend "triton" without triton.
    """
    who = "siamese_similarity"
    check_tensor(who, "left", left)
    check_tensor(who, "right", right)
    choice_of(who, "similarity", similarity, SIMILARITIES)
    network = check_network(
        who,
        weights,
        bidirectional,
        cell=cell,
        pooling=pooling,
        dropout=dropout,
        recompute=recompute,
        backend=backend,
    )
    weight = network.layers[0][0].weight_ih
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
    scale = check_scale(who, scale, left.device)
    mask = None
    if left_mask is not None and right_mask is not None:
        mask = _join(left_mask, right_mask)
    x = _join(left, right)
    lengths = _stack(left_lengths, right_lengths)
    if embedding is not None:
        check_ids(who, ("left", "right"), x, lengths, embedding.shape[0], validate)
    if prepared is not None:
        check_projection(who, prepared, network)
    batch = Batch(x, lengths, mask, embedding, paired=True)
    return engine.score(who, network, batch, SIMILARITIES[similarity], scale, log, prepared)


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
    prepared: Projection | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the vectors of sequences, [B, P * H] in the weights' dtype for P directions.

    The arguments are those of one side of `siamese_similarity`, and so are the errors.
    """
    who = "siamese_encode"
    check_tensor(who, "x", x)
    network = check_network(
        who,
        weights,
        bidirectional,
        cell=cell,
        pooling=pooling,
        dropout=dropout,
        recompute=recompute,
        backend=backend,
    )
    weight = network.layers[0][0].weight_ih
    lengths = check_side(who, "x", x, lengths, mask, weight, embedding, validate)
    if embedding is not None:
        check_ids(who, ("x",), x, lengths, embedding.shape[0], validate)
    if prepared is not None:
        check_projection(who, prepared, network)
    return engine.encode(who, network, Batch(x, lengths, mask, embedding), prepared)


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
    scale = check_scale(who, scale, u.device)
    return MANHATTAN.value(MANHATTAN.distance(u, v), scale)


def prepare(
    weights: Weights | Sequence[Weights],
    embedding: Tensor,
    backend: str = "auto",
    *,
    cell: str = "lstm",
    bidirectional: bool = False,
) -> Projection | None:
    """Project all of `embedding`, [V, D], once, for any number of calls without gradients.

    Args:
        weights: as for `siamese_similarity`; only the first layer reads the embedding.
        embedding: [V, D], of the weights' dtype and device.
        backend: as for `siamese_similarity`.
        cell: "lstm" or "gru".
        bidirectional: as for `siamese_similarity`.

    Returns:
        The `prepared` of `siamese_similarity` and `siamese_encode`, which holds until a weight
        changes; or None where the backend has no use for it ("lstm" and "reference").

    Raises:
        TypeError: the embedding is no tensor.
        ValueError: it does not fit the weights, or these do not fit each other.
        ImportError: backend "triton" without triton.
    """
    who = "prepare"
    check_tensor(who, "embedding", embedding)
    with torch.no_grad(), without_autocast(embedding.device.type):
        network = check_network(who, weights, bidirectional, cell=cell, backend=backend)
    directions, dtype = network.layers[0], network.dtype
    with torch.no_grad():
        check_table(who, embedding, directions[0].weight_ih)
        chosen = network.choose(who, embedding.device).backend
        with without_autocast(embedding.device.type):
            stacked = stack_weights(directions, cell, dtype)
            return chosen.project(embedding.to(dtype), stacked, cell)


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
