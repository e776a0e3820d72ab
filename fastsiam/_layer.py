"""One layer over N sequences on one backend: what the operators of `_ops` compute.

Both towers are one batch of N = 2B: sequence j and sequence B + j are a pair. Weights come stacked
by direction, P of them: one, or two where the layer runs both ways. Arguments mean what they mean
to `forward`. A kernel is imported when it first runs, so triton may be absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsiam import batched
from fastsiam._packed import OfPairs, Saved, compute_dtype

# padded tokens, and sequences, whose activations `_gradients_in_parts` holds at once
PART_TOKENS, PART_SEQUENCES = 2**16, 1024

Shape = tuple[int, ...]


def prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], and lay the recurrent weight out for `infer`."""
    if backend == "triton":
        table, weight, _ = _packing_of(cell).prepare(
            x, weight_ih, weight_hh, bias, keep=False, allow_tf32=False
        )
        return table, weight
    return batched.prepare(x, weight_ih, weight_hh, bias, cell)


def prepared_shapes(
    R: int, weight_hh: Shape, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[tuple[Shape, torch.dtype], tuple[Shape, torch.dtype]]:
    """Return shape and dtype of both results of `prepare`, for R rows and weight_hh's shape."""
    P, rows, H = weight_hh
    if backend == "triton":
        from fastsiam.kernels import _packing

        table, weight = _packing.packed_shapes(R, H, dtype, P)
        return (table, _packing.table_dtype(dtype)), (weight, torch.int16)
    table, weight = batched.prepared_shapes(R, P, rows, H, dtype, device)
    return (table, compute_dtype(dtype)), (weight, compute_dtype(dtype))


def saved_shapes(
    N: int,
    steps: int,
    H: int,
    P: int,
    dtype: torch.dtype,
    cell: str,
    backend: str,
    recompute: bool = False,
) -> tuple[tuple[Shape, ...], torch.dtype]:
    """Return the shapes of gates, cells and states that `forward` keeps, and their dtype."""
    if backend == "triton":
        if recompute:
            return ((0,),) * 3, dtype
        return _packing_of(cell).record_shapes(N, steps, H, P), dtype
    M = 0 if recompute else N * steps
    cells = (P, M, H) if batched.CELLS[cell].STATES == 2 else (0,)
    return ((P, M, 4 * H), cells, (P, M, H)), compute_dtype(dtype)


def transposed_shape(weight_hh: Tensor, allow_tf32: bool) -> tuple[Shape, torch.dtype]:
    """Return shape and dtype of weight_hh as `forward` keeps it for the backward kernel."""
    from fastsiam.kernels import _packing

    return _packing.transposed_shape(weight_hh, allow_tf32)


def infer(
    table: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    learned_scale: Tensor | None,
    scale: float,
    H: int,
    steps: int,
    pooling: str,
    paired: bool,
    keep_outputs: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a layer over what `prepare` returned: similarity, L1, vectors, hidden states."""
    if backend == "triton":
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _launchers(cell, H)[0](
            table,
            weight,
            ids,
            lengths,
            mask,
            learned_scale,
            scale,
            H,
            steps,
            pooling,
            paired,
            allow_tf32,
            dtype,
            store_records=False,
            store_outputs=keep_outputs,
        )[:4]
        return outputs
    h, states = batched.infer(table, weight, ids, lengths, mask, steps, pooling, keep_outputs, cell)
    return *_score(h, paired, scale, learned_scale), h.to(dtype), states.to(dtype)


def forward(
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    learned_scale: Tensor | None,
    scale: float,
    steps: int,
    pooling: str,
    paired: bool,
    keep_outputs: bool,
    recompute: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer from its inputs.

    Args:
        x: [R, D], a table that ids, [N, steps], point into, or one row a token where ids is None.
        lengths: [N], 0 <= length <= steps.
        mask: [N, steps] for pooling "mask", else None.
        weight_ih, weight_hh, bias: [P, 4H, D], [P, 4H, H] and [P, 4H] or None; the GRU's weights
            have 3H rows and its bias (r, z, n of the input, n of the state).
        learned_scale: one element, or None: then `scale` is the factor on L1.
        steps: padded time steps.
        pooling: "last", "max" or "mask".
        paired: whether sequences j and N / 2 + j are scored.
        keep_outputs: whether all hidden states are wanted.
        recompute: keep nothing; a backward runs the layer again part by part.
        allow_tf32: whether float32 products may be rounded to tf32.
        cell: "lstm" or "gru".
        backend: "torch" or "triton".

    Returns:
        Similarity and L1 [B], vectors [N, P * H], hidden states [N, steps, P * H] (empty unless
        wanted), and five tensors for `backward`.
    """
    keep = not recompute
    H = weight_hh.shape[2]
    if backend == "triton":
        from fastsiam.kernels._packing import token_rows

        rows, row_ids = token_rows(x, ids, lengths, steps)
        table, weight, transposed = _packing_of(cell).prepare(
            rows, weight_ih, weight_hh, bias, keep, allow_tf32
        )
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
        outputs = _launchers(cell, H)[0](
            table,
            weight,
            row_ids,
            lengths,
            mask,
            learned_scale,
            scale,
            H,
            steps,
            pooling,
            paired,
            allow_tf32,
            x.dtype,
            store_records=keep,
            store_outputs=keep_outputs,
        )
        return *outputs, transposed if keep else x.new_empty(0)
    h, states, saved = batched.forward(
        x,
        ids,
        lengths,
        mask,
        weight_ih,
        weight_hh,
        bias,
        steps,
        pooling,
        keep_outputs,
        cell,
        keep,
    )
    similarity, distance = _score(h, paired, scale, learned_scale)
    return (similarity, distance, h.to(x.dtype), states.to(x.dtype), *saved, x.new_empty(0))


def backward(
    dsim: Tensor | None,
    ddistance: Tensor | None,
    dh: Tensor | None,
    doutputs: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    learned_scale: Tensor | None,
    sim: Tensor,
    distance: Tensor,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
    states: Tensor,
    peaks: Tensor,
    transposed: Tensor,
    scale: float,
    steps: int,
    pooling: str,
    need_dx: bool,
    recompute: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty unless need_dx), weights, bias and a learned scale.

    Args:
        dsim, ddistance, dh, doutputs: the gradients of what `forward` returned first, or None.
        sim, distance, h: what it returned of these.
        gates, c, states, peaks, transposed: what it kept.
    """
    dscale = sim.new_empty(0)
    if learned_scale is not None:
        dscale = sim.new_zeros(1)
        if dsim is not None:
            dsim = dsim * -sim
            dscale = (dsim * distance).sum().reshape(1)
            dpair = dsim * learned_scale.to(sim.dtype)
            ddistance = dpair if ddistance is None else ddistance + dpair
            dsim = None
    of_pairs = OfPairs(dsim, sim, scale, ddistance)
    of_layer = x, ids, lengths, mask, weight_ih, weight_hh
    how = steps, pooling, need_dx, allow_tf32, cell, backend
    # the forward's dtypes hold, also where backward is called under autocast
    with without_autocast(x.device.type):
        if recompute:
            grads = _gradients_in_parts(of_pairs, dh, doutputs, *of_layer, bias, h, *how)
        else:
            saved = Saved(gates, c, states, peaks)
            grads = _gradients(of_pairs, dh, doutputs, *of_layer, h, saved, transposed, *how)
    return *grads, dscale


def _gradients(
    of_pairs: OfPairs,
    dvectors: Tensor | None,
    doutputs: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    h: Tensor,
    saved: Saved,
    transposed: Tensor,
    steps: int,
    pooling: str,
    need_dx: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty unless need_dx), weight_ih, weight_hh and bias.

    Args:
        of_pairs: of the pairs' L1.
        dvectors: [N, P * H], or None.
        doutputs: [N, T, P * H], or None.
        h: [N, P * H] vectors.
        saved, transposed: what `forward` kept.
    """
    if backend == "triton":
        packing = _packing_of(cell)
        dgates = _launchers(cell, weight_hh.shape[2])[1](
            *of_pairs,
            dvectors,
            doutputs,
            h,
            transposed,
            lengths,
            mask,
            *saved,
            steps,
            pooling,
            allow_tf32,
        )
        found: tuple[Tensor, Tensor, Tensor, Tensor] = packing.weight_gradients(
            dgates,
            saved.states,
            x,
            ids,
            lengths,
            weight_ih if need_dx else None,
            weight_hh,
            steps,
            allow_tf32,
        )
        return found
    dtype = saved.gates.dtype
    dx, dweight_ih, dweight_hh, dbias = batched.backward(
        _reach_vectors(of_pairs.total(), dvectors, h.to(dtype)),
        None if doutputs is None else doutputs.to(dtype),
        x,
        ids,
        lengths,
        mask,
        weight_ih,
        weight_hh,
        saved,
        steps,
        pooling,
        need_dx,
        cell,
    )
    return (
        dx.to(x.dtype),
        dweight_ih.to(weight_ih.dtype),
        dweight_hh.to(weight_hh.dtype),
        dbias.to(weight_hh.dtype),
    )


def _gradients_in_parts(
    of_pairs: OfPairs,
    dvectors: Tensor | None,
    doutputs: Tensor | None,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h: Tensor,
    steps: int,
    pooling: str,
    need_dx: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `_gradients` does with nothing kept: run some sequences again, then the next ones."""
    N, precise = lengths.shape[0], compute_dtype(x.dtype)
    dv = _reach_vectors(of_pairs.total(), dvectors, h.to(precise))
    sums = [
        torch.zeros(shape, device=x.device, dtype=precise)
        for shape in (weight_ih.shape, weight_hh.shape, (len(weight_hh), 4 * weight_hh.shape[2]))
    ]
    dx = torch.zeros(x.shape if need_dx else 0, device=x.device, dtype=precise)
    size = max(PART_SEQUENCES, PART_TOKENS // max(steps, 1))
    for start in range(0, N, size):
        some = slice(start, start + size)
        rows = slice(start * steps, min(start + size, N) * steps) if ids is None else slice(None)
        part = (x[rows], _some(ids, some), lengths[some], _some(mask, some), weight_ih, weight_hh)
        how = (allow_tf32, cell, backend)
        _, _, vectors, _, *kept, transposed = forward(
            *part, bias, None, 1.0, steps, pooling, False, False, False, *how
        )
        found = _gradients(
            OfPairs(None, vectors, 1.0, None),
            None if dv is None else dv[some].to(x.dtype),
            _some(doutputs, some),
            *part,
            vectors,
            Saved(*kept),
            transposed,
            steps,
            pooling,
            need_dx,
            *how,
        )
        if need_dx:
            dx[rows] += found[0]
        for total, grad in zip(sums, found[1:], strict=True):
            total += grad
    dweight_ih, dweight_hh, dbias = (total.to(x.dtype) for total in sums)
    return dx.to(x.dtype), dweight_ih, dweight_hh, dbias


def _reach_vectors(dpair: Tensor | None, dvectors: Tensor | None, h: Tensor) -> Tensor | None:
    """Return all that reaches the vectors, [N, P * H], from L1 and from outside, in h's dtype."""
    dv = None if dvectors is None else dvectors.to(h.dtype)
    if dpair is None:
        return dv
    left, right = h.chunk(2)
    pull = (left - right).sign_().mul_(dpair.unsqueeze(1))
    pulls = torch.cat((pull, -pull))
    return pulls if dv is None else dv + pulls


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off where it is on: to enter and to leave it takes longer than to ask."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _some(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _score(
    h: Tensor, paired: bool, scale: float, learned_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return exp(-scale * L1) and L1 of the pairs of h, [B] each, or empty ones."""
    if not paired:
        return h.new_empty(0), h.new_empty(0)
    left, right = h.chunk(2)
    distance = (left - right).abs_().sum(dim=1)
    if learned_scale is not None:
        return torch.exp(-learned_scale.to(h.dtype) * distance), distance
    return torch.exp(distance * -scale), distance


def _packing_of(cell: str) -> ModuleType:
    from fastsiam.kernels import _packing, _packing_gru

    return _packing if cell == "lstm" else _packing_gru


def _launchers(cell: str, H: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Import the kernels of a cell and hidden size, forward and backward."""
    from fastsiam.kernels._tiling import NARROW

    if H > NARROW:
        from fastsiam.kernels.siamese_wide_bwd import siamese_wide_bwd
        from fastsiam.kernels.siamese_wide_fwd import siamese_wide_fwd

        return functools.partial(siamese_wide_fwd, cell), functools.partial(siamese_wide_bwd, cell)
    if cell == "lstm":
        from fastsiam.kernels.siamese_bwd import siamese_bwd
        from fastsiam.kernels.siamese_fwd import siamese_fwd

        return siamese_fwd, siamese_bwd
    from fastsiam.kernels.siamese_gru_bwd import siamese_gru_bwd
    from fastsiam.kernels.siamese_gru_fwd import siamese_gru_fwd

    return siamese_gru_fwd, siamese_gru_bwd
