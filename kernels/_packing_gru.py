"""The same for the GRU: its weights with four gates a unit, in the kernels' row order and scaling.

Gates are r, z, n, y: n is what x alone gives to nn.GRU's n, y = W_hn h + b_hn what the reset gate
multiplies. So y has no input weight but a bias, which the table holds, and n no recurrent weight.

Scaling. As in `_packing` r and z are halved and the kernels keep 2h; y is halved, because the reset
gate is (1 + tanh) / 2. What the backward stores is the gradient of the gates so scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsiam.kernels import _packing

_SCALING = (0.5, 0.5, 1.0, 0.5)  # of a gate, and so of what its gradient gives to a weight


def record_shapes(N: int, T: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the forward keeps: gates, nothing, and hidden states."""
    gates, _, states = _packing.record_shapes(N, T, H, P)
    return gates, (0,), states


def pack_table(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Project the rows of x, [R, D], to gates of a cell's order: see `_packing.packed_shapes`."""
    return _packing.pack_table(x, _with_y(weight_ih), bias, _SCALING)


def pack_weight_fwd(weight_hh: Tensor) -> Tensor:
    """Return the bits of weight_hh, [P, 3H, H], as [P, 4 * block, block] for `a + W h`."""
    return _packing.pack_weight_fwd(_with_n(weight_hh), _SCALING)


def pack_weight_bwd(weight_hh: Tensor) -> Tensor:
    """Return the bits of weight_hh transposed, [P, 3 * block * block].

    In them r and z, [block, 2 * block], then y, [block, block].
    """
    r_z, n_y = _packing.pack_weight_bwd(_with_n(weight_hh), _SCALING).unbind(1)
    y = n_y[:, :, n_y.shape[1] :]
    return torch.cat((r_z.flatten(1), y.flatten(1)), dim=1)


def weight_gradients(
    dgates: Tensor,
    states: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    steps: int,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the kernel's gate gradients into gradients of the weights, as `_packing` does.

    Returns:
        dx (like x, or empty), dweight_ih, dweight_hh, dbias [P, 4H].
    """
    dx, dweight_ih, dweight_hh, dbias = _packing.weight_gradients(
        dgates,
        states,
        x,
        ids,
        lengths,
        _with_y(weight_ih),
        _with_n(weight_hh),
        steps,
        need_dx,
        _SCALING,
    )
    r, z, _, y = dweight_hh.chunk(4, dim=1)
    rows = weight_ih.shape[1]
    return dx, dweight_ih[:, :rows].contiguous(), torch.cat((r, z, y), dim=1), dbias


def _with_y(weight_ih: Tensor) -> Tensor:
    """Return [P, 3H, D] with rows of 0 for y, [P, 4H, D]."""
    r = weight_ih.chunk(3, dim=1)[0]
    return torch.cat((weight_ih, torch.zeros_like(r)), dim=1)


def _with_n(weight_hh: Tensor) -> Tensor:
    """Return [P, 3H, H], r, z, y, with rows of 0 for n, [P, 4H, H]."""
    r, z, y = weight_hh.chunk(3, dim=1)
    return torch.cat((r, z, torch.zeros_like(r), y), dim=1)
