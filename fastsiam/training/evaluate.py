"""Pearson, Spearman and mean squared error of a model on scored pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsiam.model import TextSiamese
from fastsiam.text.datasets import Pairs


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
    """

    metrics: Metrics
    similarity: Tensor
    unknown: Counter[str]
    truncated: int


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


def evaluate(model: TextSiamese, pairs: Pairs) -> Evaluation:
    """Score the pairs and compare with their gold scores."""
    left, right = (model.vocabulary.encode(s, model.max_len) for s in (pairs.left, pairs.right))
    similarity = model.score(left, right)
    return Evaluation(
        measure(similarity, torch.tensor(pairs.similarity)),
        similarity,
        left.unknown + right.unknown,
        left.truncated + right.truncated,
    )
