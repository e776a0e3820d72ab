"""A monotone map from a model's similarities to those that people gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Calibration:
    """A piecewise linear map of 0..1 into 0..1 that never falls.

    Mueller and Thyagarajan (AAAI 2016) follow their model with such a regression, since the gold
    scores bend the scale. It changes the squared error and Pearson's correlation; ranks stay but
    for ties.

    Args:
        predicted: the knots, rising, within 0..1.
        gold: the value at each knot, not falling, within 0..1. Outside the knots the first and the
            last value hold.

    Raises:
        ValueError: the knots are not such numbers.
    """

    def __init__(self, predicted: Sequence[float], gold: Sequence[float]) -> None:
        try:
            x, y = ([float(knot) for knot in knots] for knots in (predicted, gold))
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"Calibration: predicted and gold must be lists of numbers: {error}"
            ) from error
        self.predicted = torch.tensor(x, dtype=torch.float64)
        self.gold = torch.tensor(y, dtype=torch.float64)
        both = torch.cat([self.predicted, self.gold])
        if not (
            len(self.predicted) == len(self.gold) >= 2
            and bool(((both >= 0) & (both <= 1)).all())
            and bool((self.predicted.diff() > 0).all())
            and bool((self.gold.diff() >= 0).all())
        ):
            raise ValueError(
                "Calibration: predicted must rise and gold must not fall, two or more knots each "
                f"within 0..1, got {len(self.predicted)} and {len(self.gold)} numbers"
            )

    @classmethod
    def fit(cls, predicted: Tensor, gold: Tensor) -> Calibration:
        """Fit by isotonic regression: the rising map with the least squared error.

        Its steps are joined by lines through their middles, so that few predictions tie. Each end,
        0 for 0 and 1 for 1, counts as one more pair, so that the map covers the whole range.

        Args:
            predicted: [n] in 0..1, from models that were not trained on these pairs.
            gold: [n] in 0..1.

        Raises:
            ValueError: the two differ in shape, are empty, or hold something outside 0..1.
        """
        import numpy as np
        from scipy.optimize import isotonic_regression

        if predicted.ndim != 1 or predicted.shape != gold.shape or not len(gold):
            raise ValueError(
                "Calibration.fit: predicted and gold must be [n] of one size, n at least 1, got "
                f"{list(predicted.shape)} and {list(gold.shape)}"
            )
        x, y = (t.detach().double().cpu() for t in (predicted, gold))
        if not bool(((torch.stack([x, y]) >= 0) & (torch.stack([x, y]) <= 1)).all()):
            raise ValueError("Calibration.fit: predicted and gold must be within 0..1")
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        x, y = torch.cat([x, ends]), torch.cat([y, ends])
        # equal predictions must get one value
        x, group = x.unique(return_inverse=True)
        weight = torch.bincount(group).double()
        y = torch.zeros_like(x).index_add_(0, group, y) / weight
        steps = isotonic_regression(y.numpy(), weights=weight.numpy())
        knots_x, knots_y = [], []
        for start, end in zip(steps.blocks[:-1], steps.blocks[1:], strict=True):
            knots_x.append(float(np.average(x[start:end], weights=weight[start:end])))
            knots_y.append(min(1.0, max(0.0, float(steps.x[start]))))
        if len(knots_x) == 1:  # nothing rises: the mean everywhere
            knots_x, knots_y = [0.0, 1.0], knots_y * 2
        return cls(knots_x, knots_y)

    def __call__(self, similarity: Tensor) -> Tensor:
        """Map similarities, of any shape, in their dtype and on their device."""
        x = similarity.detach().double().cpu().contiguous()
        right = torch.searchsorted(self.predicted, x).clamp(1, len(self.predicted) - 1)
        x0, x1 = self.predicted[right - 1], self.predicted[right]
        y0, y1 = self.gold[right - 1], self.gold[right]
        share = ((x - x0) / (x1 - x0)).clamp(0, 1)
        return (y0 + share * (y1 - y0)).to(similarity)

    def to_dict(self) -> dict[str, Any]:
        """Return the map as a JSON-able dict."""
        return {"predicted": self.predicted.tolist(), "gold": self.gold.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Make the map that `to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: the dict is not of that form.
        """
        return cls(values["predicted"], values["gold"])
