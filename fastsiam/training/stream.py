"""Batches of pairs that stay in their file, which is read once an epoch in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from fastsiam.text.batches import POOL, grouped_batches
from fastsiam.text.scored import ScoredPair
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.data import EncodedPairs
from fastsiam.training.objective import Batch
from fastsiam.training.pair_file import PairFile


class _Rows:
    """Some pairs of a pool: a batch, or a process's share of one."""

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
        """Return the batches of one epoch, which are read as they are asked for."""
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
