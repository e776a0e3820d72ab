"""`TextSiamese`: sentences in, numbers out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor

from fastsiam.calibration import Calibration
from fastsiam.device import UnavailableError, pick_device
from fastsiam.engine.similarity import SIMILARITIES, Similarity
from fastsiam.model_folder import ModelFolder
from fastsiam.modules import SiameseLSTM
from fastsiam.search import nearest_rows
from fastsiam.text.columns import check_range
from fastsiam.text.vocabulary import Encoded, Vocabulary

if TYPE_CHECKING:
    import numpy as np


class TextSiamese:
    """A vocabulary with its word vectors, and the Siamese LSTM that reads them.

    The word vectors are not trained; `lstm` is the module to train. An ensemble has several such
    `members`, of one shape and with the same word vectors. Its Manhattan similarity is the
    geometric mean of the members' similarities, its cosine similarity their mean.

    Args:
        vocabulary: the V words of the table.
        table: [V, D] float, one vector a word.
        hidden_size: H, states of a direction.
        bidirectional: as for `SiameseLSTM`.
        pooling: as for `SiameseLSTM`.
        similarity: as for `SiameseLSTM`.
        scale: factor on the L1 distance, > 0; one for each member of an ensemble.
        learn_scale: as for `SiameseLSTM`.
        max_len: tokens of a sentence that are read, at least 1.
        score_range: lowest and highest score of the scale that `to_score` maps to.
        calibration: map of the similarities that `to_score` applies first; None: none.
        backend: as for `SiameseLSTM`.
        device: where the weights live; None means CUDA where there is one, else the CPU.
        dtype: of the weights; None means float32.

    Raises:
        ValueError: an argument out of range, or a table that does not fit the vocabulary.
        UnavailableError: the device or the backend cannot be used on this machine.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        table: Tensor,
        hidden_size: int = 50,
        *,
        bidirectional: bool = False,
        pooling: str = "last",
        similarity: str = "manhattan",
        scale: float | Sequence[float] = 0.25,
        learn_scale: bool = False,
        max_len: int = 73,
        score_range: tuple[float, float] = (1.0, 5.0),
        calibration: Calibration | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if table.ndim != 2 or len(table) != len(vocabulary):
            raise ValueError(
                f"TextSiamese: table must be [V, D] with V = {len(vocabulary)}, the words of the "
                f"vocabulary, got {list(table.shape)}"
            )
        if max_len < 1:
            raise ValueError(f"TextSiamese: max_len must be at least 1, got {max_len}")
        check_range("TextSiamese", score_range)
        low, high = score_range
        self.vocabulary = vocabulary
        self.max_len = max_len
        self.score_range = (float(low), float(high))
        self.calibration = calibration
        scales = [float(scale)] if isinstance(scale, (float, Real)) else list(scale)
        if not scales:
            raise ValueError("TextSiamese: scale must hold a number for each member, got none")
        self.members: list[SiameseLSTM] = []
        for factor in scales:
            member = SiameseLSTM(
                table.shape[1],
                hidden_size,
                bidirectional=bidirectional,
                embedding=self.members[0].embedding if self.members else table,
                pooling=pooling,
                similarity=similarity,
                scale=factor,
                learn_scale=learn_scale,
                backend=backend,
                device=pick_device(device),
                dtype=dtype or torch.float32,
            )
            self.members.append(member)
        self.lstm = self.members[0]
        try:
            self.lstm.explain()
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    @classmethod
    def ensemble(cls, models: Sequence[TextSiamese]) -> TextSiamese:
        """Return one model with copies of the members of several.

        It scores in the range of the first and is not calibrated.

        Raises:
            ValueError: there is none, or they differ in words, word vectors, shape, similarity or
                `max_len`.
        """
        if not models:
            raise ValueError("ensemble: models must hold at least one model, got none")
        first, members = models[0], [member for model in models for member in model.members]
        for model in models:
            alike = (
                model.vocabulary.to_dict() == first.vocabulary.to_dict()
                and _shape(model) == _shape(first)
                and torch.equal(_table(model), _table(first))
            )
            if not alike:
                raise ValueError(
                    "ensemble: the models must have the same words, word vectors, shape, "
                    "similarity and max_len; train them on the same files with seeds of their own"
                )
        made = cls(
            first.vocabulary,
            _table(first),
            first.lstm.hidden_size,
            bidirectional=first.lstm.bidirectional,
            pooling=first.lstm.pooling,
            similarity=first.lstm.similarity,
            scale=[_scale(member) for member in members],
            max_len=first.max_len,
            score_range=first.score_range,
            backend=first.lstm.backend,
            device=first.device,
            dtype=first.lstm.weight_hh_l0.dtype,
        )
        for new, member in zip(made.members, members, strict=True):
            new.load_state_dict(_own_weights(member), strict=False)
        return made

    @property
    def scale(self) -> float:
        """The factor on the L1 distance of the vectors of `encode`."""
        return _scale(self.lstm) if len(self.members) == 1 else 1.0

    @property
    def measure(self) -> Similarity:
        """The similarity of vectors of `encode`, as an object."""
        return SIMILARITIES[self.lstm.similarity]

    @property
    def vector_size(self) -> int:
        """The size of a sentence vector."""
        directions = 2 if self.lstm.bidirectional else 1
        return len(self.members) * directions * self.lstm.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.lstm.weight_hh_l0.device

    @overload
    def similarity(self, left: str, right: str, batch_size: int = 256) -> float: ...
    @overload
    def similarity(self, left: list[str], right: list[str], batch_size: int = 256) -> Tensor: ...
    def similarity(
        self, left: str | list[str], right: str | list[str], batch_size: int = 256
    ) -> float | Tensor:
        """Score pairs of sentences.

        Args:
            left: n sentences, or one string. A sentence may be empty.
            right: as many, or one string.
            batch_size: pairs that are computed together.

        Returns:
            [n] float32 from 0 to 1, on the CPU, in the order given; a float for two strings.

        Raises:
            TypeError: one side is a string and the other is not.
            ValueError: the two sides differ in number.
        """
        if isinstance(left, str) and isinstance(right, str):
            return float(self.similarity([left], [right], batch_size)[0])
        if isinstance(left, str) or isinstance(right, str):
            raise TypeError(
                "similarity: left and right must be two strings or two lists, got one of each"
            )
        if len(left) != len(right):
            raise ValueError(
                "similarity: left and right must hold as many sentences, "
                f"got {len(left)} and {len(right)}"
            )
        return self.score(self._read(left), self._read(right), batch_size)

    @torch.no_grad()
    def score(self, left: Encoded, right: Encoded, batch_size: int = 256) -> Tensor:
        """Score pairs whose words are ids already; otherwise like `similarity`."""
        scores = torch.empty(len(left.lengths), dtype=torch.float32, device="cpu")
        longest = torch.maximum(left.lengths, right.lengths)
        with self._prepared_for(left, right):
            for rows in _by_length(longest, batch_size):
                (left_ids, left_lengths), (right_ids, right_lengths) = (
                    cut(side, rows, self.device) for side in (left, right)
                )
                scores[rows] = self._call(left_ids, right_ids, left_lengths, right_lengths)
        return scores

    def encode(self, sentences: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the vectors of n sentences, [n, vector_size] on the CPU, in the order given.

        Two sentences score exp(-scale * L1 distance of their vectors), or (1 + cosine) / 2. The
        vectors of an ensemble's members stand side by side: times its scale by the number of
        members each, or as unit vectors.
        """
        return self.vectors(self._read(sentences), batch_size)

    @torch.no_grad()
    def vectors(self, encoded: Encoded, batch_size: int = 256) -> Tensor:
        """Return the vectors of sentences whose words are ids already; otherwise like `encode`."""
        vectors = torch.empty(
            (len(encoded.lengths), self.vector_size),
            dtype=self.lstm.weight_hh_l0.dtype,
            device="cpu",
        )
        scales = [_scale(member) for member in self.members]
        with self._prepared_for(encoded):
            for rows in _by_length(encoded.lengths, batch_size):
                inputs = cut(encoded, rows, self.device)
                parts = [member.encode(*inputs) for member in self.members]
                joined = self.measure.join(parts, scales) if len(parts) > 1 else parts[0]
                vectors[rows] = joined.to(vectors)
        return vectors

    @torch.no_grad()
    def search(
        self,
        query: str | Sequence[str],
        corpus: Sequence[str] | Tensor | np.ndarray,
        k: int = 10,
        batch_size: int = 256,
    ) -> tuple[Tensor, Tensor]:
        """Find the k sentences of a corpus that are most similar to a query.

        Args:
            query: one string, or n sentences.
            corpus: m sentences, or their vectors from `encode`, which are worth keeping: a tensor,
                or an array as numpy loads it from the file of `fastsiam encode`.
            k: 1 <= k <= m.
            batch_size: sentences that are computed together.

        Returns:
            Similarities from 0 to 1, float32, the highest first, and the sentences' numbers in the
            corpus, int64: [n, k] each, or [k] for one string, on the CPU. Of equal ones the smaller
            number comes first.

        Raises:
            TypeError: the corpus is one string.
            ValueError: `k` is out of range, or the corpus is not of this model's `vector_size`.
        """
        import numpy as np

        if isinstance(corpus, str):
            raise TypeError("search: corpus must be a list of strings, got one string")
        if isinstance(corpus, np.ndarray):
            # a copy: torch warns of memory that must not be written
            corpus = torch.tensor(corpus) if corpus.dtype.kind == "f" else corpus.tolist()
        if not isinstance(corpus, Tensor):
            corpus = self.encode(corpus, batch_size).to(self.device)
        if corpus.ndim != 2 or corpus.shape[1] != self.vector_size:
            raise ValueError(
                f"search: corpus must be [m, {self.vector_size}], the vectors that encode returns, "
                f"got {list(corpus.shape)}"
            )
        if not 1 <= k <= len(corpus):
            raise ValueError(f"search: k must be 1 to {len(corpus)}, the corpus, got {k}")
        queries = self.encode([query] if isinstance(query, str) else query, batch_size).to(corpus)
        distance, index = nearest_rows("search", queries, corpus, k, self.measure)
        similarity = self.measure.value(distance, self.scale).float()
        if isinstance(query, str):
            similarity, index = similarity[0], index[0]
        return similarity.cpu(), index.cpu()

    @overload
    def to_score(self, similarity: float) -> float: ...
    @overload
    def to_score(self, similarity: Tensor) -> Tensor: ...
    def to_score(self, similarity: float | Tensor) -> float | Tensor:
        """Map similarities, 0..1, to the scale of the scores, calibrated if the model is."""
        low, high = self.score_range
        if self.calibration is None:
            return low + (high - low) * similarity
        calibrated = self.calibration(torch.as_tensor(similarity, dtype=torch.float64))
        score = low + (high - low) * calibrated
        return score.to(similarity) if isinstance(similarity, Tensor) else float(score)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json`, `vocabulary.json` and `model.safetensors`, each whole or not at all.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a learned scale is 0, infinite or NaN, with which no model can be loaded.
        """
        ModelFolder(
            self.vocabulary,
            _table(self),
            [_own_weights(member) for member in self.members],
            [_scale(member) for member in self.members],
            self.lstm.hidden_size,
            self.lstm.bidirectional,
            self.lstm.pooling,
            self.lstm.similarity,
            self.max_len,
            self.score_range,
            self.calibration,
        ).write(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> TextSiamese:
        """Read what `save_pretrained` wrote; nothing in the files is run.

        Raises:
            DataError: a file is missing, damaged, of a newer fastsiam, or does not fit the others.
            ValueError: the backend or the device has no such name.
            UnavailableError: the device or the backend cannot be used on this machine.
        """
        saved = ModelFolder.read(folder)
        model = cls(
            saved.vocabulary,
            saved.table,
            saved.hidden_size,
            bidirectional=saved.bidirectional,
            pooling=saved.pooling,
            similarity=saved.similarity,
            scale=saved.scales,
            max_len=saved.max_len,
            score_range=saved.score_range,
            calibration=saved.calibration,
            backend=backend,
            device=device,
            dtype=saved.table.dtype,
        )
        for member, weights in zip(model.members, saved.members, strict=True):
            member.load_state_dict(weights, strict=False)
        return model

    @contextmanager
    def prepared(self) -> Iterator[Self]:
        """Hold the projection of the whole vocabulary, as `SiameseLSTM.prepared` does.

        Whoever scores or encodes sentences call by call is faster inside. One call with more words
        than the vocabulary has does so by itself.
        """
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.prepared())
            yield self

    def _prepared_for(self, *sides: Encoded) -> AbstractContextManager[object]:
        """Return `prepared` where sentences have more words than the vocabulary."""
        words = sum(int(side.lengths.sum()) for side in sides)
        return self.prepared() if words > len(self.vocabulary) else nullcontext()

    def _call(self, *inputs: Tensor) -> Tensor:
        """Return the similarities of a batch, [B] float32 on the CPU."""
        if len(self.members) == 1:
            scored: Tensor = self.lstm(*inputs)
        else:
            logs = [member.log_similarity(*inputs) for member in self.members]
            scored = self.measure.average(torch.stack(logs))
        return scored.float().cpu()

    def _read(self, sentences: Sequence[str]) -> Encoded:
        return self.vocabulary.encode(sentences, self.max_len)


def cut(side: Encoded, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and lengths of some sentences on the device, no wider than the longest of them."""
    lengths = side.lengths[rows]
    width = max(1, int(lengths.max()))
    return side.ids[rows, :width].to(device), lengths.to(device)


def _table(model: TextSiamese) -> Tensor:
    assert model.lstm.embedding is not None
    return model.lstm.embedding.weight.detach()


def _scale(member: SiameseLSTM) -> float:
    scale = member.scale
    return float(scale.detach()) if isinstance(scale, Tensor) else scale


def _shape(model: TextSiamese) -> tuple[Any, ...]:
    lstm = model.lstm
    return (lstm.hidden_size, lstm.bidirectional, lstm.pooling, lstm.similarity, model.max_len)


def _own_weights(member: SiameseLSTM) -> dict[str, Tensor]:
    """Return the weights of the LSTM alone: the word vectors are shared, the scale is a number."""
    state = member.state_dict()
    return {name: state[name] for name in state if name not in ("embedding.weight", "log_scale")}


def _by_length(lengths: Tensor, batch_size: int) -> list[Tensor]:
    if batch_size < 1:
        raise ValueError(f"TextSiamese: batch_size must be at least 1, got {batch_size}")
    order = torch.argsort(lengths, stable=True)
    return list(order.split(batch_size)) if len(order) else []
