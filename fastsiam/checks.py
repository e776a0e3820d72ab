"""What must hold of the arguments of the public functions, one sentence each where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastsiam.engine.layer import GATES, Projection, Weights
from fastsiam.engine.network import Network
from fastsiam.engine.select import check_name

Lengths = Tensor | Sequence[int] | None

POOLINGS = ("last", "mean", "max")


def check_network(
    who: str,
    weights: Weights | Sequence[Weights],
    bidirectional: bool,
    *,
    cell: str,
    pooling: str = "last",
    dropout: float = 0.0,
    recompute: bool = False,
    backend: str = "auto",
) -> Network:
    """Check a network's arguments, and all weights against each other.

    Raises:
        TypeError: a weight is no tensor.
        ValueError: the weights are not the layers of one network, or an option is out of range.
    """
    check_name(who, backend)
    weights = [weights] if isinstance(weights, Weights) else weights
    choice_of(who, "cell", cell, GATES)
    choice_of(who, "pooling", pooling, POOLINGS)
    if not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be at least 0 and below 1, got {dropout}")
    P = 2 if bidirectional else 1
    if not weights or len(weights) % P:
        raise ValueError(
            f"{who}: weights must be {P} a layer (bidirectional={bidirectional}), "
            f"got {len(weights)} in all"
        )
    for direction in weights:
        if not isinstance(direction, Weights):
            raise TypeError(
                f"{who}: weights must be Weights or a list of them, got {type(direction).__name__}"
            )
        for name, weight in zip(Weights._fields, direction, strict=True):
            if weight is not None or name.startswith("weight"):
                check_tensor(who, name, weight)
    layers = [weights[first : first + P] for first in range(0, len(weights), P)]
    like = weights[0].weight_hh
    if not like.is_floating_point():
        raise ValueError(f"{who}: weights must be floating point, got {like.dtype}")
    H, has_bias = like.shape[-1], weights[0].bias_ih is not None
    for depth, layer in enumerate(layers):
        D = layer[0].weight_ih.shape[-1] if depth == 0 else P * H
        for direction in layer:
            _check_weights(who, direction, GATES[cell] * H, D, like, has_bias)
    return Network(cell, layers, pooling, dropout, recompute, backend)


def check_projection(who: str, projection: Projection, network: Network) -> None:
    """Refuse a projection of another network: nothing below looks at its shapes again."""
    weight = network.layers[0][0].weight_hh
    shape = (len(network.layers[0]), *weight.shape)
    if (projection.cell, projection.shape) != (network.cell, shape):
        raise ValueError(
            f"{who}: prepared must be the result of prepare for these weights, {network.cell} of "
            f"{list(shape)}, got one for {projection.cell} of {list(projection.shape)}"
        )


def _check_weights(
    who: str, weights: Weights, rows: int, D: int, like: Tensor, has_bias: bool
) -> None:
    H = like.shape[-1]
    wanted = ((rows, D), (rows, H), (rows,), (rows,))
    for name, weight, shape in zip(Weights._fields, weights, wanted, strict=True):
        if weight is None:
            continue
        if weight.shape != shape:
            raise ValueError(
                f"{who}: {name} must be {list(shape)} for H = {H} (the columns of weight_hh), "
                f"got {list(weight.shape)}"
            )
        if what := _difference(weight, like):
            raise ValueError(
                f"{who}: all weights must have one {what}, got {name} of "
                f"{getattr(weight, what)} and weight_hh of {getattr(like, what)}"
            )
    if (weights.bias_ih is None) != (weights.bias_hh is None):
        raise ValueError(f"{who}: bias_ih and bias_hh must be given together or not at all")
    if (weights.bias_ih is not None) != has_bias:
        raise ValueError(f"{who}: every layer and direction must have biases, or none")


def check_tensor(who: str, name: str, given: object) -> None:
    """Raise TypeError where an argument is something else than a tensor."""
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{who}: {name} must be a tensor, got {type(given).__name__}; "
            "pass torch.as_tensor of it"
        )


def _difference(t: Tensor, like: Tensor) -> str | None:
    """Return which of dtype and device two tensors do not share, if any."""
    if t.dtype != like.dtype:
        return "dtype"
    return None if t.device == like.device else "device"


def check_table(who: str, embedding: Tensor, weight: Tensor) -> None:
    """Check an embedding against the first layer's weight_ih."""
    check_tensor(who, "embedding", embedding)
    D = weight.shape[1]
    if embedding.ndim != 2 or embedding.shape[1] != D:
        raise ValueError(
            f"{who}: embedding must be [V, D] with D = {D}, got {list(embedding.shape)}"
        )
    if what := _difference(embedding, weight):
        raise ValueError(
            f"{who}: embedding must have the weights' {what} {getattr(weight, what)}, "
            f"got {getattr(embedding, what)}"
        )


def check_side(
    who: str,
    name: str,
    x: Tensor,
    lengths: Lengths,
    mask: Tensor | None,
    weight: Tensor,
    embedding: Tensor | None,
    validate: bool,
) -> Tensor:
    """Check one side's arguments but the values of ids; return its lengths on its device.

    `weight` is the first layer's weight_ih.
    """
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
        check_table(who, embedding, weight)
    B, T = x.shape[:2]
    if mask is not None:
        check_tensor(who, f"{name}'s mask", mask)
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
    return _check_lengths(who, name, x, lengths, validate)


def as_tensor(lengths: Tensor | Sequence[int]) -> Tensor:
    """Return lengths as a tensor: those of a list on the CPU, whatever the default device is."""
    return lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")


def _check_lengths(who: str, name: str, x: Tensor, lengths: Lengths, validate: bool) -> Tensor:
    B, T = x.shape[:2]
    if lengths is None:
        return torch.full((B,), T, dtype=torch.int64, device=x.device)
    given = as_tensor(lengths)
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
        low, high = _bounds(given)
        if low < 0 or high > T:
            raise ValueError(
                f"{who}: {name}'s lengths must be between 0 and T = {T}, "
                f"got {low if low < 0 else high}"
            )
    return given.to(device=x.device, dtype=torch.int64)


def check_ids(
    who: str, names: Sequence[str], ids: Tensor, lengths: Tensor, V: int, validate: bool
) -> None:
    """Check the ids of one side or both, which stand one below the other."""
    checked = validate or ids.device.type == "cpu"
    if not checked or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = _bounds(ids)
    if 0 <= low and high < V:
        return
    # something is out of range: an error only where it is not padding
    valid = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    bad = valid & ((ids < 0) | (ids >= V))
    for name, side, wrong in zip(names, ids.chunk(len(names)), bad.chunk(len(names)), strict=True):
        if wrong.any():
            raise ValueError(
                f"{who}: {name}'s ids must be between 0 and V - 1 = {V - 1}, "
                f"got {int(side[wrong][0])}"
            )


def _bounds(t: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(t)
    return int(low), int(high)


def choice_of(who: str, name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError where an option is not one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{who}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_scale(who: str, scale: float | Tensor, device: torch.device) -> float | Tensor:
    """Return the factor on L1 as a float, or as a tensor without dimensions on a device."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{who}: scale must have one element, got {list(scale.shape)}")
        return scale.reshape(()).to(device)
    if not 0 < scale < math.inf:
        raise ValueError(f"{who}: scale must be positive and finite, got {scale}")
    return float(scale)
