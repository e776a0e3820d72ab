"""Public functions over weights: check, pick the backend, call the operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastsiam import _ops, reference
from fastsiam._backend import Choice, resolve_backend
from fastsiam._checks import Lengths, Weights, check_network, check_side
from fastsiam._measured import Call

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


class Prepared(NamedTuple):
    """Every row of an embedding projected, and the recurrent weights laid out, for one backend."""

    backend: str
    table: Tensor
    weight: Tensor


class _Layer(NamedTuple):
    """A layer's weights stacked by direction, and the sum of its biases as `_ops` wants it."""

    weight_ih: Tensor  # [P, 4H, D], of a GRU [P, 3H, D]
    weight_hh: Tensor  # [P, 4H, H], of a GRU [P, 3H, H]
    bias: Tensor | None  # [P, 4H]


class _Network(NamedTuple):
    cell: str
    layers: list[Sequence[Weights]]  # by direction
    dtype: torch.dtype
    pooling: str
    dropout: float
    asked: str  # the caller's backend, which may be "auto"
    backend: str
    prepared: Prepared | None
    recompute: bool


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
            given. What stands behind a sequence's end is never read and may be anything.
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
        scale: factor on L1, > 0: a number, or a tensor of one element that may require grad.
        log: return -scale * L1 instead, which does not underflow.
        backend: "auto", "triton", "torch", "lstm" or "reference".
        prepared: what `prepare` returned for these weights and this embedding.
        validate: check lengths and ids on CUDA too, at the price of a synchronisation.
            CPU tensors are always checked.

    Returns:
        [B] similarities in (0, 1], float32 (float64 for float64 weights), or their logarithms.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range; the message names it.
        ImportError: backend "triton" without triton.
    """
    who = "siamese_similarity"
    network = _network(
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
    weight = _first(weights).weight_ih
    left, left_lengths = check_side(
        who, "left", left, left_lengths, left_mask, weight, embedding, validate
    )
    right, right_lengths = check_side(
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
    _check_scale(who, scale)
    mask = None
    if left_mask is not None and right_mask is not None:
        mask = _join(left_mask, right_mask)
    x = _join(left, right)
    lengths = torch.cat((left_lengths, right_lengths))
    similarity, distance, _ = _run(network, x, lengths, mask, embedding, scale, True)
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
    network = _network(
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
    weight = _first(weights).weight_ih
    x, lengths = check_side(who, "x", x, lengths, mask, weight, embedding, validate)
    return _run(network, x, lengths, mask, embedding, 1.0, False)[2]


def manhattan_similarity(u: Tensor, v: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return exp(-scale * L1) of the rows of u and v, [B, H] each, as [B] in (0, 1].

    Raises:
        ValueError: u and v are not [B, H] of one shape.
    """
    if u.ndim != 2 or u.shape != v.shape:
        raise ValueError(
            "manhattan_similarity: u and v must be [B, H] of one shape, "
            f"got {list(u.shape)} and {list(v.shape)}"
        )
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
    """
    with torch.no_grad():
        network = _network(
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
        if network.backend not in ("torch", "triton"):
            return None
        with torch.autocast(embedding.device.type, enabled=False):
            table, weight = _ops.siamese_prepare(
                embedding.to(network.dtype),
                *_stack(network, network.layers[0]),
                cell,
                network.backend,
            )
    return Prepared(network.backend, table, weight)


def explain(
    weights: Weights | Sequence[Weights],
    device: torch.device,
    backend: str = "auto",
    *,
    cell: str = "lstm",
    sequences: int | None = None,
    steps: int | None = None,
    filled: float | None = None,
    who: str = "explain",
) -> Choice:
    """Return the backend a call on `device` would take, and why; raise if it cannot run.

    "auto" goes by measurements where it knows the call: `sequences` (two a pair), `steps` of the
    longest and `filled`, the share of their product that is valid, None where lengths are on a GPU.
    Whether gradients are on counts too.
    """
    weight = _first(weights).weight_hh
    dtype, H = _computed_dtype(weight), weight.shape[1]
    if not sequences or not steps:
        return resolve_backend(who, backend, device, dtype, H)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in _first(weights)
    )
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    call = Call(cell, name, training, threads, H, sequences, steps, filled)
    gpu = ""
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(device)
    return resolve_backend(who, backend, device, dtype, H, call, gpu)


def _first(weights: Weights | Sequence[Weights]) -> Weights:
    return weights if isinstance(weights, Weights) else weights[0]


def _network(
    who: str,
    weights: Weights | Sequence[Weights],
    cell: str,
    bidirectional: bool,
    pooling: str,
    dropout: float,
    device: torch.device,
    backend: str,
    prepared: Prepared | None,
    recompute: bool,
) -> _Network:
    """Check the network's arguments and lay its weights out."""
    every = [weights] if isinstance(weights, Weights) else weights
    layers = check_network(who, every, cell, bidirectional, pooling)
    if not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be at least 0 and below 1, got {dropout}")
    choice = explain(weights, device, backend, who=who)
    dtype = _computed_dtype(every[0].weight_hh)
    if prepared is not None and prepared.backend != choice.backend:
        prepared = None
    return _Network(
        cell, layers, dtype, pooling, dropout, backend, choice.backend, prepared, recompute
    )


