"""torch.library: schema, fake and gradient of the operators; `_layer` computes them.

An operator runs one layer over N sequences. Both towers are one batch of N = 2B: sequence j and
sequence B + j are a pair. Weights come stacked by direction, P of them: one, or two where the layer
runs both ways. An operator takes the name of the cell, "lstm" or "gru", and of the backend that
computes it, "torch" or "triton".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsiam import _layer, _topk
from fastsiam._packed import OfPairs, Saved, compute_dtype

Fake = TypeVar("Fake", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("fastsiam", "FRAGMENT")


def _operator(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as an operator of the same name.

    A custom_op would do, but its first call imports the compiler, two seconds of a command's life,
    and every call goes through several functions of its own.
    """
    name = compute.__name__
    schema = torch.library.infer_schema(compute, mutates_args=())
    torch.library.define(f"fastsiam::{name}", schema)

    @functools.wraps(compute)
    def on_its_device(*inputs: Any) -> Any:
        # Triton launches on the current device, whatever its tensors are on
        with torch.cuda.device_of(next(each for each in inputs if isinstance(each, Tensor))):
            return compute(*inputs)

    torch.library.impl(f"fastsiam::{name}", "default")(on_its_device)
    operator: Callable[..., Any] = getattr(torch.ops.fastsiam, name).default
    return operator


def _fake_of(name: str) -> Callable[[Fake], Fake]:
    """Register what the compiler is to know of an `_operator`: shapes and dtypes."""
    register: Callable[[Fake], Fake] = torch.library.register_fake(f"fastsiam::{name}")
    return register


@_operator
def siamese_prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], and lay the recurrent weight out for `siamese_infer`."""
    return _layer.prepare(x, weight_ih, weight_hh, bias, cell, backend)


@_fake_of("siamese_prepare")
def _(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    table, weight = _layer.prepared_shapes(x.shape[0], weight_hh.shape, x.dtype, backend)
    return x.new_empty(table[0], dtype=table[1]), x.new_empty(weight[0], dtype=weight[1])


@_operator
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
    return _layer.infer(
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
        keep_outputs,
        allow_tf32,
        dtype,
        cell,
        backend,
    )


@_fake_of("siamese_infer")
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
    score_dtype = compute_dtype(dtype)
    sim = like.new_empty(B, dtype=score_dtype)
    h = like.new_empty(N, columns, dtype=dtype)
    states = like.new_empty((N, steps, columns) if keep_outputs else 0, dtype=dtype)
    return sim, torch.empty_like(sim), h, states


@_operator
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
    return _layer.run(
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


@_fake_of("siamese_run")
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


@_operator
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
    recompute: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        recompute: keep nothing, and let the backward run the layer again part by part.
        allow_tf32: whether float32 products may be rounded to tf32.
        cell: "lstm" or "gru".
        backend: "torch" or "triton".

    Returns:
        Similarity and L1 [B], vectors [N, P * H], hidden states [N, steps, P * H] (empty unless
        wanted), and five tensors for the backward.
    """
    return _layer.run(
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
        keep=not recompute,
    )


@_fake_of("siamese_fwd")
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
    recompute: bool,
    allow_tf32: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    N = lengths.shape[0]
    outputs = _fake_outputs(x, lengths, P * H, steps, paired, keep_outputs, x.dtype)
    shapes, dtype = _layer.saved_shapes(N, steps, H, P, x.dtype, cell, backend)
    if recompute:
        shapes = ((0,),) * 3
    gates, c, states = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    kept = pooling == "max" and not recompute
    peaks = x.new_empty((N, P * H) if kept else 0, dtype=torch.int32)
    transposed = x.new_empty(0)
    if backend == "triton" and not recompute:
        shape, dtype = _layer.transposed_shape(weight_hh, allow_tf32)
        transposed = x.new_empty(shape, dtype=dtype)
    return (*outputs, gates, c, states, peaks, transposed)


