"""The "torch" backend: the kernels' algorithm in batched tensor operations, on any device.

The sequences of both towers stand in one batch, longest first, cut into groups. In a group the rows
still alive at a step are its first ones: no step computes padding, and a finished row keeps its
last state without being touched. The tokens lie in "packed" rows, group after group and time-major
in each, and are worked on in blocks of a few steps: what a block needs fits a core's own cache, and
the next one uses the same memory, which is dear when it comes fresh from the system. Every distinct
word of the batch is projected once, and the backward takes its local derivatives and its weight
gradients a block at a time. docs/kernels.md derives the backward.

A sigmoid costs a third of a tanh here, so tanh(x) is 2 * sigmoid(2x) - 1 throughout. Inside this
file, and nowhere else, three things are therefore scaled, by powers of two and so without rounding:

    gates   i, f, (tanh g) / 2, o; before the sigmoid g is doubled, by its rows of the weights
    c       twice the cell state:    c = f * c + 4 * i * g
    h       half the hidden state:   h = o * (sigmoid(c) - 1/2)
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# sequences in a group, and packed rows that a block has at least where its group has as many
GROUP = 1024
BLOCK = 2048

# sequences up to which a batch is not worth a second thread
SMALL = 128

# bytes from which the GNU C library takes memory from the system whatever was free before
HUGE = 32 * 2**20

# factors on the rows of i, f, g, o: of the weights that make gates, which double g, and of all that
# is multiplied with the gates' gradients, which `_block_backward` leaves without any factor
FORWARD = (1.0, 1.0, 2.0, 1.0)
BACKWARD = (8.0, 2.0, 16.0, 2.0)


class Block(NamedTuple):
    """Consecutive steps of one group."""

    start: int  # the group's first sequence, in the schedule's order
    first: bool  # whether the sequences begin here
    sizes: list[int]  # rows alive at each step
    rows: slice  # packed rows


class Schedule(NamedTuple):
    """Which rows run at which step."""

    order: Tensor  # [N] sequences, longest first
    tokens: Tensor  # [M] flat positions n * T + t of the valid tokens, as they are packed
    blocks: list[Block]


class States(NamedTuple):
    """What the sequences carry from step to step, [N, H] each, in the schedule's order."""

    h: Tensor
    c: Tensor
    pooled: Tensor | None  # the masked sum of h, where there is a mask


