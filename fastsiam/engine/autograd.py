"""Layers of the explicit backends under autograd: a Function, and an operator for what traces.

Eager calls run `_Layer`, an `autograd.Function`. torch.compile, torch.export, fake tensors and
functorch cannot look into a backend. They see the operator `fastsiam::layer`: its schema is the one
place where the objects of `layer` are flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastsiam.engine.layer import (
    Activations,
    Backend,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Projection,
    Stacked,
    Upstream,
    Weights,
    compute_dtype,
    part_of,
    stack_weights,
    without_autocast,
)
from fastsiam.engine.select import BACKENDS
from fastsiam.engine.similarity import vectors_gradient

# padded tokens, and sequences, whose activations a recomputing backward holds at once
PART_TOKENS, PART_SEQUENCES = 2**16, 1024


def run(
    backend: Backend,
    inputs: Inputs,
    directions: Sequence[Weights],
    options: Options,
    projection: Projection | None = None,
) -> Outputs:
    """Run a layer; without gradients and with ids, over a projection where there is one."""
    tensors = [inputs.x, *(t for weights in directions for t in weights if t is not None)]
    transformed = torch._C._are_functorch_transforms_active()  # no public call tells
    traced = torch.compiler.is_compiling() or transformed or not all(map(_is_plain, tensors))
    # no tensor says that forward mode differentiates it, which a Function refuses
    training = forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )
    options = replace(options, training=training)
    if not (training or traced) and projection is not None and inputs.ids is not None:
        return backend.infer(inputs, projection, options)
    weights = stack_weights(directions, options.cell, inputs.x.dtype)
    if not traced and not training:
        return backend.forward(inputs, weights, options)[0]
    if not traced:
        results = _Layer.apply(  # type: ignore[no-untyped-call]
            backend, options, inputs.steps, *_flat(inputs, weights)
        )
    else:
        if transformed and training:
            _refuse_transform()
        layer = _filled(_flat(inputs, weights))
        results = layer_op(layer, inputs.steps, options.encode(), backend.name)[:4]
    vectors, states, distance, similarity = results
    return Outputs(
        vectors,
        states if options.all_states else None,
        distance if options.paired else None,
        similarity if options.paired else None,
    )


def _is_plain(t: Tensor) -> bool:
    """Return whether a tensor is memory that a backend reads: not a fake, traced or wrapped one."""
    return type(t) in (Tensor, nn.Parameter) and t.device.type in ("cpu", "cuda")


def _flat(inputs: Inputs, weights: Stacked) -> tuple[Tensor | None, ...]:
    """Return the tensors of a layer in the order of the operator's schema."""
    sequences = inputs.x, inputs.ids, inputs.lengths, inputs.mask
    return *sequences, weights.weight_ih, weights.weight_hh, weights.bias


def _objects(tensors: Sequence[Any], steps: int) -> tuple[Inputs, Stacked]:
    """Return the objects that `_flat` flattened."""
    # a hook on saved tensors may have laid them out anew
    x, ids, lengths, mask, *weights = _contiguous(tensors)
    return Inputs(x, ids, lengths, mask, steps), Stacked(*weights)


