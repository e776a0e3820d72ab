"""What `fit` is asked to run, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastsiam.training.report import EpochRecord
from fastsiam.training.source import Source


@dataclass(frozen=True)
class Phase:
    """Passes over one set of pairs.

    Attributes:
        name: of the phase, in records and messages.
        source: where its batches come from.
        epochs: passes, at least 1.
        optimizer: holds the parameters that train.
        schedule: moved on after each step.
        select: the epoch whose weights are kept: "dev", the one of the highest Pearson correlation
            on dev, or "last".
        patience: epochs without a better one on dev after which the phase ends; None: it never
            does.
    """

    name: str
    source: Source
    epochs: int
    optimizer: Optimizer
    schedule: LRScheduler
    select: Literal["dev", "last"] = "dev"
    patience: int | None = None


class Observer(Protocol):
    """Is told how `fit` goes."""

    def on_resume(self, records: Sequence[EpochRecord], step: int, pairs: int) -> None:
        """A checkpoint was taken up: the epochs so far, the steps, and the pairs seen in them."""

    def on_batch(self, pairs: int) -> None:
        """A step is done."""

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        """An epoch is done; `best` says whether its weights are the ones kept so far."""
