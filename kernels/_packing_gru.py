"""The same for the GRU: its weights with four gates a unit, in the kernels' scaling.

Gates are r, z, n, y: n is what x alone gives to nn.GRU's n, y = W_hn h + b_hn what the reset gate
multiplies. So y has no input weight but a bias, which the table holds, and n no recurrent weight.

Scaling. As in `_packing` r and z are halved and the kernels keep 2h; y is halved, because the reset
gate is (1 + tanh) / 2. What the backward stores is the gradient of the gates so scaled.
"""

from __future__ import annotations

from torch import Tensor

from fastsiam.kernels import _packing

_SCALING = (0.5, 0.5, 1.0, 0.5)  # of a gate, and so of what its gradient gives to a weight


def record_shapes(N: int, T: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the forward keeps: gates, nothing, and hidden states."""
    gates, _, states = _packing.record_shapes(N, T, H, P)
    return gates, (0,), states


def prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do what `_packing.prepare` does, for weight_ih [P, 3H, D] and weight_hh [P, 3H, H]."""
    return _packing.prepare(x, weight_ih, weight_hh, bias, _SCALING)


def pack_backward(
    weight_ih: Tensor | None, weight_hh: Tensor, allow_tf32: bool
) -> tuple[Tensor | None, Tensor]:
    """Do what `_packing.pack_backward` does."""
    return _packing.pack_backward(weight_ih, weight_hh, allow_tf32, _SCALING)


def weight_gradients(
    dgates: Tensor,
    states: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    packed_ih: Tensor | None,
    H: int,
    steps: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `_packing.weight_gradients` does: dbias has r, z, n and y."""
    return _packing.weight_gradients(
        dgates, states, x, ids, lengths, packed_ih, H, steps, allow_tf32, _SCALING, gates=3
    )
