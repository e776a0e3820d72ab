"""Each format works wherever a file of pairs is taken: training, evaluation, scoring, encoding."""

import csv
import io
import json
import os
import pickle
import threading

import numpy as np
import pytest
from test_bulk import make_model
from tiny import make_pairs, write_files
from typer.testing import CliRunner

from fastsiam.bulk import encode_file, score_file
from fastsiam.cli import app
from fastsiam.text.columns import SICK_HEADER
from fastsiam.text.files import DataError
from fastsiam.text.formats import FORMATS, open_table
from fastsiam.text.pairs import read_pairs, stream_pairs

PAIRS = [*make_pairs(38, seed=9), ("a cat, here", 'so "quoted"', 4.5), ("007 é", "NA", 1.0)]
LABELS = ["ENTAILMENT", "NEUTRAL", "CONTRADICTION", "none"] * 10
ROWS = [(*pair, label) for pair, label in zip(PAIRS, LABELS, strict=True)]


def as_parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    columns = {
        name: list(values)
        for name, values in zip(SICK_HEADER, zip(*rows, strict=True), strict=True)
    }
    parquet.write_table(pyarrow.table(columns), out, row_group_size=7)
    return out.getvalue()


def as_csv(rows):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([SICK_HEADER, *rows])
    return out.getvalue().encode()


WRITERS = {
    "tsv": lambda rows: "".join(
        "\t".join(map(str, row)) + "\n" for row in (SICK_HEADER, *rows)
    ).encode(),
    "csv": as_csv,
    "jsonl": lambda rows: "".join(
        json.dumps(dict(zip(SICK_HEADER, row, strict=True))) + "\n" for row in rows
    ).encode(),
    "parquet": as_parquet,
    "pkl": pickle.dumps,
}


@pytest.fixture(params=WRITERS)
def file(request, tmp_path):
    path = tmp_path / f"pairs.{request.param}"
    path.write_bytes(WRITERS[request.param](ROWS))
    return path


def test_scored_pairs(file):
    pairs = read_pairs(file)
    assert list(zip(pairs.left, pairs.right, pairs.score, strict=True)) == PAIRS
    assert pairs.entailment == [2, 1, 0, -1] * 10
    assert pairs.score_range == (1.0, 5.0)
    expected = [(left, right, (score - 1) / 4) for left, right, score in PAIRS]
    assert list(stream_pairs(file)) == expected
    turned = read_pairs(file, columns=(*SICK_HEADER[1::-1], SICK_HEADER[2]), score_range=(0, 10))
    assert (turned.left, turned.right) == (pairs.right, pairs.left)
    assert turned.similarity == [score / 10 for score in pairs.score]


def test_files_of_sentences(file, tmp_path):
    model = make_model(scale=0.5)
    left, right, _ = zip(*PAIRS, strict=True)
    tally = score_file(model, file, tmp_path / "scores.tsv")
    lines = (tmp_path / "scores.tsv").read_text().splitlines()
    lines = lines[1:] if file.suffix in (".tsv", ".csv") else lines
    found = [float(line.split("\t")[0]) for line in lines]
    assert tally.rows == len(found) == len(PAIRS)
    assert found == pytest.approx(model.similarity(left, right).tolist(), rel=1e-5)
    encode_file(model, file, tmp_path / "v.npy", column="sentence_B")
    assert np.allclose(np.load(tmp_path / "v.npy"), model.encode(right).numpy(), atol=1e-6)


def test_the_commands_train_and_evaluate(file, tmp_path):
    files = write_files(tmp_path / "data")
    options = {"train": file, "dev": files.dev, "vectors": files.vectors, "device": "cpu"}
    options |= {"epochs": 1, "hidden-size": 3}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for more in ("--no-stream", "--stream"):
        out = tmp_path / more
        done = CliRunner().invoke(app, ["train", *words, more, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert "train: 40 pairs" in done.output
    done = CliRunner().invoke(app, ["evaluate", str(out), str(file), "--json"])
    assert json.loads(done.output)["n"] == len(PAIRS)


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "pkl"])
def test_a_pipe_is_read_once_and_to_its_end(tmp_path, kind):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(WRITERS[kind](ROWS),))
    writer.start()
    assert len(read_pairs(pipe)) == len(PAIRS)
    writer.join()


def test_parquet_in_a_pipe_is_refused(tmp_path):
    data = as_parquet(ROWS)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data[:100],))
    writer.start()
    with pytest.raises(DataError, match=r"pipe: Parquet must be a file, not a pipe"):
        read_pairs(pipe)
    writer.join()


def test_a_column_that_is_missing_is_named(file):
    with pytest.raises(DataError, match=rf"{file.name}: no column 'x'; the columns are sentence_A"):
        read_pairs(file, columns=("x", "sentence_B", "relatedness_score"))


def test_a_bad_row_is_named(tmp_path):
    for kind, writer in WRITERS.items():
        path = tmp_path / f"bad.{kind}"
        path.write_bytes(writer([*ROWS, ("a", "b", 5.5, "")]))
        with pytest.raises(DataError, match=rf"{path.name}, (row|line) 4[12]: the score must be"):
            read_pairs(path)


def test_the_last_format_takes_any_file():
    assert [f.tells("x", b"a\tb\n") for f in FORMATS] == [False] * (len(FORMATS) - 1) + [True]
    with pytest.raises(DataError, match="x: the file is empty"):
        open_table("x", io.BytesIO())