def schedule(lengths: Tensor, steps: int) -> Schedule:
    """Order the sequences of `lengths`, [N], each padded to `steps`."""
    longest_first, order = torch.sort(lengths.long(), descending=True, stable=True)
    tokens: list[Tensor] = []
    blocks: list[Block] = []
    start = row = 0
    for some, sequences in zip(longest_first.split(GROUP), order.split(GROUP), strict=True):
        finished = torch.bincount(some, minlength=1).cumsum(0)[:-1]
        time = torch.arange(finished.shape[0], device=lengths.device).unsqueeze(1)
        tokens.append((sequences * steps + time)[time < some])
        left = (some.shape[0] - finished).tolist()
        first = True
        while left:
            taken = count = 0
            while taken < len(left) and count < BLOCK:
                count += left[taken]
                taken += 1
            blocks.append(Block(start, first, left[:taken], slice(row, row + count)))
            left, first, row = left[taken:], False, row + count
        start += some.shape[0]
    return Schedule(order, torch.cat(tokens), blocks)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def threads(lengths: Tensor) -> Iterator[None]:
    """Run a small batch on one thread: its operations are over before a second one wakes up."""
    before = torch.get_num_threads()
    if lengths.shape[0] > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H] with g doubled."""
    x = x.to(compute_dtype(x.dtype))
    weight = _scaled(weight_ih.to(x.dtype), FORWARD)
    if bias is None:
        return x @ weight.T
    return torch.addmm(_scaled(bias.to(x.dtype), FORWARD), x, weight.T)


def recurrent_weight(weight_hh: Tensor) -> Tensor:
    """Return weight_hh, [4H, H], as the [H, 4H] right-hand side of a step's product."""
    weight = weight_hh.to(compute_dtype(weight_hh.dtype))
    # doubled, because h is half the hidden state
    return (_scaled(weight, FORWARD) * 2).T.contiguous()


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
    rows = plan.tokens if ids is None else ids.reshape(-1).index_select(0, plan.tokens)
    weights = _packed_mask(mask, plan, table.dtype)
    states = _start(table, lengths.shape[0], weight.shape[0], mask)
    for block in plan.blocks:
        gates = torch.index_select(table, 0, rows[block.rows])
        _block_forward(block, gates, weight, weights, states)
    return _vectors(states, plan)


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
        Sentence vectors [N, H]; then of the packed tokens, in the first sum(lengths) of N * T rows,
        their gates [N * T, 4H] and the states before them: c and h, [N * T, H] each.
    """
    plan = schedule(lengths, steps)
    words, rows = _distinct(ids, plan, x.shape[0])
    table = torch.cat(
        [project(x.index_select(0, some), weight_ih, bias) for some in words.split(BLOCK)]
    )
    weight = recurrent_weight(weight_hh)
    N, H = lengths.shape[0], weight_hh.shape[1]
    # the packed rows come first; the rest is never touched, so it costs address space only
    gates, c, h = (_empty(N * steps, columns, table) for columns in (4 * H, H, H))
    weights = _packed_mask(mask, plan, table.dtype)
    states = _start(table, N, H, mask)
    for block in plan.blocks:
        part = gates[block.rows]
        if rows is None:
            part.copy_(table[block.rows])
        else:
            torch.index_select(table, 0, rows[block.rows], out=part)
        before = c[block.rows], h[block.rows]
        _block_forward(block, part, weight, weights, states, before)
    return _vectors(states, plan), gates, c, h


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
    H = h.shape[1]
    weight = _scaled(weight_hh.to(h.dtype), BACKWARD)
    weights = _packed_mask(mask, plan, h.dtype)
    dv = dv.to(h.dtype).index_select(0, plan.order)
    # without a mask a row of dh holds dv until the steps, coming from behind, reach its last one
    grads = States(
        h=dv.clone() if mask is None else torch.zeros_like(dv),
        c=torch.zeros_like(dv),
        pooled=None if mask is None else dv,
    )
    dtable = gates.new_zeros(words.shape[0], 4 * H)
    dweight_hh = gates.new_zeros(H, 4 * H)
    for block in reversed(plan.blocks):
        dgates = _block_backward(block, gates[block.rows], c[block.rows], weight, weights, grads)
        dweight_hh.addmm_(h[block.rows].T, dgates)
        if rows is None:
            dtable[block.rows] = dgates
        else:
            dtable.index_add_(0, rows[block.rows], dgates)

    dweight_ih = gates.new_zeros(x.shape[1], 4 * H)
    for some, part in zip(words.split(BLOCK), dtable.split(BLOCK), strict=True):
        dweight_ih.addmm_(x.index_select(0, some).to(h.dtype).T, part)
    dx = h.new_zeros(x.shape if need_dx else 0)
    if need_dx:
        dx[words] = dtable @ _scaled(weight_ih.to(h.dtype), BACKWARD)
    return (
        dx,
        _scaled(dweight_ih.T, BACKWARD),
        _scaled(dweight_hh.T, BACKWARD) * 2,
        _scaled(dtable.sum(dim=0), BACKWARD),
    )


def _start(table: Tensor, N: int, H: int, mask: Tensor | None) -> States:
    h, c = table.new_zeros(N, H), table.new_zeros(N, H)
    return States(h, c, None if mask is None else table.new_zeros(N, H))


def _vectors(states: States, plan: Schedule) -> Tensor:
    """Return the sentence vectors in the caller's order."""
    v = states.h if states.pooled is None else states.pooled
    return torch.empty_like(v).index_copy_(0, plan.order, v * 2)


