"""The "torch" backend: the kernels' algorithm in batched tensor operations, on any device.

The sequences of both towers stand in one batch, longest first, cut into groups. In a group the rows
still alive at a step are its first ones: no step computes padding, and a finished row keeps its
last state without being touched. The tokens lie in "packed" rows, group after group and time-major
in each, and are worked on in blocks of a few steps: what a block needs fits a core's own cache, and
the next one uses the same memory, which is dear when it comes fresh from the system. Every distinct
word of the batch is projected once, and the backward takes its local derivatives and its weight
gradients a block at a time.

A layer has P directions, one or two, that run one after the other. Direction 1 reads a sequence
from its last valid token to its first; "own time" counts a direction's steps from where it begins.
What a step computes is the cell's business: `batched_lstm`, `batched_gru`. For float32 on a CPU
`compiled` does all of it where it can. docs/cpu.md tells why it is done so.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastsiam import _steps, batched_gru, batched_lstm, compiled
from fastsiam._packed import (
    BLOCK,
    Block,
    Pool,
    Reached,
    Saved,
    Seen,
    compute_dtype,
    empty,
    project,
    schedule,
    stack,
)

CELLS: dict[str, ModuleType] = {"lstm": batched_lstm, "gru": batched_gru}


def prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], and lay the recurrent weights out for `infer`.

    Returns:
        What `prepared_shapes` says.
    """
    how, dtype = CELLS[cell], compute_dtype(x.dtype)
    if _compiled(x.device, dtype, weight_hh.shape[2]):
        return compiled.prepare(x, weight_ih, weight_hh, bias, cell)
    weights = [how.recurrent_weight(weight.to(dtype)) for weight in weight_hh]
    tables = [project(how, x, part, _of(bias, p)) for p, part in enumerate(weight_ih)]
    return stack(tables), stack(weights)


