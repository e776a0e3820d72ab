"""Scored sentence pairs of a file of any size, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from os import PathLike
from pathlib import Path

from fastsiam.text.columns import as_score, as_sentence, check_range, choose_columns
from fastsiam.text.files import DataError, check_file
from fastsiam.text.tables import Row, read_table

ScoredPair = tuple[str, str, float]  # two sentences and their similarity, 0..1


def stream_pairs(
    path: str | PathLike[str],
    *,
    columns: tuple[str, str, str] | None = None,
    score_range: tuple[float, float] | None = None,
) -> Iterator[ScoredPair]:
    """Read scored pairs as `read_pairs` does, holding a block of lines at a time.

    Args:
        path: tab-separated text, CSV or JSON lines, UTF-8; or Parquet, which needs datasets.
        columns: as for `read_pairs`.
        score_range: as for `read_pairs`.

    Yields:
        The pairs, in the order of the file.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row that is not two sentences
            and a score within the range.
        ImportError: the file is Parquet, and datasets is not installed.
        ValueError: `score_range` is not two finite numbers, the lower first, or two of `columns`
            name one column.
    """
    if score_range is not None:
        check_range("stream_pairs", score_range)
    path = check_file(path)
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
        file.seek(0)
        header, rows = _parquet_rows(path) if parquet else read_table(str(path), file)
        names, limits = choose_columns(str(path), header, columns)
        low, high = score_range or limits
        for where, row in rows:
            left, right, score = (row[name] for name in names)
            value = as_score(where, score, (low, high))
            pair = as_sentence(where, left), as_sentence(where, right)
            yield *pair, (value - low) / (high - low)


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path}: a Parquet file needs datasets; install with: pip install 'fastsiam[stream]'"
        ) from error
    try:
        stream = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        )
        header = list(stream.features)
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    rows = ((f"{path}, row {number}", row) for number, row in zip(count(), stream, strict=False))
    return header, rows
