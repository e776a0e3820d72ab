"""Sentences to tokens: those of nltk's Treebank-style tokenizer, which needs no download.

nltk takes 100 us for a sentence. Its rules look past a blank in two places only: at a quotation
mark that may begin the sentence, and at a full stop that may end it. So a sentence is cut at its
blanks. The tokens of a part depend on the part, and on whether it begins or ends the sentence. Most
parts are repeated or plain words; nltk tokenizes each other part once. docs/tokens.md proves it.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

# stands in a part for an end of the sentence
END = "\n"

# characters that may stand between the last full stop and the end of the sentence
CLOSING = " ])}>\"'\u00bb\u201d\u2019"

# a word with single hyphens and full stops inside, a clitic or a full stop behind it, and a mark
# that nltk splits off; the last full stop is a mark
_PLAIN = re.compile(
    r"\n?(\w+(?:[-.]\w+)*)(?:(n't|N'T|'(?:[sSmMdD]|ll|LL|re|RE|ve|VE))|(\.(?![.\n])))?"
    r"([,:;?!]|\.(?=\n))?\n?",
    re.ASCII,
)

# words of letters alone that nltk cuts in two
_CONTRACTIONS = re.compile("cannot|gimme|gonna|gotta|lemme|wanna", re.IGNORECASE)


@cache
def _tokenizer() -> Any:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
    except ImportError as error:
        raise ImportError("tokenize: nltk is missing; install it with: pip install nltk") from error
    return NLTKWordTokenizer()


def split_parts(sentence: str) -> list[str]:
    """Cut a sentence at its blanks into parts for `part_tokens`.

    Args:
        sentence: any text, may be empty.

    Returns:
        At least one part. The first starts with END and the last ends with it. A sentence with
        whitespace other than blanks, or another character that cannot be printed, is one part.

    Raises:
        TypeError: `sentence` is not a string.
    """
    if not isinstance(sentence, str):
        raise TypeError(f"tokenize: sentence must be a string, got {type(sentence).__name__}")
    if not sentence.isprintable():
        return [END + sentence + END]
    parts = sentence.split(" ")
    if sentence and sentence[-1] in CLOSING:
        # the last full stop may stand before this part: the parts up to it stay together
        last = len(parts) - 1
        while last and not parts[last].rstrip(CLOSING):
            last -= 1
        parts[last:] = [" ".join(parts[last:])]
    parts[0] = END + parts[0]
    parts[-1] += END
    return parts


@lru_cache(maxsize=1 << 16)
def part_tokens(part: str) -> tuple[str, ...]:
    """Return the tokens of a part from `split_parts`.

    Raises:
        ImportError: nltk is not installed.
    """
    plain = _PLAIN.fullmatch(part)
    if plain and not _CONTRACTIONS.search(part):
        word, clitic, stop, mark = plain.groups("")
        return tuple(filter(None, (word + stop, clitic, mark)))
    # a word in place of the rest of the sentence, on each side that has a rest
    starts, ends = part.startswith(END), part.endswith(END)
    text = part[starts : len(part) - ends]
    tokens = _tokenizer().tokenize(f"{'' if starts else 'x '}{text}{'' if ends else ' x'}")
    return tuple(tokens[not starts : len(tokens) - (not ends)])


def tokenize(sentence: str) -> list[str]:
    """Split a sentence into words and punctuation marks, as nltk does; case is kept.

    Args:
        sentence: any text, may be empty. It is taken as one sentence: a full stop is split off
            at its end only.

    Returns:
        The tokens from left to right; none for an empty or blank sentence.

    Raises:
        ImportError: nltk is not installed.
        TypeError: `sentence` is not a string.
    """
    return [token for part in split_parts(sentence) for token in part_tokens(part)]
