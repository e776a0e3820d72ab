"""The "torch" backend: the kernels' algorithm in batched tensor operations, on any device.

The sequences of both towers stand in one batch, longest first, so that the rows still alive at
step t are the first `sizes[t]` ones: no step computes padding, and a finished row keeps its last
state without being touched. Their tokens lie time-major in "packed" rows, one GEMM projects every
distinct word of the batch once, and the backward takes its local derivatives and its weight
gradients in bulk. docs/kernels.md derives the backward.

Inside this file, and nowhere else, gates stand in the order g, i, f, o: one sigmoid covers the last
three and the cell's gradient multiplies the first three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """Which rows run at which step."""

    order: Tensor  # [N] sequences, longest first
    sizes: list[int]  # rows alive at each step, up to the longest length
    tokens: Tensor  # [M] flat positions n * T + t of the valid tokens, time-major in that order


def schedule(lengths: Tensor, steps: int) -> Schedule:
    """Order the sequences of `lengths`, [N], each padded to `steps`."""
    N = lengths.shape[0]
    longest_first, order = torch.sort(lengths.long(), descending=True, stable=True)
    finished = torch.bincount(longest_first, minlength=1).cumsum(0)[:-1]
    time = torch.arange(finished.shape[0], device=lengths.device).unsqueeze(1)
    positions = order * steps + time
    tokens = positions[time < longest_first]
    return Schedule(order, (N - finished).tolist(), tokens)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H] in this file's order."""
    x = x.to(compute_dtype(x.dtype))
    weight = _reorder(weight_ih.to(x.dtype))
    if bias is None:
        return x @ weight.T
    return torch.addmm(_reorder(bias.to(x.dtype)), x, weight.T)


def recurrent_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [4H, H], as the [H, 4H] right-hand side of a step's product."""
    return _reorder(weight_hh.to(compute_dtype(weight_hh.dtype))).T.contiguous()


def infer(
    table: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    steps: int,
) -> Tensor:
    """Run the recurrence over projected rows and keep nothing but the sentence vectors.

    Args:
        table: [R, 4H] from `project`.
        weight: [H, 4H] from `recurrent_weight`.
        ids: [N, T] rows of the table, or None where row n * T + t is the token's own.
        lengths: [N].
        mask: [N, T] or None.
        steps: T.

    Returns:
        [N, H].
    """
    plan = schedule(lengths, steps)
    rows = plan.tokens if ids is None else ids.reshape(-1)[plan.tokens]
    N, H = lengths.shape[0], weight.shape[0]
    h = table.new_zeros(N, H)
    c = table.new_zeros(N, H)
    pooled = None if mask is None else table.new_zeros(N, H)
    weights = _packed_mask(mask, plan, table.dtype)
    gates = table.new_empty(N, 4 * H)
    n = -1
    for t, row in enumerate(rows.split(plan.sizes)):
        if plan.sizes[t] != n:
            n = plan.sizes[t]
            a, ht, ct = gates[:n], h[:n], c[:n]
            g, i, f, o = a.chunk(4, dim=1)
            ifo = a[:, H:]
        torch.index_select(table, 0, row, out=a)
        a.addmm_(ht, weight)
        g.tanh_()
        ifo.sigmoid_()
        ct.mul_(f).addcmul_(i, g)
        torch.tanh(ct, out=ht).mul_(o)
        if pooled is not None and weights is not None:
            pooled[:n].addcmul_(ht, weights[t])
    out = torch.empty_like(h)
    out[plan.order] = h if pooled is None else pooled
    return out