def _stack(network: _Network, directions: Sequence[Weights]) -> _Layer:
    cell, dtype = network.cell, network.dtype

    def stack(tensors: list[Tensor]) -> Tensor:
        tensors = [t.to(dtype) for t in tensors]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    bias = None
    if directions[0].bias_ih is not None:
        bias = stack([_bias(direction, cell) for direction in directions])
    return _Layer(
        stack([direction.weight_ih for direction in directions]),
        stack([direction.weight_hh for direction in directions]),
        bias,
    )


def _bias(weights: Weights, cell: str) -> Tensor:
    """Return the biases added up, [4H]; of a GRU's gate n they stay apart, input and state."""
    assert weights.bias_ih is not None
    assert weights.bias_hh is not None
    if cell == "lstm":
        return weights.bias_ih + weights.bias_hh
    H = weights.weight_hh.shape[1]
    of_input, of_state = (bias.split((2 * H, H)) for bias in (weights.bias_ih, weights.bias_hh))
    return torch.cat((of_input[0] + of_state[0], of_input[1], of_state[1]))


def _run(
    network: _Network,
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    embedding: Tensor | None,
    scale: float | Tensor,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarity and L1, [B] (empty unless paired), and vectors [N, P * H]."""
    if embedding is None:
        x = x.to(network.dtype)
    else:
        embedding = embedding.to(network.dtype)
    network, steps = _fit(network, x, lengths)
    x = x[:, :steps]
    mask = None if mask is None else mask[:, :steps]
    pooling = network.pooling if mask is None else "mask"
    if pooling == "mean":
        pooling = "mask"
        share = lengths.clamp(1, max(x.shape[1], 1)).to(
            torch.promote_types(network.dtype, torch.float32)
        )
        mask = share.reciprocal_().unsqueeze(1).expand(-1, x.shape[1])
    # the kernels address these by rows without gaps
    lengths = lengths.contiguous()
    mask = None if mask is None else mask.contiguous()
    layer_of: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _fused_layer
    if network.backend in ("reference", "lstm"):
        layer_of = _plain_layer
        if network.recompute and torch.is_grad_enabled():
            layer_of = partial(checkpoint, _plain_layer, use_reentrant=False)
    with torch.autocast(x.device.type, enabled=False):
        for layer in network.layers[:-1]:
            states = layer_of(
                network, layer, x, lengths, None, embedding, 1.0, "last", False, True
            )[3]
            embedding = None
            x = _drop(states, network.dropout, paired)
        similarity, distance, h, _ = layer_of(
            network,
            network.layers[-1],
            x,
            lengths,
            mask,
            embedding,
            scale,
            pooling,
            paired,
            False,
        )
    return similarity, distance, h


def _fit(network: _Network, x: Tensor, lengths: Tensor) -> tuple[_Network, int]:
    """Let "auto" look at the sizes of a call; return the steps that its backend needs, too."""
    N, T = x.shape[:2]
    measured = network.asked == "auto" and N > 0 and T > 0
    if torch.compiler.is_compiling() or not (measured or network.backend == "lstm"):
        return network, T
    longest, filled = T, None
    if x.device.type == "cpu":
        longest = int(lengths.max()) if N else 0
        filled = int(lengths.sum()) / (N * longest) if longest else 1.0
    if measured:
        choice = explain(
            network.layers[0][0],
            x.device,
            network.asked,
            cell=network.cell,
            sequences=N,
            steps=max(longest, 1),
            filled=filled,
        )
        network = network._replace(backend=choice.backend)
    # the other backends stop where a sequence stops by themselves
    return network, longest if network.backend == "lstm" else T


def _drop(states: Tensor, dropout: float, paired: bool) -> Tensor:
    """Apply dropout to hidden states, [N, T, F]: one mask a pair (a sequence), for all steps."""
    if dropout == 0:
        return states
    N, T, columns = states.shape
    sides = 2 if paired else 1
    keep = states.new_empty(1, N // sides, 1, columns).bernoulli_(1 - dropout) / (1 - dropout)
    return (states.view(sides, N // sides, T, columns) * keep).view(N, T, columns)


def _fused_layer(
    network: _Network,
    directions: Sequence[Weights],
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    embedding: Tensor | None,
    scale: float | Tensor,
    pooling: str,
    paired: bool,
    keep_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return similarity, L1, vectors and hidden states from the backends with the whole program."""
    factor, learned_scale = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    steps = x.shape[1]
    rnn = torch.backends.cudnn.rnn
    allow_tf32 = x.is_cuda and rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    source = x.reshape(-1, x.shape[-1]) if embedding is None else embedding
    ids = None if embedding is None else x.contiguous()
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (source, learned_scale, *itertools.chain.from_iterable(directions))
    )
    prepared = None if embedding is None or wants_grad else network.prepared
    if prepared is not None:
        outputs = _ops.siamese_infer(
            prepared.table,
            prepared.weight,
            ids,
            lengths,
            mask,
            learned_scale,
            factor,
            directions[0].weight_hh.shape[1],
            steps,
            pooling,
            paired,
            keep_outputs,
            allow_tf32,
            network.dtype,
            network.cell,
            network.backend,
        )
        return outputs
    given = (source, ids, lengths, mask, *_stack(network, directions), learned_scale, factor, steps)
    how = pooling, paired, keep_outputs
    backend = allow_tf32, network.cell, network.backend
    if wants_grad:
        outputs = _ops.siamese_fwd(*given, *how, network.recompute, *backend)[:4]
    else:
        outputs = _ops.siamese_run(*given, *how, *backend)
    return outputs


