"""The GRU's cell for `batched`: its steps forward and backward on packed rows.

With PyTorch's equations, the reset gate acting after the product:

    r, z = sigmoid(a_r), sigmoid(a_z)
    n = tanh(x_n + r * y),   y = W_hn h + b_hn
    h' = (1 - z) n + z h

A sigmoid costs a third of a tanh here, so tanh(x) is 2 * sigmoid(2x) - 1. Inside this file, and
nowhere else, the gates stand in the order n, r, z, y, and three things are scaled, by powers of two
and so without rounding:

    y       doubled, and so is n before the sigmoid, by their rows of the weights
    n       half:  sigmoid(n + r * y) - 1/2
    h       half

So what comes from x is the first three, what is multiplied with h the last three, and a step's
gate gradients are the gradient of h times four numbers that do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# what a sequence carries from step to step: h
STATES = 1

# true size of a unit of h
UNIT = 2.0

# what gradients of n, r, z, y lack in `backward`; their products bring it
_BACKWARD = (4.0, 2.0, 2.0, 4.0)


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H]."""
    rows = weight_ih.shape[0]
    table = x.new_zeros(x.shape[0], rows // 3 * 4)
    if bias is not None:
        r, z, n, y = bias.chunk(4)
        table += torch.cat((n * 2, r, z, y * 2))
    r, z, n = weight_ih.chunk(3)
    table[:, :rows].addmm_(x, torch.cat((n * 2, r, z)).T)
    return table


def recurrent_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [3H, H], as the [H, 3H] right-hand side of a step's product."""
    # doubled, because h is half the hidden state
    return _scaled(weight_hh, (2.0, 2.0, 4.0)).T.contiguous()


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
        weight: [H, 3H] from `recurrent_weight`.
        states: h of the group, [n, H].
        sizes: rows alive at each step; their sum is m.
        first: whether the sequences begin here: h is 0 at the first step.
        before: h, [m, H], to be filled with the states before each token.
        visit: told of each step's number and the h after it.
    """
    H = weight.shape[0]
    # as a tensor: a number would be made into one at each step
    half = gates.new_tensor(0.5)
    parts = (gates[:, H:], gates[:, H : 3 * H], *gates.view(-1, 4, H).unbind(1))
    each = zip(*(part.split_with_sizes(sizes) for part in parts), strict=True)
    saved = None if before is None else before[0].split_with_sizes(sizes)
    count = 0
    for t, (a, rz, n, r, z, y) in enumerate(each):
        if count != sizes[t]:
            count = sizes[t]
            h = states[0][:count]
        if saved is not None:
            saved[t].copy_(h)
        if t or not first:
            a.addmm_(h, weight)
        rz.sigmoid_()
        n.addcmul_(r, y).sigmoid_().sub_(half)
        torch.lerp(n, h, z, out=h)
        if visit is not None:
            visit(t, h)


def backward_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [3H, H], as `backward` multiplies by it."""
    return _scaled(weight_hh, _BACKWARD[1:])


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
        weight: [3H, H] from `backward_weight`.
        grads: gradient of the group's h, [n, H], true to its real size; changed.
        sizes, first: as in `forward`.
        upstream: [m, H], what else reaches the h after each token, or None.

    Returns:
        [m, 4H], gradients of the gates before the sigmoid (of y itself), without the factors that
        `input_gradient`, `weight_gradients` and `backward_weight` bring.
    """
    H = weight.shape[1]
    n, r, z, y = gates.view(-1, 4, H).unbind(1)
    dgates = torch.empty_like(gates)
    local = dgates.view(-1, 4, H)
    dn, dr, dz, dy = local.unbind(1)
    # local derivatives first, all multiplied by the gradient of h in the loop:
    # dn = (1/4 - n^2) (1 - z), dy = dn r, dr = dy y (1 - r), dz = (h - n) z (1 - z)
    torch.addcmul(gates.new_tensor(0.25), n, n, value=-1, out=dn)
    dn.addcmul_(dn, z, value=-1)
    torch.mul(dn, r, out=dy)
    torch.mul(dy, y, out=dr)
    dr.addcmul_(dr, r, value=-1)
    torch.sub(before[0], n, out=dz).mul_(z)
    dz.addcmul_(dz, z, value=-1)

    each = list(
        zip(
            *(part.split_with_sizes(sizes) for part in (local, dgates[:, H:], z)),
            strict=True,
        )
    )
    reached = None if upstream is None else upstream.split_with_sizes(sizes)
    count = 0
    for t in range(len(each) - 1, -1, -1):
        da, da_rzy, z_t = each[t]
        if count != sizes[t]:
            count = sizes[t]
            dh = grads[0][:count]
            dh_of_gates = dh.unsqueeze(1)
        if reached is not None:
            dh.add_(reached[t])
        da.mul_(dh_of_gates)
        if t or not first:
            dh.mul_(z_t).addmm_(da_rzy, weight)
    return dgates


def input_gradient(dgates: Tensor, weight_ih: Tensor) -> Tensor:
    """Return the gradient of projected rows, [R, D], from their sums of `backward`, [R, 4H]."""
    r, z, n = _scaled(weight_ih, (2.0, 2.0, 4.0)).view(3, -1, weight_ih.shape[1])
    return dgates[:, : weight_ih.shape[0]] @ torch.cat((n, r, z))


def weight_gradients(
    gates_by_x: Tensor, gates_by_h: Tensor, gates_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn products with the result of `backward` into gradients in PyTorch's order.

    Args:
        gates_by_x: [4H, D] sum over tokens of dgates and x.
        gates_by_h: [4H, H] of dgates and the h before each token.
        gates_sum: [4H] of dgates.

    Returns:
        Gradients of weight_ih [3H, D], weight_hh [3H, H] and bias [4H].
    """
    of_x, of_h, of_bias = (
        _scaled(gates, _BACKWARD).chunk(4) for gates in (gates_by_x, gates_by_h, gates_sum)
    )
    n, r, z, y = range(4)
    return (
        torch.cat([of_x[gate] for gate in (r, z, n)]),
        torch.cat([of_h[gate] for gate in (r, z, y)]) * UNIT,
        torch.cat([of_bias[gate] for gate in (r, z, n, y)]),
    )


def _scaled(gates: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Multiply the rows of each gate of a weight or bias by a factor."""
    return torch.cat(
        [part * by for part, by in zip(gates.chunk(len(factors)), factors, strict=True)]
    )
