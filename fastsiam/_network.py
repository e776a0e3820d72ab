"""A network of layers on one backend: what the functions of `functional` run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastsiam import _layer, _ops, _steps, reference
from fastsiam._backend import Choice, resolve_backend
from fastsiam._checks import Weights, check_network
from fastsiam._measured import Call
from fastsiam._packed import compute_dtype, stack


class Prepared(NamedTuple):
    """Every row of an embedding projected, and the recurrent weights laid out, for one backend."""

    backend: str
    cell: str
    table: Tensor
    weight: Tensor


class _Layer(NamedTuple):
    """A layer's weights stacked by direction, and the sum of its biases as `_ops` wants it."""

    weight_ih: Tensor  # [P, 4H, D], of a GRU [P, 3H, D]
    weight_hh: Tensor  # [P, 4H, H], of a GRU [P, 3H, H]
    bias: Tensor | None  # [P, 4H]


class Network(NamedTuple):
    """A network, and how it is to run."""

    cell: str
    layers: list[Sequence[Weights]]  # by direction
    dtype: torch.dtype
    pooling: str
    dropout: float
    asked: str  # the caller's backend, which may be "auto"
    backend: str
    prepared: Prepared | None
    recompute: bool


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
    weight = first_of(weights).weight_hh
    dtype, H = _computed_dtype(weight), weight.shape[1]
    if not sequences or not steps:
        return resolve_backend(who, backend, device, dtype, H)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in first_of(weights)
    )
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    call = Call(cell, name, training, threads, H, sequences, steps, filled)
    machine = machine_name(device, dtype, H)
    return resolve_backend(who, backend, device, dtype, H, call, machine)


def machine_name(device: torch.device, dtype: torch.dtype, H: int) -> str:
    """Return the name of a device in the table of measurements."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and _steps.obstacle(device, compute_dtype(dtype), H):
        return "cpu without compiled steps"
    return device.type


def make_network(
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
) -> Network:
    """Check the network's arguments and name its backend, as far as no sizes are known."""
    every = [weights] if isinstance(weights, Weights) else weights
    layers = check_network(who, every, cell, bidirectional, pooling)
    if not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be at least 0 and below 1, got {dropout}")
    weight = every[0].weight_hh
    dtype = _computed_dtype(weight)
    chosen = resolve_backend(who, backend, device, dtype, weight.shape[1]).backend
    if prepared is not None and prepared.backend != chosen:
        prepared = None
    if prepared is not None:
        _check_prepared(who, prepared, cell, layers[0], dtype)
    return Network(cell, layers, dtype, pooling, dropout, backend, chosen, prepared, recompute)


def _check_prepared(
    who: str, prepared: Prepared, cell: str, directions: Sequence[Weights], dtype: torch.dtype
) -> None:
    """Refuse what was prepared for another network: nothing below looks at its shapes again."""
    stacked = (len(directions), *directions[0].weight_hh.shape)
    device = prepared.weight.device
    _, (shape, _) = _layer.prepared_shapes(1, stacked, dtype, device, prepared.backend)
    given = prepared.weight
    if prepared.cell != cell or given.shape != shape or not given.is_contiguous():
        raise ValueError(
            f"{who}: prepared must be what prepare returned for these weights, of {cell} with a "
            f"weight of {list(shape)}, got one of {prepared.cell} with {list(given.shape)}"
        )


