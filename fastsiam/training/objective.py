"""The objectives of training: modules from a batch to its loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastsiam.engine.layer import compute_dtype
from fastsiam.engine.similarity import SIMILARITIES
from fastsiam.modules import SiameseLSTM
from fastsiam.training.config import Config

HEAD_SIZE = 64
SCORE_CLASSES = 5  # as in the scale of SICK
ENTAILMENT_CLASSES = 3
UNLABELLED = -1  # a pair whose entailment nobody has judged


class Batch(NamedTuple):
    """Sentence pairs, as an objective takes them.

    Attributes:
        inputs: arguments of a Siamese module: ids [B, T] of both sides, whose T may differ, and
            lengths [B] int64 of both.
        target: [B], gold similarities, 0..1.
        labels: [B] int64, entailment 0..2, -1 where there is none; None: no pair has one.
    """

    inputs: list[Tensor]
    target: Tensor
    labels: Tensor | None = None


class Output(NamedTuple):
    """The result of an objective on a batch.

    Attributes:
        loss: [], mean over the pairs of the batch.
        similarity: [B], predicted, 0..1; for the logs.
        target: [B], gold, 0..1; for the logs.
    """

    loss: Tensor
    similarity: Tensor
    target: Tensor


class MeanSquaredError(nn.Module):
    """The mean squared error of the similarities.

    Args:
        module: called as `SiameseLSTM` is, with ids and lengths of both sides.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Output:
        """Return the loss of a batch."""
        similarity = self.module(*batch.inputs)
        target = batch.target.to(similarity.dtype)
        return Output(F.mse_loss(similarity, target), similarity, target)


class AuxiliaryLoss(nn.Module):
    """The mean squared error with the losses of two heads, and dropout of the word vectors.

    The heads share a layer tanh(W [|u - v|, u * v]). One is trained on the Kullback-Leibler
    divergence from the gold score, spread over its two neighbours of five classes (Tai, Socher and
    Manning, ACL 2015), the other on the cross-entropy of the entailment label. They shape the
    sentence vectors, and nothing of them is left in the trained module.

    Dropout zeroes numbers of the word vectors. One mask a step serves every pair and both sides: a
    mask for each side would put distance between equal sentences.

    Each part of the loss is a mean over the pairs, so that the losses of parts of a batch, weighted
    by their size, add up to that of the batch.

    Args:
        module: the module to train, with an embedding.
        kl_weight: of the head of the score; 0 for none.
        entailment_weight: of the head of the label; 0 for none.
        dropout: share of the word vectors' numbers that are zero in a step of training.
        generator: CPU generator that the heads' weights are drawn from; None: PyTorch's own.
    """

    def __init__(
        self,
        module: SiameseLSTM,
        *,
        kl_weight: float = 0.0,
        entailment_weight: float = 0.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.kl_weight, self.entailment_weight = kl_weight, entailment_weight
        self.dropout = dropout
        self.heads = nn.ModuleDict()
        if kl_weight or entailment_weight:
            size = module.hidden_size * (2 if module.bidirectional else 1)
            self.heads["shared"] = _linear(2 * size, HEAD_SIZE, module, generator)
        if kl_weight:
            self.heads["score"] = _linear(HEAD_SIZE, SCORE_CLASSES, module, generator)
        if entailment_weight:
            self.heads["entailment"] = _linear(HEAD_SIZE, ENTAILMENT_CLASSES, module, generator)

    def forward(self, batch: Batch) -> Output:
        """Return the loss of a batch."""
        u, v = self._vectors(batch.inputs)
        distance = (u - v).abs()
        measure = SIMILARITIES[self.module.similarity]
        u_exact, v_exact = (side.to(compute_dtype(side.dtype)) for side in (u, v))
        similarity = measure.value(measure.distance(u_exact, v_exact), self.module.scale)
        target = batch.target.to(similarity.dtype)
        loss = F.mse_loss(similarity, target)
        if self.heads:
            hidden = torch.tanh(self.heads["shared"](torch.cat([distance, u * v], dim=1)))
            loss = loss + self._head_losses(hidden, target, batch.labels)
        return Output(loss, similarity, target)

    def _head_losses(self, hidden: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        loss = target.new_zeros(())
        if self.kl_weight:
            guess = F.log_softmax(self.heads["score"](hidden).to(target.dtype), dim=1)
            gold = spread(target, SCORE_CLASSES)
            loss = loss + self.kl_weight * F.kl_div(guess, gold, reduction="batchmean")
        if self.entailment_weight and labels is not None:
            guess = self.heads["entailment"](hidden).to(target.dtype)
            # a sum over the labelled pairs by the number of all: means of means do not add up
            error = F.cross_entropy(guess, labels, ignore_index=UNLABELLED, reduction="sum")
            loss = loss + self.entailment_weight * error / len(labels)
        return loss

    def _vectors(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors of both sides, from one call of 2B sentences."""
        left, right, *lengths = inputs
        T = max(left.shape[1], right.shape[1])
        ids = torch.cat([F.pad(side, (0, T - side.shape[1])) for side in (left, right)])
        encoder = _Encoder(self.module)
        tables: dict[str, Tensor] = {}
        if self.training and self.dropout:
            assert self.module.embedding is not None
            tables["module.embedding.weight"] = F.dropout(
                self.module.embedding.weight, self.dropout
            )
        u, v = functional_call(encoder, tables, (ids, torch.cat(lengths))).chunk(2)
        return u, v


class _Encoder(nn.Module):
    """Calls `encode` of a Siamese module, since functional_call reaches no other method."""

    def __init__(self, module: SiameseLSTM) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the sentence vectors."""
        return self.module.encode(ids, lengths)


def make_objective(
    module: SiameseLSTM, config: Config, generator: torch.Generator | None = None
) -> MeanSquaredError | AuxiliaryLoss:
    """Return the objective of a recipe; arguments as for `AuxiliaryLoss`."""
    if not (config.kl_weight or config.entailment_weight or config.dropout):
        return MeanSquaredError(module)  # one fused call
    return AuxiliaryLoss(
        module,
        kl_weight=config.kl_weight,
        entailment_weight=config.entailment_weight,
        dropout=config.dropout,
        generator=generator,
    )


def spread(similarity: Tensor, classes: int) -> Tensor:
    """Return probabilities, [B, classes], of the classes on either side of 0..1.

    Their mean is the similarity: with five classes, .6 is a score of 3.4, which is .6 of the third
    and .4 of the fourth.
    """
    at = torch.arange(classes, device=similarity.device)
    return (1 - (similarity[:, None] * (classes - 1) - at).abs()).clamp_min(0)


def _linear(
    inputs: int, outputs: int, module: SiameseLSTM, generator: torch.Generator | None
) -> nn.Linear:
    """Return nn.Linear with its own start, drawn on the CPU so that every device starts alike."""
    weight = module.weight_hh_l0
    made = nn.Linear(inputs, outputs, device=weight.device, dtype=weight.dtype)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in (made.weight, made.bias):
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    return made
