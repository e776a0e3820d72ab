"""Where a phase takes its batches from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsiam.text.batches import grouped_batches
from fastsiam.training.data import EncodedPairs
from fastsiam.training.objective import Batch


class Source(Protocol):
    """Training pairs that come in batches.

    Rows are whatever `batch` understands: they have a length, the number of pairs, and can be
    sliced, so that several processes share them out.
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
        """Return what the objective takes."""


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