def run(
    network: Network,
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
    if steps < x.shape[1]:
        x = x[:, :steps]
        mask = None if mask is None else mask[:, :steps]
    pooling = network.pooling if mask is None else "mask"
    if pooling == "mean":
        pooling = "mask"
        share = lengths.clamp(1, max(x.shape[1], 1)).to(compute_dtype(network.dtype))
        mask = share.reciprocal_().unsqueeze(1).expand(-1, x.shape[1])
    # the kernels address these by rows without gaps
    lengths = lengths.contiguous()
    mask = None if mask is None else mask.contiguous()
    layer_of: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _fused_layer
    if network.backend in ("reference", "lstm"):
        layer_of = _plain_layer
        if network.recompute and torch.is_grad_enabled():
            layer_of = partial(checkpoint, _plain_layer, use_reentrant=False)
    with _layer.without_autocast(x.device.type):
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


def stack_layer(network: Network, directions: Sequence[Weights]) -> _Layer:
    """Lay the directions of a layer out for `_ops`, in the network's dtype."""
    dtype, bias = network.dtype, None
    if directions[0].bias_ih is not None:
        bias = stack([_bias(direction, network.cell).to(dtype) for direction in directions])
    return _Layer(
        stack([direction.weight_ih.to(dtype) for direction in directions]),
        stack([direction.weight_hh.to(dtype) for direction in directions]),
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


def _fit(network: Network, x: Tensor, lengths: Tensor) -> tuple[Network, int]:
    """Let "auto" look at the sizes of a call; return the steps that its backend needs, too."""
    N, T = x.shape[:2]
    measured = network.asked == "auto" and N > 0 and T > 0
    if torch.compiler.is_compiling() or not (measured or network.backend == "lstm"):
        return network, T
    longest, filled = T, None
    if x.device.type == "cpu":
        # of so few numbers Python is done sooner than two operators
        values = lengths.tolist()
        longest = max(values, default=0)
        filled = sum(values) / (N * longest) if longest else 1.0
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
        if choice.backend != network.backend:
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
    network: Network,
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
    allow_tf32 = allows_tf32(x.device)
    source = x.reshape(-1, x.shape[-1]) if embedding is None else embedding
    ids = None if embedding is None else x.contiguous()
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]
    # no tensor says that it is being differentiated in forward mode, which `siamese_fwd` refuses
    wants_grad = forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and any(
            t is not None and t.requires_grad
            for t in (source, learned_scale, *itertools.chain.from_iterable(directions))
        )
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
    outputs = _ops.siamese_fwd(
        source,
        ids,
        lengths,
        mask,
        *stack_layer(network, directions),
        learned_scale,
        factor,
        steps,
        pooling,
        paired,
        keep_outputs,
        # without a backward there is nothing to keep
        network.recompute or not wants_grad,
        allow_tf32,
        network.cell,
        network.backend,
    )[:4]
    return outputs


def allows_tf32(device: torch.device) -> bool:
    """Return whether float32 products of a recurrence may be rounded to tf32."""
    if device.type != "cuda":
        return False
    rnn = torch.backends.cudnn.rnn
    precision: str = rnn.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def _plain_layer(
    network: Network,
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
    # an empty batch runs nothing, and not every LSTM of torch's takes one
    by_torch = network.backend == "lstm" and x.shape[0] > 0
    states_of = _torch_states if by_torch else _reference_states
    for p, weights in enumerate(directions):
        reverse = p == 1
        direction = states_of(network.cell, x, lengths, weights, reverse)
        states.append(direction)
        vectors.append(reference.pool(direction, lengths, pooling, mask, reverse))
    h = torch.cat(vectors, dim=1)
    outputs = h.new_empty(0)
    if keep_outputs:
        outputs = torch.where(valid.unsqueeze(2), torch.cat(states, dim=2), 0)[:, :T]
    if not paired:
        return h.new_empty(0), h.new_empty(0), h, outputs
    # not chunk(2): of a free batch size, torch.export cannot tell how many parts that makes
    sides = h.view(2, h.shape[0] // 2, h.shape[1])
    left, right = sides.to(compute_dtype(h.dtype))
    distance = reference.manhattan_distance(left, right)
    return torch.exp(-scale * distance), distance, h, outputs


def _reference_states(
    cell: str, x: Tensor, lengths: Tensor, weights: Weights, reverse: bool
) -> Tensor:
    """Return one direction's hidden states, [N, T, H], from the definition."""
    bias = None if weights.bias_ih is None else _bias(weights, cell).to(x.dtype)
    of_x, of_h = weights.weight_ih.to(x.dtype), weights.weight_hh.to(x.dtype)
    return reference.STATES[cell](x, lengths, of_x, of_h, bias, reverse)


def _torch_states(cell: str, x: Tensor, lengths: Tensor, weights: Weights, reverse: bool) -> Tensor:
    """Return the same from torch's own LSTM or GRU."""
    N, T, H = x.shape[0], x.shape[1], weights.weight_hh.shape[1]
    parameters = [weight.to(x.dtype) for weight in weights if weight is not None]
    has_bias = weights.bias_ih is not None
    if x.is_cuda:
        # one buffer, as nn.LSTM keeps them: cuDNN would copy them into one, with a warning. It
        # has biases in any case
        flat = [p.flatten() for p in parameters]
        if not has_bias:
            flat.append(x.new_zeros(2 * len(parameters[0])))
        chunks = torch.cat(flat).split([p.numel() for p in flat])
        parameters = [chunk.view_as(p) for chunk, p in zip(chunks, parameters, strict=False)]
    turned = None
    if reverse:
        # each sequence turned round within its length; the same once more turns it back
        time = torch.arange(T, device=x.device)
        ends = lengths.unsqueeze(1)
        turned = torch.where(time < ends, ends - 1 - time, time).unsqueeze(2)
        x = x.gather(1, turned.expand_as(x))
    state = x.new_zeros(1, N, H)
    training = torch.is_grad_enabled()
    how = parameters, has_bias, 1, 0.0, training, False, True
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


def first_of(weights: Weights | Sequence[Weights]) -> Weights:
    return weights if isinstance(weights, Weights) else weights[0]