def _plain_layer(
    network: _Network,
    directions: Sequence[Weights],
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    embedding: Tensor | None,
    scale: float | Tensor,
    pooling: str,
    paired: bool,
    keep_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same from the definition, or from torch's own LSTM or GRU on the padded batch."""
    layer = _stack(network, directions)
    T = x.shape[1]
    if T == 0:
        # a step that no sequence has: the weights get gradients, of 0, as from any other batch
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    valid = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    if embedding is not None:
        x = F.embedding(torch.where(valid, x, 0), embedding)
    x = torch.where(valid.unsqueeze(2), x, 0)
    states, vectors = [], []
    for p, (weight_ih, weight_hh) in enumerate(zip(*layer[:2], strict=True)):
        bias = None if layer.bias is None else layer.bias[p]
        reverse = p == 1
        # an empty batch runs nothing, and not every LSTM of torch's takes one
        if network.backend == "reference" or x.shape[0] == 0:
            run = reference.STATES[network.cell]
            direction = run(x, lengths, weight_ih, weight_hh, bias, reverse)
        else:
            direction = _torch_states(network.cell, x, lengths, weight_ih, weight_hh, bias, reverse)
        states.append(direction)
        vectors.append(reference.pool(direction, lengths, pooling, mask, reverse))
    h = torch.cat(vectors, dim=1)
    outputs = h.new_empty(0)
    if keep_outputs:
        outputs = torch.where(valid.unsqueeze(2), torch.cat(states, dim=2), 0)[:, :T]
    if not paired:
        return h.new_empty(0), h.new_empty(0), h, outputs
    left, right = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2)
    distance = reference.manhattan_distance(left, right)
    return torch.exp(-scale * distance), distance, h, outputs


