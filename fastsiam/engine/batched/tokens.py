"""Packed tokens of the backend "batched": their order, pooling, and gradients from outside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsiam.engine.layer import Inputs, Options

# sequences in a group, and packed rows that a block has at least where its group has as many
GROUP = 1024
BLOCK = 2048


class PoolBlock(NamedTuple):
    """Places for the hidden states of a block; None where the layer does not need one."""

    states: Tensor | None  # [m, H] all of them
    pooled: Tensor | None  # [n, H] their sum by weights, or without weights their maximum
    weights: Tensor | None  # [m, 1]
    peaks: Tensor | None  # [n, H] int32, step in own time of the maximum


class Block(NamedTuple):
    """Consecutive steps of one group."""

    group: slice  # its sequences, in the schedule's order
    step: int  # the first one, in own time
    sizes: list[int]  # rows alive at each step
    rows: slice  # packed rows


class Schedule(NamedTuple):
    """Which rows run at which step."""

    lengths: Tensor  # [N] int64, from 0 to the padded steps
    order: Tensor  # [N] sequences, longest first
    tokens: list[Tensor]  # P times [M]: flat positions n * T + t of the valid tokens, as packed
    blocks: list[Block]


def schedule(lengths: Tensor, steps: int, P: int) -> Schedule:
    """Order the sequences of `lengths`, [N], each padded to `steps`, for P directions.

    A length beyond these, which only an unchecked call can bring, counts as the nearest one.
    """
    lengths = lengths.long().clamp(0, steps)
    order, tokens, alive = _order(lengths, steps, P)
    blocks: list[Block] = []
    row = 0
    for number, left in enumerate(alive):
        group = slice(number * GROUP, min((number + 1) * GROUP, lengths.shape[0]))
        step = 0
        while left:
            taken = count = 0
            while taken < len(left) and count < BLOCK:
                count += left[taken]
                taken += 1
            blocks.append(Block(group, step, left[:taken], slice(row, row + count)))
            left, step, row = left[taken:], step + taken, row + count
    return Schedule(lengths, order, tokens, blocks)


def _order(lengths: Tensor, steps: int, P: int) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """Return sequences, longest first; each direction's tokens; each group's rows by step."""
    longest_first, order = torch.sort(lengths, descending=True, stable=True)
    tokens: list[list[Tensor]] = [[] for _ in range(P)]
    alive: list[list[int]] = []
    for some, sequences in zip(longest_first.split(GROUP), order.split(GROUP), strict=True):
        finished = torch.bincount(some, minlength=1).cumsum(0)[:-1]
        time = torch.arange(finished.shape[0], device=lengths.device).unsqueeze(1)
        valid, first = time < some, sequences * steps
        tokens[0].append((first + time)[valid])
        if P == 2:
            tokens[1].append((first + some - 1 - time)[valid])
        alive.append((some.shape[0] - finished).tolist())
    return order, [torch.cat(each) for each in tokens], alive


class Pool:
    """Makes a vector of each sequence from its hidden states, and keeps the states where wanted."""

    def __init__(
        self, like: Tensor, columns: int, inputs: Inputs, options: Options, plan: Schedule
    ) -> None:
        N, T = inputs.count, inputs.steps
        self.vectors = like.new_empty(N, columns)
        self.states = like.new_zeros(N, T, columns) if options.all_states else None
        keep_peaks = options.keep and options.pooling == "max"
        self.peaks = like.new_zeros((N, columns), dtype=torch.int32) if keep_peaks else None
        self._pooling, self._mask, self._plan = options.pooling, inputs.mask, plan

    def start(self, p: int, H: int) -> None:
        """Begin direction p."""
        self._tokens = self._plan.tokens[p]
        self._columns = slice(p * H, (p + 1) * H)
        N = len(self.vectors)
        self._weights = self._pooled = self._own_peaks = self._packed = None
        if self._pooling == "mask" and self._mask is not None:
            packed = self._mask.reshape(-1, 1).index_select(0, self._tokens)
            self._weights = packed.to(self.vectors.dtype)
        if self._pooling != "last":
            nothing = -torch.inf if self._pooling == "max" else 0.0
            self._pooled = self.vectors.new_full((N, H), nothing)
        if self.peaks is not None:
            self._own_peaks = self.peaks.new_zeros(N, H)
        if self.states is not None:
            self._packed = self.vectors.new_empty(len(self._tokens), H)

    def block(self, block: Block) -> PoolBlock:
        """Return the places of a block."""
        return PoolBlock(
            None if self._packed is None else self._packed[block.rows],
            None if self._pooled is None else self._pooled[block.group],
            None if self._weights is None else self._weights[block.rows],
            None if self._own_peaks is None else self._own_peaks[block.group],
        )

    def finish(self, h: Tensor, unit: float) -> None:
        """Write a direction's results, given its last states and the size of a unit of h."""
        order, columns = self._plan.order, self._columns
        v = h if self._pooled is None else self._pooled
        if self._pooling == "max":
            v = v.masked_fill_(v == -torch.inf, 0)
        self.vectors[:, columns].index_copy_(0, order, v * unit)
        if self.peaks is not None and self._own_peaks is not None:
            self.peaks[:, columns].index_copy_(0, order, self._own_peaks)
        if self.states is not None and self._packed is not None:
            states = self.states.view(-1, self.states.shape[2])[:, columns]
            states.index_copy_(0, self._tokens, self._packed * unit)


class StateGradients(NamedTuple):
    """The gradients that reach the hidden states of direction p from outside the recurrence."""

    dv: Tensor | None  # [N, H]
    dstates: Tensor | None  # [N, T, P * H]
    columns: slice
    plan: Schedule
    inputs: Inputs
    options: Options
    p: int

    def rows(self, tokens: Tensor, peaks: Tensor | None) -> Tensor | None:
        """Return them for the packed tokens at flat positions `tokens`, [m], as [m, H], or None."""
        found: Tensor | None = None
        if self.dv is not None and self.options.pooling != "last":
            sequence = tokens.div(self.inputs.steps, rounding_mode="floor")
            found = self.dv.index_select(0, sequence)
            if peaks is not None:
                step = tokens - sequence * self.inputs.steps
                if self.p == 1:
                    step = self.plan.lengths.index_select(0, sequence) - 1 - step
                own = peaks[:, self.columns].index_select(0, sequence)
                found = found.mul_(own == step.unsqueeze(1))
            elif self.inputs.mask is not None:
                weights = self.inputs.mask.reshape(-1, 1).index_select(0, tokens)
                found = found.mul_(weights.to(found.dtype))
        if self.dstates is not None:
            flat = self.dstates.reshape(-1, self.dstates.shape[2])[:, self.columns]
            states = flat.index_select(0, tokens)
            found = states if found is None else found.add_(states)
        return found
