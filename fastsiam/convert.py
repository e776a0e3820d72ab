"""Weights of other programs' LSTMs, as the state_dict of `nn.LSTM` and `SiameseLSTM`."""

from __future__ import annotations

import torch
from torch import Tensor


def from_tensorflow(kernel: Tensor, bias: Tensor, forget_bias: float = 1.0) -> dict[str, Tensor]:
    """Turn the weights of TensorFlow 1's BasicLSTMCell into those of nn.LSTM.

    Args:
        kernel: [D + H, 4H], input rows before recurrent ones, gates in the order i, g, f, o.
        bias: [4H], in the same order.
        forget_bias: what the cell was told to add to the forget gate as it runs; part of the bias
            from here on.

    Returns:
        `weight_ih_l0` [4H, D], `weight_hh_l0` [4H, H], `bias_ih_l0` [4H] and `bias_hh_l0` [4H], of
        zeros; gates in PyTorch's order i, f, g, o.

    Raises:
        ValueError: the shapes are not those of one cell.
    """
    gates = kernel.shape[1] if kernel.ndim == 2 else 0
    H = gates // 4
    if not H or gates % 4 or len(kernel) <= H or bias.shape != (gates,):
        raise ValueError(
            "from_tensorflow: kernel must be [D + H, 4H] and bias [4H], got "
            f"{list(kernel.shape)} and {list(bias.shape)}"
        )
    i, g, f, o = kernel.T.chunk(4)
    weight = torch.cat([i, f, g, o])
    bias_i, bias_g, bias_f, bias_o = bias.chunk(4)
    D = len(kernel) - H
    return _state(
        weight[:, :D], weight[:, D:], torch.cat([bias_i, bias_f + forget_bias, bias_g, bias_o])
    )


def from_theano(W: Tensor, U: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Turn the weights of the MaLSTM authors' Theano program into those of nn.LSTM.

    Args:
        W: [4H, D], gates in the order i, f, o, g.
        U: [4H, H], likewise.
        b: [4H], likewise; the forget bias is part of it.

    Returns:
        As `from_tensorflow`.

    Raises:
        ValueError: the shapes are not those of one cell.
    """
    H = U.shape[-1]
    if W.ndim != 2 or U.shape != (4 * H, H) or len(W) != 4 * H or b.shape != (4 * H,):
        raise ValueError(
            "from_theano: W must be [4H, D], U [4H, H] and b [4H], got "
            f"{list(W.shape)}, {list(U.shape)} and {list(b.shape)}"
        )

    def ordered(t: Tensor) -> Tensor:
        i, f, o, g = t.chunk(4)
        return torch.cat([i, f, g, o])

    return _state(ordered(W), ordered(U), ordered(b))


def _state(weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {
        "weight_ih_l0": weight_ih.contiguous(),
        "weight_hh_l0": weight_hh.contiguous(),
        "bias_ih_l0": bias,
        "bias_hh_l0": torch.zeros_like(bias),
    }