def prepared_shapes(
    R: int, P: int, rows: int, H: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of both results of `prepare`, for R rows and a weight_hh [P, rows, H]."""
    compiles = _compiled(device, compute_dtype(dtype), H)
    weight = _steps.panels_shape(P, H, rows) if compiles else (P, H, rows)
    return (P, R, 4 * H), weight


def infer(
    table: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    steps: int,
    pooling: str,
    keep_outputs: bool,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """Run a layer over projected rows and keep nothing that only a backward needs.

    Args:
        table, weight: from `prepare`.
        ids: [N, T] rows of the table, or None where row n * T + t is the token's own.
        lengths: [N].
        mask: [N, T] for pooling "mask", else None.
        steps: T.
        pooling: "last", "max" or "mask".
        keep_outputs: whether all hidden states are wanted.
        cell: a key of CELLS.

    Returns:
        Vectors [N, P * H]; hidden states [N, T, P * H], zero behind a sequence's end, or empty.
    """
    how = CELLS[cell]
    N, P, H = lengths.shape[0], table.shape[0], table.shape[2] // 4
    if _compiled(table.device, table.dtype, H):
        return compiled.infer(table, weight, ids, lengths, mask, steps, pooling, keep_outputs, cell)
    plan = schedule(lengths, steps, P)
    pool = Pool(table, N, P * H, steps, pooling, mask, plan, keep_outputs, peaks=False)
    for p, tokens in enumerate(plan.tokens):
        rows = tokens if ids is None else ids.reshape(-1).index_select(0, tokens)
        states = _zeros(table, N, H, how.STATES)
        pool.start(p, H)
        for block in plan.blocks:
            gates = torch.index_select(table[p], 0, rows[block.rows])
            _forward(cell, block, gates, weight[p], states, None, pool.seen(block))
        pool.finish(states[0], how.UNIT)
    return pool.vectors, pool.outputs


def forward(
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    steps: int,
    pooling: str,
    keep_outputs: bool,
    cell: str,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Saved]:
    """Run a layer from its inputs, and keep what `backward` needs.

    Args:
        x: [R, D] rows: a table that ids point into, or one row a token.
        ids, lengths, mask, steps, pooling, keep_outputs, cell: as in `infer`.
        weight_ih, weight_hh, bias: [P, 4H, D], [P, 4H, H], [P, 4H] or None, PyTorch's order.
        keep: whether there will be a backward.

    Returns:
        Vectors and hidden states as from `infer`, and what is kept.
    """
    how = CELLS[cell]
    N, P, H = lengths.shape[0], weight_hh.shape[0], weight_hh.shape[2]
    like = x.new_empty(0, dtype=compute_dtype(x.dtype))
    if _compiled(x.device, like.dtype, H):
        of_layer = x, ids, lengths, mask, weight_ih, weight_hh, bias
        return compiled.forward(*of_layer, steps, pooling, keep_outputs, cell, keep)
    plan = schedule(lengths, steps, P)
    # the packed rows come first; the rest is never touched, so it costs address space only
    M = N * steps if keep else 0
    gates = empty((P, M, 4 * H), like)
    kept = [empty((P, M, H), like) for _ in range(how.STATES)]
    peaks = keep and pooling == "max"
    pool = Pool(like, N, P * H, steps, pooling, mask, plan, keep_outputs, peaks)
    for p, tokens in enumerate(plan.tokens):
        words, rows = _distinct(ids, tokens, x.shape[0])
        parts = [
            project(how, x.index_select(0, some), weight_ih[p], _of(bias, p))
            for some in words.split(BLOCK)
        ]
        table = parts[0] if len(parts) == 1 else torch.cat(parts)
        weight = how.recurrent_weight(weight_hh[p].to(like.dtype))
        states = _zeros(like, N, H, how.STATES)
        pool.start(p, H)
        for block in plan.blocks:
            before = None
            if keep:
                part = gates[p, block.rows]
                before = tuple(tensor[p, block.rows] for tensor in kept)
            else:
                part = like.new_empty(block.rows.stop - block.rows.start, 4 * H)
            if rows is None:
                part.copy_(table[block.rows])
            else:
                torch.index_select(table, 0, rows[block.rows], out=part)
            _forward(cell, block, part, weight, states, before, pool.seen(block))
        pool.finish(states[0], how.UNIT)
    cells = kept[1] if how.STATES == 2 else like
    return pool.vectors, pool.outputs, Saved(gates, cells, kept[0], pool.peaks)


def backward(
    dvectors: Tensor | None,
    doutputs: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    saved: Saved,
    steps: int,
    pooling: str,
    need_dx: bool,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry the gradients of the vectors and of the hidden states back through time.

    Args:
        dvectors: [N, P * H] or None.
        doutputs: [N, T, P * H] or None.
        saved: what `forward` kept.
        need_dx: whether the gradient of x is wanted.

    Returns:
        dx (like x, or empty), and in PyTorch's order, stacked as they were given: dweight_ih,
        dweight_hh and dbias.
    """
    how = CELLS[cell]
    dtype = saved.gates.dtype
    N, P, H = lengths.shape[0], weight_hh.shape[0], weight_hh.shape[2]
    if _compiled(x.device, dtype, H):
        of_layer = x, ids, lengths, mask, weight_ih, weight_hh
        how_run = steps, pooling, need_dx, cell
        return compiled.backward(dvectors, doutputs, *of_layer, saved, *how_run)
    dx = saved.gates.new_zeros(x.shape if need_dx else 0)
    weights: list[tuple[Tensor, Tensor, Tensor]] = []
    plan = schedule(lengths, steps, P)
    for p, tokens in enumerate(plan.tokens):
        words, rows = _distinct(ids, tokens, x.shape[0])
        columns = slice(p * H, (p + 1) * H)
        dv = None if dvectors is None else dvectors[:, columns].to(dtype)
        reached = Reached(dv, doutputs, columns, plan.lengths, mask, saved.peaks, steps, pooling, p)
        grads = _zeros(saved.gates, N, H, how.STATES)
        if dv is not None and pooling == "last":
            # a row of dh holds dv until the steps, coming from behind, reach its last one
            torch.index_select(dv, 0, plan.order, out=grads[0])
        weight = how.backward_weight(weight_hh[p].to(dtype))
        dtable = saved.gates.new_zeros(words.shape[0], 4 * H)
        gates_by_h = saved.gates.new_zeros(4 * H, H)
        for block in reversed(plan.blocks):
            h = saved.states[p, block.rows]
            before = (h, saved.cells[p, block.rows]) if how.STATES == 2 else (h,)
            dgates = _backward(
                cell,
                block,
                saved.gates[p, block.rows],
                before,
                weight,
                grads,
                reached.rows(tokens[block.rows]),
            )
            gates_by_h.addmm_(dgates.T, h)
            if rows is None:
                dtable[block.rows] = dgates
            else:
                dtable.index_add_(0, rows[block.rows], dgates)
        gates_by_x = saved.gates.new_zeros(4 * H, x.shape[1])
        for some, part in zip(words.split(BLOCK), dtable.split(BLOCK), strict=True):
            gates_by_x.addmm_(part.T, x.index_select(0, some).to(dtype))
        if need_dx:
            dx.index_add_(0, words, how.input_gradient(dtable, weight_ih[p].to(dtype)))
        weights.append(how.weight_gradients(gates_by_x, gates_by_h, dtable.sum(dim=0)))
    dweight_ih, dweight_hh, dbias = (stack(list(parts)) for parts in zip(*weights, strict=True))
    return dx, dweight_ih, dweight_hh, dbias


def _compiled(device: torch.device, dtype: torch.dtype, H: int) -> bool:
    """Return whether layers with states of this kind are compiled."""
    return not _steps.obstacle(device, dtype, H)


def _forward(
    cell: str,
    block: Block,
    gates: Tensor,
    weight: Tensor,
    states: tuple[Tensor, ...],
    before: tuple[Tensor, ...] | None,
    seen: Seen,
) -> None:
    alive = tuple(state[block.group] for state in states)
    first, visit = block.step == 0, _visitor(block, seen)
    CELLS[cell].forward(gates, weight, alive, block.sizes, first, before, visit)


def _backward(
    cell: str,
    block: Block,
    gates: Tensor,
    before: tuple[Tensor, ...],
    weight: Tensor,
    grads: tuple[Tensor, ...],
    upstream: Tensor | None,
) -> Tensor:
    some = tuple(grad[block.group] for grad in grads)
    dgates: Tensor = CELLS[cell].backward(
        gates, before, weight, some, block.sizes, block.step == 0, upstream
    )
    return dgates


def _visitor(block: Block, seen: Seen) -> Callable[[int, Tensor], None] | None:
    """Return what does with the hidden states of each step of a block as `seen` says."""
    outputs, pooled, weights, peaks = seen
    if outputs is None and pooled is None:
        return None
    each_output = None if outputs is None else outputs.split_with_sizes(block.sizes)
    each_weight = None if weights is None else weights.split_with_sizes(block.sizes)

    def visit(t: int, h: Tensor) -> None:
        n = h.shape[0]
        if each_output is not None:
            each_output[t].copy_(h)
        if pooled is None:
            return
        if each_weight is not None:
            pooled[:n].addcmul_(h, each_weight[t])
            return
        if peaks is not None:
            peaks[:n].masked_fill_(h > pooled[:n], block.step + t)
        torch.maximum(pooled[:n], h, out=pooled[:n])

    return visit


def _of(stacked: Tensor | None, p: int) -> Tensor | None:
    return None if stacked is None else stacked[p]


def _zeros(like: Tensor, N: int, H: int, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_zeros(N, H) for _ in range(count))


def _distinct(ids: Tensor | None, tokens: Tensor, R: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows of x that the batch needs, and which of these each packed token is.

    None in the second place means each its own, in packed order.
    """
    if ids is None:
        return tokens, None
    token_ids = ids.reshape(-1).index_select(0, tokens)
    seen = torch.zeros(R, dtype=torch.bool, device=ids.device)
    seen[token_ids] = True
    words = seen.nonzero().squeeze(1)
    place = torch.empty(R, dtype=torch.long, device=ids.device)
    place[words] = torch.arange(words.shape[0], device=ids.device)
    return words, place.index_select(0, token_ids)
