"""The definition: the Siamese LSTM in plain PyTorch, any dtype, any device, differentiable twice.

Nothing here is fast and nothing here is shared with the other backends: it is what they are
checked against. Equations: Mueller and Thyagarajan, "Siamese Recurrent Architectures for Learning
Sentence Similarity", AAAI 2016, with PyTorch's gate order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.engine.layer import Backend, Call, Inputs, Options, Outputs, Weights, sum_biases

# the hidden states of one direction, [N, T, H]
States = Callable[[str, Tensor, Tensor, Weights, bool], Tensor]


def lstm_states(
    x: Tensor,
    lengths: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """Run one direction of an LSTM layer from zero state and return its hidden states.

    Args:
        x: [N, T, D] inputs; what stands at step >= length is not read.
        lengths: [N] valid steps, 0 <= length <= T.
        weight_ih: [4H, D], gates i, f, g, o.
        weight_hh: [4H, H].
        bias: [4H], the sum of nn.LSTM's two biases, or None.
        reverse: whether to run from the last valid step to the first.

    Returns:
        [N, T, H]: the state after reading each step; zero behind a sequence's end.
    """
    N, T, _ = x.shape
    h = c = x.new_zeros(N, weight_hh.shape[1])
    states: list[Tensor] = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        alive = (t < lengths).unsqueeze(1)
        # chosen before it is multiplied, so NaN in the padding reaches neither value nor gradient
        a = torch.where(alive, x[:, t], 0) @ weight_ih.T + h @ weight_hh.T
        if bias is not None:
            a = a + bias
        i, f, g, o = a.chunk(4, dim=1)
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h_next = torch.sigmoid(o) * torch.tanh(c_next)
        c = torch.where(alive, c_next, 0)
        h = torch.where(alive, h_next, 0)
        states[t] = h
    return torch.stack(states, dim=1)


def gru_states(
    x: Tensor,
    lengths: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """Run one direction of a GRU layer (nn.GRU's equations) as `lstm_states` does.

    Args:
        x, lengths, reverse: as for `lstm_states`.
        weight_ih: [3H, D], gates r, z, n.
        weight_hh: [3H, H].
        bias: [4H], of nn.GRU's two biases the sums of r and of z, the input's of n and the state's
            of n, which the reset gate multiplies; or None.

    Returns:
        [N, T, H]: the state after reading each step; zero behind a sequence's end.
    """
    N, T, _ = x.shape
    H = weight_hh.shape[1]
    h = x.new_zeros(N, H)
    b_r, b_z, b_in, b_hn = x.new_zeros(4, H) if bias is None else bias.view(4, H)
    states: list[Tensor] = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        alive = (t < lengths).unsqueeze(1)
        x_r, x_z, x_n = (torch.where(alive, x[:, t], 0) @ weight_ih.T).chunk(3, dim=1)
        h_r, h_z, h_n = (h @ weight_hh.T).chunk(3, dim=1)
        r = torch.sigmoid(x_r + h_r + b_r)
        z = torch.sigmoid(x_z + h_z + b_z)
        n = torch.tanh(x_n + b_in + r * (h_n + b_hn))
        h = torch.where(alive, (1 - z) * n + z * h, 0)
        states[t] = h
    return torch.stack(states, dim=1)


STATES = {"lstm": lstm_states, "gru": gru_states}


def pool(
    states: Tensor, lengths: Tensor, pooling: str, mask: Tensor | None, reverse: bool = False
) -> Tensor:
    """Turn one direction's hidden states into one vector a sequence.

    Args:
        states: [N, T, H], T at least 1, finite.
        lengths: [N].
        pooling: "last", the state after the last step in the order they were read; "max", the
            largest value of each unit (among equals the gradient goes to the one read first);
            "mask", sum_t mask[:, t] h_t over valid steps.
        mask: [N, T] for "mask", else None.
        reverse: whether the steps were read from the last to the first.

    Returns:
        [N, H]; zero for length 0.
    """
    valid = torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)
    if pooling == "mask" and mask is not None:
        return torch.einsum("nt,nth->nh", torch.where(valid, mask, 0).to(states.dtype), states)
    if pooling == "max":
        if reverse:
            states, valid = states.flip(1), valid.flip(1)
        at = torch.where(valid.unsqueeze(2), states, -torch.inf).argmax(dim=1, keepdim=True)
    else:
        last = torch.zeros_like(lengths) if reverse else (lengths - 1).clamp(min=0)
        at = last.long().view(-1, 1, 1).expand(-1, 1, states.shape[2])
    return torch.where((lengths > 0).unsqueeze(1), states.gather(1, at).squeeze(1), 0)


class Reference(Backend):
    """Layers by the definition, which autograd differentiates."""

    name = "reference"
    composite = True

    def obstacle(self, call: Call) -> str:
        """Nothing keeps the definition from a call."""
        del call
        return ""

    def run(self, inputs: Inputs, directions: Sequence[Weights], options: Options) -> Outputs:
        """Run a layer."""
        return run_padded(inputs, directions, options, _states)


def run_padded(
    inputs: Inputs, directions: Sequence[Weights], options: Options, states_of: States
) -> Outputs:
    """Run a layer on the padded batch, with a function for the hidden states of one direction."""
    valid, x, mask = padded(inputs)
    states, vectors = [], []
    for p, weights in enumerate(directions):
        reverse = p == 1
        states.append(states_of(options.cell, x, inputs.lengths, weights, reverse))
        vectors.append(pool(states[p], inputs.lengths, options.pooling, mask, reverse))
    wanted = None
    if options.all_states:
        wanted = torch.where(valid.unsqueeze(2), torch.cat(states, dim=2), 0)[:, : inputs.steps]
    return Outputs(torch.cat(vectors, dim=1), wanted)


def padded(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return valid steps [N, T], inputs [N, T, D], 0 where not valid, and the mask; T >= 1."""
    N, T, lengths = inputs.count, inputs.steps, inputs.lengths
    x = inputs.x.view(N, T, inputs.x.shape[1]) if inputs.ids is None else inputs.x
    mask = inputs.mask
    if T == 0:
        # a step that no sequence has: x and the weights get gradients of 0, as from any batch
        T, mask = 1, None if mask is None else F.pad(mask, (0, 1))
        if inputs.ids is None:
            x = F.pad(x, (0, 0, 0, 1))
    valid = torch.arange(T, device=lengths.device) < lengths.unsqueeze(1)
    if inputs.ids is not None:
        ids = inputs.ids if inputs.steps else inputs.ids.new_zeros(N, 1)
        x = F.embedding(torch.where(valid, ids, 0), x)
    return valid, torch.where(valid.unsqueeze(2), x, 0), mask


def _states(cell: str, x: Tensor, lengths: Tensor, weights: Weights, reverse: bool) -> Tensor:
    bias = None if weights.bias_ih is None else sum_biases(weights, cell).to(x.dtype)
    of_x, of_h = weights.weight_ih.to(x.dtype), weights.weight_hh.to(x.dtype)
    return STATES[cell](x, lengths, of_x, of_h, bias, reverse)


REFERENCE = Reference()
