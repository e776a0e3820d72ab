"""The definition: the Siamese LSTM in plain PyTorch, any dtype, any device, differentiable twice.

Nothing here is fast and nothing here is shared with the other backends: it is what they are
checked against. Equations: Mueller and Thyagarajan, "Siamese Recurrent Architectures for Learning
Sentence Similarity", AAAI 2016, with PyTorch's gate order i, f, g, o.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(
    x: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Run an LSTM from zero state and return one vector a sequence.

    Args:
        x: [N, T, D] inputs; what stands at step >= length is not read.
        lengths: [N] valid steps, 0 <= length <= T.
        mask: [N, T] weights of the steps in the sum, or None for the last valid state.
        weight_ih: [4H, D], gates i, f, g, o.
        weight_hh: [4H, H].
        bias: [4H], the sum of nn.LSTM's two biases, or None.

    Returns:
        [N, H]: h at step length - 1 (zero for length 0), or sum_t mask[:, t] h_t over valid steps.
    """
    N, T, _ = x.shape
    H = weight_hh.shape[1]
    h = x.new_zeros(N, H)
    c = x.new_zeros(N, H)
    pooled = x.new_zeros(N, H)
    for t in range(T):
        alive = (t < lengths).unsqueeze(1)
        # chosen before it is multiplied, so NaN in the padding reaches neither value nor gradient
        a = torch.where(alive, x[:, t], 0) @ weight_ih.T + h @ weight_hh.T
        if bias is not None:
            a = a + bias
        i, f, g, o = a.chunk(4, dim=1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_next = torch.sigmoid(o) * torch.tanh(c_next)
        c = torch.where(alive, c_next, c)
        h = torch.where(alive, h_next, h)
        if mask is not None:
            pooled = pooled + torch.where(alive, mask[:, t : t + 1], 0) * h_next
    return h if mask is None else pooled


def manhattan_distance(u: Tensor, v: Tensor) -> Tensor:
    """Return the L1 distances of the rows of u and v, [B, H] each, as [B]."""
    return (u - v).abs().sum(dim=1)
