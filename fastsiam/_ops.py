"""torch.library: schema, fake and gradient of the operators; nothing else.

An operator runs one layer over N sequences. Both towers are one batch of N = 2B: sequence j and
sequence B + j are a pair. Weights come stacked by direction, P of them: one, or two where the layer
runs both ways. An operator takes the name of the cell, "lstm" or "gru", and of the backend that
computes it, "torch" or "triton"; a kernel is imported when it first runs, so triton may be absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsiam import _topk, batched


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


@torch.library.custom_op("fastsiam::siamese_prepare", mutates_args=())
def siamese_prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], and lay the recurrent weight out for `siamese_infer`."""
    if backend == "triton":
        from fastsiam.kernels import _packing

        return (
            _packing.pack_table(x, weight_ih, bias),
            _packing.pack_weight_fwd(weight_hh),
        )
    return batched.prepare(x, weight_ih, weight_hh, bias, cell)


@siamese_prepare.register_fake
def _(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    if backend == "triton":
        from fastsiam.kernels import _packing

        table, weight = _packing.packed_shapes(x.shape[0], H, x.dtype, P)
        return (
            x.new_empty(table, dtype=_packing.table_dtype(x.dtype)),
            x.new_empty(weight, dtype=_packing.bits_dtype(x.dtype)),
        )
    dtype = batched.compute_dtype(x.dtype)
    shapes = (P, x.shape[0], 4 * H), (P, H, weight_hh.shape[1])
    return x.new_empty(shapes[0], dtype=dtype), x.new_empty(shapes[1], dtype=dtype)


@torch.library.custom_op("fastsiam::siamese_infer", mutates_args=())
def siamese_infer(
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
    """Run a layer over prepared tables: similarity, L1, vectors, hidden states; see siamese_fwd."""
    if backend == "triton":
        from fastsiam.kernels.siamese_fwd import siamese_fwd as launch

        outputs = launch(
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
        )
        return outputs[:4]
    h, states = batched.infer(table, weight, ids, lengths, mask, steps, pooling, keep_outputs, cell)
    return *_score(h, paired, scale, learned_scale), h.to(dtype), states.to(dtype)


@siamese_infer.register_fake
def _(
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
    P = weight.shape[0]
    return _fake_outputs(table, lengths, P * H, steps, paired, keep_outputs, dtype)


def _fake_outputs(
    like: Tensor,
    lengths: Tensor,
    columns: int,
    steps: int,
    paired: bool,
    keep_outputs: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = lengths.shape[0]
    B = N // 2 if paired else 0
    score_dtype = batched.compute_dtype(dtype)
    sim = like.new_empty(B, dtype=score_dtype)
    h = like.new_empty(N, columns, dtype=dtype)
    states = like.new_empty((N, steps, columns) if keep_outputs else 0, dtype=dtype)
    return sim, torch.empty_like(sim), h, states


def _run(
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
    allow_tf32: bool,
    cell: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer from its inputs; `keep` says whether a backward follows."""
    H = weight_hh.shape[2]
    if backend == "triton":
        from fastsiam.kernels import _packing
        from fastsiam.kernels.siamese_fwd import siamese_fwd as launch

        rows, row_ids = _packing.token_rows(x, ids, lengths, steps)
        return launch(
            _packing.pack_table(rows, weight_ih, bias),
            _packing.pack_weight_fwd(weight_hh),
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
    return (similarity, distance, h.to(x.dtype), states.to(x.dtype), *saved)


@torch.library.custom_op("fastsiam::siamese_run", mutates_args=())
def siamese_run(
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
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `siamese_fwd` does where no gradient is wanted: keep nothing."""
    return _run(
        x,
        ids,
        lengths,
        mask,
        weight_ih,
        weight_hh,
        bias,
        learned_scale,
        scale,
        steps,
        pooling,
        paired,
        keep_outputs,
        allow_tf32,
        cell,
        backend,
        keep=False,
    )[:4]


@siamese_run.register_fake
def _(
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
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    return _fake_outputs(x, lengths, P * H, steps, paired, keep_outputs, x.dtype)


@torch.library.custom_op("fastsiam::siamese_fwd", mutates_args=())
def siamese_fwd(
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
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer and keep the activations.

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
        allow_tf32: whether float32 products may be rounded to tf32.
        cell: "lstm" or "gru".
        backend: "torch" or "triton".

    Returns:
        Similarity and L1 [B], vectors [N, P * H], hidden states [N, steps, P * H] (empty unless
        wanted), and four tensors for the backward.
    """
    return _run(
        x,
        ids,
        lengths,
        mask,
        weight_ih,
        weight_hh,
        bias,
        learned_scale,
        scale,
        steps,
        pooling,
        paired,
        keep_outputs,
        allow_tf32,
        cell,
        backend,
        keep=True,
    )


@siamese_fwd.register_fake
def _(
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
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    N = lengths.shape[0]
    outputs = _fake_outputs(x, lengths, P * H, steps, paired, keep_outputs, x.dtype)
    if backend == "triton":
        from fastsiam.kernels import _packing

        shapes, dtype = _packing.record_shapes(N, steps, H, P), x.dtype
    else:
        M = N * steps
        cells = (P, M, H) if batched.CELLS[cell].STATES == 2 else (0,)
        shapes, dtype = ((P, M, 4 * H), cells, (P, M, H)), batched.compute_dtype(x.dtype)
    gates, c, states = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    peaks = x.new_empty((N, P * H) if pooling == "max" else 0, dtype=torch.int32)
    return (*outputs, gates, c, states, peaks)


@torch.library.custom_op("fastsiam::siamese_bwd", mutates_args=())
def siamese_bwd(
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
    learned_scale: Tensor | None,
    sim: Tensor,
    distance: Tensor,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
    states: Tensor,
    peaks: Tensor,
    scale: float,
    steps: int,
    pooling: str,
    need_dx: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty unless need_dx), weight_ih, weight_hh, bias and scale."""
    factor: Tensor | float = scale if learned_scale is None else learned_scale.to(sim.dtype)
    # what reaches L1 of a pair, from the similarity and from L1 itself
    dpair = None if dsim is None else dsim * sim * -factor
    if ddistance is not None:
        dpair = ddistance if dpair is None else dpair + ddistance
    if dsim is None or learned_scale is None:
        dscale = sim.new_zeros(1)
    else:
        dscale = -(dsim * sim * distance).sum().reshape(1)
    if backend == "triton":
        from fastsiam.kernels import _packing
        from fastsiam.kernels.siamese_bwd import siamese_bwd as launch

        dgates = launch(
            dpair,
            dh,
            doutputs,
            h,
            weight_hh,
            lengths,
            mask,
            gates,
            c,
            peaks,
            steps,
            pooling,
            allow_tf32,
        )
        grads = _packing.weight_gradients(
            dgates, states, x, ids, lengths, weight_ih, weight_hh, steps, need_dx
        )
        return *grads, dscale
    dv = None if dh is None else dh.to(gates.dtype)
    if dpair is not None:
        left, right = h.to(gates.dtype).chunk(2)
        pull = torch.sign(left - right) * dpair.unsqueeze(1)
        pulls = torch.cat((pull, -pull))
        dv = pulls if dv is None else dv + pulls
    if doutputs is not None:
        doutputs = doutputs.to(gates.dtype)
    saved = batched.Saved(gates, c, states, peaks)
    dx, dweight_ih, dweight_hh, dbias = batched.backward(
        dv,
        doutputs,
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
        dscale,
    )


@siamese_bwd.register_fake
def _(
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
    learned_scale: Tensor | None,
    sim: Tensor,
    distance: Tensor,
    h: Tensor,
    gates: Tensor,
    c: Tensor,
    states: Tensor,
    peaks: Tensor,
    scale: float,
    steps: int,
    pooling: str,
    need_dx: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    return (
        dx,
        torch.empty_like(weight_ih),
        torch.empty_like(weight_hh),
        weight_hh.new_empty(P, 4 * H),
        sim.new_empty(1),
    )


def _siamese_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ids, lengths, mask, weight_ih, weight_hh, bias, learned_scale = inputs[:8]
    ctx.scale, ctx.steps, ctx.pooling, _, _, ctx.allow_tf32, ctx.cell, ctx.backend = inputs[8:]
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    similarity, distance, h, _, *saved = output
    ctx.save_for_backward(
        x, ids, lengths, mask, weight_ih, weight_hh, learned_scale, similarity, distance, h, *saved
    )


def _siamese_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, ids, lengths, mask, weight_ih, weight_hh, learned_scale, *outputs = ctx.saved_tensors
    reached = [None if g is None else g.contiguous() for g in grads[:4]]
    need = ctx.needs_input_grad
    if all(g is None for g in reached):
        return (None,) * len(need)
    dx, dweight_ih, dweight_hh, dbias, dscale = siamese_bwd(
        *reached,
        x,
        ids,
        lengths,
        mask,
        weight_ih,
        weight_hh,
        learned_scale,
        *outputs,
        ctx.scale,
        ctx.steps,
        ctx.pooling,
        need[0],
        ctx.allow_tf32,
        ctx.cell,
        ctx.backend,
    )
    return (
        dx if need[0] else None,
        None,
        None,
        None,
        dweight_ih,
        dweight_hh,
        dbias if ctx.has_bias else None,
        dscale.reshape(learned_scale.shape).to(learned_scale.dtype) if need[7] else None,
        *(None,) * 8,
    )


siamese_fwd.register_autograd(_siamese_backward, setup_context=_siamese_setup_context)


@torch.library.custom_op("fastsiam::manhattan_topk", mutates_args=())
def manhattan_topk(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return L1, [Q, k] float32, and indices of the k rows of corpus nearest to each query."""
    if backend == "triton":
        from fastsiam.kernels.pairwise import manhattan_pairs

        return _topk.manhattan_topk(queries, corpus, k, manhattan_pairs)
    return _topk.manhattan_topk(queries, corpus, k)


@manhattan_topk.register_fake
def _(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    distance = queries.new_empty(queries.shape[0], k, dtype=torch.float32)
    return distance, torch.empty_like(distance, dtype=torch.int64)
