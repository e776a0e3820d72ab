"""Similarities of two vectors, each one object.

A similarity looks at a pair of vectors through one number, its statistic: L1 for the Manhattan
similarity, the cosine for the cosine similarity. `value` and `log` turn the statistic into results.
The definitions are plain tensor operations, so autograd differentiates them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.engine.layer import Options, Outputs, Upstream

Scale = float | Tensor


class Similarity:
    """A similarity of the rows of u and v, [B, F] each.

    `fused`: whether the layers of an explicit backend compute the statistic and its gradient. The
    layers of all others return vectors, which the definition scores.
    """

    name: str
    fused = False

    def statistic(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the statistic of the pairs, [B]."""
        raise NotImplementedError

    def value(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return the similarities, [B] in [0, 1]."""
        raise NotImplementedError

    def log(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return the logarithms of the similarities, [B] at most 0."""
        raise NotImplementedError


class Manhattan(Similarity):
    """exp(-scale * L1), of MaLSTM."""

    name = "manhattan"
    fused = True

    def statistic(self, u: Tensor, v: Tensor) -> Tensor:
        """Return L1."""
        return (u - v).abs().sum(dim=1)

    def value(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return exp(-scale * L1)."""
        return torch.exp(self.log(statistic, scale))

    def log(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return -scale * L1, which does not underflow."""
        return statistic * -scale

    def gradient(self, dstatistic: Tensor, vectors: Tensor) -> Tensor:
        """Return the gradient of vectors, [2B, F], from that of L1, [B]; 0 where u equals v."""
        u, v = vectors.to(dstatistic.dtype).chunk(2)
        du = (u - v).sign_().mul_(dstatistic.unsqueeze(1))
        return torch.cat((du, -du))

    def statistic_gradient(
        self,
        dsimilarity: Tensor | None,
        dstatistic: Tensor | None,
        similarity: Tensor | None,
        scale: float,
    ) -> Tensor | None:
        """Return the gradient of L1, [B], from those of both results of a fused layer."""
        if dsimilarity is None or similarity is None:
            return dstatistic
        through_value = dsimilarity * similarity * -scale
        return through_value if dstatistic is None else dstatistic + through_value


class Cosine(Similarity):
    """(1 + cosine) / 2; the scale has no effect. The cosine with a zero vector is 0."""

    name = "cosine"

    def statistic(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the cosine."""
        # rounding may leave [-1, 1]
        return F.cosine_similarity(u, v, dim=1).clamp(-1, 1)

    def value(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return (1 + cosine) / 2."""
        del scale
        return (1 + statistic) / 2

    def log(self, statistic: Tensor, scale: Scale) -> Tensor:
        """Return the logarithm of the value: minus infinity for opposite vectors."""
        return self.value(statistic, scale).log()


MANHATTAN = Manhattan()
SIMILARITIES: dict[str, Similarity] = {each.name: each for each in (MANHATTAN, Cosine())}


def score(outputs: Outputs, options: Options) -> Outputs:
    """Return the outputs with the results of the pairs where the options ask for them."""
    if not options.paired:
        return outputs
    left, right = outputs.vectors.chunk(2)
    distance = MANHATTAN.statistic(left, right)
    similarity = MANHATTAN.value(distance, options.scale)
    return Outputs(outputs.vectors, outputs.states, distance, similarity)


def vectors_gradient(outputs: Outputs, upstream: Upstream, options: Options) -> Tensor | None:
    """Return all that reaches the vectors, [N, P * H], from the pairs and from outside."""
    ddistance = MANHATTAN.statistic_gradient(
        upstream.similarity, upstream.distance, outputs.similarity, options.scale
    )
    if ddistance is None:
        return upstream.vectors
    through_pairs = MANHATTAN.gradient(ddistance, outputs.vectors)
    return through_pairs if upstream.vectors is None else upstream.vectors + through_pairs
