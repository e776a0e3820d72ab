"""Everything a run reads, checked and encoded before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastsiam.model import cut
from fastsiam.text.files import DataError
from fastsiam.text.pair_file import PairFile, scan_pairs
from fastsiam.text.pairs import (
    Pairs,
    drop_repeats,
    join_pairs,
    pair_keys,
    read_pairs,
    rows_outside,
)
from fastsiam.text.synonyms import close_synonyms, load_synonyms, swap_words
from fastsiam.text.tokens import tokenize
from fastsiam.text.vectors import Coverage, WordVectors, load_vectors
from fastsiam.text.vocabulary import Encoded, Vocabulary, load_spelling
from fastsiam.training.config import Config
from fastsiam.training.objective import Batch

FOLD_SEED = 0  # the parts are the same for every model of an ensemble


@dataclass(frozen=True)
class EncodedPairs:
    """Sentence pairs as ids, with the similarity to learn.

    Attributes:
        left: first sentences.
        right: second sentences.
        similarity: [n] float32, gold, 0..1.
        labels: [n] int64, entailment 0..2, -1 for none; None where no pair has one.
        origin: [n] int64, the row of the pair that a pair was made from by swapping words, its own
            row for any other; None: every pair is one of a file.
        group: [n] int64, one number for pairs that `rows_outside` takes for the same, in every
            phase of a run; None: no two are.
    """

    left: Encoded
    right: Encoded
    similarity: Tensor
    labels: Tensor | None = None
    origin: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def of(cls, pairs: Pairs, vocabulary: Vocabulary, max_len: int) -> EncodedPairs:
        """Encode the pairs."""
        return cls(
            vocabulary.encode(pairs.left, max_len),
            vocabulary.encode(pairs.right, max_len),
            torch.tensor(pairs.similarity),
            torch.tensor(pairs.entailment) if pairs.entailment else None,
        )

    def __len__(self) -> int:
        return len(self.similarity)

    def take(self, rows: Tensor) -> EncodedPairs:
        """Return the pairs of some rows, with counts of cut sentences and unknown words of 0."""
        return EncodedPairs(
            Encoded(self.left.ids[rows], self.left.lengths[rows], 0, Counter()),
            Encoded(self.right.ids[rows], self.right.lengths[rows], 0, Counter()),
            self.similarity[rows],
            None if self.labels is None else self.labels[rows],
            group=None if self.group is None else self.group[rows],
        )

    def without(self, others: EncodedPairs) -> EncodedPairs:
        """Return the pairs that are not among the others."""
        if self.group is None or others.group is None:
            return self
        return self.take(torch.nonzero(~torch.isin(self.group, others.group))[:, 0])

    def split(self, folds: int, fold: int) -> tuple[EncodedPairs, EncodedPairs]:
        """Return the pairs outside and inside one of the parts that the pairs are dealt into.

        Equal pairs are in one part. A pair with swapped words is in no part. It is outside a part
        unless that part holds the pair it was made from, or a pair equal to it.
        """
        rows = torch.arange(len(self))
        origin = rows if self.origin is None else self.origin
        group = rows if self.group is None else self.group
        own = origin == rows
        part = torch.full_like(rows, -1)
        part[own] = _deal(group[own], folds)
        inside = part == fold
        outside = (part[origin] != fold) & ~torch.isin(group, group[inside])
        return self.take(rows[outside]), self.take(rows[inside])

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """Return some pairs on the device, no wider than the longest of them."""
        left_ids, left_lengths = cut(self.left, rows, device)
        right_ids, right_lengths = cut(self.right, rows, device)
        return Batch(
            [left_ids, right_ids, left_lengths, right_lengths],
            self.similarity[rows].to(device),
            None if self.labels is None else self.labels[rows].to(device),
        )


@dataclass(frozen=True)
class Inputs:
    """The files of a run, read and encoded.

    Attributes:
        phases: "pretrain" (where there is one) and "train", in the order they run; files where
            the pairs are streamed.
        dev: pairs that choose the epoch.
        test: pairs as in the test file, if any.
        score_range: scale of the dev file's scores.
        dropped: phase -> training pairs left out because dev or test holds them too.
        swapped: pairs of "train" that were made by swapping words for synonyms.
        truncated: sentences of all files that lost their end to `max_len`.
        vocabulary: the words with a vector.
        table: [V, D] float32.
        coverage: how many words have a vector.
    """

    phases: Mapping[str, EncodedPairs | PairFile]
    dev: EncodedPairs
    test: Pairs | None
    score_range: tuple[float, float]
    dropped: dict[str, int]
    swapped: int
    truncated: int
    vocabulary: Vocabulary
    table: Tensor
    coverage: Coverage


def load_inputs(config: Config) -> Inputs:
    """Read the pairs and the vectors of a run.

    Training pairs that repeat a dev or test pair are left out and counted, with and without swapped
    words. With `train_on_dev`, dev pairs that repeat a test pair are left out.

    Raises:
        DataError: a file cannot be used, no training pair is left, fewer different ones than the
            calibration has folds, no pair has the entailment label that is to be learned, or dev
            cannot rank epochs.
    """
    dev = _read(config, config.dev)
    if len(set(dev.score)) < 2:
        raise DataError(
            f"{config.dev}: must hold different scores, since correlation with them chooses the "
            f"epoch; all {len(dev)} are {dev.score[0]:g}"
        )
    test = None if config.test is None else _read(config, config.test)
    held_out = [part for part in (dev, test) if part is not None]
    if config.stream:
        return _scan_inputs(config, dev, test)
    kept_from = held_out[1:] if config.train_on_dev else held_out
    phases: dict[str, Pairs] = {}
    dropped: dict[str, int] = {}
    for phase, path in {"pretrain": config.pretrain, "train": config.train}.items():
        if path is None:
            continue
        phases[phase], dropped[phase] = drop_repeats(_read(config, path), *kept_from)
        if not len(phases[phase]):
            raise DataError(
                f"{path}: each of its {dropped[phase]} pairs is in the dev or the test file too"
            )
    if config.train_on_dev:
        usable, dropped["dev"] = drop_repeats(dev, *kept_from)
        phases["train"] = join_pairs(phases["train"], usable)
    if config.entailment_weight and not phases["train"].entailment:
        raise DataError(
            f"{config.train}: no pair has an entailment label (SICK's column "
            "entailment_judgment) to learn; set entailment_weight to 0"
        )

    numbers: dict[tuple[str, ...], int] = {}
    groups = {phase: _number(pairs, numbers) for phase, pairs in phases.items()}
    different = len(groups["train"].unique())
    if config.calibrate and different < config.folds:
        raise DataError(
            f"{config.train}: must hold at least {config.folds} different pairs to calibrate on, "
            f"one for each fold, got {different}; set calibrate to False"
        )

    synonyms = {} if config.synonyms is None else load_synonyms(config.synonyms)
    parts = {**phases, "dev": dev} | ({} if test is None else {"test": test})
    vocabulary, vectors = _load_vectors(config, parts, synonyms)
    origin = list(range(len(phases["train"])))
    if synonyms:
        close = close_synonyms(synonyms, vocabulary, vectors.table)
        generator = torch.Generator().manual_seed(config.seed)
        swapped, rows = swap_words(phases["train"], close, generator)
        keep = rows_outside(swapped, *kept_from)
        origin += [rows[row] for row in keep]
        swapped = swapped.take(keep)
        parts["train"] = join_pairs(phases["train"], swapped)
        groups["train"] = torch.cat([groups["train"], _number(swapped, numbers)])
    encoded = {
        name: EncodedPairs.of(pairs, vocabulary, config.max_len) for name, pairs in parts.items()
    }
    for phase, group in groups.items():
        encoded[phase] = replace(encoded[phase], group=group)
    encoded["train"] = replace(encoded["train"], origin=torch.tensor(origin))
    return Inputs(
        phases={phase: encoded[phase] for phase in phases},
        dev=encoded["dev"],
        test=test,
        score_range=dev.score_range,
        dropped=dropped,
        swapped=len(encoded["train"]) - len(phases["train"]),
        truncated=sum(p.left.truncated + p.right.truncated for p in encoded.values()),
        vocabulary=vocabulary,
        table=vectors.table,
        coverage=vectors.coverage,
    )


def _number(pairs: Pairs, numbers: dict[tuple[str, ...], int]) -> Tensor:
    """Return a number for each pair, [n] int64: that in `numbers`, where new ones are added."""
    found = [numbers.setdefault(key, len(numbers)) for key in pair_keys(pairs)]
    return torch.tensor(found, dtype=torch.int64)


def _deal(group: Tensor, folds: int) -> Tensor:
    """Deal rows into parts of about one size, all rows of a group into the same; [n] int64."""
    _, number, sizes = group.unique(return_inverse=True, return_counts=True)
    generator = torch.Generator().manual_seed(FOLD_SEED)
    rank = torch.randperm(len(sizes), generator=generator).tolist()
    part, held = [0] * len(rank), [0] * folds
    # the largest first, so that the small ones make up for the rest
    size = sizes.tolist()
    for at in sorted(range(len(rank)), key=lambda at: (-size[at], rank[at])):
        part[at] = held.index(min(held))
        held[part[at]] += size[at]
    return torch.tensor(part)[number]


def _scan_inputs(config: Config, dev: Pairs, test: Pairs | None) -> Inputs:
    """Read the held-out pairs, and scan the files of training pairs."""
    held_out = {"dev": dev} | ({} if test is None else {"test": test})
    paths = {"pretrain": config.pretrain, "train": config.train}
    files = {
        phase: scan_pairs(
            path, list(held_out.values()), config.max_len, config.columns, config.score_range
        )
        for phase, path in paths.items()
        if path is not None
    }
    words = sum((file.words for file in files.values()), Counter())
    vocabulary, vectors = _load_vectors(config, held_out, {}, words)
    encoded = {
        name: EncodedPairs.of(pairs, vocabulary, config.max_len) for name, pairs in held_out.items()
    }
    return Inputs(
        phases=files,
        dev=encoded["dev"],
        test=test,
        score_range=dev.score_range,
        dropped={phase: len(file.held_out) for phase, file in files.items()},
        swapped=0,
        truncated=sum(file.truncated for file in files.values())
        + sum(p.left.truncated + p.right.truncated for p in encoded.values()),
        vocabulary=vocabulary,
        table=vectors.table,
        coverage=vectors.coverage,
    )


def _load_vectors(
    config: Config,
    parts: Mapping[str, Pairs],
    synonyms: Mapping[str, Sequence[str]],
    more: Counter[str] | None = None,
) -> tuple[Vocabulary, WordVectors]:
    """Load vectors for the words of every part and of `more`, and for synonyms in train."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in parts}
    for name, pairs in parts.items():
        for sentence in (*pairs.left, *pairs.right):
            counts[name].update(tokenize(sentence))
    forms = {form for word in counts.get("train", ()) for form in (word, word.lower())}
    spelling = None if config.spelling is None else load_spelling(config.spelling)
    vectors = load_vectors(
        config.vectors,
        sum(counts.values(), more or Counter()),
        spelling=spelling,
        oov=config.oov,
        seed=config.seed,
        length=config.vector_length,
        uncounted=[other for word in forms for other in synonyms.get(word, ())],
    )
    return Vocabulary(vectors.words, spelling), vectors


def _read(config: Config, path: Path) -> Pairs:
    return read_pairs(path, columns=config.columns, score_range=config.score_range)
