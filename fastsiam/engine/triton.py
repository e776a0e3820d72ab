"""The backend "triton": launches the kernels of fastsiam.kernels on CUDA tensors.

A kernel module is imported when it first runs, so triton may be absent. kernels/README.md says what
runs when. With TRITON_INTERPRET=1 Triton runs the kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsiam.engine.layer import (
    Activations,
    Backend,
    Call,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Projection,
    Stacked,
    Upstream,
    allows_tf32,
)
from fastsiam.engine.similarity import MANHATTAN
from fastsiam.kernels import tiling
from fastsiam.kernels.tiling import NARROW

# the largest H that "auto" gives to triton
AUTO_HIDDEN = NARROW
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Triton(Backend):
    """Layers in Triton kernels: one launch for the recurrence, and one for its backward."""

    name = "triton"

    def obstacle(self, call: Call) -> str:
        """Name the device, dtype or hidden size that the kernels do not take."""
        if call.dtype not in DTYPES:
            return (
                f"dtype must be float32, float16 or bfloat16 for backend 'triton', got {call.dtype}"
            )
        if call.device.type != "cuda" and not interpreted():
            return (
                f"backend 'triton' needs CUDA tensors, got {call.device.type} "
                "(TRITON_INTERPRET=1, set before fastsiam is imported, runs the kernels "
                "interpreted)"
            )
        if call.H <= NARROW:
            return ""
        return tiling.wide_obstacle(
            call.H, call.dtype, call.training, allows_tf32(call.device), call.device
        )

    def project(self, x: Tensor, weights: Stacked, cell: str) -> Projection:
        """Return the table and weight_hh in the kernels' layout."""
        from fastsiam.kernels import weight_layout

        with _on(x):
            table, weight, _ = weight_layout.prepare(
                cell, x, weights.weight_ih, weights.weight_hh, weights.bias
            )
        shape = tuple(weights.weight_hh.shape)
        return Projection(self.name, cell, table, weight, shape, x.dtype)

    def infer(self, inputs: Inputs, projection: Projection, options: Options) -> Outputs:
        """Run a layer over the table."""
        with _on(inputs.lengths):
            return _launch_forward(inputs, projection, options)[0]

    def forward(
        self, inputs: Inputs, weights: Stacked, options: Options
    ) -> tuple[Outputs, Activations | None]:
        """Run a layer; kernels/weight_layout.py says what the activations hold."""
        from fastsiam.kernels import weight_layout

        with _on(inputs.lengths):
            x, ids = weight_layout.token_rows(inputs.x, inputs.ids, inputs.lengths, inputs.steps)
            table, weight, transposed = weight_layout.prepare(
                options.cell,
                x,
                weights.weight_ih,
                weights.weight_hh,
                weights.bias,
                keep=options.keep,
                allow_tf32=options.allow_tf32,
            )
            shape = tuple(weights.weight_hh.shape)
            projection = Projection(self.name, options.cell, table, weight, shape, inputs.x.dtype)
            rows = Inputs(inputs.x, ids, inputs.lengths, inputs.mask, inputs.steps)
            outputs, records = _launch_forward(rows, projection, options)
        if not options.keep:
            return outputs, None
        gates, cells, states, peaks = records
        assert gates is not None
        assert states is not None
        return outputs, Activations(gates, cells, states, peaks, transposed)

    def backward(
        self,
        inputs: Inputs,
        weights: Stacked,
        options: Options,
        outputs: Outputs,
        activations: Activations,
        upstream: Upstream,
        need_dx: bool,
    ) -> Gradients:
        """Carry the gradients back through time, then sum those of the weights over tokens."""
        from fastsiam.kernels import weight_layout

        with _on(inputs.lengths):
            dgates = _launch_backward(inputs, options, outputs, activations, upstream)
            dx, dweight_ih, dweight_hh, dbias = weight_layout.weight_gradients(
                options.cell,
                dgates,
                activations.states,
                inputs.x,
                inputs.ids,
                inputs.lengths,
                inputs.steps,
                weights.weight_ih if need_dx else None,
                weights.weight_hh,
                options.allow_tf32,
            )
        return Gradients(dx, dweight_ih, dweight_hh, dbias)

    def activations_like(self, inputs: Inputs, weights: Stacked, options: Options) -> Activations:
        """Return tensors of `weight_layout.record_shapes`, peaks, and weight_hh transposed."""
        from fastsiam.kernels import weight_layout

        like, P, H = inputs.x, weights.directions, weights.hidden
        gates, cells, states, peaks = _new_records(like, inputs, P, H, options)
        shape, dtype = weight_layout.transposed_shape(weights.weight_hh, options.allow_tf32)
        return Activations(gates, cells, states, peaks, like.new_empty(shape, dtype=dtype))


