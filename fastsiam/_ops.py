"""torch.library: schema, fake and gradient of what `_layer` and `_topk` compute, and explain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsiam import _layer, _topk
from fastsiam._packed import compute_dtype

Fake = TypeVar("Fake", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("fastsiam", "FRAGMENT")


def _operator(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function, whose signature becomes the schema, as an operator.

    A custom_op would do, but its first call imports the compiler, two seconds of a command's life,
    and every call goes through several functions of its own.
    """
    schema = torch.library.infer_schema(compute, mutates_args=())
    torch.library.define(f"fastsiam::{name}", schema)

    torch.library.impl(f"fastsiam::{name}", "default")(functools.partial(_on_its_device, compute))
    operator: Callable[..., Any] = getattr(torch.ops.fastsiam, name).default
    return operator


def _on_its_device(compute: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function on its tensors' device: Triton launches on the current one."""
    like = next(each for each in inputs if isinstance(each, Tensor))
    if not like.is_cuda:
        return compute(*inputs)
    with torch.cuda.device_of(like):
        return compute(*inputs)


def _fake_of(name: str) -> Callable[[Fake], Fake]:
    """Register what the compiler is to know of an `_operator`: shapes and dtypes."""
    register: Callable[[Fake], Fake] = torch.library.register_fake(f"fastsiam::{name}")
    return register


siamese_prepare = _operator("siamese_prepare", _layer.prepare)


@_fake_of("siamese_prepare")
def _(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, Tensor]:
    table, weight = _layer.prepared_shapes(x.shape[0], weight_hh.shape, x.dtype, x.device, backend)
    return x.new_empty(table[0], dtype=table[1]), x.new_empty(weight[0], dtype=weight[1])


siamese_infer = _operator("siamese_infer", _layer.infer)


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


siamese_fwd = _operator("siamese_fwd", _layer.forward)


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
    shapes, dtype = _layer.saved_shapes(N, steps, H, P, x.dtype, cell, backend, recompute)
    gates, c, states = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    kept = pooling == "max" and not recompute
    peaks = x.new_empty((N, P * H) if kept else 0, dtype=torch.int32)
    transposed = x.new_empty(0)
    if backend == "triton" and not recompute:
        shape, dtype = _layer.transposed_shape(weight_hh, allow_tf32)
        transposed = x.new_empty(shape, dtype=dtype)
    return (*outputs, gates, c, states, peaks, transposed)


siamese_bwd = _operator("siamese_bwd", _layer.backward)


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


def _refuse_transform() -> None:
    raise RuntimeError(
        "siamese_fwd: gradients must be asked of backward or torch.autograd.grad, "
        "got torch.func or forward mode; pass backend='reference'"
    )


class _Siamese(torch.autograd.Function):
    """The gradient of `siamese_fwd`.

    `register_autograd` makes such a class too, but one whose forward lists the schema's arguments
    anew for each of them: 0.1 ms a call.
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., tuple[Tensor, ...]], *inputs: Any
    ) -> tuple[Tensor, ...]:
        output = compute(*inputs)
        tensors = inputs[:8]
        ctx.scale, ctx.steps, ctx.pooling, _, _, *ctx.how = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[4:])
        similarity, distance, h, _, *saved = output
        # in the order in which siamese_bwd takes them
        ctx.save_for_backward(*tensors, similarity, distance, h, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        reached = [None if g is None else g.contiguous() for g in grads[:4]]
        need = ctx.needs_input_grad
        if all(g is None for g in reached):
            return (None,) * len(need)
        need = need[1:]
        # a hook on saved tensors may have laid them out anew
        tensors: list[Any] = [None if t is None else t.contiguous() for t in ctx.saved_tensors]
        dx, dweight_ih, dweight_hh, dbias, dscale = siamese_bwd(
            *reached, *tensors, ctx.scale, ctx.steps, ctx.pooling, need[0], *ctx.how
        )
        learned_scale = tensors[7]
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

    @staticmethod
    def jvp(*_: Any) -> Any:
        _refuse_transform()


class _SiameseGradient(torch.autograd.Function):
    """Says of the gradient of `siamese_bwd` that there is none."""

    @staticmethod
    def forward(
        _: Any, compute: Callable[..., tuple[Tensor, ...]], *inputs: Any
    ) -> tuple[Tensor, ...]:
        return compute(*inputs)

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "siamese_bwd: a gradient cannot be differentiated again; pass backend='reference'"
        )


# what is left of the keys of plain tensors below autograd: no mode, subclass or tracer among them
_PLAIN = [
    torch._C.DispatchKeySet(key).raw_repr()
    for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
]


def _register_gradient(
    name: str, compute: Callable[..., Any], function: type[torch.autograd.Function]
) -> None:
    """Let a function run in an operator's place where autograd looks on."""
    redispatch = getattr(torch.ops.fastsiam, name).default.redispatch

    def below(keys: Any, *inputs: Any) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if keys.raw_repr() in _PLAIN:
                # the dispatcher would but call the same
                return _on_its_device(compute, *inputs)
            return redispatch(keys, *inputs)

    def apply(keys: Any, *inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            _refuse_transform()
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return function.apply(functools.partial(below, keys), *inputs)
        return below(keys, *inputs)

    _LIBRARY.impl(name, apply, "Autograd", with_keyset=True)


_register_gradient("siamese_fwd", _layer.forward, _Siamese)
_register_gradient("siamese_bwd", _layer.backward, _SiameseGradient)


manhattan_topk = _operator("manhattan_topk", _topk.manhattan_topk)


@_fake_of("manhattan_topk")
def _(queries: Tensor, corpus: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    distance = queries.new_empty(queries.shape[0], k, dtype=torch.float32)
    return distance, torch.empty_like(distance, dtype=torch.int64)
