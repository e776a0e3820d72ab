"""torch.library: schema, fake and gradient of the operators; nothing else.

Both towers are one batch of N = 2B sequences: sequence j and sequence B + j are a pair. An operator
takes the name of the backend that computes it, "torch" or "triton"; a kernel is imported when it
first runs, so triton may be absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsiam import batched


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
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], and lay the recurrent weight out for `siamese_infer`."""
    if backend == "triton":
        from fastsiam.kernels import _packing

        return (
            _packing.pack_table(x, weight_ih, bias),
            _packing.pack_weight_fwd(weight_hh),
        )
    return batched.project(x, weight_ih, bias), batched.recurrent_weight(weight_hh)


@siamese_prepare.register_fake
def _(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    H = weight_hh.shape[1]
    if backend == "triton":
        from fastsiam.kernels import _packing

        table, weight = _packing.packed_shapes(x.shape[0], H, x.dtype)
        return (
            x.new_empty(table, dtype=_packing.table_dtype(x.dtype)),
            x.new_empty(weight, dtype=_packing.bits_dtype(x.dtype)),
        )
    dtype = batched.compute_dtype(x.dtype)
    return x.new_empty(x.shape[0], 4 * H, dtype=dtype), x.new_empty(H, 4 * H, dtype=dtype)


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
    paired: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both towers over prepared tables: similarity [B], L1 [B], sentence vectors [N, H]."""
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
            paired,
            allow_tf32,
            dtype,
            store_records=False,
        )
        return outputs[:3]
    with batched.threads(lengths):
        h = batched.infer(table, weight, ids, lengths, mask, steps)
    return *_score(h, paired, scale, learned_scale), h.to(dtype)


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
    paired: bool,
    allow_tf32: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_outputs(table, lengths, H, paired, dtype)


def _fake_outputs(
    like: Tensor, lengths: Tensor, H: int, paired: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    N = lengths.shape[0]
    B = N // 2 if paired else 0
    score_dtype = batched.compute_dtype(dtype)
    sim = like.new_empty(B, dtype=score_dtype)
    return sim, torch.empty_like(sim), like.new_empty(N, H, dtype=dtype)


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
    paired: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run both towers and keep the activations: similarity, L1, vectors, three saved tensors.

    Args:
        x: [R, D], a table that ids, [N, steps], point into, or one row a token where ids is None.
        lengths: [N], 0 <= length <= steps.
        mask: [N, steps] or None.
        weight_ih, weight_hh, bias: [4H, D], [4H, H] and [4H] or None.
        learned_scale: one element, or None: then `scale` is the factor on L1.
        steps: padded time steps.
        paired: whether sequences j and N / 2 + j are scored.
        allow_tf32: whether float32 products may be rounded to tf32.
        backend: "torch" or "triton".
    """
    H = weight_hh.shape[1]
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
            paired,
            allow_tf32,
            x.dtype,
            store_records=True,
        )
    with batched.threads(lengths):
        h, *saved = batched.forward(x, ids, lengths, mask, weight_ih, weight_hh, bias, steps)
    return *_score(h, paired, scale, learned_scale), h.to(x.dtype), saved[0], saved[1], saved[2]


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
    paired: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    H = weight_hh.shape[1]
    N = lengths.shape[0]
    sim, distance, h = _fake_outputs(x, lengths, H, paired, x.dtype)
    if backend == "triton":
        from fastsiam.kernels import _packing

        shapes, dtype = _packing.record_shapes(N, steps, H), x.dtype
    else:
        M = N * steps
        shapes, dtype = ((M, 4 * H), (M, H), (M, H)), batched.compute_dtype(x.dtype)
    gates, c, states = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return sim, distance, h, gates, c, states


@torch.library.custom_op("fastsiam::siamese_bwd", mutates_args=())
def siamese_bwd(
    dsim: Tensor | None,
    ddistance: Tensor | None,
    dh: Tensor | None,
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
    scale: float,
    steps: int,
    need_dx: bool,
    allow_tf32: bool,
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

        dgates = launch(dpair, dh, h, weight_hh, lengths, mask, gates, c, steps, allow_tf32)
        grads = _packing.weight_gradients(
            dgates, states, x, ids, lengths, weight_ih, weight_hh, steps, need_dx
        )
        return *grads, dscale
    dv = torch.zeros_like(h, dtype=gates.dtype) if dh is None else dh.to(gates.dtype)
    if dpair is not None:
        left, right = h.to(gates.dtype).chunk(2)
        pull = torch.sign(left - right) * dpair.unsqueeze(1)
        dv = dv + torch.cat((pull, -pull))
    with batched.threads(lengths):
        dx, dweight_ih, dweight_hh, dbias = batched.backward(
            dv, x, ids, lengths, mask, weight_ih, weight_hh, gates, c, states, steps, need_dx
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
    scale: float,
    steps: int,
    need_dx: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    dbias = weight_hh.new_empty(weight_hh.shape[0])
    return (
        dx,
        torch.empty_like(weight_ih),
        torch.empty_like(weight_hh),
        dbias,
        sim.new_empty(1),
    )


def _siamese_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ids, lengths, mask, weight_ih, weight_hh, bias, learned_scale = inputs[:8]
    ctx.scale, ctx.steps, _, ctx.allow_tf32, ctx.backend = inputs[8:]
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(x, ids, lengths, mask, weight_ih, weight_hh, learned_scale, *output)


def _siamese_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, ids, lengths, mask, weight_ih, weight_hh, learned_scale, *outputs = ctx.saved_tensors
    dsim, ddistance, dh = (None if g is None else g.contiguous() for g in grads[:3])
    need = ctx.needs_input_grad
    if dsim is None and ddistance is None and dh is None:
        return (None,) * len(need)
    dx, dweight_ih, dweight_hh, dbias, dscale = siamese_bwd(
        dsim,
        ddistance,
        dh,
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
        need[0],
        ctx.allow_tf32,
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
        *(None,) * 5,
    )


siamese_fwd.register_autograd(_siamese_backward, setup_context=_siamese_setup_context)
