"""Pearson, Spearman and mean squared error of a model on scored pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsiam.model import TextSiamese
from fastsiam.text.datasets import Pairs
from fastsiam.training.data import EncodedPairs
from fastsiam.training.world import World


@dataclass(frozen=True)
class Metrics:
    """How well predictions agree with gold scores.

    Attributes:
        n: number of pairs.
        pearson: correlation, -1..1; None where it is undefined.
        spearman: correlation of the ranks; None where it is undefined.
        mse: mean squared error after both sides are mapped to 1..5.
        undefined: why there are no correlations; empty where there are.
    """

    n: int
    pearson: float | None
    spearman: float | None
    mse: float
    undefined: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of scored pairs.

    Attributes:
        metrics: the agreement with the gold scores.
        similarity: [n] float32, predicted, 0..1, in the order of the pairs.
        unknown: words without a vector, with their counts.
        truncated: sentences of which only the start was read.
        calibrated: the agreement after the model's calibration; None where it has none.
    """

    metrics: Metrics
    similarity: Tensor
    unknown: Counter[str]
    truncated: int
    calibrated: Metrics | None = None


def measure(predicted: Tensor, gold: Tensor) -> Metrics:
    """Compare predicted and gold similarities, both [n] in 0..1, n at least 1."""
    from scipy.stats import pearsonr, spearmanr

    predicted, gold = predicted.double().cpu(), gold.double().cpu()
    n = len(gold)
    mse = float((4 * (predicted - gold)).square().mean())  # 4: the width of 1..5
    if n < 2:
        undefined = "a correlation needs at least two pairs"
    elif bool((gold == gold[0]).all()):
        undefined = "the gold scores are all the same"
    elif bool((predicted == predicted[0]).all()):
        undefined = "the predictions are all the same"
    else:
        both = predicted.numpy(), gold.numpy()
        return Metrics(n, float(pearsonr(*both)[0]), float(spearmanr(*both)[0]), mse)
    return Metrics(n, None, None, mse, undefined)


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
