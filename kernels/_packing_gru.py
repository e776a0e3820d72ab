"""The same for the GRU: its weights with four gates a unit, in the kernels' scaling.

Gates are r, z, n, y: n is what x alone gives to nn.GRU's n, y = W_hn h + b_hn what the reset gate
multiplies. So y has no input weight but a bias, which the table holds, and n no recurrent weight.

Scaling. As in `_packing` r and z are halved and the kernels keep 2h; y is halved, because the reset
gate is (1 + tanh) / 2. What the backward stores is the gradient of the gates so scaled.
"""

from __future__ import annotations

import functools

from fastsiam.kernels import _packing

# both ways the same: of a gate, and so of what its gradient gives to a weight
_GRU = _packing.Scaling((0.5, 0.5, 1.0, 0.5), (0.5, 0.5, 1.0, 0.5))


def record_shapes(N: int, T: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the forward keeps: gates, nothing, and hidden states."""
    gates, _, states = _packing.record_shapes(N, T, H, P)
    return gates, (0,), states


# of weights [P, 3H, D] and [P, 3H, H]; dbias has r, z, n and y
prepare = functools.partial(_packing.prepare, scaling=_GRU)
weight_gradients = functools.partial(_packing.weight_gradients, scaling=_GRU)