def _torch_states(
    cell: str,
    x: Tensor,
    lengths: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Return one direction's hidden states, [N, T, H], from torch's own LSTM or GRU."""
    N, T, H = x.shape[0], x.shape[1], weight_hh.shape[1]
    parameters = [weight_ih, weight_hh]
    if bias is not None:
        # of the state's own, all that the input's cannot hold: the bias of a GRU's gate n
        own = bias[len(weight_hh) :]
        parameters += [bias[: len(weight_hh)], F.pad(own, (len(weight_hh) - len(own), 0))]
    if x.is_cuda:
        # one buffer, as nn.LSTM keeps them: cuDNN would copy them into one, with a warning
        sizes = [p.numel() for p in parameters]
        chunks = torch.cat([p.flatten() for p in parameters]).split(sizes)
        parameters = [chunk.view_as(p) for chunk, p in zip(chunks, parameters, strict=True)]
    turned = None
    if reverse:
        # each sequence turned round within its length; the same once more turns it back
        time = torch.arange(T, device=x.device)
        ends = lengths.unsqueeze(1)
        turned = torch.where(time < ends, ends - 1 - time, time).unsqueeze(2)
        x = x.gather(1, turned.expand_as(x))
    state = x.new_zeros(1, N, H)
    training = torch.is_grad_enabled()
    how = parameters, bias is not None, 1, 0.0, training, False, True
    states: Tensor
    if cell == "lstm":
        states = torch.lstm(x, (state, state), *how)[0]
    else:
        states = torch.gru(x, state, *how)[0]
    return states if turned is None else states.gather(1, turned.expand_as(states))


def _computed_dtype(weight: Tensor) -> torch.dtype:
    """Return the weight's dtype, or autocast's where it is on: the operators are opaque to it."""
    device, dtype = weight.device.type, weight.dtype
    if not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Stack two sides, [B, T, ...] each, as [2B, max T, ...]."""
    steps = max(left.shape[1], right.shape[1])
    if left.shape[1] != right.shape[1]:
        left, right = (
            F.pad(side, (0, 0) * (side.ndim - 2) + (0, steps - side.shape[1]))
            for side in (left, right)
        )
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
        scale: factor on L1, > 0: a number or a tensor of one element.
        backend: "auto", "triton" or "torch".

    Returns:
        Similarities [Q, k] in (0, 1], float32, descending, and row numbers [Q, k], int64. Of equal
        distances the smaller row number comes first; rows with a NaN come last. L1 is summed in
        float32 (float64 for float64) and compared in float32. Neither result carries a gradient:
        where one is wanted, score the rows that were found with `manhattan_similarity`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
        ImportError: backend "triton" without triton.
    """
    who = "manhattan_topk"
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
    _check_scale(who, scale)
    choice = resolve_backend(who, backend, queries.device, queries.dtype, H=1, otherwise="torch")
    if choice.backend not in ("torch", "triton"):
        raise ValueError(
            f"{who}: backend must be auto, triton or torch, got {backend!r}; pass backend='torch'"
        )
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        distance, index = _ops.manhattan_topk(
            queries.contiguous(), corpus.contiguous(), k, choice.backend
        )
        return torch.exp(distance * -scale).float(), index


def _check_scale(who: str, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{who}: scale must have one element, got {list(scale.shape)}")
    elif not scale > 0:
        raise ValueError(f"{who}: scale must be positive, got {scale}")
