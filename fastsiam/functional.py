"""Public functions over weights: check, pick the backend, call the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam import _ops, reference
from fastsiam._backend import Choice, resolve_backend

Lengths = Tensor | Sequence[int] | None


class Weights(NamedTuple):
    """An LSTM layer's weights under nn.LSTM's names, all of one dtype and device.

    weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H] or both None; gates i, f, g, o.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


class Prepared(NamedTuple):
    """Every row of an embedding projected, and the recurrent weight laid out, for one backend."""

    backend: str
    table: Tensor
    weight: Tensor


def siamese_lstm(
    left: Tensor,
    right: Tensor,
    weights: Weights,
    *,
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
    """Score pairs of sequences by exp(-scale * L1) of their LSTM vectors (MaLSTM, AAAI 2016).

    Args:
        left: [B, T, D] inputs in the weights' dtype, or [B, T] integer ids where `embedding` is
            given. What stands behind a sequence's end is never read and may be anything.
        right: the same; its T may differ from left's.
        weights: of the one LSTM both sides run through.
        embedding: [V, D] vectors that ids point into.
        left_lengths: [B] valid steps of each sequence, 0 <= length <= T: int32 or int64 tensor on
            any device, or a list. None: all T. A sequence of length 0 has the vector 0.
        right_lengths: the same for the right side.
        left_mask: [B, T] weights of the steps; the vector is then sum_t mask[b, t] h_t over valid
            steps instead of the last valid h. It carries no gradient.
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
    who = "siamese_lstm"
    _check_weights(who, weights)
    left, left_lengths = _check_side(
        who, "left", left, left_lengths, left_mask, weights, embedding, validate
    )
    right, right_lengths = _check_side(
        who, "right", right, right_lengths, right_mask, weights, embedding, validate
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
    mask = None
    if left_mask is not None and right_mask is not None:
        mask = _join(left_mask, right_mask)
    x = _join(left, right)
    lengths = torch.cat((left_lengths, right_lengths))
    similarity, log_similarity, _ = _run(
        who, x, lengths, mask, weights, embedding, scale, True, backend, prepared
    )
    return log_similarity if log else similarity


def lstm_encode(
    x: Tensor,
    weights: Weights,
    *,
    embedding: Tensor | None = None,
    lengths: Lengths = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    prepared: Prepared | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the LSTM vectors of sequences, [B, H] in the weights' dtype.

    The arguments are those of one side of `siamese_lstm`, and so are the errors.
    """
    who = "lstm_encode"
    _check_weights(who, weights)
    x, lengths = _check_side(who, "x", x, lengths, mask, weights, embedding, validate)
    return _run(who, x, lengths, mask, weights, embedding, 1.0, False, backend, prepared)[2]


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


def prepare(weights: Weights, embedding: Tensor, backend: str = "auto") -> Prepared | None:
    """Project all of `embedding`, [V, D], once, for any number of calls without gradients.

    Returns:
        What to hand to `siamese_lstm` or `lstm_encode` as `prepared` until a weight changes, or
        None where the backend has no use for it ("lstm" and "reference").
    """
    dtype = _computed_dtype(weights)
    weights, embedding = _cast(weights, dtype), embedding.to(dtype)
    who = "prepare"
    choice = explain(weights, embedding.device, backend, who=who)
    if choice.backend not in ("torch", "triton"):
        return None
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):
        table, weight = _ops.siamese_prepare(
            embedding, weights.weight_ih, weights.weight_hh, _bias(weights), choice.backend
        )
    return Prepared(choice.backend, table, weight)


def explain(
    weights: Weights, device: torch.device, backend: str = "auto", *, who: str = "explain"
) -> Choice:
    """Return the backend a call on `device` would take, and why; raise if it cannot run."""
    H = weights.weight_hh.shape[1]
    return resolve_backend(who, backend, device, weights.weight_hh.dtype, H)


