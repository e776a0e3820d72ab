"""The LSTM's cell for `batched`: its steps forward and backward on packed rows.

A sigmoid costs a third of a tanh here, so tanh(x) is 2 * sigmoid(2x) - 1 throughout. Inside this
file, and nowhere else, three things are therefore scaled, by powers of two and so without rounding:

    gates   i, f, (tanh g) / 2, o; before the sigmoid g is doubled, by its rows of the weights
    c       twice the cell state:    c = f * c + 4 * i * g
    h       half the hidden state:   h = o * (sigmoid(c) - 1/2)

docs/kernels.md derives the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# what a sequence carries from step to step: h and c
STATES = 2

# true size of a unit of h
UNIT = 2.0

# factors on the rows of i, f, g, o: of the weights that make gates, which double g, and of all that
# is multiplied with the gates' gradients, which `backward` leaves without any factor
_FORWARD = (1.0, 1.0, 2.0, 1.0)
_BACKWARD = (8.0, 2.0, 16.0, 2.0)


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H]."""
    weight = _scaled(weight_ih, _FORWARD).T
    return x @ weight if bias is None else torch.addmm(_scaled(bias, _FORWARD), x, weight)


def recurrent_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [4H, H], as the [H, 4H] right-hand side of a step's product."""
    # doubled, because h is half the hidden state
    return (_scaled(weight_hh, _FORWARD) * 2).T.contiguous()


def forward(
    gates: Tensor,
    weight: Tensor,
    states: tuple[Tensor, ...],
    sizes: list[int],
    first: bool,
    before: tuple[Tensor, ...] | None,
    visit: Callable[[int, Tensor], None] | None,
) -> None:
    """Run consecutive steps of a group of sequences, longest first, and change its states.

    Args:
        gates: [m, 4H] input gates of the packed tokens; they become the gates.
        weight: [H, 4H] from `recurrent_weight`.
        states: h and c of the group, [n, H] each.
        sizes: rows alive at each step; their sum is m.
        first: whether the sequences begin here: h is 0 at the first step.
        before: h and c, [m, H] each, to be filled with the states before each token.
        visit: told of each step's number and the h after it.
    """
    # as a tensor: a number would be made into one at each step
    half = gates.new_tensor(0.5)
    parts = (gates, *gates.view(-1, 4, weight.shape[0]).unbind(1))
    each = zip(*(part.split_with_sizes(sizes) for part in parts), strict=True)
    saved = None if before is None else [part.split_with_sizes(sizes) for part in before]
    n = 0
    for t, (a, i, f, g, o) in enumerate(each):
        if n != sizes[t]:
            n = sizes[t]
            h, c = states[0][:n], states[1][:n]
        if saved is not None:
            saved[0][t].copy_(h)
            saved[1][t].copy_(c)
        if t or not first:
            a.addmm_(h, weight)
        a.sigmoid_()
        g.sub_(half)
        c.mul_(f).addcmul_(i, g, value=4)
        torch.sigmoid(c, out=h).sub_(half).mul_(o)
        if visit is not None:
            visit(t, h)


def backward_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [4H, H], as `backward` multiplies by it."""
    return _scaled(weight_hh, _BACKWARD)


def backward(
    gates: Tensor,
    before: tuple[Tensor, ...],
    weight: Tensor,
    grads: tuple[Tensor, ...],
    sizes: list[int],
    first: bool,
    upstream: Tensor | None,
) -> Tensor:
    """Carry the gradients of the states back through the steps of `forward`.

    Args:
        gates, before: as `forward` left them.
        weight: [4H, H] from `backward_weight`.
        grads: gradients of the group's states, [n, H] each, true to h's real size; changed.
        sizes, first: as in `forward`.
        upstream: [m, H], what else reaches the h after each token, or None.

    Returns:
        [m, 4H], gradients of the gates before the sigmoid, without the factors that
        `input_gradient`, `weight_gradients` and `backward_weight` bring.
    """
    half = gates.new_tensor(0.5)
    H = weight.shape[1]
    i, f, g, o = gates.view(-1, 4, H).unbind(1)
    c_before = before[1]
    # local derivatives first, each multiplied by the gradient of c or h in the loop
    s = torch.mul(f, c_before).addcmul_(i, g, value=4).sigmoid_()
    dc_dh = torch.addcmul(s, s, s, value=-1).mul_(o)
    dgates = torch.addcmul(gates, gates, gates, value=-1)
    local = dgates.view(-1, 4, H)
    di, df, dg, do = local.unbind(1)
    torch.addcmul(half * half, g, g, value=-1, out=dg).mul_(i)
    di.mul_(g)
    df.mul_(c_before)
    do.mul_(s.sub_(half))

    parts = (dgates, local[:, :3], do, dc_dh, f)
    each = list(zip(*(part.split_with_sizes(sizes) for part in parts), strict=True))
    reached = None if upstream is None else upstream.split_with_sizes(sizes)
    n = 0
    for t in range(len(each) - 1, -1, -1):
        da, da_ifg, da_o, dc_dh_t, f_t = each[t]
        if n != sizes[t]:
            n = sizes[t]
            dh, dc = grads[0][:n], grads[1][:n]
            dc_of_gates = dc.unsqueeze(1)
        if reached is not None:
            dh.add_(reached[t])
        dc.addcmul_(dh, dc_dh_t)
        da_ifg.mul_(dc_of_gates)
        da_o.mul_(dh)
        if t or not first:
            torch.mm(da, weight, out=dh)
            dc.mul_(f_t)
    return dgates


def input_gradient(dgates: Tensor, weight_ih: Tensor) -> Tensor:
    """Return the gradient of projected rows, [R, D], from their sums of `backward`, [R, 4H]."""
    return dgates @ _scaled(weight_ih, _BACKWARD)


def weight_gradients(
    gates_by_x: Tensor, gates_by_h: Tensor, gates_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn products with the result of `backward` into gradients in PyTorch's order.

    Args:
        gates_by_x: [4H, D] sum over tokens of dgates and x.
        gates_by_h: [4H, H] of dgates and the h before each token.
        gates_sum: [4H] of dgates.

    Returns:
        Gradients of weight_ih [4H, D], weight_hh [4H, H] and bias [4H].
    """
    return (
        _scaled(gates_by_x, _BACKWARD),
        _scaled(gates_by_h, _BACKWARD) * UNIT,
        _scaled(gates_sum, _BACKWARD),
    )


def _scaled(gates: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Multiply the rows of i, f, g, o of a weight or bias by a factor each."""
    return (gates.reshape(4, -1) * _column(factors, gates.dtype, gates.device)).view(gates.shape)


@functools.cache
def _column(factors: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return constants as a column, made once: a step is too short to make them each time."""
    with torch.inference_mode(False):
        return torch.tensor(factors, dtype=dtype, device=device).unsqueeze(1)
