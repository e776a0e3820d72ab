"""Scored sentence pairs from files: SICK, STS, any CSV, TSV or JSON lines, and legacy pickles."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike

from fastsiam.text.columns import (
    DEFAULT_RANGE,
    ENTAILMENT_COLUMN,
    as_entailment,
    as_score,
    as_sentence,
    check_range,
    choose_columns,
    find_columns,
    is_range,
)
from fastsiam.text.files import DataError, check_file
from fastsiam.text.legacy import pickle_rows
from fastsiam.text.tables import read_table

__all__ = [
    "DataError",
    "Pairs",
    "drop_repeats",
    "is_range",
    "join_pairs",
    "pair_key",
    "pair_keys",
    "read_pairs",
    "rows_outside",
]


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
        """The scores mapped to 0..1: what a model's similarity is regressed on."""
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
    """Read scored sentence pairs; the kind of file is told by its content.

    Tab-separated text is taken as it is (a quotation mark is a character), comma-separated text is
    quoted CSV; both have a header line. JSON lines are objects with the columns as keys. A pickle
    holds a list of `[sentence, sentence, score, ...]` and is read without running anything in it.
    Entailment labels are read where there are any: from SICK's column `entailment_judgment`, or
    behind the score in a pickle.

    Args:
        path: the file, UTF-8.
        columns: names of the two sentences and the score; not needed for the headers of SICK
            (`sentence_A`, `sentence_B`, `relatedness_score`) and STS (`sentence1`, `sentence2`,
            `score`). The case of letters does not matter. A pickle has no names.
        score_range: lowest and highest score; by default that of a known header, else 1 to 5.

    Returns:
        The pairs, at least one.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a line that is not two sentences
            and a score within the range.
        ValueError: `score_range` is not two finite numbers, the lower first, or `columns` is not
            names of three different columns.
    """
    if columns is not None and (
        isinstance(columns, str) or not len(columns) == len(set(columns)) == 3
    ):
        raise ValueError(f"read_pairs: columns must be three different names, got {columns!r}")
    if score_range is not None:
        check_range("read_pairs", score_range)
    path = check_file(path)
    data = path.read_bytes()
    if path.suffix in (".p", ".pkl", ".pickle") or data.startswith((b"(lp", b"\x80")):
        rows, limits = pickle_rows(path, data), DEFAULT_RANGE
    else:
        header, table = read_table(str(path), io.BytesIO(data))
        names, limits = choose_columns(str(path), header, columns)
        # the first record of JSON lines may lack a label that others have
        label = find_columns(header, [ENTAILMENT_COLUMN])[0] or ENTAILMENT_COLUMN
        rows = ((where, [*(row[name] for name in names), row.get(label)]) for where, row in table)
    low, high = score_range or limits
    pairs = Pairs([], [], [], (float(low), float(high)))
    for where, (left, right, score, *label_of_row) in rows:
        pairs.left.append(as_sentence(where, left))
        pairs.right.append(as_sentence(where, right))
        pairs.score.append(as_score(where, score, pairs.score_range))
        pairs.entailment.append(as_entailment(*label_of_row))
    if not pairs.score:
        raise DataError(f"{path}: no sentence pair in the file")
    if max(pairs.entailment) < 0:
        pairs.entailment.clear()
    return pairs


def pair_key(left: str, right: str) -> tuple[str, ...]:
    """Return what is equal for two pairs that are the same.

    These are pairs whose sentences, in either order, are equal after lower-casing and removing
    punctuation.
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