def _run(
    who: str,
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    weights: Weights,
    embedding: Tensor | None,
    scale: float | Tensor,
    paired: bool,
    backend: str,
    prepared: Prepared | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarity and log-similarity, [B] (empty unless paired), and vectors [N, H]."""
    dtype = _computed_dtype(weights)
    weights = _cast(weights, dtype)
    if embedding is None:
        x = x.to(dtype)
    else:
        embedding = embedding.to(dtype)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{who}: scale must have one element, got {list(scale.shape)}")
    elif not scale > 0:
        raise ValueError(f"{who}: scale must be positive, got {scale}")
    choice = explain(weights, x.device, backend, who=who)
    with torch.autocast(x.device.type, enabled=False):
        if choice.backend in ("reference", "lstm"):
            h = _plain_encode(choice.backend, x, lengths, mask, weights, embedding)
            if not paired:
                return h.new_empty(0), h.new_empty(0), h
            left, right = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2)
            log_similarity = -scale * reference.manhattan_distance(left, right)
            return torch.exp(log_similarity), log_similarity, h
        similarity, distance, h = _fused(
            x, lengths, mask, weights, embedding, scale, paired, choice.backend, prepared
        )
    return similarity, -scale * distance, h


def _fused(
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    weights: Weights,
    embedding: Tensor | None,
    scale: float | Tensor,
    paired: bool,
    backend: str,
    prepared: Prepared | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarity, L1 and vectors from the backends that have the whole program."""
    factor, learned_scale = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    steps = x.shape[1]
    rnn = torch.backends.cudnn.rnn
    allow_tf32 = x.is_cuda and rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    source = x.reshape(-1, x.shape[-1]) if embedding is None else embedding
    # the kernels address these three by rows without gaps
    ids = None if embedding is None else x.contiguous()
    lengths = lengths.contiguous()
    mask = None if mask is None else mask.contiguous()
    bias = _bias(weights)
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (source, weights.weight_ih, weights.weight_hh, bias, learned_scale)
    )
    if wants_grad:
        similarity, distance, h, *_ = _ops.siamese_fwd(
            source,
            ids,
            lengths,
            mask,
            weights.weight_ih,
            weights.weight_hh,
            bias,
            learned_scale,
            factor,
            steps,
            paired,
            allow_tf32,
            backend,
        )
        return similarity, distance, h
    if prepared is None or prepared.backend != backend:
        if embedding is None or _tokens_are_fewer(source, x):
            source, ids = _token_rows(source, ids, lengths, steps), None
        table, weight = _ops.siamese_prepare(
            source, weights.weight_ih, weights.weight_hh, bias, backend
        )
    else:
        table, weight = prepared.table, prepared.weight
    outputs: tuple[Tensor, Tensor, Tensor] = _ops.siamese_infer(
        table,
        weight,
        ids,
        lengths,
        mask,
        learned_scale,
        factor,
        weights.weight_hh.shape[1],
        steps,
        paired,
        allow_tf32,
        weights.weight_hh.dtype,
        backend,
    )
    return outputs


def _tokens_are_fewer(embedding: Tensor, ids: Tensor) -> bool:
    return ids.numel() < embedding.shape[0]


def _token_rows(source: Tensor, ids: Tensor | None, lengths: Tensor, steps: int) -> Tensor:
    """Return one row a token, [N * T, D]; rows of the padding are row 0's, not what stood there."""
    if ids is None:
        return source
    valid = torch.arange(steps, device=ids.device) < lengths.unsqueeze(1)
    return F.embedding(torch.where(valid, ids, 0).reshape(-1), source)


def _plain_encode(
    backend: str,
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    weights: Weights,
    embedding: Tensor | None,
) -> Tensor:
    """Return [N, H] from the definition, or from torch's own LSTM on the padded batch."""
    if x.shape[1] == 0:
        # a step that no sequence has: the weights get gradients, of 0, as from any other batch
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    valid = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    if embedding is not None:
        x = F.embedding(torch.where(valid, x, 0), embedding)
    bias = _bias(weights)
    N, H = x.shape[0], weights.weight_hh.shape[1]
    # an empty batch runs nothing, and not every LSTM of torch's takes one
    if backend == "reference" or N == 0:
        return reference.encode(x, lengths, mask, weights.weight_ih, weights.weight_hh, bias)
    parameters = [weights.weight_ih, weights.weight_hh]
    if weights.bias_ih is not None and weights.bias_hh is not None:
        parameters += [weights.bias_ih, weights.bias_hh]
    if x.is_cuda:
        # one buffer, as nn.LSTM keeps them: cuDNN would copy them into one, with a warning
        sizes = [p.numel() for p in parameters]
        chunks = torch.cat([p.flatten() for p in parameters]).split(sizes)
        parameters = [chunk.view_as(p) for chunk, p in zip(chunks, parameters, strict=True)]
    state = x.new_zeros(1, N, H)
    x = torch.where(valid.unsqueeze(2), x, 0)
    training = torch.is_grad_enabled()
    y: Tensor = torch.lstm(
        x, (state, state), parameters, bias is not None, 1, 0.0, training, False, True
    )[0]
    if mask is None:
        last = (lengths.long() - 1).clamp(min=0).view(N, 1, 1).expand(N, 1, H)
        return torch.where((lengths > 0).unsqueeze(1), y.gather(1, last).squeeze(1), 0)
    return torch.einsum("nt,nth->nh", torch.where(valid, mask, 0).to(y.dtype), y)


def _bias(weights: Weights) -> Tensor | None:
    if weights.bias_ih is None or weights.bias_hh is None:
        return None
    return weights.bias_ih + weights.bias_hh


