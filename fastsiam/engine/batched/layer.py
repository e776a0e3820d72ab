"""The backend "batched": the kernels' algorithm in batched tensor operations, on any device.

The sequences of both towers stand in one batch, longest first, cut into groups. In a group the
sequences that still have a token at a step are the first rows: no step computes padding, and the
last state of a finished sequence stays untouched. Tokens lie in "packed" rows, group after group,
time-major in a group. Blocks of a few steps are worked on at a time, so that a block fits a core's
cache. Every distinct word of the batch is projected once. The backward takes the local derivatives
and the weight gradients a block at a time.

The directions of a layer run one after the other. "Own time" counts a direction's steps from its
first one. The cells are in `lstm.py` and `gru.py`. docs/cpu.md gives the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastsiam.engine.batched import gru, lstm
from fastsiam.engine.batched.tokens import BLOCK, Block, Pool, PoolBlock, StateGradients, schedule
from fastsiam.engine.cpu import empty
from fastsiam.engine.layer import (
    SLOTS,
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
    compute_dtype,
    stack,
)
from fastsiam.engine.similarity import score, vectors_gradient

CELLS: dict[str, ModuleType] = {"lstm": lstm, "gru": gru}


class Batched(Backend):
    """Layers in tensor operations. States and sums are float32, of float64 weights float64."""

    name = "batched"

    def obstacle(self, call: Call) -> str:
        """Nothing keeps tensor operations from a call."""
        del call
        return ""

    def project(self, x: Tensor, weights: Stacked, cell: str) -> Projection:
        """Return the table [P, R, 4H] and the weight [P, H, rows]."""
        module, dtype = CELLS[cell], compute_dtype(x.dtype)
        tables = [_project(module, x, weights, p) for p in range(weights.directions)]
        weight = [module.recurrent_weight(each.to(dtype)) for each in weights.weight_hh]
        shape = tuple(weights.weight_hh.shape)
        return Projection(self.name, cell, stack(tables), stack(weight), shape, x.dtype)

    def infer(self, inputs: Inputs, projection: Projection, options: Options) -> Outputs:
        """Run a layer over the table."""
        cell, table, H = CELLS[options.cell], projection.table, projection.hidden
        plan = schedule(inputs.lengths, inputs.steps, len(table))
        pool = Pool(table.new_empty(0), len(table) * H, inputs, options, plan)
        for p, tokens in enumerate(plan.tokens):
            rows = tokens if inputs.ids is None else inputs.ids.reshape(-1).index_select(0, tokens)
            states = _zeros(table, inputs.count, H, cell.STATES)
            pool.start(p, H)
            for block in plan.blocks:
                gates = torch.index_select(table[p], 0, rows[block.rows])
                _run_block(cell, block, gates, projection.weight[p], states, None, pool)
            pool.finish(states[0], cell.UNIT)
        return _outputs(pool, options, projection.dtype)

    def forward(
        self, inputs: Inputs, weights: Stacked, options: Options
    ) -> tuple[Outputs, Activations | None]:
        """Run a layer; activations lie in packed rows, of which N * T is more than enough."""
        cell, H, x = CELLS[options.cell], weights.hidden, inputs.x
        like = x.new_empty(0, dtype=compute_dtype(x.dtype))
        plan = schedule(inputs.lengths, inputs.steps, weights.directions)
        pool = Pool(like, weights.directions * H, inputs, options, plan)
        kept = self._new_activations(inputs, weights, options, pool) if options.keep else None
        for p, tokens in enumerate(plan.tokens):
            words, rows = _distinct(inputs.ids, tokens, len(x))
            parts = [
                _project(cell, x.index_select(0, some), weights, p) for some in words.split(BLOCK)
            ]
            table = parts[0] if len(parts) == 1 else torch.cat(parts)
            weight = cell.recurrent_weight(weights.weight_hh[p].to(like.dtype))
            states = _zeros(like, inputs.count, H, cell.STATES)
            pool.start(p, H)
            for block in plan.blocks:
                before = None
                if kept is None:
                    gates = like.new_empty(block.rows.stop - block.rows.start, SLOTS * H)
                else:
                    gates, before = kept.gates[p, block.rows], _before(kept, p, block)
                if rows is None:
                    gates.copy_(table[block.rows])
                else:
                    torch.index_select(table, 0, rows[block.rows], out=gates)
                _run_block(cell, block, gates, weight, states, before, pool)
            pool.finish(states[0], cell.UNIT)
        return _outputs(pool, options, x.dtype), kept

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
        """Carry the gradients back through time, and sum those of the weights."""
        cell, H, x = CELLS[options.cell], weights.hidden, inputs.x
        dtype = activations.gates.dtype
        dvectors = vectors_gradient(outputs, upstream, options)
        dstates = None if upstream.states is None else upstream.states.to(dtype)
        dx = activations.gates.new_zeros(x.shape) if need_dx else None
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        plan = schedule(inputs.lengths, inputs.steps, weights.directions)
        for p, tokens in enumerate(plan.tokens):
            words, rows = _distinct(inputs.ids, tokens, len(x))
            columns = slice(p * H, (p + 1) * H)
            dv = None if dvectors is None else dvectors[:, columns].to(dtype)
            outside = StateGradients(dv, dstates, columns, plan, inputs, options, p)
            grads = _zeros(activations.gates, inputs.count, H, cell.STATES)
            if dv is not None and options.pooling == "last":
                # a row of dh holds dv until the steps, from last to first, reach its last step
                torch.index_select(dv, 0, plan.order, out=grads[0])
            weight = cell.backward_weight(weights.weight_hh[p].to(dtype))
            dtable = activations.gates.new_zeros(len(words), SLOTS * H)
            gates_by_h = activations.gates.new_zeros(SLOTS * H, H)
            for block in reversed(plan.blocks):
                before = _before(activations, p, block)
                some = tuple(grad[block.group] for grad in grads)
                dgates = cell.backward(
                    activations.gates[p, block.rows],
                    before,
                    weight,
                    some,
                    block.sizes,
                    block.step == 0,
                    outside.rows(tokens[block.rows], activations.peaks),
                )
                gates_by_h.addmm_(dgates.T, before[0])
                if rows is None:
                    dtable[block.rows] = dgates
                else:
                    dtable.index_add_(0, rows[block.rows], dgates)
            gates_by_x = activations.gates.new_zeros(SLOTS * H, x.shape[1])
            for some_words, part in zip(words.split(BLOCK), dtable.split(BLOCK), strict=True):
                gates_by_x.addmm_(part.T, x.index_select(0, some_words).to(dtype))
            if dx is not None:
                weight_ih = weights.weight_ih[p].to(dtype)
                dx.index_add_(0, words, cell.input_gradient(dtable, weight_ih))
            found.append(cell.weight_gradients(gates_by_x, gates_by_h, dtable.sum(dim=0)))
        dweight_ih, dweight_hh, dbias = (
            stack(list(parts)).to(x.dtype) for parts in zip(*found, strict=True)
        )
        return Gradients(None if dx is None else dx.to(x.dtype), dweight_ih, dweight_hh, dbias)

    def activations_like(self, inputs: Inputs, weights: Stacked, options: Options) -> Activations:
        """Return packed rows [P, N * T, ...], and peaks [N, P * H] for pooling "max"."""
        return self._new_activations(inputs, weights, options, None)

    def _new_activations(
        self, inputs: Inputs, weights: Stacked, options: Options, pool: Pool | None
    ) -> Activations:
        P, H, M = weights.directions, weights.hidden, inputs.count * inputs.steps
        like = inputs.x.new_empty(0, dtype=compute_dtype(inputs.x.dtype))
        peaks = None if pool is None else pool.peaks
        if pool is None and options.pooling == "max":
            peaks = like.new_empty((inputs.count, P * H), dtype=torch.int32)
        return Activations(
            empty((P, M, SLOTS * H), like),
            empty((P, M, H), like) if CELLS[options.cell].STATES == 2 else None,
            empty((P, M, H), like),
            peaks,
        )


BATCHED = Batched()


def _outputs(pool: Pool, options: Options, dtype: torch.dtype) -> Outputs:
    """Return the results of a layer in its dtype; the pairs' results come from exact vectors."""
    found = score(Outputs(pool.vectors, pool.states), options)
    states = None if found.states is None else found.states.to(dtype)
    return Outputs(found.vectors.to(dtype), states, found.distance, found.similarity)


