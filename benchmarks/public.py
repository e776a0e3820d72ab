"""Public LSTM kernels in the place of nn.LSTM, where their packages are installed: rivals.md.

Each takes the weights of the one-way network of `padded` and runs all T steps, as none of them
stops at a sentence's end. The order of gates and the layout of weights are that project's own; the
check against float64 says whether they are met.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Batch

H_OF_TILES = 16  # FlashRNN's matrix instructions take hidden units by the sixteen


def torchrl_padded(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Run TorchRL's Triton kernels, which may reset a sequence at any step and here never do."""
    from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

    (lstm,), some = networks, batch.sentences
    x = F.embedding(some.steps.t(), table)
    start = x.new_zeros(*x.shape[:2], lstm.hidden_size)
    resets = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    weights = (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
    states = lstm_triton(x, start, start, *weights, resets)[0]
    return states[some.rows, some.last]


def flashrnn_padded(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Project with one GEMM, then run FlashRNN's fused LSTM as one head."""
    from flashrnn import flashrnn

    (lstm,), some = networks, batch.sentences
    T, S = some.steps.shape
    H = lstm.hidden_size
    pad = -H % H_OF_TILES
    gates = F.linear(F.embedding(some.steps.t(), table), lstm.weight_ih_l0)
    # [S, T, gates, heads, H], [gates, heads, H, H], [gates, heads, H]: units of zeros fill up
    gates = F.pad(gates.view(S, T, 4, 1, H), (0, pad))
    recurrent = F.pad(lstm.weight_hh_l0.view(4, 1, H, H), (0, pad, 0, pad))
    bias = F.pad((lstm.bias_ih_l0 + lstm.bias_hh_l0).view(4, 1, H), (0, pad))
    dtype = str(gates.dtype).removeprefix("torch.")
    states, _ = flashrnn(gates, recurrent, bias, function="lstm", dtype=dtype)
    return states[0][some.rows, some.last, 0, :H]


def fastlstm_padded(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Run FastLSTM, which picks its kernel; its import turns TF32 on for the whole process."""
    from fastlstm.lstm import LSTMfn

    (lstm,), some = networks, batch.sentences
    weights = (lstm.weight_ih_l0, lstm.bias_ih_l0, lstm.weight_hh_l0, lstm.bias_hh_l0)
    states, _ = LSTMfn.apply(F.embedding(some.steps, table), None, None, *weights)
    return states[some.last, some.rows]
