"""Tokens: nltk's rules, without its downloads."""

import sys

import pytest

from fastsiam.text.tokens import _tokenizer, tokenize

pytest.importorskip("nltk")


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("A man is singing", ["A", "man", "is", "singing"]),
        ("The dog isn't here.", ["The", "dog", "is", "n't", "here", "."]),
        ("Tom's cat, 5% (U.S.)", ["Tom", "'s", "cat", ",", "5", "%", "(", "U.S", ".", ")"]),
        ('She said "no"', ["She", "said", "``", "no", "''"]),
        ("  blue\t sky\n", ["blue", "sky"]),
        ("Zoë 漢字", ["Zoë", "漢字"]),
        ("", []),
        (" \t", []),
    ],
)
def test_tokens(sentence, tokens):
    assert tokenize(sentence) == tokens


def test_a_caller_may_change_its_tokens():
    tokenize("a b").append("c")
    assert tokenize("a b") == ["a", "b"]


def test_not_a_string():
    with pytest.raises(TypeError, match="must be a string, got bytes"):
        tokenize(b"a cat")


def test_nltk_missing(monkeypatch):
    _tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize.destructive", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        tokenize("words that no other test uses")
