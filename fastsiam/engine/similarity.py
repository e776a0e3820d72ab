"""Similarities of two vectors, each one object.

A similarity compares two vectors by one number, their distance: L1 for the Manhattan similarity,
1 - cos for the cosine similarity. `value` and `log` turn the distance into results. The definitions
are plain tensor operations, so autograd differentiates them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.engine.layer import Options, Outputs, Upstream

Scale = float | Tensor

# features from which three passes over rows in cache beat torch.cdist on the CPU, and the numbers
# that these work on
WIDE = 128
CACHED = 2**19


class Similarity:
    """A similarity of the rows of u and v, [B, F] each.

    `fused`: whether the layers of an explicit backend compute the distance and its gradient. The
    layers of other backends return vectors, which the definition scores.
    """

    name: str
    fused = False

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the distances of the pairs, [B], 0 or more: the smaller, the more similar."""
        raise NotImplementedError

    def value(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return the similarities of distances, in [0, 1]."""
        raise NotImplementedError

    def log(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return the logarithms of the similarities, at most 0."""
        raise NotImplementedError

    def distances(self, queries: Tensor, corpus: Tensor) -> Tensor:
        """Return the distances of all rows of queries, [Q, F], and corpus, [M, F]: [Q, M] float32.

        The distance of two rows does not depend on the other rows, not even by rounding.
        """
        raise NotImplementedError

    def average(self, logs: Tensor) -> Tensor:
        """Return an ensemble's similarities, [B], from the members' logarithms, [members, B]."""
        raise NotImplementedError

    def join(self, vectors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """Return an ensemble's vectors, from the members' vectors, [N, F], and their scales.

        At scale 1 the similarity of the joined vectors is that of `average`.
        """
        raise NotImplementedError


class Manhattan(Similarity):
    """exp(-scale * L1), of MaLSTM."""

    name = "manhattan"
    fused = True

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """Return L1."""
        return (u - v).abs().sum(dim=1)

    def value(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return exp(-scale * L1)."""
        return torch.exp(self.log(distance, scale))

    def log(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return -scale * L1, which does not underflow."""
        return distance * -scale

    def distances(self, queries: Tensor, corpus: Tensor) -> Tensor:
        """Return L1 of all rows."""
        queries, corpus = _precise(queries), _precise(corpus)
        F = queries.shape[1]
        if F < WIDE or queries.device.type != "cpu":
            return torch.cdist(queries, corpus, p=1).float()
        distance = queries.new_empty(queries.shape[0], corpus.shape[0])
        rows = max(1, CACHED // F)
        for some, out in zip(corpus.split(rows), distance.split(rows, dim=1), strict=True):
            difference = torch.empty_like(some)
            for query, its in zip(queries, out, strict=True):
                torch.sub(some, query, out=difference)
                torch.sum(difference.abs_(), dim=1, out=its)
        return distance.float()

    def average(self, logs: Tensor) -> Tensor:
        """Return the geometric mean."""
        return logs.mean(dim=0).exp()

    def join(self, vectors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """Return the vectors side by side, each times its scale by the number of members."""
        parts = zip(vectors, scales, strict=True)
        return torch.cat([part * (scale / len(vectors)) for part, scale in parts], dim=1)

    def gradient(self, ddistance: Tensor, vectors: Tensor) -> Tensor:
        """Return the gradient of vectors, [2B, F], from that of L1, [B]; 0 where u equals v."""
        u, v = vectors.to(ddistance.dtype).chunk(2)
        du = (u - v).sign_().mul_(ddistance.unsqueeze(1))
        return torch.cat((du, -du))

    def distance_gradient(
        self,
        dsimilarity: Tensor | None,
        ddistance: Tensor | None,
        similarity: Tensor | None,
        scale: float,
    ) -> Tensor | None:
        """Return the gradient of L1, [B], from those of both results of a fused layer."""
        if dsimilarity is None or similarity is None:
            return ddistance
        through_value = dsimilarity * similarity * -scale
        return through_value if ddistance is None else ddistance + through_value


class Cosine(Similarity):
    """(1 + cosine) / 2; the scale has no effect. The cosine with a zero vector is 0."""

    name = "cosine"

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """Return 1 - cosine."""
        # rounding may leave [-1, 1]
        return 1 - F.cosine_similarity(u, v, dim=1).clamp(-1, 1)

    def value(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return (1 + cosine) / 2."""
        del scale
        return 1 - distance / 2

    def log(self, distance: Tensor, scale: Scale) -> Tensor:
        """Return the logarithm of the value: minus infinity for opposite vectors."""
        return self.value(distance, scale).log()

    def distances(self, queries: Tensor, corpus: Tensor) -> Tensor:
        """Return 1 - cosine of all rows: half the squared distance of unit vectors."""
        u, v = F.normalize(_precise(queries)), F.normalize(_precise(corpus))
        half = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
        # with a zero vector it is 1: half a unit, or nothing, is missing there
        missing = [(rows == 0).all(dim=1).float() / 2 for rows in (u, v)]
        return (half + missing[0].unsqueeze(1) + missing[1]).clamp_max(2).float()

    def average(self, logs: Tensor) -> Tensor:
        """Return the mean."""
        return logs.exp().mean(dim=0)

    def join(self, vectors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """Return the unit vectors side by side."""
        del scales
        return torch.cat([F.normalize(part) for part in vectors], dim=1)


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


MANHATTAN = Manhattan()
SIMILARITIES: dict[str, Similarity] = {each.name: each for each in (MANHATTAN, Cosine())}


def score(outputs: Outputs, options: Options) -> Outputs:
    """Return the outputs with the results of the pairs where the options ask for them."""
    if not options.paired:
        return outputs
    left, right = outputs.vectors.chunk(2)
    distance = MANHATTAN.distance(left, right)
    similarity = MANHATTAN.value(distance, options.scale)
    return Outputs(outputs.vectors, outputs.states, distance, similarity)


def vectors_gradient(outputs: Outputs, upstream: Upstream, options: Options) -> Tensor | None:
    """Return all that reaches the vectors, [N, P * H], from the pairs and from outside."""
    ddistance = MANHATTAN.distance_gradient(
        upstream.similarity, upstream.distance, outputs.similarity, options.scale
    )
    if ddistance is None:
        return upstream.vectors
    through_pairs = MANHATTAN.gradient(ddistance, outputs.vectors)
    return through_pairs if upstream.vectors is None else upstream.vectors + through_pairs
