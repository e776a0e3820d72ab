"""Everything a run reads, checked and encoded before training starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastsiam.model import cut
from fastsiam.text.datasets import DataError, Pairs, drop_repeats, read_pairs
from fastsiam.text.tokens import tokenize
from fastsiam.text.vectors import Coverage, load_vectors
from fastsiam.text.vocabulary import Encoded, Vocabulary, load_spelling
from fastsiam.training.config import Config


@dataclass(frozen=True)
class EncodedPairs:
    """Sentence pairs as ids, with the similarity to learn.

    Attributes:
        left: first sentences.
        right: second sentences.
        similarity: [n] float32, gold, 0..1.
    """

    left: Encoded
    right: Encoded
    similarity: Tensor

    @classmethod
    def of(cls, pairs: Pairs, vocabulary: Vocabulary, max_len: int) -> EncodedPairs:
        """Encode the pairs."""
        return cls(
            vocabulary.encode(pairs.left, max_len),
            vocabulary.encode(pairs.right, max_len),
            torch.tensor(pairs.similarity),
        )

    def __len__(self) -> int:
        return len(self.similarity)

    def batch(self, rows: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Return what a Siamese module takes (ids, ids, lengths, lengths), and the target."""
        left_ids, left_lengths = cut(self.left, rows, device)
        right_ids, right_lengths = cut(self.right, rows, device)
        inputs = [left_ids, right_ids, left_lengths, right_lengths]
        return inputs, self.similarity[rows].to(device)


@dataclass(frozen=True)
class Inputs:
    """The files of a run, read and encoded.

    Attributes:
        phases: "pretrain" (where there is one) and "train", in the order they run.
        dev: pairs that choose the epoch.
        test: pairs as in the test file, if any.
        score_range: scale of the dev file's scores.
        dropped: phase -> training pairs left out because dev or test holds them too.
        truncated: sentences of all files that lost their end to `max_len`.
        vocabulary: the words with a vector.
        table: [V, D] float32.
        coverage: how many words have a vector.
    """

    phases: dict[str, EncodedPairs]
    dev: EncodedPairs
    test: Pairs | None
    score_range: tuple[float, float]
    dropped: dict[str, int]
    truncated: int
    vocabulary: Vocabulary
    table: Tensor
    coverage: Coverage


def load_inputs(config: Config) -> Inputs:
    """Read the pairs and the vectors of a run.

    Training pairs that repeat a dev or test pair are left out and counted.

    Raises:
        DataError: a file cannot be used, no training pair is left, or dev cannot rank epochs.
    """
    dev = _read(config, config.dev)
    if len(set(dev.score)) < 2:
        raise DataError(
            f"{config.dev}: must hold different scores, since correlation with them chooses the "
            f"epoch; all {len(dev)} are {dev.score[0]:g}"
        )
    test = None if config.test is None else _read(config, config.test)
    held_out = [dev] if test is None else [dev, test]
    phases: dict[str, Pairs] = {}
    dropped: dict[str, int] = {}
    for phase, path in {"pretrain": config.pretrain, "train": config.train}.items():
        if path is None:
            continue
        pairs = _read(config, path)
        total = len(pairs)
        for part in held_out:
            pairs, _ = drop_repeats(pairs, part)
        if not len(pairs):
            raise DataError(f"{path}: each of its {total} pairs is in the dev or the test file too")
        phases[phase] = pairs
        dropped[phase] = total - len(pairs)

    words: Counter[str] = Counter()
    for pairs in (*phases.values(), *held_out):
        for sentence in (*pairs.left, *pairs.right):
            words.update(tokenize(sentence))
    spelling = None if config.spelling is None else load_spelling(config.spelling)
    vectors = load_vectors(
        config.vectors, words, spelling=spelling, oov=config.oov, seed=config.seed
    )
    vocabulary = Vocabulary(vectors.words, spelling)
    parts = {**phases, "dev": dev} | ({} if test is None else {"test": test})
    encoded = {
        name: EncodedPairs.of(pairs, vocabulary, config.max_len) for name, pairs in parts.items()
    }
    return Inputs(
        phases={phase: encoded[phase] for phase in phases},
        dev=encoded["dev"],
        test=test,
        score_range=dev.score_range,
        dropped=dropped,
        truncated=sum(p.left.truncated + p.right.truncated for p in encoded.values()),
        vocabulary=vocabulary,
        table=vectors.table,
        coverage=vectors.coverage,
    )


def _read(config: Config, path: Path) -> Pairs:
    return read_pairs(path, columns=config.columns, score_range=config.score_range)
