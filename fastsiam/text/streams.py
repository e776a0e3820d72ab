"""Files of sentences as streams: blocks of rows in, bytes out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastsiam.text.columns import KNOWN_HEADERS, as_sentence, find_columns, need_columns, shown
from fastsiam.text.files import DataError, is_unicode
from fastsiam.text.formats import open_table
from fastsiam.text.tables import Table, read_lines
from fastsiam.text.whole_file import whole_file

ROWS = 8192  # in a block

Name = str | PathLike[str]  # of a file; "-" is the standard input or output


class Block(NamedTuple):
    """Rows that are worked on together: the line each begins on, and their text by column."""

    lines: tuple[int, ...]
    columns: list[list[str]]


def sentence_blocks(name: str, stream: BinaryIO, column: str | None) -> Iterator[Block]:
    """Yield the lines of a text, or one column of a table.

    Args:
        name: of the file, for messages.
        stream: its bytes, UTF-8.
        column: name of the table's column, or its number from "1" where the table has no header;
            None: a text with a sentence a line, of which any may be empty.

    Raises:
        DataError: a line does not fit, or there is no such column.
    """
    if column is not None:
        table = _open_table(name, stream, [column])
        yield from _blocks(table, need_columns(name, table.header, [column]))
        return
    lines = read_lines(name, stream)
    while some := list(islice(lines, ROWS)):
        numbers, sentences = zip(*some, strict=True)
        yield Block(numbers, [list(sentences)])


def pair_blocks(
    name: str, stream: BinaryIO, columns: Sequence[str] | None
) -> tuple[bool, Iterator[Block]]:
    """Read two columns of a table.

    Args:
        name: of the file, for messages.
        stream: its bytes, UTF-8.
        columns: names of the two sentences, or their numbers from "1" where the table has no
            header; not needed for the headers of SICK and STS.

    Returns:
        Whether a line of the file names the columns, and the rows, without blank lines.

    Raises:
        DataError: there are no such columns or, while the rows are read, a line does not fit.
        ValueError: `columns` is not two names.
    """
    if columns is not None and (isinstance(columns, str) or len(columns) != 2):
        raise ValueError(f"pair_blocks: columns must be two names, got {columns!r}")
    table = _open_table(name, stream, columns)
    if columns is None:
        for left, right, _ in KNOWN_HEADERS:
            if None not in find_columns(table.header, (left, right)):
                columns = (left, right)
    if columns is None:
        raise DataError(
            f"{name}: the header is none of the known ones; name the two sentences (columns=, "
            "--columns LEFT,RIGHT), by numbers such as 1,2 where there is no header; the columns "
            f"are {shown(table.header)}"
        )
    return table.titled, _blocks(table, need_columns(name, table.header, columns))


@contextmanager
def reading(source: Name) -> Iterator[BinaryIO]:
    """Open a file to read, or the standard input for "-".

    Raises:
        DataError: it cannot be opened.
    """
    if str(source) == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    with stream:
        yield stream


@contextmanager
def writing(out: Name) -> Iterator[BinaryIO]:
    """Open a file to be written whole or not at all; a pipe, a device or "-" is written at once.

    Raises:
        OSError: it cannot be written.
    """
    if str(out) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(out)
    # asked before links are followed: /dev/stdout leads to a pipe, which has no path of its own
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            error.filename = error.filename or str(path)  # a failed write does not say where
            raise
        return
    with whole_file(Path(os.path.realpath(path))) as file:  # a link stays one
        yield file


def check_output(who: str, out: Name, *sources: Name) -> None:
    """Refuse to write a file over one that is read.

    Raises:
        ValueError: `out` is one of the sources.
    """
    for source in map(Path, sources):
        # a device or a pipe may be both
        if source.is_file() and Path(out).exists() and source.samefile(out):
            raise ValueError(f"{who}: out must be another file than those that are read, got {out}")


def _open_table(name: str, stream: BinaryIO, columns: Sequence[str] | None) -> Table:
    numbered = columns is not None and all(column.isdecimal() for column in columns)
    return open_table(name, stream, header=not numbered)


def _blocks(table: Table, columns: Sequence[str]) -> Iterator[Block]:
    fields = [itemgetter(table.keys[column]) for column in columns]
    while some := list(islice(table.rows, ROWS)):
        numbers, rows = zip(*some, strict=True)
        block = Block(numbers, [list(map(field, rows)) for field in fields])
        for values in block.columns:
            # JSON has other ones, and halves of characters
            if set(map(type, values)) != {str} or not is_unicode("".join(values)):
                values[:] = (
                    as_sentence(table.where(number), value)
                    for number, value in zip(numbers, values, strict=True)
                )
        yield block
