"""Scored sentence pairs from files: SICK, STS, any CSV, TSV or JSON lines, and legacy pickles."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from fastsiam.text.files import DataError, check_file, is_unicode, short
from fastsiam.text.legacy import pickle_rows
from fastsiam.text.tables import find_columns, read_table

__all__ = [
    "DataError",
    "Pairs",
    "drop_repeats",
    "is_range",
    "join_pairs",
    "read_pairs",
    "rows_outside",
]

ENTAILMENT_COLUMN = "entailment_judgment"  # of SICK
ENTAILMENTS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")

# headers that need no columns=: the two sentences, the score, and the range that its makers state
KNOWN_HEADERS: dict[tuple[str, str, str], tuple[float, float]] = {
    ("sentence_A", "sentence_B", "relatedness_score"): (1.0, 5.0),  # SICK
    ("sentence1", "sentence2", "score"): (0.0, 5.0),  # STS
}
DEFAULT_RANGE = (1.0, 5.0)


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
    if score_range is not None and not is_range(*score_range):
        low, high = score_range
        raise ValueError(
            f"read_pairs: score_range must be two numbers, the lower first, got {low} {high}"
        )
    path = check_file(path)
    data = path.read_bytes()
    if path.suffix in (".p", ".pkl", ".pickle") or data.startswith((b"(lp", b"\x80")):
        rows, limits = pickle_rows(path, data), DEFAULT_RANGE
    else:
        header, table = read_table(path, data)
        names, limits = _choose_columns(path, header, columns)
        # the first record of JSON lines may lack a label that others have
        label = find_columns(header, [ENTAILMENT_COLUMN])[0] or ENTAILMENT_COLUMN
        rows = ((where, [*(row[name] for name in names), row.get(label)]) for where, row in table)
    low, high = score_range or limits
    pairs = Pairs([], [], [], (float(low), float(high)))
    for where, (left, right, score, *label_of_row) in rows:
        pairs.left.append(_sentence(where, left))
        pairs.right.append(_sentence(where, right))
        pairs.score.append(_score(where, score, pairs.score_range))
        pairs.entailment.append(_entailment(*label_of_row))
    if not pairs.score:
        raise DataError(f"{path}: no sentence pair in the file")
    if max(pairs.entailment) < 0:
        pairs.entailment.clear()
    return pairs


def is_range(low: float, high: float) -> bool:
    """Return whether the two are the ends of a scale: finite, the lower first, a finite width."""
    try:
        return low < high and math.isfinite(float(high) - float(low))
    except OverflowError:  # an int beyond all floats
        return False


def rows_outside(train: Pairs, *held_out: Pairs) -> list[int]:
    """Return the rows of `train` whose pair is in none of the held-out parts, in order.

    Two pairs are the same when their sentences, in either order, are equal after lower-casing and
    removing punctuation.
    """
    held = {
        _pair_key(*pair) for part in held_out for pair in zip(part.left, part.right, strict=True)
    }
    return [
        row
        for row, pair in enumerate(zip(train.left, train.right, strict=True))
        if _pair_key(*pair) not in held
    ]


def drop_repeats(train: Pairs, held_out: Pairs) -> tuple[Pairs, int]:
    """Leave out the training pairs that the held-out part holds too, as `rows_outside` tells them.

    Args:
        train: pairs to filter.
        held_out: pairs to be scored later.

    Returns:
        The pairs of `train` that are not in `held_out`, in order, and how many were dropped.
    """
    kept = train.take(rows_outside(train, held_out))
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


def _pair_key(left: str, right: str) -> tuple[str, ...]:
    plain = (" ".join(re.sub(r"[^\w\s]", "", text.lower()).split()) for text in (left, right))
    return tuple(sorted(plain))


def _choose_columns(
    path: Path, header: Sequence[str], columns: tuple[str, str, str] | None
) -> tuple[list[str], tuple[float, float]]:
    """Return the header's names of the two sentences and the score, and the default range."""
    shown = textwrap.shorten(", ".join(header), 200, placeholder=" ...")
    by_header = [known for known in KNOWN_HEADERS if None not in find_columns(header, known)]
    wanted = columns or next(iter(by_header), None)
    if wanted is None:
        raise DataError(
            f"{path}: the header is none of the known ones; name the two sentences and the score "
            f"(columns=, --columns LEFT,RIGHT,SCORE); the columns are {shown}"
        )
    names = []
    for asked, name in zip(wanted, find_columns(header, wanted), strict=True):
        if name is None:
            raise DataError(f"{path}: no column {asked!r}; the columns are {shown}")
        if header.count(name) > 1:
            raise DataError(f"{path}: the header names the column {name!r} more than once")
        if name in names:
            raise ValueError(
                f"{path}: columns must be three different names, got {asked!r} for the column "
                f"{name!r}, which is named already"
            )
        names.append(name)
    limits = (KNOWN_HEADERS[known] for known in by_header if find_columns(header, known) == names)
    return names, next(limits, DEFAULT_RANGE)


def _sentence(where: str, value: object) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: must be UTF-8 text, got {short(value)}") from error
    if not isinstance(value, str):
        raise DataError(f"{where}: a sentence must be text, got {short(value)}")
    if not is_unicode(value):
        raise DataError(
            f"{where}: a sentence must be Unicode text, got half a surrogate pair in {short(value)}"
        )
    return value


def _score(where: str, value: object, limits: tuple[float, float]) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str, bytes)):
            raise ValueError
        score = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: the score must be a number, got {short(value)}") from None
    low, high = limits
    if not low <= score <= high:  # also refuses NaN
        raise DataError(f"{where}: the score must be from {low:g} to {high:g}, got {short(value)}")
    return score


def _entailment(value: object = None) -> int:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return ENTAILMENTS.index(value) if value in ENTAILMENTS else -1
