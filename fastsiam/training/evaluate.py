"""A model on scored pairs: its similarities, and how well they agree with the gold scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsiam.model import TextSiamese
from fastsiam.text.pairs import Pairs
from fastsiam.training.data import EncodedPairs
from fastsiam.training.metrics import Metrics, measure
from fastsiam.training.world import World


@dataclass(frozen=True)
class Evaluation:
    """How a model scores pairs.

    Attributes:
        metrics: the agreement with the gold scores.
        similarity: [n] float32, predicted, 0..1, in the order of the pairs.
        unknown: words without a vector, with their counts.
        truncated: sentences longer than the model reads.
        calibrated: the agreement after the model's calibration; None where it has none.
    """

    metrics: Metrics
    similarity: Tensor
    unknown: Counter[str]
    truncated: int
    calibrated: Metrics | None = None


def score_pairs(model: TextSiamese, pairs: EncodedPairs, world: World | None = None) -> Tensor:
    """Return the similarities of the pairs, [n] float32 on the CPU, in their order.

    Args:
        model: the same in every process.
        pairs: n of them.
        world: the processes, each of which scores its share; all get every similarity.
    """
    world = world or World()
    rows = torch.arange(len(pairs))
    mine = pairs if world.size == 1 else pairs.take(rows[world.rank :: world.size])
    shares = world.gather(model.score(mine.left, mine.right))
    similarity = torch.empty(len(pairs))
    for rank, share in enumerate(shares):
        similarity[rank :: world.size] = share
    return similarity


def evaluate(model: TextSiamese, pairs: Pairs) -> Evaluation:
    """Score the pairs and compare with their gold scores."""
    left, right = (model.vocabulary.encode(s, model.max_len) for s in (pairs.left, pairs.right))
    similarity, gold = model.score(left, right), torch.tensor(pairs.similarity)
    return Evaluation(
        measure(similarity, gold),
        similarity,
        left.unknown + right.unknown,
        left.truncated + right.truncated,
        None if model.calibration is None else measure(model.calibration(similarity), gold),
    )
