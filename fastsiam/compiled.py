"""The "torch" backend's layers where they are compiled: float32 on a CPU, kernels/steps.cpp.

The sequences of both towers stand in one batch, longest first, cut into tiles. The library runs a
tile through all of its steps while its states are in the cache; it finds the input gates of a token
by the row of its word, in a table of all distinct words of the batch (in scoring, of the
vocabulary). What a backward needs lies in packed rows: tile after tile, in each step after step.
The backward goes through the tiles in blocks, so that the gradients of the gates, from which those
of the weights are made, are still in a cache; the next block uses the same memory, or with several
threads the one after it.

What it computes is told in `batched`, whose functions these are; `how` is the module of the cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastsiam import _steps
from fastsiam._packed import BLOCK, Reached, Saved, empty, stack


def project(
    how: ModuleType, x: Tensor, rows: Tensor | None, weight_ih: Tensor, bias: Tensor | None
) -> Tensor:
    """Project rows of x, [R, D]; None: all of them. Do for one direction as `batched.prepare`."""
    x, rows = _float_rows(x, rows)
    weight = weight_ih.float()
    of_bias = how.input_bias(None if bias is None else bias.float(), weight)
    return _steps.project(x, rows, how.input_weight(weight), of_bias)


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
    """Do as `batched.infer`."""
    N, P, H = lengths.shape[0], *weight.shape[:2]
    if ids is None:
        ids = torch.arange(N * steps, device=lengths.device)
    batch = _steps.batch(lengths, steps, H)
    vectors = table.new_empty(N, P * H)
    outputs = table.new_zeros(N, steps, P * H) if keep_outputs else None
    ids = ids.long().contiguous()
    mask = None if mask is None else mask.float().contiguous()
    for p in range(P):
        _steps.forward(
            cell,
            batch,
            p,
            _steps.panels(weight[p]),
            table[p],
            ids,
            None,
            pooling,
            mask,
            vectors,
            outputs,
            None,
            (None, None, None),
        )
    return vectors, table.new_empty(0) if outputs is None else outputs


def forward(
    how: ModuleType,
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
    keep: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """Do as `batched.forward`."""
    N, P, H = lengths.shape[0], weight_hh.shape[0], weight_hh.shape[2]
    batch = _steps.batch(lengths, steps, H)
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    vectors = nothing.new_empty(N, P * H)
    outputs = nothing.new_zeros((N, steps, P * H) if keep_outputs else 0)
    # the packed rows come first; the rest is never touched, so it costs address space only
    M = N * steps if keep else 0
    gates, states = empty((P, M, 4 * H), nothing), empty((P, M, H), nothing)
    cells = empty((P, M, H), nothing) if how.STATES == 2 else nothing
    peaks = torch.zeros(
        (N, P * H) if keep and pooling == "max" else 0, dtype=torch.int32, device=x.device
    )
    mask = None if mask is None else mask.float().contiguous()
    places = None
    if ids is not None:
        ids = ids.long().contiguous()
        words, places = _steps.distinct(batch, ids, x.shape[0])
    for p in range(P):
        rows = words if ids is not None else _steps.pack(batch, p, None, None)[0]
        table = project(how, x, rows, weight_ih[p], None if bias is None else bias[p])
        _steps.forward(
            cell,
            batch,
            p,
            _steps.panels(how.recurrent_weight(weight_hh[p].float())),
            table,
            ids,
            places,
            pooling,
            mask,
            vectors,
            outputs if keep_outputs else None,
            peaks if peaks.numel() else None,
            _from(gates, states, cells, p) if keep else (None, None, None),
        )
    return vectors, outputs, Saved(gates, cells, states, peaks)


def backward(
    how: ModuleType,
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
    """Do as `batched.backward`."""
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    gates, cells, states, peaks = saved
    dx = gates.new_zeros(x.shape if need_dx else 0)
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    batch = _steps.batch(lengths, steps, H)
    blocks = list(_blocks(batch.starts.tolist()))
    dvectors = None if dvectors is None else dvectors.float().contiguous()
    last = dvectors if pooling == "last" else None
    places = None
    if ids is not None:
        ids = ids.long().contiguous()
        words, places = _steps.distinct(batch, ids, x.shape[0])
    for p in range(P):
        tokens, rows = _steps.pack(batch, p, ids, places)
        if ids is None:
            words = tokens
        columns = slice(p * H, (p + 1) * H)
        dv = None if dvectors is None else dvectors[:, columns]
        reached = Reached(dv, doutputs, columns, batch.lengths, mask, peaks, steps, pooling, p)
        weight = _steps.panels(how.backward_weight(weight_hh[p].float()))
        dtable = gates.new_empty(words.shape[0], 4 * H)
        h_by_gates = gates.new_zeros(H, 4 * H)
        _steps.backward(
            cell,
            batch,
            p,
            blocks,
            weight,
            _from(gates, states, cells, p),
            last,
            reached.rows(tokens),
            None if ids is None else rows,
            dtable,
            h_by_gates,
        )
        gates_by_x = _steps.sum_products(dtable, *_float_rows(x, words))
        gates_sum = _steps.sum_products(dtable.new_ones(words.shape[0], 1), dtable, None)[0]
        if need_dx:
            dx.index_add_(0, words, how.input_gradient(dtable, weight_ih[p].float()))
        grads.append(how.weight_gradients(gates_by_x, h_by_gates.T, gates_sum))
    dweight_ih, dweight_hh, dbias = (stack(list(parts)) for parts in zip(*grads, strict=True))
    return dx, dweight_ih, dweight_hh, dbias


def _float_rows(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return float32 rows without gaps: x and which of its rows, or these rows alone."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x, rows
    return (x if rows is None else x.index_select(0, rows)).float().contiguous(), None


def _from(gates: Tensor, states: Tensor, cells: Tensor, p: int) -> tuple[Tensor | None, ...]:
    """Return what is kept of direction p."""
    return gates[p], states[p], cells[p] if cells.ndim == 3 else None


def _blocks(starts: list[int]) -> Iterator[int]:
    """Cut tiles, which begin at these packed rows, into equal parts of about BLOCK rows.

    Yields the tiles at which parts begin, and where the last one ends.
    """
    yield 0
    total = starts[-1]
    count = max(1, total // BLOCK)
    first = part = 0
    for last, end in enumerate(starts):
        if end > starts[first] and end * count >= total * (part + 1):
            yield last
            first, part = last, end * count // total
