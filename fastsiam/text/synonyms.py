"""More training pairs: words swapped for synonyms that are close to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsiam.text.files import DataError, read_object
from fastsiam.text.pairs import Pairs
from fastsiam.text.tokens import tokenize
from fastsiam.text.vocabulary import Vocabulary

CLOSE = 0.6  # least cosine of a word's vector and that of its synonym
SWAPPED = 0.5  # chance that a word with a synonym is swapped
COPIES = 2  # of each pair


def load_synonyms(path: str | PathLike[str]) -> dict[str, list[str]]:
    """Read a file of synonyms: a JSON object, word -> list of words.

    Raises:
        DataError: the file cannot be read or is not such an object.
    """
    synonyms = read_object(path, "lists of words")
    for word, others in synonyms.items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise DataError(f"{path}: must map {word!r} to a list of words, got {others!r}")
    return synonyms


def close_synonyms(
    synonyms: Mapping[str, Sequence[str]], vocabulary: Vocabulary, table: Tensor
) -> dict[str, list[str]]:
    """Keep the synonyms whose vector is close to the word's, and no stop words.

    A table of synonyms knows every sense of a word, a sentence means one of them: "yellow" would
    become "chicken". The vectors tell the common sense.

    Args:
        synonyms: word -> words to swap it with.
        vocabulary: the words of the table.
        table: [V, D] float.

    Returns:
        Word -> other words with a cosine of at least 0.6; words without any are left out.

    Raises:
        ImportError: gensim, whose list of stop words is used, is not installed.
    """
    try:
        from gensim.parsing.preprocessing import STOPWORDS
    except ImportError as error:
        raise ImportError(
            "close_synonyms: gensim is missing; install it with: pip install gensim"
        ) from error
    close = {}
    for word, others in synonyms.items():
        row = vocabulary.id(word)
        if not row or word.lower() in STOPWORDS:
            continue
        rows = {other: vocabulary.id(other) for other in others}
        known = [other for other, at in rows.items() if at not in (0, row)]
        cosines = F.cosine_similarity(table[row], table[[rows[other] for other in known]])
        kept = [o for o, cosine in zip(known, cosines.tolist(), strict=True) if cosine >= CLOSE]
        if kept:
            close[word] = kept
    return close


def swap_words(
    pairs: Pairs, synonyms: Mapping[str, Sequence[str]], generator: torch.Generator
) -> tuple[Pairs, list[int]]:
    """Write pairs again with words swapped in both sentences; score and label stay.

    Each pair is written twice, and each word that has a synonym is swapped in half of the cases. A
    pair that came out as it was is left out.

    Args:
        pairs: the pairs to start from.
        synonyms: word, as written or in lower case, -> words to choose from.
        generator: CPU generator; its state decides the words and moves on.

    Returns:
        The new pairs alone, and the row of `pairs` that each came from.
    """

    def swap(sentence: str) -> str:
        words = tokenize(sentence)
        for at, word in enumerate(words):
            choices = synonyms.get(word) or synonyms.get(word.lower())
            if choices and torch.rand((), generator=generator) < SWAPPED:
                words[at] = choices[int(torch.randint(len(choices), (), generator=generator))]
        return " ".join(words)

    rows, left, right = [], [], []
    for _ in range(COPIES):
        for row, (a, b) in enumerate(zip(pairs.left, pairs.right, strict=True)):
            new_a, new_b = swap(a), swap(b)
            if (new_a, new_b) != (" ".join(tokenize(a)), " ".join(tokenize(b))):
                rows.append(row)
                left.append(new_a)
                right.append(new_b)
    drawn = pairs.take(rows)
    return Pairs(left, right, drawn.score, drawn.score_range, drawn.entailment), rows
