"""The columns of scored pairs in a table, and the checks of their fields."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from fastsiam.text.files import DataError, is_unicode, short

SICK_HEADER = ("sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
ENTAILMENT_COLUMN = SICK_HEADER[3]
ENTAILMENTS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")

# headers that need no columns=: the two sentences, the score, and the range that its makers state
KNOWN_HEADERS: dict[tuple[str, str, str], tuple[float, float]] = {
    SICK_HEADER[:3]: (1.0, 5.0),
    ("sentence1", "sentence2", "score"): (0.0, 5.0),  # STS
}
DEFAULT_RANGE = (1.0, 5.0)


def find_columns(header: Sequence[str], wanted: Sequence[str]) -> list[str | None]:
    """Return the header's name for each wanted one, in any letter case; None for one not there."""
    # an exact name wins over one in another letter case
    by_name = {name.lower(): name for name in reversed(header)} | {name: name for name in header}
    return [by_name.get(name, by_name.get(name.lower())) for name in wanted]


def need_columns(name: str, header: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the header's name for each wanted one, in any letter case.

    Raises:
        DataError: the header of the file `name` has a wanted one not at all, or more than once.
    """
    found = []
    for asked, column in zip(wanted, find_columns(header, wanted), strict=True):
        if column is None:
            raise DataError(f"{name}: no column {asked!r}; the columns are {shown(header)}")
        if header.count(column) > 1:
            raise DataError(f"{name}: the header names the column {column!r} more than once")
        found.append(column)
    return found


def choose_columns(
    name: str, header: Sequence[str], columns: tuple[str, str, str] | None
) -> tuple[list[str], tuple[float, float]]:
    """Return the header's names of the two sentences and the score, and the default range.

    Raises:
        DataError: the header of the file `name` lacks one, or is not known where `columns` is None.
        ValueError: two of `columns` name one column.
    """
    by_header = [known for known in KNOWN_HEADERS if None not in find_columns(header, known)]
    wanted = columns or next(iter(by_header), None)
    if wanted is None:
        raise DataError(
            f"{name}: the header is none of the known ones; name the two sentences and the score "
            f"(columns=, --columns LEFT,RIGHT,SCORE); the columns are {shown(header)}"
        )
    names = need_columns(name, header, wanted)
    if len(set(names)) < len(names):
        raise ValueError(
            f"{name}: columns must be three different names, got {', '.join(wanted)} for the "
            f"columns {', '.join(names)}"
        )
    limits = (KNOWN_HEADERS[known] for known in by_header if find_columns(header, known) == names)
    return names, next(limits, DEFAULT_RANGE)


def shown(header: Sequence[str]) -> str:
    """Return the names of the columns, for a message."""
    return textwrap.shorten(", ".join(header), 200, placeholder=" ...")


def is_range(low: float, high: float) -> bool:
    """Return whether the two are the ends of a scale: finite, the lower first, a finite width."""
    try:
        return low < high and math.isfinite(float(high) - float(low))
    except OverflowError:  # an int beyond all floats
        return False


def check_range(who: str, score_range: tuple[float, float]) -> None:
    """Raise ValueError where a caller's lowest and highest score are no range."""
    low, high = score_range
    if not is_range(low, high):
        raise ValueError(
            f"{who}: score_range must be two numbers, the lower first, got {low} {high}"
        )


def as_sentence(where: str, value: object) -> str:
    """Return a field as a sentence.

    Raises:
        DataError: it is no text, or cannot be written as UTF-8; `where` names the row.
    """
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


def as_score(where: str, value: object, limits: tuple[float, float]) -> float:
    """Return a field as a score.

    Raises:
        DataError: it is no number, or not within the limits; `where` names the row.
    """
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


def as_entailment(value: object = None) -> int:
    """Return the place of a label in `ENTAILMENTS`, -1 for anything else."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return ENTAILMENTS.index(value) if value in ENTAILMENTS else -1