TRITON = Triton()


def interpreted() -> bool:
    """Return whether Triton's interpreter is on: kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _on(like: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one, where Triton launches."""
    return torch.cuda.device_of(like) if like.is_cuda else nullcontext()


Records = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _new_records(like: Tensor, inputs: Inputs, P: int, H: int, options: Options) -> Records:
    """Allocate gates, cells, states and peaks of a forward; None where a cell has none."""
    from fastsiam.kernels import weight_layout

    gates, cells, states = (
        None if shape is None else like.new_empty(shape)
        for shape in weight_layout.record_shapes(options.cell, inputs.count, inputs.steps, H, P)
    )
    assert gates is not None
    assert states is not None
    peaks = None
    if options.pooling == "max":
        peaks = like.new_empty((inputs.count, P * H), dtype=torch.int32)
    return gates, cells, states, peaks


def _launch_forward(
    inputs: Inputs, projection: Projection, options: Options
) -> tuple[Outputs, Records | tuple[None, None, None, None]]:
    """Run all sequences over projected rows; return the results and the records of a backward."""
    N, H, dtype = inputs.count, projection.hidden, projection.dtype
    P, device = projection.table.shape[1], projection.table.device
    nothing = N == 0 or inputs.steps == 0
    new = torch.zeros if nothing else torch.empty
    vectors = new((N, P * H), device=device, dtype=dtype)
    states = vectors.new_zeros(N, inputs.steps, P * H) if options.all_states else None
    distance = new((P, N // 2 if options.paired else 0), device=device, dtype=torch.float32)
    similarity = torch.empty_like(distance[0])
    records: Records | tuple[None, None, None, None] = (None,) * 4
    if options.keep:
        records = _new_records(vectors, inputs, P, H, options)
    if not nothing:
        launch = _narrow_forward if H <= NARROW else _wide_forward
        launch(inputs, projection, options, Outputs(vectors, states, distance, similarity), records)
    if not options.paired:
        return Outputs(vectors, states), records
    total = distance[0]
    if nothing or (P == 2 and H <= NARROW):
        # no narrow program has both directions of a pair
        total = distance.sum(dim=0)
        similarity = MANHATTAN.value(total, options.scale)
    return Outputs(vectors, states, total, similarity), records


def _common(inputs: Inputs, P: int, options: Options, order: Tensor | None) -> dict[str, Any]:
    """Return the arguments that all recurrences share; a missing tensor's pointer is not read."""
    lengths = inputs.lengths
    return {
        "lengths_ptr": lengths,
        "mask_ptr": lengths if inputs.mask is None else inputs.mask,
        "order_ptr": lengths if order is None else order,
        "T": inputs.steps,
        "zero": 0,
        "CELL": options.cell,
        "DIRECTIONS": P,
        "POOLING": options.pooling,
        "HAS_ORDER": order is not None,
    }


def _forward_arguments(
    inputs: Inputs,
    projection: Projection,
    options: Options,
    outputs: Outputs,
    records: tuple[Tensor | None, ...],
) -> dict[str, Any]:
    """Return the arguments that the narrow and the wide forward share."""
    vectors = outputs.vectors
    gates, cells, states, peaks = (vectors if r is None else r for r in records)
    return {
        "table_ptr": projection.table,
        "ids_ptr": inputs.lengths if inputs.ids is None else inputs.ids,
        "outputs_ptr": vectors if outputs.states is None else outputs.states,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "states_ptr": states,
        "peaks_ptr": peaks,
        "R": projection.table.shape[0],
        "H": projection.hidden,
        "PAIRED": options.paired,
        "HAS_IDS": inputs.ids is not None,
        "STORE_RECORDS": options.keep,
        "STORE_OUTPUTS": outputs.states is not None,
    }


def _narrow_forward(
    inputs: Inputs,
    projection: Projection,
    options: Options,
    outputs: Outputs,
    records: tuple[Tensor | None, ...],
) -> None:
    """Launch the forward of an H that one program holds."""
    from fastsiam.kernels.recurrence_fwd import recurrence_fwd_kernel
    from fastsiam.kernels.tile import in_triton

    N, P, H = inputs.count, projection.table.shape[1], projection.hidden
    B = N // 2 if options.paired else N
    vectors = outputs.vectors
    target = tiling.target_of(vectors.device)
    how = tiling.arithmetic(vectors.dtype, options.allow_tf32, target)
    load = tiling.load_of(inputs.lengths, P, target)
    tile = tiling.forward_tile(H, vectors.dtype, how, target, load)
    order = tiling.pair_order(inputs.lengths, B, target, P)
    recurrence_fwd_kernel[(tiling.cdiv(N, tile.sequences), P)](
        weight_ptr=projection.weight,
        similarity_ptr=outputs.similarity,
        distance_ptr=outputs.distance,
        vectors_ptr=vectors,
        scale=options.scale,
        B=B,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.sequences,
        WARPS=tile.num_warps,
        STREAM=tile.stream,
        OPERAND=in_triton(tile.operand),
        PARTS=tile.parts,
        num_warps=tile.num_warps,
        **_forward_arguments(inputs, projection, options, outputs, records),
        **_common(inputs, P, options, order),
        **how._asdict(),
        **tiling.forward_options(target, inputs.ids is not None, options.keep),
    )


def _wide_forward(
    inputs: Inputs,
    projection: Projection,
    options: Options,
    outputs: Outputs,
    records: tuple[Tensor | None, ...],
) -> None:
    """Launch the forward of an H whose units several programs share, then the score of pairs."""
    from fastsiam.kernels.wide_fwd import score_kernel, wide_fwd_kernel

    N, P, H = inputs.count, projection.table.shape[1], projection.hidden
    B = N // 2 if options.paired else N
    vectors = outputs.vectors
    block, target = tiling.block_h(H), tiling.target_of(vectors.device)
    precision = tiling.product_precision(vectors.dtype, options.allow_tf32, target)
    tile = tiling.wide_forward_tile(
        N, P, H, vectors.dtype, target, tiling.multiprocessors(vectors.device, target)
    )
    assert tile is not None  # else `Triton.obstacle` had named the limit
    tiles = tiling.cdiv(N, tile.sequences)
    order = tiling.longest_first(inputs.lengths, B) if tiles > 1 else None
    # twice the vectors; no step writes that of a sequence without steps
    pooled = torch.empty_like(vectors, dtype=torch.float32)
    carried = vectors.new_empty(0 if options.keep else (2, P, tiles * tile.sequences, block))
    wide_fwd_kernel[(min(tile.groups, tiles), P, block // tile.units)](
        weight_ptr=projection.weight.view(vectors.dtype),
        pooled_ptr=pooled,
        carried_h_ptr=carried,
        arrived_ptr=torch.zeros(tiles, P, device=vectors.device, dtype=torch.int32),
        tiles=tiles,
        B=B,
        BLOCK_H=block,
        UNITS=tile.units,
        BLOCK_N=tile.sequences,
        BLOCK_K=tile.block_k,
        PRECISION=precision,
        num_warps=tile.num_warps,
        num_stages=1,
        launch_cooperative_grid=True,
        **_forward_arguments(inputs, projection, options, outputs, records),
        **_common(inputs, P, options, order),
        **tiling.arithmetic(vectors.dtype, options.allow_tf32, target)._asdict(),
    )
    score_kernel[(B,)](
        pooled_ptr=pooled,
        lengths_ptr=inputs.lengths,
        similarity_ptr=outputs.similarity,
        distance_ptr=outputs.distance,
        vectors_ptr=vectors,
        scale=options.scale,
        B=B,
        F=P * H,
        BLOCK_F=512,
        PAIRED=options.paired,
    )


def _launch_backward(
    inputs: Inputs,
    options: Options,
    outputs: Outputs,
    activations: Activations,
    upstream: Upstream,
) -> Tensor:
    """Carry the gradients back through time; return those of the gates, where a step was."""
    from fastsiam.kernels import weight_layout

    vectors, weight = outputs.vectors, activations.weight
    assert weight is not None
    N, P = inputs.count, weight.shape[0]
    H, dtype, lengths = vectors.shape[1] // P, vectors.dtype, inputs.lengths
    dgates = torch.empty_like(activations.gates)
    if N == 0 or inputs.steps == 0:
        return dgates
    paired = upstream.similarity is not None or upstream.distance is not None
    B = N // 2 if paired else N
    target = tiling.target_of(vectors.device)
    how = tiling.arithmetic(dtype, options.allow_tf32, target)
    words = weight_layout.table_dtype(dtype)
    cells = activations.cells
    arguments: dict[str, Any] = {
        "dsim_ptr": vectors if upstream.similarity is None else upstream.similarity,
        "similarity_ptr": vectors if outputs.similarity is None else outputs.similarity,
        "dpair_ptr": vectors if upstream.distance is None else upstream.distance,
        "dvectors_ptr": vectors if upstream.vectors is None else upstream.vectors,
        "doutputs_ptr": vectors if upstream.states is None else upstream.states,
        "vectors_ptr": vectors,
        "gates_ptr": activations.gates.view(words),
        "before_ptr": activations.states if cells is None else cells.view(words),
        "peaks_ptr": vectors if activations.peaks is None else activations.peaks,
        "dgates_ptr": dgates,
        "scale": options.scale,
        "B": B,
        "H": H,
        "PAIRED": paired,
        "HAS_DSIM": upstream.similarity is not None,
        "HAS_DPAIR": upstream.distance is not None,
        "HAS_DVECTORS": upstream.vectors is not None,
        "HAS_DOUTPUTS": upstream.states is not None,
        "WIDEN": how.WIDEN,
    }
    if H <= NARROW:
        from fastsiam.kernels.recurrence_bwd import recurrence_bwd_kernel
        from fastsiam.kernels.tile import in_triton

        tile = tiling.backward_tile(H, dtype, how, target, tiling.load_of(lengths, P, target))
        order = tiling.pair_order(lengths, B, target, P)
        recurrence_bwd_kernel[(tiling.cdiv(N, tile.sequences), P)](
            weight_ptr=weight,
            BLOCK_H=tile.block_h,
            BLOCK_N=tile.sequences,
            WARPS=tile.num_warps,
            STREAM=tile.stream,
            OPERAND=in_triton(tile.operand),
            PARTS=tile.parts,
            ASSEMBLY=how.ASSEMBLY,
            num_warps=tile.num_warps,
            **arguments,
            **_common(inputs, P, options, order),
            **tiling.all_registers(target),
        )
        return dgates
    from fastsiam.kernels.wide_bwd import wide_bwd_kernel

    block = tiling.block_h(H)
    wide = tiling.wide_backward_tile(
        N, P, H, dtype, target, tiling.multiprocessors(vectors.device, target)
    )
    assert wide is not None
    tiles = tiling.cdiv(N, wide.sequences)
    order = tiling.longest_first(lengths, B) if tiles > 1 else None
    wide_bwd_kernel[(min(wide.groups, tiles), P, block // wide.units)](
        weight_ptr=weight.view(dtype),
        arrived_ptr=torch.zeros(tiles, P, device=vectors.device, dtype=torch.int32),
        tiles=tiles,
        BLOCK_H=block,
        UNITS=wide.units,
        BLOCK_N=wide.sequences,
        BLOCK_K=wide.block_k,
        PRECISION=tiling.product_precision(dtype, options.allow_tf32, target),
        num_warps=wide.num_warps,
        num_stages=1,
        launch_cooperative_grid=True,
        **arguments,
        **_common(inputs, P, options, order),
    )
    return dgates
