"""Sentences to tokens, by nltk's Treebank-style tokenizer, which needs no download."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any


@cache
def _tokenizer() -> Any:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
    except ImportError as error:
        raise ImportError("tokenize: nltk is missing; install it with: pip install nltk") from error
    return NLTKWordTokenizer()


@lru_cache(maxsize=1 << 16)  # a corpus repeats sentences and is read more than once a run
def _tokens(sentence: str) -> tuple[str, ...]:
    return tuple(_tokenizer().tokenize(sentence))


def tokenize(sentence: str) -> list[str]:
    """Split a sentence into words and punctuation marks; case is kept.

    Args:
        sentence: any text, may be empty. It is taken as one sentence: a full stop is split off
            at its end only.

    Returns:
        The tokens from left to right; none for an empty or blank sentence.

    Raises:
        ImportError: nltk is not installed.
        TypeError: `sentence` is not a string.
    """
    if not isinstance(sentence, str):
        raise TypeError(f"tokenize: sentence must be a string, got {type(sentence).__name__}")
    return list(_tokens(sentence))
