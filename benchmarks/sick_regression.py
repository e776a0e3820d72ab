"""A regression on more than the similarity: `python -m benchmarks.sick_regression --runs DIR`.

The paper's authors followed their model with a regression on its prediction. This one is also given
how well the words of the two sentences match, by their vectors, and whether one sentence alone is
negated: what two vectors of two sentences miss. It is fitted on the out-of-fold predictions of
the run folders that `python -m benchmarks.sick --out DIR` left, and scores the test part with the
model. It is not part of the library: its score depends on more than the sentences' vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.sick import FIGURES, SICK_RESULTS, recipe
from fastsiam.calibration import Calibration
from fastsiam.model import TextSiamese
from fastsiam.text.vocabulary import Encoded
from fastsiam.training.config import PRESETS
from fastsiam.training.data import EncodedPairs, load_inputs
from fastsiam.training.metrics import measure

NEGATIONS = {"no", "not", "n't", "nobody", "nothing", "none", "without", "never"}
RIDGE = 1.0


class Words:
    """The word vectors, their weights and which words negate.

    Args:
        model: gives the vocabulary and the vectors.
        train: pairs whose words are counted: a word weighs by its inverse document frequency.
    """

    def __init__(self, model: TextSiamese, train: EncodedPairs) -> None:
        words = model.vocabulary.words
        assert model.lstm.embedding is not None
        self.vectors = F.normalize(model.lstm.embedding.weight.detach().float().cpu(), dim=1)
        self.negates = torch.tensor([word.lower() in NEGATIONS for word in words])
        counts = torch.zeros(len(words))
        for side in (train.left, train.right):
            inside = torch.arange(side.ids.shape[1]) < side.lengths[:, None]
            counts += torch.bincount(side.ids[inside], minlength=len(words))
        weight = torch.log((2 * len(train) + 1) / (counts + 1))
        self.weight = weight / weight.max()

    def features(self, left: Encoded, right: Encoded) -> Tensor:
        """Return the features of pairs, [n, 5] float64.

        Whether one sentence alone is negated; the mean, over a sentence's words, of the largest
        cosine to a word of the other one, the smaller and the larger of both sides; the worst such
        word of both; the cosine of the mean vectors.
        """
        rows = torch.arange(len(left.lengths)).split(256)
        return torch.cat([self._features(left, right, some) for some in rows]).double()

    def _features(self, left: Encoded, right: Encoded, rows: Tensor) -> Tensor:
        sides = []
        for side in (left, right):
            ids = side.ids[rows, : int(side.lengths[rows].max())]
            known = (torch.arange(ids.shape[1]) < side.lengths[rows][:, None]) & (ids > 0)
            sides.append((ids, known, self.vectors[ids] * known[:, :, None]))
        (ids_a, known_a, a), (ids_b, known_b, b) = sides
        cosines = a @ b.transpose(1, 2)
        cosines = cosines.masked_fill(~(known_a[:, :, None] & known_b[:, None, :]), -1.0)
        weight_a, weight_b = self.weight[ids_a] * known_a, self.weight[ids_b] * known_b
        matched, worst = [], []
        for best, weight in ((cosines.amax(2), weight_a), (cosines.amax(1), weight_b)):
            best = best.clamp_min(0)
            matched.append((best * weight).sum(1) / weight.sum(1).clamp_min(1e-6))
            worst.append((1 - (1 - best) * weight).amin(1))
        means = [(v * weight[:, :, None]).sum(1) for v, weight in ((a, weight_a), (b, weight_b))]
        negated = [
            (self.negates[ids] & known).any(1)
            for ids, known in ((ids_a, known_a), (ids_b, known_b))
        ]
        return torch.stack(
            [
                (negated[0] != negated[1]).float(),
                torch.minimum(*matched),
                torch.maximum(*matched),
                torch.minimum(*worst),
                F.cosine_similarity(*means),
            ],
            dim=1,
        )


class Regression:
    """Ridge regression on the features, the similarity and its calibration, and their products."""

    def __init__(self, similarity: Tensor, features: Tensor, gold: Tensor) -> None:
        self.calibration = Calibration.fit(similarity, gold)
        columns = self._columns(similarity, features)
        self.mean, self.deviation = columns.mean(0), columns.std(0).clamp_min(1e-9)
        terms = self._terms(columns)
        gram = terms.T @ terms + RIDGE * torch.eye(terms.shape[1], dtype=torch.float64)
        self.weights = torch.linalg.solve(gram, terms.T @ gold.double())

    def __call__(self, similarity: Tensor, features: Tensor) -> Tensor:
        """Return the predictions, [n] float64 within 0..1."""
        terms = self._terms(self._columns(similarity, features))
        return (terms @ self.weights).clamp(0, 1)

    def _columns(self, similarity: Tensor, features: Tensor) -> Tensor:
        similarity = similarity.double()
        both = [similarity[:, None], self.calibration(similarity)[:, None]]
        return torch.cat([*both, features], dim=1)

    def _terms(self, columns: Tensor) -> Tensor:
        scaled = (columns - self.mean) / self.deviation
        first, second = torch.triu_indices(scaled.shape[1], scaled.shape[1])
        ones = torch.ones(len(scaled), 1, dtype=torch.float64)
        return torch.cat([ones, scaled, scaled[:, first] * scaled[:, second]], dim=1)


def figures(predicted: Tensor, gold: Tensor) -> dict[str, float | None]:
    found = measure(predicted, gold)
    return {name: getattr(found, name) for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="holds sick/, vectors/, sts/, seed/"
    )
    parser.add_argument("--runs", type=Path, required=True, help="the --out of benchmarks.sick")
    parser.add_argument("--preset", choices=PRESETS, default="best", help="what it trained")
    options = parser.parse_args()
    config = recipe(options.preset, options.data, options.runs)
    inputs = load_inputs(config)
    train = inputs.phases["train"]
    model = TextSiamese.from_pretrained(options.runs)
    words = Words(model, train)

    similarity, features, gold = [], [], []
    for fold in range(config.folds):
        _, inside = train.split(config.folds, fold)
        of_fold = TextSiamese.from_pretrained(options.runs / "folds" / str(fold))
        similarity.append(of_fold.score(inside.left, inside.right))
        features.append(words.features(inside.left, inside.right))
        gold.append(inside.similarity)
    # by cross-validation inside the training part: a model of four parts scores the fifth
    unseen = torch.cat(
        [
            Regression(
                *(
                    torch.cat([t for i, t in enumerate(of) if i != k])
                    for of in (similarity, features, gold)
                )
            )(similarity[k], features[k])
            for k in range(config.folds)
        ]
    )
    regression = Regression(torch.cat(similarity), torch.cat(features), torch.cat(gold))

    assert inputs.test is not None
    test = EncodedPairs.of(inputs.test, model.vocabulary, config.max_len)
    of_test = words.features(test.left, test.right)
    members = sorted((options.runs / "members").iterdir(), key=lambda folder: int(folder.name))
    rows = [
        figures(
            regression(TextSiamese.from_pretrained(m).score(test.left, test.right), of_test),
            test.similarity,
        )
        for m in members
    ]
    found: dict[str, Any] = {
        "preset": options.preset,
        "out of fold": figures(unseen, torch.cat(gold)),
        "seeds": rows,
        "mean": {name: sum(row[name] or 0.0 for row in rows) / len(rows) for name in FIGURES},
        "ensemble": figures(
            regression(model.score(test.left, test.right), of_test), test.similarity
        ),
    }
    for name in ("out of fold", "mean", "ensemble"):
        print(f"{name:>12}  " + "  ".join(f"{found[name][f]:7.4f}" for f in FIGURES))
    SICK_RESULTS.mkdir(parents=True, exist_ok=True)
    file = SICK_RESULTS / "regression.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"stored: {file}")


if __name__ == "__main__":
    main()
