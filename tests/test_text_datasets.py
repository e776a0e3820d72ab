"""Readers of sentence pairs: what they accept, and the sentence they fail with."""

import csv
import io
import json
import math
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsiam.text.pairs import DataError, Pairs, drop_repeats, read_pairs, stream_pairs

DATA = Path(__file__).parent / "data"
STS = "sentence1\tsentence2\tscore\n"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_sick():
    pairs = read_pairs(DATA / "sick.txt")
    assert pairs.left == [
        "A man is opening a door",
        'A dog says "woof',
        "A bird isn't singing",
        "Zoë is at the café",
    ]
    assert pairs.right[1] == 'Nobody is "here'  # a lone quotation mark swallows nothing
    assert pairs.score == [4.8, 1.3, 3.65, 5.0]
    assert pairs.score_range == (1.0, 5.0)
    assert pairs.similarity == pytest.approx([0.95, 0.075, 0.6625, 1.0])
    assert len(pairs) == 4


def test_sts_has_a_range_of_its_own():
    pairs = read_pairs(DATA / "sts.tsv")
    assert pairs.score_range == (0.0, 5.0)
    assert pairs.similarity == pytest.approx([0.88, 0.0])


def test_legacy_pickle():
    pairs = read_pairs(DATA / "legacy.p")
    assert pairs.left == ["A cat sits", 'café "au lait"']
    assert pairs.right == ["The cat is sitting", "A cat sits"]
    assert pairs.score == [4.5, 1.0]
    assert pairs.score_range == (1.0, 5.0)


def test_pickle_of_python_3_under_another_name(write):
    path = write("pairs.bin", pickle.dumps([("é 漢", "b", 2), ["c", "", "3.5", "x"]]))
    pairs = read_pairs(path, score_range=(0, 4))
    assert pairs == Pairs(["é 漢", "c"], ["b", ""], [2.0, 3.5], (0.0, 4.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n\n \n\r\n",
        lambda text: "\n" + text,
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("sentence_A", "SENTENCE_a").replace("_score", "_Score "),
    ],
    ids=["crlf", "bom", "blank lines at the end", "blank line first", "no last line feed", "case"],
)
def test_forms_of_a_file(write, change):
    text = (DATA / "sick.txt").read_text(encoding="utf-8")
    assert read_pairs(write("x.txt", change(text))) == read_pairs(DATA / "sick.txt")


def test_csv_is_quoted(write):
    path = write("x.csv", 'q,a,b\n3,"one, ""two""","two\nlines"\n\n1,x,\n')
    pairs = read_pairs(path, columns=("a", "b", "q"))
    assert pairs == Pairs(['one, "two"', "x"], ["two\nlines", ""], [3.0, 1.0], (1.0, 5.0))


