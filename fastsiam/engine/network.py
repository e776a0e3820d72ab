"""A stack of layers: what the functions of `functional` run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastsiam.engine import autograd
from fastsiam.engine.layer import (
    Backend,
    Call,
    Inputs,
    Options,
    Outputs,
    Projection,
    Weights,
    allows_tf32,
    compute_dtype,
    without_autocast,
)
from fastsiam.engine.select import Choice, choose
from fastsiam.engine.similarity import Scale, Similarity


@dataclass(frozen=True, slots=True)
class Network:
    """The layers of a network, and how they run."""

    cell: str
    layers: Sequence[Sequence[Weights]]  # of each layer, by direction
    pooling: str = "last"  # "last", "mean" or "max"
    dropout: float = 0.0  # between layers
    recompute: bool = False
    backend: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all products: the weights', or autocast's where it is on."""
        weight = self.layers[0][0].weight_hh
        device, dtype = weight.device.type, weight.dtype
        if dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return dtype
        return torch.get_autocast_dtype(device)

    def choose(
        self, who: str, device: torch.device, sequences: int | None = None, like: object = None
    ) -> Choice:
        """Return the backend of a call, and why; raise where the named one cannot run it.

        Args:
            who: the caller's name, for the message.
            device: of the inputs.
            sequences: of the call, two a pair; None where it is not known.
            like: the first layer's inputs, which may require gradients.
        """
        weights = [t for layer in self.layers for direction in layer for t in direction]
        training = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in (*weights, like)
        )
        H = self.layers[0][0].weight_hh.shape[1]
        return choose(
            who, self.backend, Call(self.cell, H, self.dtype, device, training, sequences)
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of a call; both towers, where they are scored."""

    x: Tensor  # [N, T, D], or ids [N, T]
    lengths: Tensor  # [N] int64
    mask: Tensor | None = None  # [N, T] weights of the steps, in place of the pooling
    embedding: Tensor | None = None  # [V, D] that ids point into
    paired: bool = False  # whether sequences j and N / 2 + j are a pair


def encode(
    who: str, network: Network, batch: Batch, projection: Projection | None = None
) -> Tensor:
    """Return the vectors of all sequences, [N, P * H]."""
    return _run(who, network, batch, projection, None).vectors


def score(
    who: str,
    network: Network,
    batch: Batch,
    similarity: Similarity,
    scale: Scale,
    log: bool,
    projection: Projection | None = None,
) -> Tensor:
    """Return the similarities of the pairs, [B], or their logarithms."""
    number = scale if isinstance(scale, float) else 1.0
    outputs = _run(who, network, batch, projection, number if similarity.fused else None)
    distance = outputs.distance
    if distance is None:
        h = outputs.vectors
        # not chunk(2): of a free batch size, torch.export cannot tell how many parts that makes
        left, right = h.view(2, h.shape[0] // 2, h.shape[1]).to(compute_dtype(h.dtype))
        distance = similarity.distance(left, right)
    if log:
        return similarity.log(distance, scale)
    if outputs.similarity is not None and isinstance(scale, float):
        return outputs.similarity
    return similarity.value(distance, scale)


def _run(
    who: str,
    network: Network,
    batch: Batch,
    projection: Projection | None,
    scale: float | None,
) -> Outputs:
    """Run all layers. With a scale, backends that fuse the Manhattan similarity score the pairs."""
    dtype, x, embedding = network.dtype, batch.x, batch.embedding
    table = x if embedding is None else embedding
    N, T = x.shape[:2]
    backend = network.choose(who, x.device, N, table).backend
    if projection is not None and (projection.backend, projection.dtype) != (backend.name, dtype):
        projection = None
    pooling, mask = network.pooling, batch.mask
    if mask is None and pooling == "mean":
        share = batch.lengths.clamp(1, max(T, 1)).to(compute_dtype(dtype))
        mask = share.reciprocal_().unsqueeze(1).expand(-1, T)
    if mask is not None:
        pooling, mask = "mask", mask.contiguous()
    ids = None if embedding is None else x.contiguous()
    rows = x.reshape(-1, x.shape[-1]) if embedding is None else embedding
    inputs = Inputs(rows.to(dtype), ids, batch.lengths.contiguous(), None, T)
    tf32 = allows_tf32(x.device)
    inner = Options(network.cell, all_states=True, recompute=network.recompute, allow_tf32=tf32)
    with without_autocast(x.device.type):
        for directions in network.layers[:-1]:
            states = _layer(backend, inputs, directions, inner, projection).states
            assert states is not None
            dropped = _drop(states, network.dropout, batch.paired)
            inputs = Inputs(dropped.flatten(0, 1), None, inputs.lengths, None, T)
            projection = None
        last = Options(
            network.cell,
            pooling,
            paired=scale is not None and not backend.composite,
            scale=1.0 if scale is None else scale,
            recompute=network.recompute,
            allow_tf32=tf32,
        )
        inputs = Inputs(inputs.x, inputs.ids, inputs.lengths, mask, T)
        return _layer(backend, inputs, network.layers[-1], last, projection)


def _layer(
    backend: Backend,
    inputs: Inputs,
    directions: Sequence[Weights],
    options: Options,
    projection: Projection | None,
) -> Outputs:
    if not backend.composite:
        return autograd.run(backend, inputs, directions, options, projection)
    if options.recompute and torch.is_grad_enabled():
        found: Outputs = checkpoint(backend.run, inputs, directions, options, use_reentrant=False)
        return found
    return backend.run(inputs, directions, options)


def _drop(states: Tensor, dropout: float, paired: bool) -> Tensor:
    """Apply dropout to hidden states, [N, T, F]: one mask a pair (a sequence), for all steps."""
    if dropout == 0:
        return states
    N, T, columns = states.shape
    sides = 2 if paired else 1
    keep = states.new_empty(1, N // sides, 1, columns).bernoulli_(1 - dropout) / (1 - dropout)
    return (states.view(sides, N // sides, T, columns) * keep).view(N, T, columns)
