"""What `batched` runs through, and what becomes of it: packed tokens, pooled hidden states.

Some of it `compiled` has in common with it.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# sequences in a group, and packed rows that a block has at least where its group has as many
GROUP = 1024
BLOCK = 2048

# bytes from which the GNU C library takes memory from the system whatever was free before
HUGE = 32 * 2**20

# the memory of tensors of `empty` that are gone, as many as the forward of two layers takes
_SPARE: deque[mmap.mmap] = deque(maxlen=6)


class Saved(NamedTuple):
    """What `forward` keeps for `backward`: rows of packed tokens, of which the rest is not used."""

    gates: Tensor  # [P, N * T, 4H]
    cells: Tensor  # [P, N * T, H] the cell state before each token; empty for a cell without one
    states: Tensor  # [P, N * T, H] the hidden state before each token
    peaks: (
        Tensor  # [N, P * H] int32, step in own time of each unit's maximum; empty unless pooled so
    )


class OfPairs(NamedTuple):
    """What reaches the pairs' L1: dsim * similarity * -scale, and dpair; nothing without both."""

    dsim: Tensor | None  # [B]
    similarity: Tensor  # [B]
    scale: float
    dpair: Tensor | None  # [B]

    def total(self) -> Tensor | None:
        """Return their sum, [B]."""
        if self.dsim is None:
            return self.dpair
        dpair = self.dsim * self.similarity * -self.scale
        return dpair if self.dpair is None else self.dpair + dpair


class Seen(NamedTuple):
    """What becomes of a block's hidden states besides; None where it is not wanted."""

    outputs: Tensor | None  # [m, H] all of them
    pooled: Tensor | None  # [n, H] their sum by weights, or without these their maximum
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
    """What becomes of the hidden states: a vector a sequence, and all of them where wanted."""

    def __init__(
        self,
        like: Tensor,
        N: int,
        columns: int,
        steps: int,
        pooling: str,
        mask: Tensor | None,
        plan: Schedule,
        keep_outputs: bool,
        peaks: bool,
    ) -> None:
        self.vectors = like.new_empty(N, columns)
        self.outputs = like.new_zeros((N, steps, columns) if keep_outputs else 0)
        self.peaks = torch.zeros(
            (N, columns) if peaks else 0, dtype=torch.int32, device=like.device
        )
        self._keep_outputs, self._keep_peaks = keep_outputs, peaks
        self._pooling, self._mask, self._plan = pooling, mask, plan

    def start(self, p: int, H: int) -> None:
        """Begin direction p."""
        self._tokens = self._plan.tokens[p]
        self._columns = slice(p * H, (p + 1) * H)
        N = self.vectors.shape[0]
        self._weights = None
        if self._pooling == "mask" and self._mask is not None:
            packed = self._mask.reshape(-1, 1).index_select(0, self._tokens)
            self._weights = packed.to(self.vectors.dtype)
        nothing = -torch.inf if self._pooling == "max" else 0.0
        if self._pooling != "last":
            self._pooled = self.vectors.new_full((N, H), nothing)
        if self._keep_peaks:
            self._peaks = torch.zeros((N, H), dtype=torch.int32, device=self.vectors.device)
        if self._keep_outputs:
            self._packed = self.vectors.new_empty(self._tokens.shape[0], H)

    def seen(self, block: Block) -> Seen:
        """Return what is made of the hidden states of a block, besides the last ones."""
        return Seen(
            self._packed[block.rows] if self._keep_outputs else None,
            None if self._pooling == "last" else self._pooled[block.group],
            None if self._weights is None else self._weights[block.rows],
            self._peaks[block.group] if self._keep_peaks else None,
        )

    def finish(self, h: Tensor, unit: float) -> None:
        """Write a direction's results, given its last states and the size of a unit of h."""
        order, columns = self._plan.order, self._columns
        v = h if self._pooling == "last" else self._pooled
        if self._pooling == "max":
            v = v.masked_fill_(v == -torch.inf, 0)
        self.vectors[:, columns].index_copy_(0, order, v * unit)
        if self._keep_peaks:
            self.peaks[:, columns].index_copy_(0, order, self._peaks)
        if self._keep_outputs:
            outputs = self.outputs.view(-1, self.outputs.shape[2])[:, columns]
            outputs.index_copy_(0, self._tokens, self._packed * unit)


class Reached(NamedTuple):
    """What reaches the hidden states of direction p from outside the recurrence."""

    dv: Tensor | None  # [N, H]
    doutputs: Tensor | None  # [N, T, P * H]
    columns: slice
    lengths: Tensor
    mask: Tensor | None
    peaks: Tensor
    steps: int
    pooling: str
    p: int

    def rows(self, tokens: Tensor) -> Tensor | None:
        """Return it for the packed tokens at flat positions `tokens`, [m], as [m, H], or None."""
        found: Tensor | None = None
        if self.dv is not None and self.pooling != "last":
            sequence = tokens.div(self.steps, rounding_mode="floor")
            found = self.dv.index_select(0, sequence)
            if self.pooling == "max":
                step = tokens - sequence * self.steps
                if self.p == 1:
                    step = self.lengths.index_select(0, sequence) - 1 - step
                peaks = self.peaks[:, self.columns].index_select(0, sequence)
                found = found.mul_(peaks == step.unsqueeze(1))
            elif self.mask is not None:
                weights = self.mask.reshape(-1, 1).index_select(0, tokens)
                found = found.mul_(weights.to(found.dtype))
        if self.doutputs is not None:
            flat = self.doutputs.reshape(-1, self.doutputs.shape[2])[:, self.columns]
            states = flat.index_select(0, tokens)
            found = states if found is None else found.add_(states)
        return found


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def project(how: ModuleType, x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input gates of the rows of x, [R, D], as [R, 4H] in the dtype of sums."""
    dtype = compute_dtype(x.dtype)
    table: Tensor = how.project(
        x.to(dtype), weight_ih.to(dtype), None if bias is None else bias.to(dtype)
    )
    return table


def stack(tensors: list[Tensor]) -> Tensor:
    """Return one tensor a direction as one: a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return uninitialized memory, in huge pages where it is large.

    What is this large the C library takes from the system at each call and gives back afterwards,
    and the system clears each page: that costs as much as the arithmetic that fills them. So it is
    taken in pages of 2 MiB where there are some, and what the last tensors of this kind had is kept
    for the next ones, until the process ends. It is never filled with NaN.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = _spare(size)
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    # the storage holds the view until nothing reads it any more
    view = memoryview(memory)[:size]
    weakref.finalize(view, _SPARE.append, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def _spare(size: int) -> mmap.mmap | None:
    """Return memory that is not in use any more, of at least some bytes, and drop what is not."""
    while True:
        try:
            memory = _SPARE.popleft()
        except IndexError:
            return None
        if len(memory) >= size:
            return memory