def forward(
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence and keep what `backward` needs.

    Args:
        x: [R, D] rows: a table that ids point into, or one row a token.
        ids, lengths, mask, steps: as in `infer`.
        weight_ih, weight_hh, bias: [4H, D], [4H, H], [4H] or None, PyTorch's order.

    Returns:
        Sentence vectors [N, H]; then activations of the packed tokens, in the first sum(lengths) of
        N * T rows: gates [N * T, 4H], cell states and hidden states [N * T, H].
    """
    plan = schedule(lengths, steps)
    words, rows = _distinct(ids, plan, x.shape[0])
    table = project(x[words], weight_ih, bias)
    N, H, M = lengths.shape[0], weight_hh.shape[1], plan.tokens.shape[0]
    weight = recurrent_weight(weight_hh)
    # the packed rows come first; the rest is never touched, so it costs address space only
    saved_gates = table.new_empty(N * steps, 4 * H)
    saved_c = table.new_empty(N * steps, H)
    saved_h = table.new_empty(N * steps, H)
    gates, c, h = saved_gates[:M], saved_c[:M], saved_h[:M]
    if rows is None:
        gates.copy_(table)
    else:
        torch.index_select(table, 0, rows, out=gates)
    hs, cs = h.split(plan.sizes), c.split(plan.sizes)
    each = [part.split(plan.sizes) for part in (gates, *gates.chunk(4, dim=1), gates[:, H:])]
    for t, (a, g, i, f, o, ifo) in enumerate(zip(*each, strict=True)):
        n = plan.sizes[t]
        if t:
            a.addmm_(hs[t - 1][:n], weight)
        g.tanh_()
        ifo.sigmoid_()
        torch.mul(i, g, out=cs[t])
        if t:
            cs[t].addcmul_(f, cs[t - 1][:n])
        torch.tanh(cs[t], out=hs[t]).mul_(o)
    v = table.new_zeros(N, H)
    weights = _packed_mask(mask, plan, v.dtype)
    if weights is None:
        # a row's last state is its last packed one
        for t, n in enumerate(plan.sizes):
            done = plan.sizes[t + 1] if t + 1 < len(plan.sizes) else 0
            if done < n:
                v[done:n] = hs[t][done:]
    else:
        for w, ht in zip(weights, hs, strict=True):
            v[: ht.shape[0]].addcmul_(ht, w)
    out = torch.empty_like(v)
    out[plan.order] = v
    return out, saved_gates, saved_c, saved_h


def backward(
    dv: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gates: Tensor,
    c: Tensor,
    h: Tensor,
    steps: int,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry dv, [N, H], back through time.

    Args:
        dv: gradient of the sentence vectors.
        gates, c, h: what `forward` kept.
        need_dx: whether the gradient of x is wanted.

    Returns:
        dx (like x, or empty), dweight_ih, dweight_hh and dbias in PyTorch's order.
    """
    plan = schedule(lengths, steps)
    words, rows = _distinct(ids, plan, x.shape[0])
    N, H, M = lengths.shape[0], weight_hh.shape[1], plan.tokens.shape[0]
    sizes = plan.sizes
    gates, c, h = gates[:M], c[:M], h[:M]
    before = _rows_before(plan)
    first = sizes[0] if sizes else 0
    c_prev = c.new_zeros(M, H)
    torch.index_select(c, 0, before, out=c_prev[first:])

    g, i, f, o = gates.chunk(4, dim=1)
    tanh_c = torch.tanh(c)
    dgates = torch.empty_like(gates)
    # local derivatives first, each multiplied by the cell's or the state's gradient in the loop
    local = dgates.view(M, 4, H)
    torch.mul(i, 1 - g * g, out=local[:, 0])
    torch.mul(g, i - i * i, out=local[:, 1])
    torch.mul(c_prev, f - f * f, out=local[:, 2])
    torch.mul(tanh_c, o - o * o, out=local[:, 3])
    dtanh = o - o * tanh_c * tanh_c

    dv = dv.to(h.dtype)[plan.order]
    weights = _packed_mask(mask, plan, h.dtype)
    # without a mask a row of dh holds dv until the loop, coming from behind, reaches its last step
    dh_all = dv.clone() if weights is None else torch.zeros_like(dv)
    dc_all = torch.zeros_like(dv)
    weight = _reorder(weight_hh.to(h.dtype))
    parts = (dgates, local[:, :3], local[:, 3], dtanh, f)
    each = list(zip(*(part.split(sizes) for part in parts), strict=True))
    for t in range(len(sizes) - 1, -1, -1):
        da, of_c, of_h, dtanh_t, ft = each[t]
        dh, dc = dh_all[: sizes[t]], dc_all[: sizes[t]]
        if weights is not None:
            dh.addcmul_(dv[: sizes[t]], weights[t])
        dc.addcmul_(dh, dtanh_t)
        of_c.mul_(dc.unsqueeze(1))
        of_h.mul_(dh)
        if t:
            torch.mm(da, weight, out=dh)
            dc.mul_(ft)

    dweight_hh = dgates[first:].T @ h[before]
    if rows is None:
        dtable = dgates
    else:
        dtable = dgates.new_zeros(words.shape[0], 4 * H).index_add_(0, rows, dgates)
    dweight_ih = dtable.T @ x[words].to(h.dtype)
    dx = h.new_zeros(x.shape if need_dx else 0)
    if need_dx:
        dx[words] = dtable @ _reorder(weight_ih.to(h.dtype))
    return dx, _restore(dweight_ih), _restore(dweight_hh), _restore(dtable.sum(dim=0))


def _reorder(gates: Tensor) -> Tensor:
    """Take the 4H rows of a weight or bias from i, f, g, o to g, i, f, o."""
    i, f, g, o = gates.chunk(4)
    return torch.cat((g, i, f, o))


def _restore(gates: Tensor) -> Tensor:
    """Undo `_reorder`."""
    g, i, f, o = gates.chunk(4)
    return torch.cat((i, f, g, o))


def _packed_mask(
    mask: Tensor | None, plan: Schedule, dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """Return the mask's weights of the rows alive at each step, [sizes[t], 1] each."""
    if mask is None:
        return None
    return mask.reshape(-1, 1)[plan.tokens].to(dtype).split(plan.sizes)


def _rows_before(plan: Schedule) -> Tensor:
    """Return, for the packed tokens of every step but the first, the row of the token before it."""
    M = plan.tokens.shape[0]
    sizes = torch.tensor(plan.sizes, dtype=torch.long)
    shift = sizes[:-1].repeat_interleave(sizes[1:]).to(plan.tokens.device)
    return torch.arange(M - shift.shape[0], M, device=shift.device) - shift


def _distinct(ids: Tensor | None, plan: Schedule, R: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows of x that the batch needs, and which of these each packed token is.

    None in the second place means each its own, in packed order.
    """
    if ids is None:
        return plan.tokens, None
    token_ids = ids.reshape(-1)[plan.tokens]
    seen = torch.zeros(R, dtype=torch.bool, device=ids.device)
    seen[token_ids] = True
    words = seen.nonzero().squeeze(1)
    place = torch.empty(R, dtype=torch.long, device=ids.device)
    place[words] = torch.arange(words.shape[0], device=ids.device)
    return words, place[token_ids]
