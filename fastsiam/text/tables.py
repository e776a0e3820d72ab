"""Tables of text: tab-separated, quoted CSV and JSON lines, read a block of lines at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, NoReturn

from fastsiam.text.files import DataError, short

Row = tuple[str, Mapping[str, Any]]  # where it stands ("FILE, line N"), and its fields by column

BLOCK_BYTES = 1 << 20  # of whole lines, decoded together


@dataclass(frozen=True)
class Table:
    """A table that is being read.

    Attributes:
        header: names of the columns; "1", "2" and so on where no line has them.
        titled: whether a line before the rows has the names.
        keys: name of a column -> what picks its field out of a row.
        rows: line number and fields of each row; to be read once. Blank lines are left out.
    """

    header: list[str]
    titled: bool
    keys: Mapping[str, int | str]
    rows: Iterator[tuple[int, Any]]


def read_table(name: str, stream: BinaryIO) -> tuple[list[str], Iterator[Row]]:
    """Tell the kind of table by its first lines and read it as its rows are asked for.

    Args:
        name: of the file, for messages.
        stream: its bytes, UTF-8.

    Returns:
        The names of the columns and the rows, blank lines left out.

    Raises:
        DataError: not UTF-8, no header, or, while the rows are read, a line that does not fit.
    """
    table = open_table(name, stream)

    def rows() -> Iterator[Row]:
        for number, row in table.rows:
            fields = row if isinstance(row, dict) else dict(zip(table.header, row, strict=True))
            yield f"{name}, line {number}", fields

    return table.header, rows()


def open_table(name: str, stream: BinaryIO, *, header: bool = True) -> Table:
    """Tell the kind of table by its first lines and read it as its rows are asked for.

    Args:
        name: of the file, for messages.
        stream: its bytes, UTF-8.
        header: whether the first line names the columns; JSON lines have their names in each.

    Raises:
        DataError: no table, or, while the rows are read, not UTF-8 or a line that does not fit.
    """
    blocks = _text_blocks(name, stream)
    start = ""
    for block in blocks:
        start += block
        if start.strip():
            break
    if not start:
        raise DataError(f"{name}: the file is empty")
    blocks = chain([start], blocks)
    if start.lstrip().startswith(("{", "[{")):  # an array is refused there, with its line
        return _json_table(name, blocks)
    return _delimited_table(name, start, blocks, header)


def read_lines(name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text, without their ends, and their numbers from 1.

    Raises:
        DataError: a line is not UTF-8.
    """
    return enumerate(_lines(_text_blocks(name, stream)), start=1)


def _text_blocks(name: str, stream: BinaryIO) -> Iterator[str]:
    """Yield whole lines, about BLOCK_BYTES together."""
    done = 0
    while lines := stream.readlines(BLOCK_BYTES):
        data = b"".join(lines)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = done + data.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{name}, line {line}: must be UTF-8 text, got the byte 0x{data[error.start]:02x}"
            ) from error
        yield text if done else text.removeprefix("\ufeff")
        done += len(lines)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    for block in blocks:
        for line in block.removesuffix("\n").split("\n"):
            yield line.rstrip("\r")


def _delimited_table(name: str, start: str, blocks: Iterator[str], header: bool) -> Table:
    first = next((line for line in start.split("\n") if line.strip(" \r")), "")
    if "\t" in first:
        # unquoted: a lone " in a sentence must not swallow the lines after it
        numbered: Iterator[tuple[int, list[str]]] = (
            (number, line.split("\t"))
            for number, line in enumerate(_lines(blocks), start=1)
            if line.strip(" ")
        )
    elif "," in first:
        numbered = _csv_rows(name, blocks)
    else:
        raise DataError(
            f"{name}: the first line must be a header with tabs or commas between the columns, "
            f"got {short(first)}"
        )
    number, fields = next(numbered)
    columns = [column.strip() for column in fields]
    if not header:
        columns = [str(column) for column in range(1, len(fields) + 1)]
        numbered = chain([(number, fields)], numbered)

    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, fields in numbered:
            if len(fields) != len(columns):
                raise DataError(
                    f"{name}, line {number}: must have {len(columns)} fields as the "
                    f"{'header' if header else 'first line'} has, got {len(fields)}"
                )
            yield number, fields

    return Table(columns, header, {column: i for i, column in enumerate(columns)}, rows())


def _csv_rows(name: str, blocks: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    # with their ends, as csv wants them; a CR alone ends no line, so that its count is the file's
    lines = chain.from_iterable(io.StringIO(block, newline="\n") for block in blocks)
    reader = csv.reader(lines, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields and fields != [""]:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        # behind the dash csv gives advice to programmers
        raise DataError(
            f"{name}, line {start}: must be CSV, at most {csv.field_size_limit()} characters a "
            f"field, quoted where it holds a line's end, got: {str(error).partition(' - ')[0]}; "
            "tab-separated text has neither quotes nor that limit"
        ) from error


def _json_table(name: str, blocks: Iterator[str]) -> Table:
    def rows() -> Iterator[tuple[int, _Record]]:
        for number, line in enumerate(_lines(blocks), start=1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: must be one JSON object, got {short(line)}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: must be one JSON object, got {short(line)}")
            yield number, _Record(where, record)

    records = rows()
    first = next(records)
    header = list(first[1])
    return Table(header, False, {column: column for column in header}, chain([first], records))


class _Record(dict[str, Any]):
    """A JSON object whose missing key is an error of the file."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> NoReturn:
        raise DataError(f"{self.where}: no key {name!r}; the keys are {', '.join(self)}")
