"""Files of sentences to files of numbers, and the search."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, D, make_pairs
from typer.testing import CliRunner

from fastsiam import bulk
from fastsiam.bulk import Hit, encode_file, score_file, search_file
from fastsiam.calibration import Calibration
from fastsiam.cli import app
from fastsiam.model import TextSiamese
from fastsiam.text import streams, tables
from fastsiam.text.pairs import DataError
from fastsiam.text.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
H = 5


def make_model(**options):
    torch.manual_seed(0)
    table = torch.randn(1 + len(WORDS), D)
    table[0] = 0
    return TextSiamese(Vocabulary(["<unk>", *WORDS]), table, H, device="cpu", **options)


PAIRS = make_pairs(60, seed=2)
LEFT, RIGHT = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]


@pytest.fixture(scope="module", params=["plain", "ensemble"])
def model(request):
    if request.param == "plain":
        return make_model(scale=0.5)
    return make_model(scale=[0.25, 0.5], bidirectional=True, pooling="max")


def test_search_finds_the_most_similar(model):
    corpus = list(dict.fromkeys(LEFT))  # equal sentences would tie
    expected = torch.stack([model.similarity([query] * len(corpus), corpus) for query in RIGHT])
    similarity, index = model.search(RIGHT, corpus, k=7)
    assert index.dtype == torch.int64
    assert similarity.shape == index.shape == (60, 7)
    torch.testing.assert_close(similarity, expected.sort(descending=True)[0][:, :7])
    torch.testing.assert_close(similarity, expected.gather(1, index))
    assert all(len(set(row)) == 7 for row in index.tolist())
    again = model.search(RIGHT, model.encode(corpus), k=7)
    torch.testing.assert_close(again, (similarity, index), rtol=1e-6, atol=0)


def test_search_for_one_string(model):
    corpus = ["dog", "the cat", "", "the cat", "cat"]
    similarity, index = model.search("the cat", corpus, k=5)
    assert similarity.shape == index.shape == (5,)
    assert index.tolist()[:2] == [1, 3]  # of equal ones the first comes first
    assert similarity[0] == similarity[1]
    # one sentence alone may go to another backend than five
    assert math.isclose(similarity[0], 1, rel_tol=1e-6)
    assert similarity[2] < 1
    assert sorted(index.tolist()) == list(range(5))
    assert math.isclose(similarity[4], model.similarity("the cat", corpus[index[4]]), rel_tol=1e-5)


def test_search_in_the_vectors_of_a_file(model, tmp_path):
    encode_file(model, write(tmp_path / "x", "\n".join(LEFT)), tmp_path / "v.npy")
    expected = model.search(RIGHT, model.encode(LEFT), k=3)
    for mode in (None, "r"):
        stored = np.load(tmp_path / "v.npy", mmap_mode=mode)
        torch.testing.assert_close(model.search(RIGHT, stored, k=3), expected)
    # as sentences, an array is a list
    torch.testing.assert_close(model.search(RIGHT, np.array(LEFT), k=3), expected)


def test_search_refuses():
    model = make_model()
    with pytest.raises(TypeError, match="search: corpus must be a list of strings"):
        model.search("a", "b")
    with pytest.raises(ValueError, match=r"search: corpus must be \[m, 5\], .* got \[3, 4\]"):
        model.search("a", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"search: corpus must be \[m, 5\], .* got \[3, 4\]"):
        model.search("a", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="search: k must be 1 to 2, the corpus, got 3"):
        model.search("a", ["a", "b"], k=3)
    with pytest.raises(ValueError, match="search: k must be 1 to 0, the corpus, got 10"):
        model.search("a", [])


def write(path, text):
    path.write_bytes(text.encode())
    return path


def table(rows, header=("sentence1", "sentence2", "score")):
    return "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])


def read_scores(path):
    """The numbers of a file of scores by line, counted from 1 behind the header."""
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return {
        number: tuple(map(float, line.split("\t")))
        for number, line in enumerate(lines, start=1)
        if line and line != "similarity\tscore"
    }


@pytest.mark.parametrize("rows", [7, 8192])
def test_scores_are_those_of_similarity(model, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(streams, "ROWS", rows)
    monkeypatch.setattr(bulk, "BATCH", 16)
    source, out = write(tmp_path / "pairs.tsv", table(PAIRS)), tmp_path / "scores.tsv"
    tallies = []
    tally = score_file(model, source, out, on_block=lambda tally: tallies.append(tally.position))
    assert out.read_text().startswith("similarity\tscore\n")
    expected = model.similarity(LEFT, RIGHT)
    scores = read_scores(out)
    assert list(scores) == list(range(2, 62))
    similarity, score = torch.tensor(list(scores.values())).unbind(1)
    torch.testing.assert_close(similarity, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(score, 1 + 4 * expected, rtol=0, atol=1e-4)
    assert tally.rows == 60
    assert tally.unknown == tally.truncated == 0
    assert len(tallies) == -(-60 // rows)
    assert tallies[-1] == tally.position == source.stat().st_size
    assert set(tmp_path.iterdir()) == {source, out}


def test_a_calibrated_score(tmp_path):
    model = make_model(calibration=Calibration([0.0, 0.5, 1.0], [0.0, 0.9, 1.0]))
    score_file(model, write(tmp_path / "x", table(PAIRS)), tmp_path / "out")
    for similarity, score in read_scores(tmp_path / "out").values():
        assert score == pytest.approx(model.to_score(similarity), abs=2e-4)


FORMS = {
    "lines are kept": (
        "\n\nsentence1\tsentence2\n\na cat\tdog\n \n\r\ndog\ta cat\n\n",
        None,
        {5, 8},
    ),
    "crlf and no last line end": ("sentence2\tsentence1\r\ndog\ta cat\r\na cat\tdog", None, {2, 3}),
    "no header": ("0\ta cat\tdog\n1\tdog\ta cat\n", ("2", "3"), {1, 2}),
    "csv": ('l,r\n"a cat\n",dog\n"dog","a, cat"\n', ("l", "r"), {2, 4}),
    "a lone carriage return": ('l,r\n"a\rcat",dog\ndog,a cat\n', ("l", "r"), {2, 3}),
    "csv without header": ('a cat,"dog"\ndog,a cat\n', ("1", "2"), {1, 2}),
    "json lines": (
        '{"r": "dog", "l": "a cat"}\n\n{"l": "dog", "r": "a cat"}\n',
        ("L", "R"),
        {1, 3},
    ),
    "byte order mark": ("\ufeffsentence_A\tsentence_B\na cat\tdog\ndog\ta cat\n", None, {2, 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_line_n_belongs_to_line_n(tmp_path, form):
    content, columns, lines = FORMS[form]
    model = make_model()
    score_file(model, write(tmp_path / "x", content), tmp_path / "out", columns=columns)
    scores = read_scores(tmp_path / "out")
    assert set(scores) == lines
    expected = model.similarity(["a cat", "dog"], ["dog", "a, cat" if form == "csv" else "a cat"])
    assert [similarity for similarity, _ in scores.values()] == pytest.approx(
        expected.tolist(), rel=1e-5
    )
    titled = (tmp_path / "out").read_text().startswith("similarity\tscore\n")
    assert titled == ("header" not in form and form != "json lines")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", None, "x: the file is empty"),
        ("\n", None, "x: the first line must be a header with tabs or commas"),
        ("a\tb\n1\t2\n", None, "x: the header is none of the known ones.* the columns are a, b$"),
        ("a\tb\n1\t2\n", ("a", "c"), "x: no column 'c'; the columns are a, b$"),
        ("a\tb\n1\t2\n", ("1", "3"), "x: no column '3'; the columns are 1, 2$"),
        ("a\tb\tb\n1\t2\t3\n", ("a", "b"), "x: the header names the column 'b' more than once"),
        ("a\tb\n1\t2\n\n1\n", ("a", "b"), "x, line 4: must have 2 fields as the header has, got 1"),
        ("a\tb\n1\t2\n1\n", ("1", "2"), "x, line 3: must have 2 fields as the first line has, got"),
        (
            '{"a": "x", "b": "y"}\n{"a": 1, "b": "y"}',
            ("a", "b"),
            "x, line 2: a sentence must be te",
        ),
        (
            '{"a": "x", "b": "y"}\n\n{"a": "x", "b": "\\ud83d"}\n{"a": "x", "b": "y"}',
            ("a", "b"),
            "x, line 3: a sentence must be Unicode text, got half",
        ),
        ('{"a": "x", "b": "y"}\n{"a": "x"}', ("a", "b"), "x, line 2: no key 'b'; the keys are a"),
        ('a,b\nx,"y\n', ("a", "b"), "x, line 2: must be CSV, .*unexpected end of data"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_the_old_scores(tmp_path, content, columns, message):
    source, out = write(tmp_path / "x", content), write(tmp_path / "out", "old")
    with pytest.raises(DataError, match=message) as caught:
        score_file(make_model(), source, out, columns=columns)
    assert "\n" not in str(caught.value)
    assert out.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_no_pairs_below_a_header(tmp_path):
    tally = score_file(make_model(), write(tmp_path / "x", table([])), tmp_path / "out")
    assert tally.rows == 0
    assert (tmp_path / "out").read_text() == "similarity\tscore\n"


def test_not_utf8_names_the_line(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"1\t2\n" * 5 + b"caf\xe9\t2\n")
    for block in (1, 1 << 20):
        monkeypatch.setattr(tables, "BLOCK_BYTES", block)
        with pytest.raises(DataError, match="x, line 6: must be UTF-8 text, got the byte 0xe9"):
            score_file(make_model(), tmp_path / "x", tmp_path / "out", columns=("1", "2"))
        with pytest.raises(DataError, match="x, line 6: must be UTF-8 text, got the byte 0xe9"):
            encode_file(make_model(), tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize("rows", [7, 8192])
def test_vectors_are_those_of_encode(model, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(streams, "ROWS", rows)
    sentences = ["", *LEFT, "  ", "zebra", LEFT[0]]
    source = write(tmp_path / "x.txt", "\r\n".join(sentences))
    tally = encode_file(model, source, tmp_path / "v.npy")
    stored = np.load(tmp_path / "v.npy")
    assert stored.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(stored), model.encode(sentences))
    assert (stored[0] == 0).all()
    assert tally.rows == len(sentences)
    assert tally.unknown == 1
    assert tally.sentences <= (len({*sentences}) if rows > 60 else tally.rows)


def test_vectors_of_a_column_in_float64(tmp_path):
    model = make_model(dtype=torch.float64)
    source = write(tmp_path / "x.tsv", table(PAIRS))
    encode_file(model, source, tmp_path / "v.npy", column="Sentence2")
    stored = np.load(tmp_path / "v.npy")
    assert stored.dtype == np.float64
    torch.testing.assert_close(torch.from_numpy(stored), model.encode(RIGHT))


def test_half_precision_is_written_as_float32(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    encode_file(model, write(tmp_path / "x", "\n".join(LEFT)), tmp_path / "v.npy")
    stored = np.load(tmp_path / "v.npy")
    assert stored.dtype == np.float32
    assert torch.equal(torch.from_numpy(stored), model.encode(LEFT).float())
    score_file(model, write(tmp_path / "y", table(PAIRS)), tmp_path / "out")
    similarity = torch.tensor([s for s, _ in read_scores(tmp_path / "out").values()])
    torch.testing.assert_close(similarity, model.similarity(LEFT, RIGHT), rtol=0.05, atol=0.01)


def test_no_sentence_gives_no_vector(tmp_path):
    model = make_model()
    encode_file(model, write(tmp_path / "x", ""), tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (0, H)


def test_counts_of_cut_and_unknown_words(tmp_path):
    model = make_model(max_len=3)
    rows = [("a cat zebra dog", "emu", 1), ("a cat zebra dog", "a dog", 1)]
    tally = score_file(model, write(tmp_path / "x", table(rows)), tmp_path / "out")
    assert (tally.rows, tally.sentences, tally.tokens) == (2, 3, 6)
    assert (tally.unknown, tally.truncated) == (2, 1)


def test_output_that_is_no_plain_file(tmp_path):
    model = make_model()
    source = write(tmp_path / "x", table(PAIRS))
    with pytest.raises(IsADirectoryError):
        score_file(model, source, tmp_path)
    with pytest.raises(FileNotFoundError):
        score_file(model, source, tmp_path / "no" / "scores.tsv")
    # a link stays a link, a device a device
    (tmp_path / "link").symlink_to("behind")
    score_file(model, source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(read_scores(tmp_path / "behind")) == 60
    score_file(model, source, os.devnull)
    assert not Path(os.devnull).is_file()
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    got = []
    reader.start()
    score_file(model, source, tmp_path / "pipe")
    reader.join()
    assert got == [(tmp_path / "behind").read_bytes()]
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            score_file(model, source, "/dev/full")


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_dev_stdout_may_be_a_pipe(folder, tmp_path):
    source = write(tmp_path / "x", table(PAIRS))
    score_file(make_model(), source, tmp_path / "expected")
    command = [sys.executable, "-m", "fastsiam", "score", str(folder), str(source)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", "/dev/stdout"], env=env, capture_output=True, check=True
    )
    assert done.stdout == (tmp_path / "expected").read_bytes()


def test_a_file_written_over_keeps_its_mode(tmp_path):
    source, out = write(tmp_path / "x.tsv", table(PAIRS)), tmp_path / "scores.tsv"
    for mode in (0o600, 0o640):
        out.touch()
        out.chmod(mode)
        score_file(make_model(), source, out)
        assert out.stat().st_mode & 0o777 == mode
        assert out.read_text()


def test_what_is_read_is_not_written_over(folder, tmp_path):
    source = write(tmp_path / "x", table(PAIRS))
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link"):
        for write_file in (score_file, encode_file):
            with pytest.raises(ValueError, match="out must be another file than those"):
                write_file(make_model(), source, out)
        found = run("search", folder, "--corpus", source, "--query", "a", "--out", out)
        assert found.exit_code == 2
        assert "out must be another file" in found.stderr
    assert source.read_text() == table(PAIRS)
    assert set(tmp_path.iterdir()) == {source, tmp_path / "link"}


@pytest.mark.parametrize("write_file", [score_file, encode_file])
def test_an_interrupted_command_leaves_the_old_file(tmp_path, write_file):
    def stop(tally):
        raise KeyboardInterrupt

    source, out = write(tmp_path / "x", table(PAIRS)), write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        write_file(make_model(), source, out, on_block=stop)
    assert out.read_text() == "old"
    assert set(tmp_path.iterdir()) == {source, out}


def test_vectors_need_a_file(capfd, tmp_path):
    with pytest.raises(ValueError, match="encode_file: out must be a file and no pipe"):
        encode_file(make_model(), write(tmp_path / "x", "a"), "-")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("rows", [3, 8192])
def test_search_of_a_file_is_that_of_a_list(model, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(streams, "ROWS", rows)
    corpus = [*LEFT[:30], "", LEFT[3], " ", *LEFT[30:]]
    words = [sentence for sentence in corpus if sentence.strip()]
    source = write(tmp_path / "corpus", "\n".join(corpus))
    similarity, index = model.search(RIGHT[:9], words, k=6)
    found = search_file(model, RIGHT[:9], source, 6)
    got = torch.tensor([[hit.similarity for hit in hits] for hits in found])
    torch.testing.assert_close(got, similarity)
    assert [[hit.sentence for hit in hits] for hits in found] == [
        [words[i] for i in row] for row in index.tolist()
    ]
    assert all(corpus[hit.line - 1] == hit.sentence for hits in found for hit in hits)
    # the same with the vectors of a file
    encode_file(model, source, tmp_path / "v.npy")
    assert search_file(model, RIGHT[:9], source, 6, vectors=tmp_path / "v.npy") == found
    assert len(search_file(model, ["cat"], source, 1000)[0]) == len(words)


@pytest.mark.parametrize("rows", [1, 3, 8192])
def test_what_underflows_is_found_by_distance_and_line(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(streams, "ROWS", rows)
    corpus = write(tmp_path / "corpus", "a\ncat\ndog\nkid\nruns\nsits\neats\n")
    # the query has no word, so its vector is 0 and these are the distances
    distances = [5, 3, 4, 3, 0, 9, 3]
    np.save(tmp_path / "v.npy", np.array([[-d] + [0] * (H - 1) for d in distances], np.float32))
    model = make_model(scale=1e4)
    (hits,) = search_file(model, [""], corpus, 5, vectors=tmp_path / "v.npy")
    assert [hit.line for hit in hits] == [5, 2, 4, 7, 3]
    assert [hit.similarity for hit in hits] == [1, 0, 0, 0, 0]


def test_search_of_a_file_refuses(tmp_path):
    model, corpus = make_model(), write(tmp_path / "corpus", "a cat\na dog\n")
    with pytest.raises(ValueError, match="search_file: k must be at least 1, got 0"):
        search_file(model, ["a"], corpus, 0)
    with pytest.raises(DataError, match="empty: no sentence in the file"):
        search_file(model, ["a"], write(tmp_path / "empty", "\n \n"))
    with pytest.raises(DataError, match=r"corpus: must be an \.npy file that .*magic string"):
        search_file(model, ["a"], corpus, vectors=corpus)
    np.savez(tmp_path / "v.npz", np.zeros((2, 5), np.float32))
    with pytest.raises(DataError, match=r"v.npz: must be an \.npy file that .*magic string"):
        search_file(model, ["a"], corpus, vectors=tmp_path / "v.npz")
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        search_file(model, ["a"], corpus, vectors=tmp_path / "nowhere")
    for shape, message in (
        ((2, 4), r"v.npy: must hold \[n, 5\] floating-point numbers.*got \[2, 4\] of float32"),
        ((1, 5), "v.npy: holds 1 vectors, the corpus has more sentences"),
        ((3, 5), "v.npy: holds 3 vectors, but .*corpus has 2"),
    ):
        np.save(tmp_path / "v.npy", np.zeros(shape, np.float32))
        with pytest.raises(DataError, match=message):
            search_file(model, ["a"], corpus, vectors=tmp_path / "v.npy")


# the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    return folder


def run(*args, **options):
    result = CliRunner().invoke(app, [str(arg) for arg in args], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_commands(folder, tmp_path):
    pairs = write(tmp_path / "pairs.tsv", table(PAIRS))
    result = run("score", folder, pairs, "--out", tmp_path / "scores.tsv")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert re.fullmatch(
        r"scoring: 60 rows in \S+ s; \d+ different sentences, 0.0% of their words without a "
        r"vector, 0 cut to 73 tokens\n",
        result.stderr,
    )
    piped = run("score", folder, "-", "--out", "-", "--quiet", input=pairs.read_bytes())
    assert piped.stdout_bytes == (tmp_path / "scores.tsv").read_bytes()
    assert piped.stderr == ""

    corpus = write(tmp_path / "corpus.txt", "\n".join(LEFT))
    result = run("encode", folder, corpus, "--out", tmp_path / "v.npy", "--quiet")
    assert result.exit_code == 0
    assert np.load(tmp_path / "v.npy").shape == (60, H)

    expected = search_file(make_model(), ["a cat", "dog"], corpus, 3)
    query = ("--query", "a cat", "--query", "dog", "-k", 3, "--quiet")
    result = run("search", folder, "--corpus", corpus, *query)
    assert result.stdout == "".join(
        f"{number}\t{hit.similarity:.6g}\t{hit.line}\t{hit.sentence}\n"
        for number, hits in enumerate(expected, start=1)
        for hit in hits
    )
    queries = write(tmp_path / "queries.txt", "a cat\n\ndog\n")
    options = ("--vectors", tmp_path / "v.npy", "--json", "-k", 3, "--quiet")
    result = run("search", folder, "--corpus", corpus, "--queries", queries, *options)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(values["number"], values["query"]) for values in found] == [(1, "a cat"), (3, "dog")]
    assert [[Hit(**hit) for hit in values["hits"]] for values in found] == expected


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("score", "x.tsv", "--out", "o", "--columns", "a"), 2, "columns must be LEFT,RIGHT"),
        (("score", "nowhere.tsv", "--out", "o"), 3, "nowhere.tsv: cannot be read: No such file"),
        (("score", "x.tsv", "--out", "no/o"), 4, "no/o: No such file or directory"),
        (("score", "corpus", "--out", "o"), 3, "corpus: the first line must be a header"),
        (
            ("encode", "half.jsonl", "--out", "o", "--column", "s"),
            3,
            "half.jsonl, line 1: a sentence",
        ),
        (("encode", "corpus", "--out", "-"), 2, "out must be a file and no pipe"),
        (("encode", "corpus", "--out", "o", "--column", "1"), 3, "corpus: the first line must be"),
        (("search", "--corpus", "corpus"), 2, "give --query or --queries, one of them"),
        (("search", "--corpus", "-", "--queries", "-"), 2, "cannot both be the standard input"),
        (("search", "--corpus", "corpus", "--query", "a", "-k", "0"), 2, "k must be at least 1"),
    ],
)
def test_a_failed_command_is_one_line(folder, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.tsv", table(PAIRS))
    write(tmp_path / "corpus", "a cat\n")
    write(tmp_path / "half.jsonl", '{"s": "\\ud83d"}\n')
    result = run(args[0], folder, *args[1:])
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.startswith("fastsiam: ")
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"x.tsv", "corpus", "half.jsonl"}


@pytest.mark.parametrize(
    ("name", "number", "code", "word"),
    [
        ("score", signal.SIGTERM, 143, "terminated"),
        ("encode", signal.SIGTERM, 143, "terminated"),
        ("score", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_leaves_the_old_file_and_no_half_one(folder, tmp_path, name, number, code, word):
    out = write(tmp_path / "out", "old")
    command = [sys.executable, "-m", "fastsiam", name, str(folder), "-", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}

    def listen():
        # a shell's background jobs ignore Ctrl-C, and so would a child of theirs
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(command, env=env, preexec_fn=listen, **pipes) as process:
        deadline = time.monotonic() + 60
        # it waits for the standard input with the new file begun
        while len(list(tmp_path.iterdir())) == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr.read() == f"fastsiam: {word}\n".encode()
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "old"


def test_a_broken_pipe_ends_quietly(folder, tmp_path):
    source = write(tmp_path / "x.tsv", table(PAIRS * 300))  # more than a pipe holds
    command = [sys.executable, "-m", "fastsiam", "score", folder, source, "--out", "-", "--quiet"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), env=env, **pipes) as process:
        assert process.stdout.readline() == b"similarity\tscore\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def words_of(sentences):
    return sum(len(sentence.split()) for sentence in sentences)


def test_the_vocabulary_is_projected_once_for_a_file(model, tmp_path, monkeypatch):
    """As soon as the file has more words than the vocabulary, and for the rest of the file."""
    monkeypatch.setattr(streams, "ROWS", 4)
    blocks, spans, real = [], [], TextSiamese.prepared

    @contextmanager
    def prepared(self):
        start = len(blocks)
        with real(self):
            yield
        spans.append((start, len(blocks)))

    monkeypatch.setattr(TextSiamese, "prepared", prepared)
    source = write(tmp_path / "x", "\n".join(LEFT))
    encode_file(model, source, tmp_path / "v.npy", on_block=blocks.append)
    first = next(i for i in range(15) if words_of(LEFT[: 4 * i + 4]) > len(model.vocabulary))
    assert spans[-1] == (first, 15)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode(LEFT).numpy(), atol=1e-6)