def _contiguous(tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _refuse_transform() -> None:
    raise RuntimeError(
        "siamese layer: gradients must be asked of backward or torch.autograd.grad, "
        "got torch.func or forward mode; pass backend='reference'"
    )


class _Layer(torch.autograd.Function):
    """A layer with its gradient: vectors, all states, distance and similarity."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, options: Options, steps: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, weights = _objects(tensors, steps)
        outputs, kept = backend.forward(inputs, weights, options)
        ctx.layer = backend, options, steps
        ctx.set_materialize_grads(False)
        saved = () if kept is None else kept.tensors()
        ctx.save_for_backward(*tensors, outputs.vectors, outputs.similarity, *saved)
        return outputs.vectors, outputs.states, outputs.distance, outputs.similarity

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = Upstream(*_contiguous(upstream))
        if forward_ad._current_level >= 0 and any(map(_has_tangent, upstream)):
            _refuse_transform()
        nothing = (None,) * len(ctx.needs_input_grad)
        if not grads:
            return nothing
        backend, options, steps = ctx.layer
        tensors = _contiguous(ctx.saved_tensors)
        inputs, weights = _objects(tensors[:7], steps)
        outputs = Outputs(tensors[7], similarity=tensors[8])
        kept = Activations(*tensors[9:]) if options.keep else None
        need = ctx.needs_input_grad[3:]

        def compute() -> tuple[Tensor | None, ...]:
            found = _gradients(backend, inputs, weights, options, (outputs, kept), grads, need[0])
            return found.x, found.weight_ih, found.weight_hh, found.bias

        if torch.is_grad_enabled():
            reached = [t for t in (*tensors, *upstream) if t is not None]
            found = _Once.apply(compute, *reached)  # type: ignore[no-untyped-call]
        else:
            found = compute()
        dx, dweight_ih, dweight_hh, dbias = found
        dbias = dbias if need[6] else None
        return None, None, None, dx, None, None, None, dweight_ih, dweight_hh, dbias

    @staticmethod
    def jvp(*_: Any) -> Any:
        _refuse_transform()


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


class _Once(torch.autograd.Function):
    """A gradient that has none itself."""

    @staticmethod
    def forward(_: Any, compute: Any, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        del tensors
        found: tuple[Tensor | None, ...] = compute()
        return found

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "siamese layer: a gradient cannot be differentiated again; pass backend='reference'"
        )


def _gradients(
    backend: Backend,
    inputs: Inputs,
    weights: Stacked,
    options: Options,
    results: tuple[Outputs, Activations | None],
    upstream: Upstream,
    need_dx: bool,
) -> Gradients:
    """Run a backend's backward; the forward's dtypes hold, also under autocast."""
    outputs, kept = results
    with without_autocast(inputs.x.device.type):
        if kept is None:
            return _recompute(backend, inputs, weights, options, outputs, upstream, need_dx)
        return backend.backward(inputs, weights, options, outputs, kept, upstream, need_dx)


def _recompute(
    backend: Backend,
    inputs: Inputs,
    weights: Stacked,
    options: Options,
    outputs: Outputs,
    upstream: Upstream,
    need_dx: bool,
) -> Gradients:
    """Run some sequences forward again, keep their activations, run them backward, go on."""
    x, N = inputs.x, inputs.count
    dtype = compute_dtype(x.dtype)
    dvectors = vectors_gradient(outputs, upstream, options)
    total = Gradients(
        torch.zeros_like(x, dtype=dtype) if need_dx else None,
        torch.zeros_like(weights.weight_ih, dtype=dtype),
        torch.zeros_like(weights.weight_hh, dtype=dtype),
        x.new_zeros(weights.bias_shape, dtype=dtype),
    )
    options = replace(options, paired=False, all_states=False, recompute=False)
    size = max(PART_SEQUENCES, PART_TOKENS // max(inputs.steps, 1))
    for start in range(0, N, size):
        some = slice(start, start + size)
        part, rows = part_of(inputs, some)
        own = Upstream(
            None if dvectors is None else dvectors[some].to(x.dtype),
            None if upstream.states is None else upstream.states[some],
            None,
            None,
        )
        part_outputs, kept = backend.forward(part, weights, options)
        assert kept is not None
        found = backend.backward(part, weights, options, part_outputs, kept, own, need_dx)
        if total.x is not None and found.x is not None:
            total.x[rows] += found.x
        total.weight_ih.add_(found.weight_ih)
        total.weight_hh.add_(found.weight_hh)
        total.bias.add_(found.bias)
    return Gradients(
        None if total.x is None else total.x.to(x.dtype),
        *(t.to(x.dtype) for t in (total.weight_ih, total.weight_hh, total.bias)),
    )


# The operator that tracers see. A schema has no objects: a layer's tensors are a list in the order
# of `_flat`, and its options are text. Autograd takes no None in a list, so an empty tensor of one
# axis stands for a missing one.

Tensors = Sequence[Tensor]


def _filled(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors with an empty one for each missing one."""
    like = next(t for t in tensors if t is not None)
    return [like.new_empty(0) if t is None else t for t in tensors]


def _without_empty(tensors: Tensors) -> list[Tensor | None]:
    """Return the tensors of several axes, and None for the others."""
    return [None if t.ndim == 1 else t for t in tensors]


def _layer_objects(layer: Tensors, steps: int) -> tuple[Inputs, Stacked]:
    x, ids, lengths, *rest = layer
    return _objects([x, *_without_empty([ids]), lengths, *_without_empty(rest)], steps)


@torch.library.custom_op("fastsiam::layer", mutates_args=())
def layer_op(layer: Tensors, steps: int, options: str, backend: str) -> list[Tensor]:
    """Run a layer: vectors, states, distance, similarity, then the activations."""
    inputs, weights = _layer_objects(layer, steps)
    return _results(*BACKENDS[backend].forward(inputs, weights, Options.decode(options)))


def _results(outputs: Outputs, kept: Activations | None) -> list[Tensor]:
    results = outputs.vectors, outputs.states, outputs.distance, outputs.similarity
    return _filled([*results, *(() if kept is None else kept.tensors())])


@layer_op.register_fake
def _(layer: Tensors, steps: int, options: str, backend: str) -> list[Tensor]:
    inputs, weights = _layer_objects(layer, steps)
    how, x, N = Options.decode(options), inputs.x, inputs.count
    columns = weights.directions * weights.hidden
    score = x.new_empty(N // 2, dtype=compute_dtype(x.dtype)) if how.paired else None
    outputs = Outputs(
        x.new_empty(N, columns),
        x.new_empty(N, steps, columns) if how.all_states else None,
        score,
        None if score is None else torch.empty_like(score),
    )
    kept = BACKENDS[backend].activations_like(inputs, weights, how) if how.keep else None
    return _results(outputs, kept)


@torch.library.custom_op("fastsiam::layer_backward", mutates_args=())
def layer_backward_op(
    upstream: Tensors, layer: Tensors, saved: Tensors, steps: int, options: str, backend: str
) -> list[Tensor]:
    """Return the gradients of x, weight_ih, weight_hh and bias of a layer."""
    inputs, weights = _layer_objects(layer, steps)
    how = Options.decode(options)
    vectors, _, _, similarity, *activations = _contiguous(saved)
    outputs = Outputs(vectors, similarity=similarity)
    kept = Activations(*_without_empty(activations)) if how.keep else None  # type: ignore[arg-type]
    grads = Upstream(*(t if t.numel() else None for t in _contiguous(upstream)))
    found = _gradients(
        BACKENDS[backend], inputs, weights, how, (outputs, kept), grads, need_dx=True
    )
    assert found.x is not None
    return [found.x, found.weight_ih, found.weight_hh, found.bias]


@layer_backward_op.register_fake
def _(
    upstream: Tensors, layer: Tensors, saved: Tensors, steps: int, options: str, backend: str
) -> list[Tensor]:
    del upstream, saved, options, backend  # a fake has its operator's arguments
    inputs, weights = _layer_objects(layer, steps)
    bias = weights.weight_hh.new_empty(weights.bias_shape)
    return [*map(torch.empty_like, (inputs.x, weights.weight_ih, weights.weight_hh)), bias]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    layer, *ctx.how = inputs
    ctx.sizes = len(layer), len(output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*layer, *output)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    count = ctx.sizes[0]
    layer, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    given = _filled([*upstream[:4], layer[0]])[:4]
    dx, dweight_ih, dweight_hh, dbias = layer_backward_op(given, layer, saved, *ctx.how)
    dbias = dbias if layer[6].ndim > 1 else None
    return [dx, None, None, None, dweight_ih, dweight_hh, dbias], None, None, None


def _refuse_backward(*_: Any) -> Any:
    _Once.backward()


layer_op.register_autograd(_backward, setup_context=_setup)
layer_backward_op.register_autograd(_refuse_backward)
