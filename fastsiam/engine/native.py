"""The backend "lstm": torch's own LSTM or GRU on the padded batch, on CUDA cuDNN's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastsiam.engine import reference
from fastsiam.engine.layer import Backend, Call, Inputs, Options, Outputs, Weights


class Native(Backend):
    """Layers by torch.lstm and torch.gru, which autograd differentiates."""

    name = "lstm"
    composite = True

    def obstacle(self, call: Call) -> str:
        """Nothing keeps torch's own recurrence from a call."""
        del call
        return ""

    def run(self, inputs: Inputs, directions: Sequence[Weights], options: Options) -> Outputs:
        """Run a layer; steps behind the longest sequence are cut off where lengths are on a CPU."""
        if inputs.count == 0:
            # torch's own LSTM does not take every empty batch
            return reference.REFERENCE.run(inputs, directions, options)
        outputs = reference.run_padded(_cut(inputs), directions, options, _states)
        if outputs.states is None or outputs.states.shape[1] == inputs.steps:
            return outputs
        behind = (0, 0, 0, inputs.steps - outputs.states.shape[1])
        return replace(outputs, states=torch.nn.functional.pad(outputs.states, behind))


def _cut(inputs: Inputs) -> Inputs:
    """Return the inputs without the steps behind all ends, where the host knows the lengths."""
    if torch.compiler.is_compiling() or inputs.lengths.device.type != "cpu":
        return inputs
    # of so few numbers Python is done sooner than an operator
    steps = max(inputs.lengths.tolist(), default=0)
    if steps == inputs.steps:
        return inputs
    N, T, ids, mask = inputs.count, inputs.steps, inputs.ids, inputs.mask
    x = (
        inputs.x
        if ids is not None
        else inputs.x.view(N, T, inputs.x.shape[1])[:, :steps].flatten(0, 1)
    )
    ids = None if ids is None else ids[:, :steps]
    mask = None if mask is None else mask[:, :steps]
    return Inputs(x, ids, inputs.lengths, mask, steps)


def _states(cell: str, x: Tensor, lengths: Tensor, weights: Weights, reverse: bool) -> Tensor:
    """Return one direction's hidden states, [N, T, H]."""
    N, T, H = x.shape[0], x.shape[1], weights.weight_hh.shape[1]
    parameters = [weight.to(x.dtype) for weight in weights if weight is not None]
    has_bias = weights.bias_ih is not None
    if x.is_cuda:
        # one buffer, as nn.LSTM keeps its weights: cuDNN would copy them into one, with a warning.
        # cuDNN has biases in any case
        flat = [p.flatten() for p in parameters]
        if not has_bias:
            flat.append(x.new_zeros(2 * len(parameters[0])))
        chunks = torch.cat(flat).split([p.numel() for p in flat])
        parameters = [chunk.view_as(p) for chunk, p in zip(chunks, parameters, strict=False)]
    turned = None
    if reverse:
        # each sequence turned round within its length; the same index turns the states back
        time = torch.arange(T, device=x.device)
        ends = lengths.unsqueeze(1)
        turned = torch.where(time < ends, ends - 1 - time, time).unsqueeze(2)
        x = x.gather(1, turned.expand_as(x))
    state = x.new_zeros(1, N, H)
    how = parameters, has_bias, 1, 0.0, torch.is_grad_enabled(), False, True
    states: Tensor
    if cell == "lstm":
        states = torch.lstm(x, (state, state), *how)[0]
    else:
        states = torch.gru(x, state, *how)[0]
    return states if turned is None else states.gather(1, turned.expand_as(states))


NATIVE = Native()
