"""Words to rows of a table: sentences become ids and lengths."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastsiam.text.files import DataError, is_unicode, read_object
from fastsiam.text.tokens import part_tokens, split_parts

UNKNOWN = "<unk>"
REMEMBERED = 1 << 18  # parts of sentences in the cache of ids


@dataclass(frozen=True)
class Encoded:
    """Sentences as ids.

    Attributes:
        ids: [n, T] int64, T the longest of these sentences; 0 behind a sentence's end.
        lengths: [n] int64, 0 <= length <= T.
        truncated: how many sentences were longer than `max_len` and lost their end.
        unknown: the words that got id 0, with their counts.
    """

    ids: Tensor
    lengths: Tensor
    truncated: int
    unknown: Counter[str]


class Vocabulary:
    """The words of a table of vectors, row by row.

    Args:
        words: word i belongs to row i; row 0 is the unknown word, "<unk>".
        spelling: word as written -> word as in the table, tried for words without a row.

    Raises:
        ValueError: `words` does not start with "<unk>" or holds a word twice.
    """

    def __init__(self, words: Sequence[str], spelling: Mapping[str, str] | None = None) -> None:
        self.words = list(words)
        self.spelling = dict(spelling or {})
        self._ids = {word: row for row, word in enumerate(self.words)}
        if not self.words or self.words[0] != UNKNOWN:
            raise ValueError(f"Vocabulary: words must start with {UNKNOWN!r}, got {self.words[:1]}")
        if len(self._ids) != len(self.words):
            twice = Counter(self.words).most_common(1)[0][0]
            raise ValueError(f"Vocabulary: words must differ from one another, got {twice!r} twice")
        self._parts = _PartIds(self)

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """Return the row of the word, its spelling, lower, Capital or UPPER form, else 0."""
        for form in (word, self.spelling.get(word, word), *case_forms(word)):
            row = self._ids.get(form)
            if row is not None:
                return row
        return 0

    def encode(self, sentences: Sequence[str], max_len: int = 73) -> Encoded:
        """Tokenize sentences and look their words up.

        Args:
            sentences: n texts; an empty one has length 0.
            max_len: at least 1; longer sentences keep their first `max_len` tokens.

        Returns:
            Ids padded to the longest sentence of this call, lengths, and the counts of cut
            sentences and unknown words.

        Raises:
            ImportError: nltk is not installed.
            TypeError: `sentences` is a single string, or holds something else than strings.
            ValueError: `max_len` is below 1.
        """
        if isinstance(sentences, str):
            raise TypeError("encode: sentences must be a list of strings, got one string")
        if max_len < 1:
            raise ValueError(f"encode: max_len must be at least 1, got {max_len}")
        import numpy as np

        if len(self._parts) > REMEMBERED:
            self._parts = _PartIds(self)
        part_ids = self._parts  # another thread may put new ones in its place
        parts: list[str] = []
        ends = []  # of each sentence among all parts
        for sentence in sentences:
            parts += split_parts(sentence)
            ends.append(len(parts))
        by_part = list(map(part_ids.__getitem__, parts))
        # from a list, numpy makes an array five times as fast as torch
        flat = torch.from_numpy(np.array(list(chain.from_iterable(by_part)), np.int64))
        sizes = np.fromiter(map(len, by_part), np.int64, len(parts))
        tokens = np.concatenate([[0], sizes.cumsum()])
        lengths = torch.from_numpy(np.diff(tokens[ends], prepend=0))
        max_len = min(max_len, len(flat))  # any int is allowed, and torch's end at 2^63
        truncated = int((lengths > max_len).sum())
        if truncated:
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            flat = flat[torch.arange(len(flat), device=flat.device) - starts < max_len]
            lengths.clamp_(max=max_len)
        unknown = part_ids.count_unknown(flat)
        ids = flat.new_zeros(len(lengths), max(lengths.tolist(), default=0))
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        ids[valid] = flat.clamp_(min=0)
        return Encoded(ids, lengths, truncated, unknown)

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary as a JSON-able dict."""
        return {"words": self.words, "spelling": self.spelling}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """Make the vocabulary that `to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: the dict is not of that form.
        """
        words, spelling = list(values["words"]), dict(values["spelling"])
        if not all(isinstance(word, str) for word in (*words, *spelling, *spelling.values())):
            raise ValueError("words and spelling must hold text alone")
        return cls(words, spelling)


# one thread at a time numbers unknown words; a lock of each vocabulary could not be pickled
_NUMBERING = threading.Lock()


class _PartIds(dict[str, list[int]]):
    """Part of a sentence -> ids of its tokens, looked up once a part; ~i is unknown word i."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._id = vocabulary.id
        self._unknown: dict[str, int] = {}

    def __missing__(self, part: str) -> list[int]:
        words = part_tokens(part)
        with _NUMBERING:
            ids = self[part] = [
                self._id(word) or ~self._unknown.setdefault(word, len(self._unknown))
                for word in words
            ]
        return ids

    def count_unknown(self, ids: Tensor) -> Counter[str]:
        """Count the unknown words among ids, [M]."""
        words = list(self._unknown)
        numbers, counts = (~ids[ids < 0]).unique(return_counts=True)
        pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        return Counter({words[number]: count for number, count in pairs})


def case_forms(word: str) -> Iterator[str]:
    """Yield the lower, Capital and UPPER form of a word, the order in which they are looked up."""
    yield word.lower()
    yield word.capitalize()
    yield word.upper()


def load_spelling(path: str | PathLike[str]) -> dict[str, str]:
    """Read a spelling file: a JSON object, word as written -> word in the vector file.

    Args:
        path: the file, UTF-8.

    Returns:
        The dictionary.

    Raises:
        DataError: the file cannot be read or is not a JSON object of Unicode strings.
    """
    spelling = read_object(path, "strings")
    for word, target in spelling.items():
        if not isinstance(target, str):
            raise DataError(f"{path}: must map {word!r} to a word, got {target!r}")
        if not is_unicode(word + target):
            raise DataError(f"{path}: must hold Unicode text, got {word!r} and {target!r}")
    return spelling