def _computed_dtype(weights: Weights) -> torch.dtype:
    """Return the weights' dtype, or autocast's where it is on: the operators are opaque to it."""
    device, dtype = weights.weight_hh.device.type, weights.weight_hh.dtype
    if not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device)


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    return Weights(
        weight_ih.to(dtype),
        weight_hh.to(dtype),
        None if bias_ih is None else bias_ih.to(dtype),
        None if bias_hh is None else bias_hh.to(dtype),
    )


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Stack two sides, [B, T, ...] each, as [2B, max T, ...]."""
    steps = max(left.shape[1], right.shape[1])
    if left.shape[1] != right.shape[1]:
        left, right = (
            F.pad(side, (0, 0) * (side.ndim - 2) + (0, steps - side.shape[1]))
            for side in (left, right)
        )
    return torch.cat((left, right))


def _check_weights(who: str, weights: Weights) -> None:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    H = weight_hh.shape[-1]
    wanted = ((4 * H, weight_ih.shape[-1]), (4 * H, H), (4 * H,), (4 * H,))
    for name, weight, shape in zip(Weights._fields, weights, wanted, strict=True):
        if weight is not None and weight.shape != shape:
            raise ValueError(
                f"{who}: {name} must be {list(shape)} for H = {H} (the columns of weight_hh), "
                f"got {list(weight.shape)}"
            )
        if weight is not None and weight.dtype != weight_hh.dtype:
            raise ValueError(
                f"{who}: all weights must have one dtype, got {name} of {weight.dtype} and "
                f"weight_hh of {weight_hh.dtype}"
            )
    if (bias_ih is None) != (bias_hh is None):
        raise ValueError(f"{who}: bias_ih and bias_hh must be given together or not at all")


def _check_side(
    who: str,
    name: str,
    x: Tensor,
    lengths: Lengths,
    mask: Tensor | None,
    weights: Weights,
    embedding: Tensor | None,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """Check one side's arguments; return it and its lengths as a tensor on its device."""
    weight = weights.weight_ih
    D = weight.shape[1]
    if x.device != weight.device:
        raise ValueError(
            f"{who}: {name} must be on the weights' device {weight.device}, got {x.device}"
        )
    if embedding is None:
        if x.ndim != 3 or x.shape[2] != D:
            raise ValueError(
                f"{who}: {name} must be [B, T, D] with D = {D}, got {list(x.shape)}"
                + ("; ids need an embedding" if x.ndim == 2 and not x.is_floating_point() else "")
            )
        autocast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
        if x.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"{who}: {name} must have the weights' dtype {weight.dtype}, got {x.dtype}; "
                f"convert it with .to({weight.dtype})"
            )
    else:
        if x.ndim != 2 or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{who}: {name} must be integer ids [B, T] of dtype int32 or int64 where an "
                f"embedding is given, got {list(x.shape)} of {x.dtype}"
            )
        if embedding.ndim != 2 or embedding.shape[1] != D:
            raise ValueError(
                f"{who}: embedding must be [V, D] with D = {D}, got {list(embedding.shape)}"
            )
        if embedding.dtype != weight.dtype:
            raise ValueError(
                f"{who}: embedding must have the weights' dtype {weight.dtype}, "
                f"got {embedding.dtype}"
            )
    B, T = x.shape[:2]
    if mask is not None:
        if mask.shape != (B, T):
            raise ValueError(
                f"{who}: {name}'s mask must be [B, T] = {[B, T]}, got {list(mask.shape)}"
            )
        if mask.requires_grad:
            raise ValueError(
                f"{who}: {name}'s mask carries no gradient and must not require one; detach it"
            )
        if mask.device != x.device:
            raise ValueError(
                f"{who}: {name}'s mask must be on the device {x.device}, got {mask.device}"
            )
    valid_steps = _check_lengths(who, name, x, lengths, validate)
    if embedding is not None and (validate or x.device.type == "cpu"):
        _check_ids(who, name, x, valid_steps, embedding.shape[0])
    return x, valid_steps


def _check_lengths(who: str, name: str, x: Tensor, lengths: Lengths, validate: bool) -> Tensor:
    B, T = x.shape[:2]
    if lengths is None:
        return torch.full((B,), T, dtype=torch.int64, device=x.device)
    given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
    if given.numel() == 0:
        given = given.long()
    if given.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{who}: {name}'s lengths must be whole numbers (int32 or int64), got {given.dtype}"
        )
    if given.shape != (B,):
        raise ValueError(
            f"{who}: {name}'s lengths must be one number a row, [{B}], got {list(given.shape)}"
        )
    on_cpu = given.device.type == "cpu" and not torch.compiler.is_compiling()
    if B and (validate or on_cpu):
        low, high = (int(bound) for bound in torch.aminmax(given))
        if low < 0 or high > T:
            raise ValueError(
                f"{who}: {name}'s lengths must be between 0 and T = {T}, "
                f"got {low if low < 0 else high}"
            )
    return given.to(device=x.device, dtype=torch.int64)


def _check_ids(who: str, name: str, ids: Tensor, lengths: Tensor, V: int) -> None:
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if 0 <= low and high < V:
        return
    # something is out of range: an error only where it is not padding
    valid = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    read = ids[valid]
    bad = read[(read < 0) | (read >= V)]
    if bad.numel():
        raise ValueError(
            f"{who}: {name}'s ids must be between 0 and V - 1 = {V - 1}, got {int(bad[0])}"
        )
