"""Words to ids: the order of the look-up, lengths, cuts and counts."""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsiam.text import vocabulary as module
from fastsiam.text.pairs import DataError
from fastsiam.text.tokens import tokenize
from fastsiam.text.vocabulary import Vocabulary, load_spelling

pytest.importorskip("nltk")

WORDS = ["<unk>", "cat", "Paris", "USA", "gray", "dog", "Dog"]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("cat", "cat"),
        ("CAT", "cat"),
        ("paris", "Paris"),
        ("PARIS", "Paris"),
        ("usa", "USA"),
        ("Dog", "Dog"),  # the word itself before its lower case
        ("DOG", "dog"),  # lower before Capital
        ("grey", "gray"),  # by the spelling
        ("hound", "dog"),
        ("Hound", "<unk>"),  # a spelling holds for the word as written
        ("dog", "dog"),  # and only for words without a row
        ("usA", "USA"),  # a spelling whose target has no row falls to the cases
        ("mouse", "<unk>"),
        ("", "<unk>"),
    ],
)
def test_id(word, found):
    spelling = {"grey": "gray", "hound": "dog", "dog": "cat", "usA": "nowhere"}
    assert WORDS[Vocabulary(WORDS, spelling).id(word)] == found


def test_encode():
    encoded = Vocabulary(WORDS).encode(["Cat, dog", "", "a cat a", "paris"])
    assert encoded.ids.tolist() == [[1, 0, 5], [0, 0, 0], [0, 1, 0], [2, 0, 0]]
    assert encoded.lengths.tolist() == [3, 0, 3, 1]
    assert encoded.ids.dtype == encoded.lengths.dtype == torch.int64
    assert encoded.truncated == 0
    assert encoded.unknown == {"a": 2, ",": 1}


def test_encode_keeps_the_first_tokens():
    encoded = Vocabulary(WORDS).encode(["cat dog USA mouse", "cat dog USA", "dog"], max_len=3)
    assert encoded.ids.tolist() == [[1, 5, 3], [1, 5, 3], [5, 0, 0]]
    assert encoded.lengths.tolist() == [3, 3, 1]
    assert encoded.truncated == 1
    assert not encoded.unknown  # what was cut off is not looked up


def test_default_max_len():
    encoded = Vocabulary(WORDS).encode(["cat " * 80])
    assert encoded.lengths.tolist() == [73]
    assert encoded.ids.tolist() == [[1] * 73]


@pytest.mark.parametrize(("sentences", "shape"), [([], [0, 0]), (["", " "], [2, 0])])
def test_encode_nothing(sentences, shape):
    encoded = Vocabulary(WORDS).encode(sentences)
    assert list(encoded.ids.shape) == shape
    assert encoded.lengths.tolist() == [0] * len(sentences)
    assert encoded.lengths.dtype == torch.int64


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["cat", "Dog", "usa", "grey", "mouse", "n't"]), max_size=9)),
    st.integers(1, 12),
)
def test_encode_agrees_with_id(lines, max_len):
    vocabulary = Vocabulary(WORDS, {"grey": "gray"})
    sentences = [" ".join(line) for line in lines]
    encoded = vocabulary.encode(sentences, max_len)
    expected = [[vocabulary.id(word) for word in tokenize(s)][:max_len] for s in sentences]
    got = [row[:length].tolist() for row, length in zip(encoded.ids, encoded.lengths, strict=True)]
    assert got == expected
    assert encoded.ids.shape[1] == max(map(len, expected), default=0)
    assert int((encoded.ids == 0).sum()) == encoded.unknown.total() + sum(
        encoded.ids.shape[1] - len(line) for line in expected
    )


@pytest.mark.parametrize("remembered", [0, 1, 1000])
def test_what_is_remembered_changes_nothing(monkeypatch, remembered):
    monkeypatch.setattr(module, "REMEMBERED", remembered)
    vocabulary = Vocabulary(WORDS)
    for _ in range(3):
        encoded = vocabulary.encode(["mouse, cat mouse.", "Dog, rat"])
        assert encoded.ids.tolist() == [[0, 0, 1, 0, 0], [6, 0, 0, 0, 0]]
        assert encoded.lengths.tolist() == [5, 3]
        assert encoded.unknown == {"mouse": 2, ",": 2, ".": 1, "rat": 1}
    assert vocabulary.encode(["a rat"]).unknown == {"a": 1, "rat": 1}


def test_threads_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 20)
    vocabulary = Vocabulary(WORDS)

    def work(thread):
        for step in range(100):
            words = [f"w{thread}x{step}x{i}" for i in range(20)]
            assert vocabulary.encode([f"cat {word}" for word in words]).unknown == Counter(words)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)


def test_through_json():
    vocabulary = Vocabulary(WORDS, {"grey": "gray"})
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again.words == WORDS
    assert again.spelling == {"grey": "gray"}
    assert len(again) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must start with '<unk>'"),
        (["cat", "<unk>"], "must start with '<unk>'"),
        (["<unk>", "a", "b", "a"], "got 'a' twice"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(words)


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be a list of strings, got one string"):
        Vocabulary(WORDS).encode("a cat")
    with pytest.raises(TypeError, match="must be a string, got int"):
        Vocabulary(WORDS).encode(["a cat", 5])
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        Vocabulary(WORDS).encode(["a cat"], max_len=0)


def test_spelling_file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"grey": "gray", "caf\\u00e9": "cafe"}', encoding="utf-8")
    assert load_spelling(path) == {"grey": "gray", "café": "cafe"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"{", "must be a JSON object of strings"),
        (b'["a"]', "must be a JSON object of strings, got list"),
        (b'{"a": ["b"]}', r"must map 'a' to a word, got \['b'\]"),
        (b'{"a": "\xe9"}', "must be a JSON object of strings"),
        (rb'{"a": "\ud83d"}', r"must hold Unicode text, got 'a' and '\\ud83d'"),
        (rb'{"\ude00": "a"}', r"must hold Unicode text, got '\\ude00' and 'a'"),
    ],
)
def test_bad_spelling_file(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_spelling(path)
    assert "words.json" in str(caught.value)


def test_no_spelling_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_spelling(tmp_path / "nowhere.json")
