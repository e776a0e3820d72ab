"""The formats of files with sentences: a test of the first bytes, and a reader, for each."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from fastsiam.text.files import DataError
from fastsiam.text.parquet import parquet_table
from fastsiam.text.pickles import pickle_table
from fastsiam.text.tables import Table, delimited_table, json_table

BLANK = b" \t\r\n\xef\xbb\xbf"  # with the mark that UTF-8 may begin with


class Format(NamedTuple):
    """A format of tables.

    Attributes:
        tells: whether a file is of this format, from its name and its first bytes.
        read: returns the table; takes the file's name, its bytes as a stream, and whether the
            first line names the columns, where a format leaves that open.
    """

    tells: Callable[[str, bytes], bool]
    read: Callable[[str, BinaryIO, bool], Table]


# the first that tells a file reads it
FORMATS = (
    Format(lambda _, start: start.startswith(b"PAR1"), parquet_table),
    Format(
        lambda name, start: (
            name.endswith((".p", ".pkl", ".pickle")) or start.startswith((b"(lp", b"\x80"))
        ),
        pickle_table,
    ),
    # an array is refused there, with its line
    Format(lambda _, start: start.lstrip(BLANK).startswith((b"{", b"[{")), json_table),
    Format(lambda *_: True, delimited_table),
)


def open_table(name: str, stream: BinaryIO, *, header: bool = True) -> Table:
    """Tell the format of a table and read it as its rows are asked for.

    Args:
        name: of the file, for messages; its ending tells a pickle.
        stream: its bytes; text is UTF-8.
        header: whether the first line of delimited text names the columns.

    Raises:
        DataError: no table, or, while the rows are read, a row that does not fit.
        ImportError: the package that reads the format is not installed.
    """
    if isinstance(stream, io.BufferedReader):
        start = stream.peek()
    else:  # bytes in memory
        start = stream.read(io.DEFAULT_BUFFER_SIZE)
        stream.seek(-len(start), io.SEEK_CUR)
    if not start:
        raise DataError(f"{name}: the file is empty")
    return next(f for f in FORMATS if f.tells(name, start)).read(name, stream, header)
