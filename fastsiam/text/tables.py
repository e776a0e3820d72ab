"""Tables of text: tab-separated, quoted CSV and JSON lines, a block of lines at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, NoReturn

from fastsiam.text.files import DataError, short

BLOCK_BYTES = 1 << 20  # of whole lines, decoded together


@dataclass(frozen=True)
class Table:
    """A table of sentences, whose rows are read as they are asked for.

    Attributes:
        name: of the file, for messages.
        header: names of the columns; "1", "2" and so on where no line has them.
        keys: name of a column -> the index or key of its field in a row.
        rows: number and fields of each row, to be read once, without blank lines. A row is a
            sequence, or a mapping where each has names of its own.
        titled: whether a line before the rows has the names.
        unit: what the numbers count, from 1.
    """

    name: str
    header: list[str]
    keys: Mapping[str, int | str]
    rows: Iterator[tuple[int, Any]]
    titled: bool = False
    unit: str = "line"

    def where(self, number: int) -> str:
        """Return the place of a row, for a message."""
        return f"{self.name}, {self.unit} {number}"


def positions(header: Sequence[str]) -> dict[str, int | str]:
    """Return the `keys` of a table whose rows are sequences."""
    return {column: index for index, column in enumerate(header)}


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


def delimited_table(name: str, stream: BinaryIO, header: bool) -> Table:
    """Read tab-separated text as it is, or quoted CSV.

    Args:
        name: of the file, for messages.
        stream: its bytes, UTF-8.
        header: whether the first line names the columns.

    Raises:
        DataError: no table, or, while the rows are read, not UTF-8 or a line that does not fit.
    """
    blocks, first = _text_blocks(name, stream), ""
    start = ""
    while not first and (block := next(blocks, None)) is not None:
        start += block
        first = next((line for line in start.split("\n") if line.strip(" \r")), "")
    blocks = chain([start], blocks)
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

    return Table(name, columns, positions(columns), rows(), titled=header)


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


def json_table(name: str, stream: BinaryIO, _header: bool) -> Table:
    """Read JSON lines: an object a line, whose keys are the columns.

    Raises:
        DataError: not UTF-8, or a line that is no object.
    """

    def rows() -> Iterator[tuple[int, _Record]]:
        for number, line in read_lines(name, stream):
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
    return Table(name, header, {key: key for key in header}, chain([first], records))


class _Record(dict[str, Any]):
    """A JSON object whose missing key is an error of the file."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> NoReturn:
        raise DataError(f"{self.where}: no key {name!r}; the keys are {', '.join(self)}")
