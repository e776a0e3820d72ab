"""Scored sentence pairs: read from a file of any format, compared, joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from os import PathLike
from typing import Any

from fastsiam.text.columns import (
    ENTAILMENT_COLUMN,
    as_entailment,
    as_score,
    as_sentence,
    check_range,
    choose_columns,
    find_columns,
)
from fastsiam.text.files import DataError
from fastsiam.text.formats import open_table
from fastsiam.text.streams import reading
from fastsiam.text.tables import Table

ScoredPair = tuple[str, str, float]  # two sentences and their similarity, 0..1


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with a score, in the order of the file.

    Attributes:
        left: first sentence of each pair.
        right: second sentence of each pair.
        score: relatedness as written in the file, within `score_range`.
        score_range: lowest and highest score of the scale.
        entailment: label of each pair, a place in `ENTAILMENTS`, -1 where it has none of these;
            empty: the file has no labels.
    """

    left: list[str]
    right: list[str]
    score: list[float]
    score_range: tuple[float, float]
    entailment: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.score)

    @property
    def similarity(self) -> list[float]:
        """The scores mapped to 0..1, the targets of a model's similarity."""
        low, high = self.score_range
        return [(score - low) / (high - low) for score in self.score]

    def take(self, rows: Iterable[int]) -> Pairs:
        """Return the pairs of some rows, in the order given."""
        rows = list(rows)
        return Pairs(
            [self.left[row] for row in rows],
            [self.right[row] for row in rows],
            [self.score[row] for row in rows],
            self.score_range,
            [self.entailment[row] for row in rows] if self.entailment else [],
        )


def read_pairs(
    path: str | PathLike[str],
    *,
    columns: tuple[str, str, str] | None = None,
    score_range: tuple[float, float] | None = None,
) -> Pairs:
    """Read scored sentence pairs; the content of the file tells its format.

    Tab-separated text is taken as it is (a quotation mark is a character), comma-separated text is
    quoted CSV; both have a header line. JSON lines are objects with the columns as keys. Parquet
    needs pyarrow. A pickle holds a list of `[sentence, sentence, score, ...]`, whose columns have
    the names of SICK, and nothing in it is run. Entailment labels come from SICK's column
    `entailment_judgment`.

    Args:
        path: the file; text is UTF-8.
        columns: names of the two sentences and the score; not needed for the headers of SICK
            (`sentence_A`, `sentence_B`, `relatedness_score`) and STS (`sentence1`, `sentence2`,
            `score`). The case of letters does not matter.
        score_range: lowest and highest score; by default that of a known header, else 1 to 5.

    Returns:
        The pairs, at least one.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row that is not two sentences
            and a score within the range.
        ImportError: the file is Parquet, and pyarrow is not installed.
        ValueError: `score_range` is not two finite numbers, the lower first, or `columns` is not
            names of three different columns.
    """
    with _scored_rows("read_pairs", path, columns, score_range) as (limits, rows):
        pairs = Pairs([], [], [], limits)
        for left, right, score, label in rows:
            pairs.left.append(left)
            pairs.right.append(right)
            pairs.score.append(score)
            pairs.entailment.append(label)
    if not pairs.score:
        raise DataError(f"{path}: no sentence pair in the file")
    if max(pairs.entailment) < 0:
        pairs.entailment.clear()
    return pairs


def stream_pairs(
    path: str | PathLike[str],
    *,
    columns: tuple[str, str, str] | None = None,
    score_range: tuple[float, float] | None = None,
) -> Iterator[ScoredPair]:
    """Yield the pairs of a file as `read_pairs` reads them, and hold a block of rows at a time.

    Arguments and errors are those of `read_pairs`; a pickle is held whole.
    """
    with _scored_rows("stream_pairs", path, columns, score_range) as ((low, high), rows):
        for left, right, score, _ in rows:
            yield left, right, (score - low) / (high - low)


@contextmanager
def _scored_rows(
    who: str,
    path: str | PathLike[str],
    columns: tuple[str, str, str] | None,
    score_range: tuple[float, float] | None,
) -> Iterator[tuple[tuple[float, float], Iterator[tuple[str, str, float, int]]]]:
    """Open a file of scored pairs: the range of its scores, and sentences, score and label."""
    if columns is not None and (
        isinstance(columns, str) or not len(columns) == len(set(columns)) == 3
    ):
        raise ValueError(f"{who}: columns must be three different names, got {columns!r}")
    if score_range is not None:
        check_range(who, score_range)
    with reading(path) as stream:
        table = open_table(str(path), stream)
        names, known = choose_columns(table.name, table.header, columns)
        low, high = score_range or known
        limits = float(low), float(high)
        fields, label = itemgetter(*(table.keys[name] for name in names)), _label(table)

        def rows() -> Iterator[tuple[str, str, float, int]]:
            for number, row in table.rows:
                where, (left, right, score) = table.where(number), fields(row)
                yield (
                    as_sentence(where, left),
                    as_sentence(where, right),
                    as_score(where, score, limits),
                    as_entailment(label(row)),
                )

        yield limits, rows()


def _label(table: Table) -> Callable[[Any], object]:
    """Return a function that reads the entailment label of a row."""
    name = find_columns(table.header, [ENTAILMENT_COLUMN])[0] or ENTAILMENT_COLUMN
    key = table.keys.get(name)
    if isinstance(key, int):
        return itemgetter(key)
    # the first of the JSON lines may lack a label that others have
    return lambda row: row.get(name) if isinstance(row, dict) else None


def pair_key(left: str, right: str) -> tuple[str, ...]:
    """Return a key that two pairs share if their sentences are equal, in either order.

    Letter case and punctuation do not count.
    """
    plain = (" ".join(re.sub(r"[^\w\s]", "", text.lower()).split()) for text in (left, right))
    return tuple(sorted(plain))


def pair_keys(*parts: Pairs) -> Iterator[tuple[str, ...]]:
    """Yield the `pair_key` of every pair."""
    for part in parts:
        yield from map(pair_key, part.left, part.right)


def rows_outside(train: Pairs, *held_out: Pairs) -> list[int]:
    """Return the rows of `train` whose pair is in none of the held-out parts, in order.

    Two pairs are the same when their `pair_key` is.
    """
    held = set(pair_keys(*held_out))
    return [row for row, key in enumerate(pair_keys(train)) if key not in held]


def drop_repeats(train: Pairs, *held_out: Pairs) -> tuple[Pairs, int]:
    """Leave out the training pairs that a held-out part holds too, as `rows_outside` tells them.

    Args:
        train: pairs to filter.
        held_out: pairs to be scored later.

    Returns:
        The pairs of `train` that are in no held-out part, in order, and how many were dropped.
    """
    kept = train.take(rows_outside(train, *held_out))
    return kept, len(train) - len(kept)


def join_pairs(first: Pairs, second: Pairs) -> Pairs:
    """Return the pairs of both, with the scores of the second on the scale of the first."""
    low, high = first.score_range
    entailment = []
    if first.entailment or second.entailment:
        entailment = [
            label for part in (first, second) for label in part.entailment or [-1] * len(part)
        ]
    return Pairs(
        first.left + second.left,
        first.right + second.right,
        first.score + [low + (high - low) * value for value in second.similarity],
        first.score_range,
        entailment,
    )