def test_json_lines(write):
    lines = [{"s": 7, "r": "b", "l": "a\u2028"}, {"l": "", "r": "d", "s": "-2.5", "more": None}]
    path = write("x.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    pairs = read_pairs(path, columns=("l", "r", "s"), score_range=(-3, 7))
    assert pairs == Pairs(["a\u2028", ""], ["b", "d"], [7.0, -2.5], (-3.0, 7.0))


def test_range_follows_a_known_header(write):
    path = write("x.tsv", "score\tsentence2\tother\tsentence1\n0\tb\to\ta\n")
    by_header = read_pairs(path)
    assert by_header == Pairs(["a"], ["b"], [0.0], (0.0, 5.0))
    assert read_pairs(path, columns=("sentence1", "sentence2", "score")) == by_header
    assert read_pairs(path, score_range=(0, 1)).score_range == (0.0, 1.0)
    with pytest.raises(DataError, match="from 1 to 5, got '0'"):
        read_pairs(path, columns=("other", "sentence2", "score"))


def test_exact_name_wins_over_another_letter_case(write):
    path = write("x.tsv", "A\ta\tb\ts\nupper\tlower\tright\t2\n")
    assert read_pairs(path, columns=("a", "b", "s")).left == ["lower"]
    assert read_pairs(path, columns=("A", "B", "S")).left == ["upper"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x: the file is empty"),
        ("\n \n", "x: the first line must be a header with tabs or commas"),
        ("one two three\n", "x: the first line must be a header .* got 'one two three'"),
        (STS, "x: no sentence pair in the file"),
        ("a\tb\tc\n1\t2\t3\n", "x: the header is none of the known ones.* the columns are a, b, c"),
        (
            "no header\t" + "word " * 99 + "\t1\n",
            r"the columns are no header, word .{150,190} \.\.\.$",
        ),
        ("score\t" + STS, "x: the header names the column 'score' more than once"),
        (STS + "a\tb\n", "x, line 2: must have 3 fields as the header has, got 2"),
        (STS + "a\tb\t1\n\na\tb\tc\t1\n", "x, line 4: must have 3 fields .* got 4"),
        (STS + "a\tb\tgood\n", "x, line 2: the score must be a number, got 'good'"),
        (STS + "a\tb\t1\na\tb\t\n", "x, line 3: the score must be a number, got ''"),
        (STS + "a\tb\t4,5\n", "x, line 2: the score must be a number, got '4,5'"),
        (STS + "a\tb\tnan\n", "x, line 2: the score must be from 0 to 5, got 'nan'"),
        (STS + "a\tb\t-inf\n", "x, line 2: the score must be from 0 to 5, got '-inf'"),
        (STS + "a\tb\t5.1\n", "x, line 2: the score must be from 0 to 5, got '5.1'"),
        (STS.encode() + b"ok\tok\t1\ncaf\xe9\tb\t1\n", "x, line 3: must be UTF-8 text.* 0xe9"),
        (STS.encode("utf-16"), "x, line 1: must be UTF-8 text, got the byte 0xff"),
        (
            STS.replace("\t", ",") + 'a,"b\nc,1\n',
            "x, line 2: must be CSV, .*unexpected end of data",
        ),
        (STS.replace("\t", ",") + 'a,"b\nc",1\nd,e,x\n', "x, line 4: the score must be a number"),
        ('{"sentence1": 1}\n', "x: the header is none of the known ones.* columns are sentence1"),
        ('{"a": 1}\n{"a": \n', "x: the header is none of the known"),
        ('[{"sentence1": "a"}]', "x, line 1: must be one JSON object, got"),
        ('{"a": \n', "x, line 1: must be one JSON object, got '{\"a\": '"),
    ],
)
def test_bad_file(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(write("x", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: must be one JSON object, got '{'"),
        ("[1]", r"line 2: must be one JSON object, got '\[1\]'"),
        ("[" * 100_000, "line 2: must be one JSON object"),
        ('{"l": "a", "r": "b"}', "line 2: no key 's'; the keys are l, r"),
        ('{"l": 5, "r": "b", "s": 1}', "line 2: a sentence must be text, got 5"),
        ('{"l": "a", "r": null, "s": 1}', "line 2: a sentence must be text, got None"),
        (
            '{"l": "a", "r": "b\\ud83d", "s": 1}',
            "line 2: a sentence must be Unicode text, got half",
        ),
        ('{"l": "a", "r": "b", "s": true}', "line 2: the score must be a number, got True"),
        ('{"l": "a", "r": "b", "s": [1]}', "line 2: the score must be a number"),
        ('{"l": "a", "r": "b", "s": NaN}', "line 2: the score must be from 1 to 5, got nan"),
        ('{"l": "a", "r": "b", "s": 1' + "0" * 400 + "}", "line 2: the score must be a number"),
    ],
)
def test_bad_json_line(write, line, message):
    path = write("x.jsonl", '{"l": "a", "r": "b", "s": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(path, columns=("l", "r", "s"))
    with pytest.raises(DataError, match=message):
        list(stream_pairs(path, columns=("l", "r", "s")))


@pytest.mark.parametrize("read", [read_pairs, lambda *a, **o: list(stream_pairs(*a, **o))])
def test_every_column_is_another_one(write, read):
    twice = write("x.tsv", "sentence_A\tsentence_A\tsentence_B\trelatedness_score\na\tx\tb\t1\n")
    with pytest.raises(DataError, match="the header names the column 'sentence_A' more than once"):
        read(twice)
    path = write("y.tsv", "l\tr\ts\nx\ty\t2\n")
    with pytest.raises(ValueError, match="names, got l, L, s for the columns l, l, s") as e:
        read(path, columns=("l", "L", "s"))
    assert not isinstance(e.value, DataError)


def test_missing_column(write):
    path = write("x.csv", "left,right,gold\na,b,1\n")
    with pytest.raises(DataError, match="no column 'score'; the columns are left, right, gold"):
        read_pairs(path, columns=("left", "right", "score"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "must hold a list, got dict"),
        (pickle.dumps([]), "no sentence pair"),
        (pickle.dumps([["a", "b"]]), r"row 1: must be \[sentence, sentence, score"),
        (pickle.dumps([["a", "b", 1], "abc"]), "row 2: must be .* got 'abc'"),
        (pickle.dumps([["a", 5, 1]]), "row 1: a sentence must be text, got 5"),
        (pickle.dumps([["a\udc80", "b", 1]]), "row 1: a sentence must be Unicode text, got half"),
        (pickle.dumps([["a", "b", 9]]), "row 1: the score must be from 1 to 5, got 9"),
        (pickle.dumps([[b"\xff", "b", 1]], protocol=0), "asks for _codecs.encode"),
        (b"(lp0\n(lp1\nS'\\xff'\naS'b'\naF1.0\naa.", "row 1: must be UTF-8 text"),
        (pickle.dumps([["a", "b", 1]])[:-3], "not a readable pickle"),
        (b"(lp0\nmess", "not a readable pickle"),
        (b"garbage", "not a readable pickle"),
        (b"\x80\x04\x95", "not a readable pickle"),
    ],
)
def test_bad_pickle(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(write("x.p", content))
    assert "x.p" in str(caught.value)


class _Dangerous:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(write, monkeypatch, tmp_path, protocol):
    monkeypatch.chdir(tmp_path)
    path = write("x.p", pickle.dumps([["a", "b", _Dangerous()]], protocol=protocol))
    with pytest.raises(DataError, match=r"the pickle asks for \w+\.mkdir; only lists"):
        read_pairs(path)
    assert list(tmp_path.iterdir()) == [path]


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.tsv: cannot be read: No such file"):
        read_pairs(tmp_path / "nowhere.tsv")
    with pytest.raises(DataError, match="cannot be read: "):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    "limits", [(1, 1), (5, 1), (math.nan, 5), (0, math.inf), (-1e308, 1e308), (0, 10**400)]
)
def test_bad_range(limits):
    with pytest.raises(ValueError, match="score_range must be two numbers, the lower first") as e:
        read_pairs(DATA / "sts.tsv", score_range=limits)
    assert not isinstance(e.value, DataError)  # the caller's mistake, not the file's


@pytest.mark.parametrize("columns", ["abc", ("a", "b"), ("a", "a", "b")])
def test_bad_columns(columns):
    with pytest.raises(ValueError, match="columns must be three different names"):
        read_pairs(DATA / "sts.tsv", columns=columns)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCORE = st.floats(0, 5)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "p"])
