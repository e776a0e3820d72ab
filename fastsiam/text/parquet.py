"""Parquet files, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO

from fastsiam.text.files import DataError
from fastsiam.text.tables import Table, positions

ROWS = 8192  # read together


def parquet_table(name: str, stream: BinaryIO, _header: bool) -> Table:
    """Read a Parquet file.

    Raises:
        DataError: the file is damaged, or a pipe.
        ImportError: pyarrow is not installed.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{name}: a Parquet file needs pyarrow; install with: pip install 'fastsiam[parquet]'"
        ) from error
    if not stream.seekable():
        raise DataError(f"{name}: Parquet must be a file, not a pipe: its index is at the end")

    def rows() -> Iterator[tuple[int, tuple[Any, ...]]]:
        number = count(1)
        try:
            for batch in file.iter_batches(ROWS):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield next(number), row
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: not a readable Parquet file: {error}") from error

    try:
        file = ParquetFile(stream)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error
    header = file.schema_arrow.names
    return Table(name, header, positions(header), rows(), unit="row")