def _block_forward(
    block: Block,
    gates: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    states: States,
    before: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run a block and change the states.

    Args:
        block: its steps.
        gates: [m, 4H] input gates of its packed tokens; they become the gates.
        weight: [H, 4H] from `recurrent_weight`.
        weights: [M, 1] from `_packed_mask`, or None.
        states: of all sequences.
        before: c and h, [m, H] each, to be filled with the states before each token.
    """
    # as a tensor: a number would be made into one at each step
    half = gates.new_tensor(0.5)
    parts = (gates, *gates.view(-1, 4, weight.shape[0]).unbind(1))
    each = zip(*(part.split_with_sizes(block.sizes) for part in parts), strict=True)
    saved = None if before is None else [part.split_with_sizes(block.sizes) for part in before]
    pooling = None if weights is None else weights[block.rows].split_with_sizes(block.sizes)
    n = 0
    for t, (a, i, f, g, o) in enumerate(each):
        if n != block.sizes[t]:
            n = block.sizes[t]
            alive = slice(block.start, block.start + n)
            h, c = states.h[alive], states.c[alive]
        if saved is not None:
            saved[0][t].copy_(c)
            saved[1][t].copy_(h)
        if t or not block.first:
            a.addmm_(h, weight)
        a.sigmoid_()
        g.sub_(half)
        c.mul_(f).addcmul_(i, g, value=4)
        torch.sigmoid(c, out=h).sub_(half).mul_(o)
        if pooling is not None and states.pooled is not None:
            states.pooled[alive].addcmul_(h, pooling[t])


def _block_backward(
    block: Block,
    gates: Tensor,
    c_before: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    grads: States,
) -> Tensor:
    """Carry the gradients of the states back through a block.

    Args:
        block: its steps.
        gates, c_before: [m, 4H] and [m, H] of its packed tokens.
        weight: [4H, H], with the factors of BACKWARD.
        weights: [M, 1] from `_packed_mask`, or None.
        grads: of the states of all sequences; `pooled` is only read.

    Returns:
        [m, 4H], gradients of the gates before the sigmoid, without the factors of BACKWARD.
    """
    half = gates.new_tensor(0.5)
    i, f, g, o = gates.view(-1, 4, weight.shape[1]).unbind(1)
    # local derivatives first, each multiplied by the gradient of c or h in the loop
    s = torch.mul(f, c_before).addcmul_(i, g, value=4).sigmoid_()
    dc_dh = torch.addcmul(s, s, s, value=-1).mul_(o)
    dgates = torch.addcmul(gates, gates, gates, value=-1)
    local = dgates.view(-1, 4, weight.shape[1])
    di, df, dg, do = local.unbind(1)
    torch.addcmul(half * half, g, g, value=-1, out=dg).mul_(i)
    di.mul_(g)
    df.mul_(c_before)
    do.mul_(s.sub_(half))

    parts = (dgates, local[:, :3], do, dc_dh, f)
    each = list(zip(*(part.split_with_sizes(block.sizes) for part in parts), strict=True))
    pooling = None if weights is None else weights[block.rows].split_with_sizes(block.sizes)
    n = 0
    for t in range(len(each) - 1, -1, -1):
        da, da_ifg, da_o, dc_dh_t, f_t = each[t]
        if n != block.sizes[t]:
            n = block.sizes[t]
            alive = slice(block.start, block.start + n)
            dh, dc = grads.h[alive], grads.c[alive]
            dc_of_gates = dc.unsqueeze(1)
        if pooling is not None and grads.pooled is not None:
            dh.addcmul_(grads.pooled[alive], pooling[t])
        dc.addcmul_(dh, dc_dh_t)
        da_ifg.mul_(dc_of_gates)
        da_o.mul_(dh)
        if t or not block.first:
            torch.mm(da, weight, out=dh)
            dc.mul_(f_t)
    return dgates


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return uninitialized memory, in huge pages where it is large.

    What is this large the C library takes from the system at each call and gives back afterwards;
    in pages of 4 KiB that costs more than the arithmetic that fills them.
    """
    size = rows * columns * like.element_size()
    if like.device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(rows, columns)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(rows, columns)


def _scaled(gates: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Multiply the rows of i, f, g, o of a weight or bias by a factor each."""
    return (gates.reshape(4, -1) * _column(factors, gates.dtype, gates.device)).view(gates.shape)


@functools.cache
def _column(factors: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return constants as a column, made once: a step is too short to make them each time."""
    with torch.inference_mode(False):
        return torch.tensor(factors, dtype=dtype, device=device).unsqueeze(1)


def _packed_mask(mask: Tensor | None, plan: Schedule, dtype: torch.dtype) -> Tensor | None:
    """Return the mask's weights of the packed tokens, [M, 1]."""
    return None if mask is None else mask.reshape(-1, 1).index_select(0, plan.tokens).to(dtype)


def _distinct(ids: Tensor | None, plan: Schedule, R: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows of x that the batch needs, and which of these each packed token is.

    None in the second place means each its own, in packed order.
    """
    if ids is None:
        return plan.tokens, None
    token_ids = ids.reshape(-1).index_select(0, plan.tokens)
    seen = torch.zeros(R, dtype=torch.bool, device=ids.device)
    seen[token_ids] = True
    words = seen.nonzero().squeeze(1)
    place = torch.empty(R, dtype=torch.long, device=ids.device)
    place[words] = torch.arange(words.shape[0], device=ids.device)
    return words, place.index_select(0, token_ids)
