"""Tokens: nltk's rules, without its downloads, and mostly without nltk."""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsiam.text import tokens
from fastsiam.text.tokens import END, part_tokens, split_parts, tokenize

pytest.importorskip("nltk")

# what nltk's rules name, what stands beside it, and what looks alike
PIECES = [
    *(" ", " ", " ", " ", " ", " ", "  ", "\t", "\n", "\r\n", "\x1c", "\x85", "\xa0", "\u2028"),
    *("'", "''", "'''", '"', '""', "`", "``", "\u2018", "\u2019", "\u201c", "\u201d", "\u201e"),
    *(".", "..", "...", ",", ",,", ":", ";", "?", "!", "-", "--", "---", "\u2013", "\u2014", "_"),
    *("(", ")", "[", "]", "{", "}", "<", ">", "\xab", "\xbb", "@", "#", "$", "%", "&", "*", "/"),
    *("cannot", "CanNot", "gonna", "gimme", "gotta", "lemme", "wanna", "d'ye", "more'n"),
    *("'tis", "'twas", "n't", "N'T", "'s", "'S", "'m", "'d", "'ll", "'LL", "'re", "'ve", "'t"),
    *("x", "s", "A", "word", "U.S.", "1", "2.5", "1,000", "10:30", "a.b", "well-known"),
    *("é", "漢", "\u0131", "\u017f", "\u212a", "\u0301", "\u200b", "\ud800", "\U0001f600", "٣"),
]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A man is singing", ["A", "man", "is", "singing"]),
        ("The dog isn't here.", ["The", "dog", "is", "n't", "here", "."]),
        ("Tom's cat, 5% (U.S.)", ["Tom", "'s", "cat", ",", "5", "%", "(", "U.S", ".", ")"]),
        ("Mr. Li lives in the U.S.", ["Mr.", "Li", "lives", "in", "the", "U.S", "."]),
        ('She said "no"', ["She", "said", "``", "no", "''"]),
        ("I cannot, he's gonna.", ["I", "can", "not", ",", "he", "'s", "gon", "na", "."]),
        ("  blue\t sky\n", ["blue", "sky"]),
        ("Zoë 漢字", ["Zoë", "漢字"]),
        ("", []),
        (" \t", []),
    ],
)
def test_tokens(sentence, expected):
    assert tokenize(sentence) == expected


@settings(deadline=None, max_examples=800)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("He left. )")  # a last full stop before a part of its own
@example('"He left." "')
@example("end .  ' \" ")
@example(" ''quoted'' ''quoted''")  # the first '' opens only behind a blank
@example("''quoted'' ''quoted''")
@example("s's'  ")
@example("dogs' ' tails'")
@example("word.\tword.")
@example(". )")
@example("wanna")
@example("a,,b ,, ,b,")
@example("\ud800")
def test_the_tokens_are_those_of_nltk(sentence):
    assert tokenize(sentence) == tokens._tokenizer().tokenize(sentence)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40) | st.text(st.characters(max_codepoint=127), max_size=40))
def test_any_text_has_the_tokens_of_nltk(sentence):
    assert tokenize(sentence) == tokens._tokenizer().tokenize(sentence)


def test_parts():
    assert split_parts("a b. c.") == [END + "a", "b.", "c." + END]
    assert split_parts('He left. " )') == [END + "He", 'left. " )' + END]
    assert split_parts("a\u00a0b c") == [END + "a\u00a0b c" + END]
    assert split_parts("") == [END + END]


def test_plain_words_do_not_ask_nltk(monkeypatch):
    asked = []

    class Tokenizer:
        def tokenize(self, text):
            asked.append(text)
            return text.split()

    monkeypatch.setattr(tokens, "_tokenizer", Tokenizer)
    part_tokens.cache_clear()
    sentence = "Plain words, Tom's well-known ones; isn't it 10 p.m. in the U.S. but odd'un: yes!"
    assert tokenize(sentence)[-3:] == ["odd'un:", "yes", "!"]
    assert asked == ["x odd'un: x"]
    part_tokens.cache_clear()


def test_a_caller_may_change_its_tokens():
    tokenize("a b").append("c")
    assert tokenize("a b") == ["a", "b"]


def test_not_a_string():
    with pytest.raises(TypeError, match="must be a string, got bytes"):
        tokenize(b"a cat")


def test_nltk_missing(monkeypatch):
    tokens._tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.tokenize.destructive", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        tokenize("words' that no other test uses")
