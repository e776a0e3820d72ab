"""The "torch" backend's layers where they are compiled: float32 on a CPU, kernels/cpu.

What it computes is told in `batched`, whose functions these are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsiam import _steps
from fastsiam._packed import Saved, empty


def prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str
) -> tuple[Tensor, Tensor]:
    """Do as `batched.prepare`; the weights come as panels of columns."""
    P, rows, H = weight_hh.shape
    table = torch.empty(P, x.shape[0], 4 * H, dtype=torch.float32, device=x.device)
    panels = table.new_empty(_steps.panels_shape(P, H, rows))
    _steps.run(
        "prepare",
        cell,
        *(P, 0, 0, H, x.shape[1], x.shape[0]),
        x=_float(x),
        weight_ih=_float(weight_ih),
        weight_hh=_float(weight_hh),
        bias=_float(bias),
        table=table,
        panels=panels,
    )
    return table, panels


def infer(
    table: Tensor,
    panels: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    steps: int,
    pooling: str,
    keep_outputs: bool,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """Do as `batched.infer`."""
    N, P, H = lengths.shape[0], panels.shape[0], panels.shape[2]
    vectors = table.new_empty(N, P * H)
    outputs = table.new_zeros((N, steps, P * H) if keep_outputs else 0)
    _steps.run(
        "forward",
        cell,
        *(P, N, steps, H, 0, table.shape[1], pooling),
        lengths=_long(lengths),
        ids=_long(ids),
        mask=_float(mask),
        table=table,
        panels=panels,
        vectors=vectors,
        outputs=outputs if keep_outputs else None,
    )
    return vectors, outputs


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
    keep: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """Do as `batched.forward`."""
    N, P, H = lengths.shape[0], weight_hh.shape[0], weight_hh.shape[2]
    rows, ids, _ = _float_rows(x, ids, lengths)
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    vectors = nothing.new_empty(N, P * H)
    outputs = nothing.new_zeros((N, steps, P * H) if keep_outputs else 0)
    # the packed rows come first; the rest is never touched, so it costs address space only
    M = N * steps if keep else 0
    gates, states = empty((P, M, 4 * H), nothing), empty((P, M, H), nothing)
    cells = empty((P, M, H), nothing) if cell == "lstm" else nothing
    keep_peaks = keep and pooling == "max"
    peaks = nothing.new_zeros((N, P * H) if keep_peaks else 0, dtype=torch.int32)
    of_layer = rows, ids, lengths, mask, weight_ih, weight_hh, steps, pooling
    _run(
        "forward",
        cell,
        *of_layer,
        bias=_float(bias),
        vectors=vectors,
        outputs=outputs if keep_outputs else None,
        peaks=peaks if keep_peaks else None,
        gates=gates if keep else None,
        before_h=states if keep else None,
        before_c=cells if keep and cell == "lstm" else None,
    )
    return vectors, outputs, Saved(gates, cells, states, peaks)


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
    """Do as `batched.backward`."""
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    rows, ids, words = _float_rows(x, ids, lengths)
    dx = saved.gates.new_zeros(rows.shape if need_dx else 0)
    dweight_ih, dweight_hh = (saved.gates.new_empty(w.shape) for w in (weight_ih, weight_hh))
    dbias = saved.gates.new_empty(P, 4 * H)
    of_layer = rows, ids, lengths, mask, weight_ih, weight_hh, steps, pooling
    _run(
        "backward",
        cell,
        *of_layer,
        peaks=saved.peaks,
        gates=saved.gates,
        before_h=saved.states,
        before_c=saved.cells if cell == "lstm" else None,
        dvectors=_float(dvectors),
        doutputs=_float(doutputs),
        dx=dx if need_dx else None,
        dweight_ih=dweight_ih,
        dweight_hh=dweight_hh,
        dbias=dbias,
    )
    if need_dx and words is not None:
        dx = dx.new_zeros(x.shape).index_copy_(0, words, dx)
    return dx, dweight_ih, dweight_hh, dbias


def _run(
    what: str,
    cell: str,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    steps: int,
    pooling: str,
    **others: Tensor | None,
) -> None:
    """Call the library with a layer's inputs, the same for its forward and its backward."""
    (P, _, H), (R, D), N = weight_hh.shape, x.shape, lengths.shape[0]
    others |= {
        "lengths": _long(lengths),
        "ids": _long(ids),
        "mask": _float(mask),
        "x": x,
        "weight_ih": _float(weight_ih),
        "weight_hh": _float(weight_hh),
    }
    _steps.run(what, cell, P, N, steps, H, D, R, pooling, **others)


def _float_rows(
    x: Tensor, ids: Tensor | None, lengths: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return x in float32 without gaps, and the ids.

    Where that takes a copy of a table, it is one of the rows that are read: which these are is the
    third, and the ids count them.
    """
    if ids is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x.float().contiguous(), ids, None
    valid = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    own = torch.zeros_like(ids, dtype=torch.long)
    words, own[valid] = torch.unique(ids[valid].long(), return_inverse=True)
    return x.index_select(0, words).float(), own, words


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _long(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.long().contiguous()
