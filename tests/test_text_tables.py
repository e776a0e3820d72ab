"""Tables read in blocks: the same rows and line numbers wherever a block ends."""

import csv
import io
import json

import pytest

from fastsiam.text import tables
from fastsiam.text.files import DataError
from fastsiam.text.formats import open_table
from fastsiam.text.tables import read_lines

ROWS = [
    ("left", "right"),
    ("é 漢", ""),
    ('a "quoted" word', "x, y"),
    ("", "b"),
    ("last", "r\u2028"),
]


def as_csv(rows):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


FILES = {
    "tsv": "\n\n" + "\n".join("\t".join(row) for row in ROWS[:3]) + "\n\n \n\tb\r\nlast\tr\u2028",
    "csv": as_csv([*ROWS[:2], ("two\nlines", "\r\n"), *ROWS[2:]]),
    "jsonl": "\n".join(json.dumps(dict(zip(ROWS[0], row, strict=True))) for row in ROWS[1:]),
}


def rows_of(text, **options):
    table = open_table("x", io.BytesIO(text.encode()), **options)
    return [
        (number, *(row[table.keys[name]] for name in table.header)) for number, row in table.rows
    ]


@pytest.mark.parametrize("block", [1, 7, 20, 1 << 20])
def test_rows_and_line_numbers(monkeypatch, block):
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    assert rows_of(FILES["tsv"]) == [(4, *ROWS[1]), (5, *ROWS[2]), (8, *ROWS[3]), (9, *ROWS[4])]
    assert rows_of("\ufeff" + FILES["csv"]) == [
        *((2, *ROWS[1]), (3, "two\nlines", "\r\n")),
        *((6, *ROWS[2]), (7, *ROWS[3]), (8, *ROWS[4])),
    ]
    assert rows_of("\n\n" + FILES["jsonl"]) == [(i + 2, *ROWS[i]) for i in range(1, 5)]


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_no_header(monkeypatch, block):
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    table = open_table("x", io.BytesIO(b"\n\tb\nc\t\n"), header=False)
    assert table.header == ["1", "2"]
    assert not table.titled
    assert list(table.rows) == [(2, ["", "b"]), (3, ["c", ""])]
    assert rows_of("a,b\n", header=False) == [(1, "a", "b")]
    with pytest.raises(DataError, match="x, line 2: must have 2 fields as the first line has"):
        rows_of("a\tb\nc\n", header=False)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_carriage_return_alone_ends_no_line_of_csv(monkeypatch, block):
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    assert rows_of('a,b\n"one\rline",x\n"\r\n\r",y\r\nlast,z\n') == [
        *((2, "one\rline", "x"), (3, "\r\n\r", "y"), (5, "last", "z")),
    ]
    with pytest.raises(DataError, match=r"x, line 2: must be CSV.*new-line character seen"):
        rows_of("a,b\nc\rd,e\n")


def test_a_field_too_long_for_csv_is_not_called_badly_quoted():
    long = "x" * 200_000
    assert rows_of(f"a\tb\n{long}\tc\n") == [(2, long, "c")]
    with pytest.raises(
        DataError, match=r"x, line 2: must be CSV, at most 131072 char.*field limit"
    ):
        rows_of(f"a,b\n{long},c\n")


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_lines(monkeypatch, block):
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    lines = read_lines("x", io.BytesIO("\ufeffa\r\n\n é\u2028\t\nlast".encode()))
    assert list(lines) == [(1, "a"), (2, ""), (3, " é\u2028\t"), (4, "last")]
    assert list(read_lines("x", io.BytesIO(b""))) == []
    assert list(read_lines("x", io.BytesIO(b"\n"))) == [(1, "")]
    with pytest.raises(DataError, match="x, line 3: must be UTF-8 text, got the byte 0xe9"):
        list(read_lines("x", io.BytesIO(b"a\nb\n\xe9\n")))


def test_a_file_is_not_held(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    stream = io.BytesIO(b"a\tb\n" * 10_000)
    rows = open_table("x", stream).rows
    assert next(rows) == (2, ["a", "b"])
    assert stream.tell() <= 2000
