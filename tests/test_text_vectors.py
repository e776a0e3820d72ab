"""Vector files of every kind, against gensim's own writer, and the table made from them."""

import gzip
import math
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsiam.text.pairs import DataError
from fastsiam.text.vectors import load_vectors

KeyedVectors = pytest.importorskip("gensim.models").KeyedVectors

WORDS = ["the", "cat", "Paris", "USA", "café", "gray", "1", "never-asked"]


@pytest.fixture
def kv():
    vectors = KeyedVectors(5)
    vectors.add_vectors(WORDS, np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32))
    return vectors


def binary(kv, path):
    kv.save_word2vec_format(str(path), binary=True)


def text(kv, path):
    kv.save_word2vec_format(str(path), binary=False)


def glove(kv, path):
    lines = [" ".join([word, *map(str, kv[word].tolist())]) for word in WORDS]
    path.write_text("\n".join(lines), encoding="utf-8")


def trailing_blanks(kv, path):
    glove(kv, path)
    body = path.read_bytes().replace(b"\n", b" \r\n")
    path.write_bytes(b"8 5\r\n" + body + b" \r\n")


def byte_order_mark(kv, path):
    glove(kv, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def byte_order_mark_and_header(kv, path):
    text(kv, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def tabs(kv, path):
    text(kv, path)
    path.write_bytes(path.read_bytes().replace(b" ", b"\t"))


def runs_of_blanks(kv, path):
    glove(kv, path)
    lines = path.read_bytes().replace(b" ", b" \t  ").splitlines(keepends=True)
    path.write_bytes(b"".join(b"  " + line for line in lines))


def binary_with_line_feeds(kv, path):
    records = [word.encode() + b" " + kv[word].tobytes() + b"\n" for word in WORDS]
    path.write_bytes(b"8 5\n" + b"".join(records))


KINDS = [binary, text, glove, trailing_blanks, binary_with_line_feeds]
KINDS += [byte_order_mark, byte_order_mark_and_header, tabs, runs_of_blanks]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(kv, tmp_path, kind, zipped):
    path = tmp_path / "vectors.whatever"  # the name says nothing
    kind(kv, path)
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    loaded = load_vectors([path], ["the", "cat", "café", "1", "cat"])
    assert loaded.words == ["<unk>", "1", "café", "cat", "the"]
    assert loaded.table.dtype == torch.float32
    assert loaded.table[0].tolist() == [0.0] * 5
    assert np.array_equal(loaded.table[1:].numpy(), [kv[word] for word in loaded.words[1:]])


def test_look_up_order_and_coverage(kv, tmp_path):
    binary(kv, tmp_path / "v")
    tokens = ["the"] * 3 + ["THE", "paris", "usa", "grey", "cat", "mouse", "mouse", "ant", "gnu"]
    spelling = {"grey": "gray", "cat": "the", "the": "the", "usa": "nowhere"}
    loaded = load_vectors([tmp_path / "v"], tokens, spelling=spelling)
    source = dict(zip(loaded.words, loaded.table, strict=True))
    for word, form in [
        ("the", "the"),
        ("THE", "the"),
        ("paris", "Paris"),
        ("usa", "USA"),  # the target of its spelling is in no file
        ("grey", "gray"),
        ("cat", "the"),  # the spelling comes before the word
    ]:
        assert np.array_equal(source[word], kv[form]), word
    assert set(loaded.words) == {"<unk>", "the", "THE", "paris", "usa", "grey", "cat"}
    coverage = loaded.coverage
    rules = ("spelling", "word", "lower", "capital", "upper", "missing")
    assert coverage.tokens == dict(zip(rules, (2, 3, 1, 1, 1, 4), strict=True))
    assert coverage.types == dict(zip(rules, (2, 1, 1, 1, 1, 3), strict=True))
    assert coverage.missing == [("mouse", 2), ("ant", 1), ("gnu", 1)]
    assert coverage.token_share == pytest.approx(8 / 12)


def test_a_counter_of_words_is_enough(kv, tmp_path):
    binary(kv, tmp_path / "v")
    tokens = ["cat", "the", "cat", "gnu"]
    one, other = (load_vectors([tmp_path / "v"], words) for words in (tokens, Counter(tokens)))
    assert one.words == other.words
    assert one.coverage == other.coverage


def test_files_side_by_side(kv, tmp_path):
    binary(kv, tmp_path / "a")
    (tmp_path / "b").write_text("2 2\ncat 1 2\ndog 3 4\n")
    loaded = load_vectors([tmp_path / "a", tmp_path / "b"], ["cat", "dog", "the", "gnu"])
    assert loaded.words == ["<unk>", "cat", "dog", "the"]
    expected = [[0] * 7, [*kv["cat"], 1, 2], [0, 0, 0, 0, 0, 3, 4], [*kv["the"], 0, 0]]
    assert np.array_equal(loaded.table, np.array(expected, np.float32))
    assert loaded.coverage.types["word"] == 3
    assert loaded.coverage.missing == [("gnu", 1)]


def test_random_vectors(kv, tmp_path):
    binary(kv, tmp_path / "a")
    (tmp_path / "b").write_text("cat 30 40\ndog 0 50\n")
    paths = [tmp_path / "a", tmp_path / "b"]

    def rows(words, seed=0):
        loaded = load_vectors(paths, words, oov="random", seed=seed)
        return dict(zip(loaded.words, loaded.table, strict=True))

    many = rows(["cat", "the", "dog", "gnu"])
    assert np.array_equal(many["cat"], [*kv["cat"], 30, 40])
    assert np.array_equal(many["the"][:5], kv["the"])
    assert many["<unk>"].tolist() == [0] * 7
    # by seed and word, whatever else is there and in which order
    few = rows(["gnu", "dog", "cat"])
    assert torch.equal(many["gnu"], few["gnu"])
    assert torch.equal(many["dog"], few["dog"])
    assert not torch.equal(many["gnu"], rows(["gnu", "cat"], seed=1)["gnu"])
    assert not torch.equal(many["gnu"][:5], many["dog"][:5])
    # typical length: the files' mean lengths, 50 in the second
    names = [f"w{i}" for i in range(2000)]
    table = torch.stack([row for word, row in rows([*names, "cat"]).items() if word[0] == "w"])
    size = table.pow(2).sum(1).mean().sqrt()
    expected = float(np.linalg.norm(kv.vectors, axis=1).mean())
    assert float(table[:, 5:].pow(2).sum(1).mean().sqrt()) == pytest.approx(50, rel=0.05)
    assert float(table[:, :5].pow(2).sum(1).mean().sqrt()) == pytest.approx(expected, rel=0.05)
    assert float(size) == pytest.approx(math.hypot(50, expected), rel=0.05)
    assert float(table.mean()) == pytest.approx(0, abs=1)


def test_random_vectors_are_the_same_in_another_process(tmp_path):
    (tmp_path / "v").write_text("cat 3 4\n")
    code = (
        "import sys; from fastsiam.text.vectors import load_vectors;"
        "print(load_vectors([sys.argv[1]], {'cat', 'dog', 'gnu'}, oov='random').table.tolist())"
    )
    here = load_vectors([tmp_path / "v"], ["gnu", "dog", "cat"], oov="random").table.tolist()
    command = [sys.executable, "-c", code, str(tmp_path / "v")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"{here}\n"


def test_limit(kv, tmp_path):
    for kind in KINDS:
        kind(kv, tmp_path / "v")
        loaded = load_vectors([tmp_path / "v"], WORDS, limit=3)
        assert loaded.words == ["<unk>", "Paris", "cat", "the"]
        assert len(load_vectors([tmp_path / "v"], WORDS, limit=99).words) == 9


def test_words_with_blanks_are_words(tmp_path):
    (tmp_path / "v").write_text("cat 1 2\n. . . 3 4\nat home 5 6\ndog 7 8\n")
    loaded = load_vectors([tmp_path / "v"], ["dog", "at home", ". . ."])
    assert loaded.words == ["<unk>", ". . .", "at home", "dog"]
    assert loaded.table[1:].tolist() == [[3, 4], [5, 6], [7, 8]]


def test_the_first_of_repeated_words_counts(tmp_path):
    (tmp_path / "v").write_text("3 1\ncat 1\ncat 2\ndog 3\n")
    assert load_vectors([tmp_path / "v"], ["cat"]).table[1].tolist() == [1]


def test_a_word_without_letters_is_passed_over(tmp_path):
    """As gensim writes one."""
    (tmp_path / "v").write_text("3 2\ncat 1 2\n 5 6\ndog 3 4\n")
    assert load_vectors([tmp_path / "v"], ["cat", "dog"]).table[1:].tolist() == [[1, 2], [3, 4]]


def test_a_large_file_is_never_held(tmp_path):
    count, dim = 60_000, 50
    record = np.zeros(count, dtype=[("word", "S8"), ("vector", "<f4", dim)])
    record["word"] = [b"w%06d " % i for i in range(count)]
    record["vector"] = np.arange(count)[:, None]
    (tmp_path / "v").write_bytes(b"%d %d\n" % (count, dim) + record.tobytes())
    load_vectors([tmp_path / "v"], ["w000001"], limit=10)
    tracemalloc.start()
    loaded = load_vectors([tmp_path / "v"], ["w059999", "w000000"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded.table[:, 0].tolist() == [0, 0, 59_999]
    assert peak < (tmp_path / "v").stat().st_size / 2


BINARY = b"2 2\ncat " + struct.pack("<2f", 1, 2) + b"dog " + struct.pack("<2f", 3, 4)
KIND = "must be word vectors in word2vec or GloVe format"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"sentence1\tsentence2\tscore\n", KIND),
        (b"(lp0\n(lp1\nS'a'\n", KIND),
        (b"\x89PNG\r\n\x1a\n\0\0", KIND),
        (b"cat\n", KIND),
        (b"0 5\n", KIND),
        (b"5 0\n", KIND),
        (b'{"cat": [1, 2]}', KIND),
        (b"2 2\nsome words here\n", "ends after 1 of 2 vectors: cut short, or not a word2vec"),
        (BINARY[:-1], "ends after 1 of 2 vectors: cut short"),
        (b"3" + BINARY[1:], "ends after 2 of 3 vectors: cut short"),
        (b"3 2\ncat 1 2\ndog 3 4\n", "ends after 2 of 3 vectors: cut short"),
        (b"3 2\ncat 1 2\ndog 3\n", "line 3: must be a word and 2 numbers"),
        (b"cat 1 2\ndog 3 4 5\n", "line 2: must be a word and 2 numbers"),
        (b"cat 1 2\ndog 3\n", "line 2: must be a word and 2 numbers"),
        (b"cat\t1\t2\ndog\t3\t4\t5\n", "line 2: must be a word and 2 numbers"),
        (b"2 3\ncat 1 2\n", "line 2: must be a word and 3 numbers"),
        (b"cat 1 2\ndog 3 x\n", "not a file of word vectors"),
        (b"cat 1 1e300\n", "a vector holds NaN or infinity"),
        (b"cat 1 nan\n", "a vector holds NaN or infinity"),
        (BINARY[:12] + b"\0\0\xc0\x7f" + BINARY[16:], "a vector holds NaN or infinity"),
        (BINARY[:12] + b"\1\0\x80\x7f" + BINARY[16:], "a vector holds NaN or infinity"),
        (gzip.compress(BINARY * 50, mtime=0)[:-12], "damaged or cut short"),
        (gzip.compress(BINARY, mtime=0)[:-8] + b"\0" * 8, "damaged or cut short"),
        (b"\x1f\x8b not gzip", "damaged or cut short"),
        (b"gnu 1 2\n", "none of the 2 words looked up has a vector in it"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "v"
    path.write_bytes(content)
    for oov in ("zero", "random"):
        with pytest.raises(DataError, match=message) as caught:
            load_vectors([path], ["cat", "dog"], oov=oov)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"2 2\n", b"cat 1 2\n", b"\x1f\x8b\x08\x00"]))
def test_any_bytes_load_or_fail_in_one_way(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("any") / "v"
    path.write_bytes(start + content)
    message = None
    try:
        loaded = load_vectors([path], ["cat"])
    except DataError as error:
        message = str(error)
    if message is None:
        assert loaded.words == ["<unk>", "cat"]
        assert loaded.table.isfinite().all()
    else:
        assert str(path) in message


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_vectors([tmp_path / "nowhere"], ["cat"])
    with pytest.raises(DataError, match="cannot be read"):
        load_vectors([tmp_path], ["cat"])


def test_bad_arguments(tmp_path):
    with pytest.raises(DataError, match="there is no word to look up"):
        load_vectors([tmp_path / "v"], [])
    with pytest.raises(ValueError, match="oov must be 'zero' or 'random', got 'mean'"):
        load_vectors([tmp_path / "v"], ["cat"], oov="mean")
    with pytest.raises(ValueError, match="paths must be a list of files"):
        load_vectors([], ["cat"])
    with pytest.raises(ValueError, match="paths must be a list of files"):
        load_vectors("v", ["cat"])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_vectors([tmp_path / "v"], ["cat"], limit=0)


def test_import_loads_torch_alone():
    code = (
        "import sys, fastsiam.text.vectors, fastsiam.text.pairs, fastsiam.text.sample;"
        "print([m for m in ('gensim', 'nltk', 'scipy', 'triton') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