@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, SCORE), min_size=1))
def test_round_trip(tmp_path_factory, kind, rows):
    names = ["sentence1", "sentence2", "score"]
    if kind == "tsv":
        rows = [
            (*(text.replace("\t", " ").replace("\n", " ") for text in row[:2]), row[2])
            for row in rows
        ]
        content = "\n".join("\t".join(map(str, row)) for row in [names, *rows]).encode()
    elif kind == "csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([names, *rows])
        content = buffer.getvalue().encode()
    elif kind == "jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        content = "\n".join(lines).encode()
    else:
        content = pickle.dumps(rows)
    path = tmp_path_factory.mktemp("round") / f"x.{kind}"
    path.write_bytes(content)
    left, right, score = map(list, zip(*rows, strict=True))
    assert read_pairs(path, score_range=(0, 5)) == Pairs(left, right, score, (0.0, 5.0))


def test_drop_repeats():
    held = Pairs(["A man, running."], ["The dog"], [3.0], (1.0, 5.0))
    train = Pairs(
        ["a MAN running", "The dog!", "A man running", "The dog", ""],
        ["the dog", " a man   running", "A cat", "the dog", ""],
        [1.0, 2.0, 3.0, 4.0, 5.0],
        (0.0, 5.0),
    )
    kept, dropped = drop_repeats(train, held)
    assert dropped == 2
    assert kept == Pairs(
        ["A man running", "The dog", ""], ["A cat", "the dog", ""], [3.0, 4.0, 5.0], (0.0, 5.0)
    )
    assert drop_repeats(kept, held) == (kept, 0)