def _project(cell: ModuleType, x: Tensor, weights: Stacked, p: int) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H] in the dtype of sums."""
    dtype = compute_dtype(x.dtype)
    bias = None if weights.bias is None else weights.bias[p].to(dtype)
    table: Tensor = cell.project(x.to(dtype), weights.weight_ih[p].to(dtype), bias)
    return table


def _before(kept: Activations, p: int, block: Block) -> tuple[Tensor, ...]:
    """Return the rows of a block in the states before each token: h, and c where there is one."""
    h = kept.states[p, block.rows]
    return (h,) if kept.cells is None else (h, kept.cells[p, block.rows])


def _run_block(
    cell: ModuleType,
    block: Block,
    gates: Tensor,
    weight: Tensor,
    states: tuple[Tensor, ...],
    before: tuple[Tensor, ...] | None,
    pool: Pool,
) -> None:
    """Run the steps of a block, from input gates to states, and pool the hidden states."""
    alive = tuple(state[block.group] for state in states)
    visit = _visitor(block, pool.block(block))
    cell.forward(gates, weight, alive, block.sizes, block.step == 0, before, visit)


def _visitor(block: Block, pool: PoolBlock) -> Callable[[int, Tensor], None] | None:
    """Return a function that stores and pools the hidden states of each step of a block."""
    if pool.states is None and pool.pooled is None:
        return None
    each_state = None if pool.states is None else pool.states.split_with_sizes(block.sizes)
    each_weight = None if pool.weights is None else pool.weights.split_with_sizes(block.sizes)
    pooled, peaks = pool.pooled, pool.peaks

    def visit(t: int, h: Tensor) -> None:
        n = h.shape[0]
        if each_state is not None:
            each_state[t].copy_(h)
        if pooled is None:
            return
        if each_weight is not None:
            pooled[:n].addcmul_(h, each_weight[t])
            return
        if peaks is not None:
            peaks[:n].masked_fill_(h > pooled[:n], block.step + t)
        torch.maximum(pooled[:n], h, out=pooled[:n])

    return visit


def _zeros(like: Tensor, N: int, H: int, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_zeros(N, H) for _ in range(count))


def _distinct(ids: Tensor | None, tokens: Tensor, R: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows of x that the batch needs, and the number of each packed token's row.

    None in the second place means that each token has a row of its own, in packed order.
    """
    if ids is None:
        return tokens, None
    token_ids = ids.reshape(-1).index_select(0, tokens).long()
    if R > 64 * len(tokens):
        words, rows = torch.unique(token_ids, return_inverse=True)
        return words, rows
    seen = torch.zeros(R, dtype=torch.bool, device=ids.device)
    seen[token_ids] = True
    words = seen.nonzero().squeeze(1)
    place = torch.empty(R, dtype=torch.long, device=ids.device)
    place[words] = torch.arange(words.shape[0], device=ids.device)
    return words, place.index_select(0, token_ids)
