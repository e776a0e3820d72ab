"""The batches of a phase: pairs in memory or in a file, grouped by length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsiam.text.pair_file import PairFile
from fastsiam.text.pairs import ScoredPair
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.data import EncodedPairs
from fastsiam.training.objective import Batch

POOL = 32  # batches sorted together: long enough for even lengths, short enough to stay random


class Source(Protocol):
    """Training pairs that come in batches.

    The rows of a batch have a length, the number of pairs, and can be sliced, so that several
    processes share them. `batch` turns them into an argument of the objective.
    """

    def __len__(self) -> int:
        """Return the number of pairs of an epoch."""

    def steps(self) -> int:
        """Return the number of batches of an epoch."""

    def batches(self, generator: torch.Generator) -> Iterable[Any]:
        """Return the rows of each batch of one epoch.

        The generator alone decides their order, and is drawn from before this returns.
        """

    def batch(self, rows: Any, device: torch.device) -> Any:
        """Return the argument of the objective."""


class PairBatches:
    """Pairs in memory, in batches of nearly equal length and another order each epoch.

    Args:
        pairs: the training pairs.
        batch_size: pairs a step; one batch may be smaller.
    """

    def __init__(self, pairs: EncodedPairs, batch_size: int) -> None:
        self.pairs, self.batch_size = pairs, batch_size

    def __len__(self) -> int:
        return len(self.pairs)

    def steps(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self.pairs) // self.batch_size)

    def batches(self, generator: torch.Generator) -> list[Tensor]:
        """Return the indices of each batch of one epoch."""
        lengths = self.pairs.left.lengths, self.pairs.right.lengths
        return grouped_batches(*lengths, self.batch_size, generator)

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """Return the inputs of a Siamese module and the gold similarities."""
        return self.pairs.batch(rows, device)


class _Rows:
    """Rows of a pool: a batch, or the share of one process."""

    def __init__(self, pool: EncodedPairs, rows: Tensor) -> None:
        self.pool, self.rows = pool, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> _Rows:
        return _Rows(self.pool, self.rows[part])


class StreamBatches:
    """Batches of a file, shuffled in a buffer and grouped by length.

    Memory holds `buffer` pairs and 32 batches, whatever the size of the file. A run that resumes
    within an epoch reads the file once more up to where it was.

    Args:
        file: looked through before.
        vocabulary: turns words into ids.
        max_len: tokens of a sentence that are read.
        batch_size: pairs a step; one batch may be smaller.
        buffer: pairs that the next one is drawn from; a pair cannot come much earlier than that.
    """

    def __init__(
        self,
        file: PairFile,
        vocabulary: Vocabulary,
        max_len: int,
        batch_size: int,
        buffer: int = 8192,
    ) -> None:
        self.file, self.vocabulary, self.max_len = file, vocabulary, max_len
        self.batch_size, self.buffer = batch_size, buffer

    def __len__(self) -> int:
        return len(self.file)

    def steps(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self.file) // self.batch_size)

    def batches(self, generator: torch.Generator) -> Iterator[_Rows]:
        """Return the batches of one epoch; each is read when it is asked for."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return self._batches(seed)

    def batch(self, rows: _Rows, device: torch.device) -> Batch:
        """Return the inputs of a Siamese module and the gold similarities."""
        return rows.pool.batch(rows.rows, device)

    def _batches(self, seed: int) -> Iterator[_Rows]:
        generator = torch.Generator().manual_seed(seed)
        shuffled = shuffle(self.file.rows(), self.buffer, seed)
        while pool := list(islice(shuffled, POOL * self.batch_size)):
            left, right, similarity = zip(*pool, strict=True)
            pairs = EncodedPairs(
                self.vocabulary.encode(left, self.max_len),
                self.vocabulary.encode(right, self.max_len),
                torch.tensor(similarity),
            )
            lengths = pairs.left.lengths, pairs.right.lengths
            for rows in grouped_batches(*lengths, self.batch_size, generator):
                yield _Rows(pairs, rows)


def shuffle(rows: Iterator[ScoredPair], buffer: int, seed: int) -> Iterator[ScoredPair]:
    """Yield each row once, drawn from the next `buffer` ones; the seed decides the order."""
    rng = random.Random(seed)
    held = list(islice(rows, buffer))
    for row in rows:
        at = rng.randrange(len(held))
        yield held[at]
        held[at] = row
    rng.shuffle(held)
    yield from held


def grouped_batches(
    left_lengths: Tensor, right_lengths: Tensor, batch_size: int, generator: torch.Generator
) -> list[Tensor]:
    """Shuffle the pairs into batches of nearly equal length.

    The pairs are shuffled, sorted by length within pools of 32 batches, cut, and the batches are
    shuffled: every epoch sees other batches, and little of a batch is padding.

    Args:
        left_lengths: [N] integer, tokens of the first sentences.
        right_lengths: [N] integer, tokens of the second sentences.
        batch_size: pairs a batch, at least 1; one batch may be smaller.
        generator: CPU generator; its state decides the order and moves on.

    Returns:
        Index tensors, int64, that hold each of 0..N-1 once.

    Raises:
        ValueError: the two sides differ in shape, or `batch_size` is below 1.
    """
    if left_lengths.ndim != 1 or left_lengths.shape != right_lengths.shape:
        raise ValueError(
            "grouped_batches: left_lengths and right_lengths must be [N] of one size, "
            f"got {list(left_lengths.shape)} and {list(right_lengths.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"grouped_batches: batch_size must be at least 1, got {batch_size}")
    # both sides share the time loop, so the longer one counts first
    longer = torch.maximum(left_lengths, right_lengths).cpu().long()
    shorter = torch.minimum(left_lengths, right_lengths).cpu().long()
    key = longer * (int(shorter.max()) + 1 if len(shorter) else 1) + shorter
    order = torch.randperm(len(key), generator=generator)
    batches: list[Tensor] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        batches += pool[torch.argsort(key[pool], stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
