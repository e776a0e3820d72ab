"""Tables of text: tab-separated, quoted CSV and JSON lines, as rows of the columns asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastsiam.text.files import DataError, short

Row = tuple[str, Mapping[str, Any]]  # where it stands ("FILE, line N"), and its fields by column


def read_table(path: Path, data: bytes) -> tuple[list[str], Iterator[Row]]:
    """Tell the kind of table by its content and read it.

    Args:
        path: the file's name, for messages.
        data: its bytes.

    Returns:
        The names of the columns and the rows, blank lines left out.

    Raises:
        DataError: not UTF-8, no header, or, while the rows are read, a line that does not fit.
    """
    text = _decode(path, data)
    if text.lstrip().startswith(("{", "[{")):  # an array is refused there, with its line
        return _json_rows(path, text)
    return _delimited_rows(path, text)


def find_columns(header: Sequence[str], wanted: Sequence[str]) -> list[str | None]:
    """Return the header's name for each wanted one, in any letter case; None for one not there."""
    # an exact name wins over one in another letter case
    by_name = {name.lower(): name for name in reversed(header)} | {name: name for name in header}
    return [by_name.get(name, by_name.get(name.lower())) for name in wanted]


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: must be UTF-8 text, got the byte 0x{data[error.start]:02x}"
        ) from error


def _delimited_rows(path: Path, text: str) -> tuple[list[str], Iterator[Row]]:
    first = text.lstrip().split("\n", 1)[0]
    if "\t" in first:
        # unquoted: a lone " in a sentence must not swallow the lines after it
        lines = enumerate((line.rstrip("\r") for line in text.split("\n")), start=1)
        numbered: Iterator[tuple[int, list[str]]] = (
            (number, line.split("\t")) for number, line in lines if line.strip(" ")
        )
    elif "," in first:
        numbered = _csv_rows(path, text)
    else:
        raise DataError(
            f"{path}: the first line must be a header with tabs or commas between the columns, "
            f"got {short(first)}"
        )
    header = [name.strip() for name in next(numbered)[1]]

    def rows() -> Iterator[Row]:
        for number, fields in numbered:
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, line {number}: must have {len(header)} fields as the header has, "
                    f"got {len(fields)}"
                )
            yield f"{path}, line {number}", dict(zip(header, fields, strict=True))

    return header, rows()


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields and fields != [""]:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not quoted as CSV must be: {error}") from error


def _json_rows(path: Path, text: str) -> tuple[list[str], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: must be one JSON object, got {short(line)}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: must be one JSON object, got {short(line)}")
            yield where, _Record(where, record)

    header = next(rows())[1]
    return list(header), rows()


class _Record(dict[str, Any]):
    """A JSON object whose missing key is an error of the file."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> NoReturn:
        raise DataError(f"{self.where}: no key {name!r}; the keys are {', '.join(self)}")