@_operator
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
    """Return the gradients of x (empty unless need_dx), weights, bias and a learned scale."""
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
    with torch.autocast(x.device.type, enabled=False):
        if recompute:
            grads = _layer.gradients_in_parts(of_pairs, dh, doutputs, *of_layer, bias, h, *how)
        else:
            saved = Saved(gates, c, states, peaks)
            grads = _layer.gradients(of_pairs, dh, doutputs, *of_layer, h, saved, transposed, *how)
    return *grads, dscale


@_fake_of("siamese_bwd")
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
    dx = x.new_empty(x.shape if need_dx else 0)
    P, H = weight_hh.shape[0], weight_hh.shape[2]
    return (
        dx,
        torch.empty_like(weight_ih),
        torch.empty_like(weight_hh),
        weight_hh.new_empty(P, 4 * H),
        sim.new_empty(0 if learned_scale is None else 1),
    )


class _Siamese(torch.autograd.Function):
    """The gradient of `siamese_fwd`.

    `register_autograd` makes such a class too, but one whose forward lists the schema's arguments
    anew for each of them: 0.1 ms a call.
    """

    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _below_autograd(siamese_fwd, keys, inputs)
        x, ids, lengths, mask, weight_ih, weight_hh, bias, learned_scale = inputs[:8]
        ctx.scale, ctx.steps, ctx.pooling, _, _, *ctx.how = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[4:])
        similarity, distance, h, _, *saved = output
        ctx.save_for_backward(
            x,
            ids,
            lengths,
            mask,
            weight_ih,
            weight_hh,
            bias,
            learned_scale,
            similarity,
            distance,
            h,
            *saved,
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, ids, lengths, mask, weight_ih, weight_hh, bias, learned_scale, *rest = ctx.saved_tensors
        reached = [None if g is None else g.contiguous() for g in grads[:4]]
        need = ctx.needs_input_grad
        if all(g is None for g in reached):
            return (None,) * len(need)
        need = need[1:]
        dx, dweight_ih, dweight_hh, dbias, dscale = siamese_bwd(
            *reached,
            x,
            ids,
            lengths,
            mask,
            weight_ih,
            weight_hh,
            bias,
            learned_scale,
            *rest,
            ctx.scale,
            ctx.steps,
            ctx.pooling,
            need[0],
            *ctx.how,
        )
        return (
            None,
            dx if need[0] else None,
            None,
            None,
            None,
            dweight_ih,
            dweight_hh,
            dbias if need[6] else None,
            dscale.reshape(learned_scale.shape).to(learned_scale.dtype) if need[7] else None,
            *(None,) * 9,
        )


class _SiameseGradient(torch.autograd.Function):
    """Says of the gradient of `siamese_bwd` that there is none."""

    @staticmethod
    def forward(_: Any, keys: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return _below_autograd(siamese_bwd, keys, inputs)

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "siamese_bwd: a gradient cannot be differentiated again; pass backend='reference'"
        )


def _below_autograd(operator: Any, keys: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call an operator as it is registered for all devices, out of what it has for autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, ...] = operator.redispatch(
            keys & torch._C._after_autograd_keyset, *inputs
        )
    return output


_LIBRARY.impl("siamese_fwd", _Siamese.apply, "Autograd", with_keyset=True)
_LIBRARY.impl("siamese_bwd", _SiameseGradient.apply, "Autograd", with_keyset=True)


@_operator
def manhattan_topk(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return L1, [Q, k] float32, and indices of the k rows of corpus nearest to each query."""
    if backend == "triton":
        from fastsiam.kernels.pairwise import manhattan_pairs

        return _topk.manhattan_topk(queries, corpus, k, manhattan_pairs)
    return _topk.manhattan_topk(queries, corpus, k)


@_fake_of("manhattan_topk")
def _(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    distance = queries.new_empty(queries.shape[0], k, dtype=torch.float32)
    return distance, torch.empty_like(distance, dtype=torch.int64)
