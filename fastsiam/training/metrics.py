"""The metrics of predictions: of pairs that were scored, and of an epoch while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsiam.training.objective import Output

CLAMP = 1e-7  # the article clips similarities to [CLAMP, 1 - CLAMP]: beyond, its gradient is 0
RANKED = 2**20  # pairs of an epoch whose ranks are compared; more would grow without bound
ROWS = ("pairs", "predicted", "gold", "clamped", "loss")


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


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of an epoch while it trains: of predictions made before their step.

    Attributes:
        loss: mean of the objective over the pairs; None where every step was skipped.
        mse: of the similarities, after both sides are mapped to 1..5.
        pearson: of similarities and gold; None where it is undefined.
        spearman: likewise, of at most the first 2**20 pairs.
        clamped: pairs whose similarity is within 1e-7 of 0 or of 1.
        gradient_norm: mean over the steps that counted, before clipping.
    """

    loss: float | None
    mse: float | None
    pearson: float | None
    spearman: float | None
    clamped: int
    gradient_norm: float | None


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.csv`.

    Attributes:
        epoch: 1, 2, ... within the phase.
        phase: "pretrain" or "train".
        loss: what is minimised, mean over the epoch's pairs while training; None where every step
            was skipped.
        dev_pearson: on the dev pairs after the epoch; None where it is undefined or not measured.
        dev_spearman: likewise.
        dev_mse: on the 1..5 scale.
        time_s: seconds of training, without the dev pairs.
        pairs_per_s: training pairs a second.
        gradient_norm: mean over the steps, before clipping.
        lr: learning rate at the end of the epoch.
        mse: on the 1..5 scale, over the epoch's pairs while training.
        pearson: over the epoch's pairs while training; None where it is undefined.
        spearman: likewise.
        clamped: training pairs whose similarity was within 1e-7 of 0 or of 1.
        skipped: steps that changed nothing, since their loss or gradient was not finite.
        steps: in the epoch.
    """

    epoch: int
    phase: str
    loss: float | None
    dev_pearson: float | None
    dev_spearman: float | None
    dev_mse: float | None
    time_s: float
    pairs_per_s: float
    gradient_norm: float | None
    lr: float
    mse: float | None
    pearson: float | None
    spearman: float | None
    clamped: int
    skipped: int
    steps: int


class RunningMetrics:
    """Sums over steps, on the device; only `compute` and `totals` wait for it.

    Args:
        device: where the outputs are.
    """

    def __init__(self, device: torch.device) -> None:
        # the products of the rows of ROWS, summed over the pairs
        self.moments = torch.zeros(len(ROWS), len(ROWS), dtype=torch.float64, device=device)
        # steps that counted, and their gradient norms
        self.norms = torch.zeros(2, dtype=torch.float64, device=device)
        self.ranked: list[Tensor] = []  # [3, B] float32 each: the first of ROWS
        self._ranked_pairs = 0

    @torch.no_grad()
    def update(self, output: Output, norm: Tensor, good: Tensor) -> None:
        """Add the pairs of one step, unless it was skipped."""
        predicted, gold = output.similarity.detach().float(), output.target.detach().float()
        rows = torch.stack(
            [
                torch.ones_like(predicted),
                predicted,
                gold,
                ((predicted - 0.5).abs() >= 0.5 - CLAMP).to(predicted.dtype),
                output.loss.detach().float().expand_as(predicted),
            ]
        )
        # a skipped step may hold NaN, which a factor of 0 would not remove
        rows = torch.where(good, rows, 0.0)
        exact = rows.double()
        self.moments.addmm_(exact, exact.T)
        self.norms += torch.where(good, torch.stack([torch.ones_like(norm), norm]), 0.0)
        if self._ranked_pairs < RANKED:
            self.ranked.append(rows[:3])
            self._ranked_pairs += rows.shape[1]

    def totals(self) -> dict[str, float]:
        """Return the sums since the start by name, for differences between two looks."""
        sums = [*self.moments[0].tolist(), self.squared_error(), *self.norms.tolist()]
        return dict(zip([*ROWS, "squared_error", "steps", "norms"], sums, strict=True))

    def squared_error(self) -> float:
        """Return the sum of (predicted - gold) squared."""
        m = self.moments
        return max(0.0, float(m[1, 1] - 2 * m[1, 2] + m[2, 2]))

    def compute(self) -> EpochMetrics:
        """Return the metrics of all steps so far."""
        m = self.moments.tolist()
        steps, norms = self.norms.tolist()
        n = m[0][0]
        if not n:
            return EpochMetrics(None, None, None, None, 0, None)
        return EpochMetrics(
            loss=m[0][4] / n,
            mse=16 * self.squared_error() / n,  # 16: the square of the width of 1..5
            pearson=_pearson(m),
            spearman=self._spearman(),
            clamped=round(m[0][3]),
            gradient_norm=norms / steps,
        )

    def _spearman(self) -> float | None:
        from scipy.stats import spearmanr

        counted, predicted, gold = torch.cat(self.ranked, dim=1).cpu()
        predicted, gold = predicted[counted > 0], gold[counted > 0]
        if predicted.unique().numel() < 2 or gold.unique().numel() < 2:
            return None
        return float(spearmanr(predicted.numpy(), gold.numpy())[0])

    @classmethod
    def merged(cls, states: Sequence[dict[str, Tensor]], device: torch.device) -> RunningMetrics:
        """Return the sums of several processes, each with its share of every batch."""
        running = cls(device)
        running.load_state_dict(
            {
                "moments": torch.stack([state["moments"].to(device) for state in states]).sum(0),
                "norms": states[0]["norms"],  # the same in all of them
                "ranked": torch.cat([state["ranked"].to(device) for state in states], dim=1),
            }
        )
        return running

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums."""
        ranked = torch.cat(self.ranked, dim=1) if self.ranked else self.moments.new_zeros(3, 0)
        return {"moments": self.moments, "norms": self.norms, "ranked": ranked.float()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the sums of `state_dict`."""
        device = self.moments.device
        self.moments, self.norms = state["moments"].to(device), state["norms"].to(device)
        self.ranked = [state["ranked"].to(device)]
        self._ranked_pairs = state["ranked"].shape[1]


def _pearson(m: list[list[float]]) -> float | None:
    """Return the correlation of rows 1 and 2 from the moments [5, 5], row 0 being ones."""
    n, x, y = m[0][:3]
    var_x, var_y = n * m[1][1] - x * x, n * m[2][2] - y * y
    # constant but for rounding: the sums carry some 16 digits
    if var_x <= 1e-14 * n * m[1][1] or var_y <= 1e-14 * n * m[2][2]:
        return None
    return (n * m[1][2] - x * y) / math.sqrt(var_x * var_y)
