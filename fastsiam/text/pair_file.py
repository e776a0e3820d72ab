"""A file of training pairs that is too large to hold: scanned once, then read in every epoch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsiam.text.files import DataError
from fastsiam.text.pairs import Pairs, ScoredPair, pair_key, pair_keys, stream_pairs
from fastsiam.text.tokens import tokenize


@dataclass(frozen=True)
class PairFile:
    """A file of scored pairs that was scanned once.

    Attributes:
        path: the file.
        columns: as for `read_pairs`.
        score_range: as for `read_pairs`.
        pairs: number of them that train.
        held_out: rows that repeat a held-out pair, and are left out.
        truncated: sentences of more than `max_len` tokens.
        words: every word of the pairs that train, with its count.
        checksum: of the pairs that train, in their order.
    """

    path: Path
    columns: tuple[str, str, str] | None
    score_range: tuple[float, float] | None
    pairs: int
    held_out: frozenset[int]
    truncated: int
    words: Counter[str]
    checksum: str

    def __len__(self) -> int:
        return self.pairs

    def rows(self) -> Iterator[ScoredPair]:
        """Yield the pairs that train."""
        stream = stream_pairs(self.path, columns=self.columns, score_range=self.score_range)
        for number, pair in enumerate(stream):
            if number not in self.held_out:
                yield pair


def scan_pairs(
    path: Path,
    held_out: Sequence[Pairs],
    max_len: int,
    columns: tuple[str, str, str] | None = None,
    score_range: tuple[float, float] | None = None,
) -> PairFile:
    """Read a file once: check it, count it, and find the rows that repeat a held-out pair.

    Raises:
        DataError: the file cannot be used, or no pair is left.
    """
    held = set(pair_keys(*held_out))
    repeats: set[int] = set()
    words: Counter[str] = Counter()
    digest = hashlib.sha256()
    truncated, number = 0, -1
    for number, pair in enumerate(stream_pairs(path, columns=columns, score_range=score_range)):
        left, right, _ = pair
        if pair_key(left, right) in held:
            repeats.add(number)
            continue
        digest.update(repr(pair).encode())
        for sentence in (left, right):
            tokens = tokenize(sentence)
            words.update(tokens)
            truncated += len(tokens) > max_len
    total = number + 1
    if not total - len(repeats):
        raise DataError(f"{path}: each of its {total} pairs is in the dev or the test file too")
    return PairFile(
        path,
        columns,
        score_range,
        total - len(repeats),
        frozenset(repeats),
        truncated,
        words,
        digest.hexdigest(),
    )
