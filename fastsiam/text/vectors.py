"""The table of pretrained vectors for the words at hand, and how many of them have one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor

from fastsiam.text.files import DataError
from fastsiam.text.vector_files import VectorFile, read_vectors
from fastsiam.text.vocabulary import UNKNOWN, case_forms

RULES = ("spelling", "word", "lower", "capital", "upper")


@dataclass(frozen=True)
class Coverage:
    """How many words have a vector, and by which rule it was found.

    With several files a word counts by the first file that has it.

    Attributes:
        tokens: rule -> occurrences; the rules: spelling, word, lower, capital, upper, missing.
        types: rule -> different words.
        missing: words in no file with their counts, the most frequent first.
    """

    tokens: dict[str, int]
    types: dict[str, int]
    missing: list[tuple[str, int]]

    @property
    def token_share(self) -> float:
        """Share of the occurrences whose word has a vector, 0..1."""
        return 1.0 - self.tokens["missing"] / sum(self.tokens.values())


@dataclass(frozen=True)
class WordVectors:
    """A table of vectors and the words of its rows.

    Attributes:
        words: word of each row; row 0 is "<unk>", the others are sorted.
        table: [V, D] float32; row 0 is zero; D is the sum of the files' sizes.
        coverage: how many words have a vector.
    """

    words: list[str]
    table: Tensor
    coverage: Coverage


def load_vectors(
    paths: Sequence[str | PathLike[str]],
    words: Iterable[str],
    *,
    spelling: Mapping[str, str] | None = None,
    oov: Literal["zero", "random"] = "zero",
    seed: int = 0,
    limit: int | None = None,
    length: float | None = None,
    uncounted: Iterable[str] = (),
) -> WordVectors:
    """Load the vectors of the given words; several files join side by side.

    In each file a word is looked up by its spelling, as it is, lower, Capital and UPPER; a file
    without it leaves its columns to the out-of-vocabulary rule. A file is streamed: only the
    vectors asked for are ever held.

    Args:
        paths: vector files, at least one: word2vec binary or text, or GloVe text, plain or gzip,
            told by content.
        words: the tokens of a corpus, or a Counter of them; repeats count for the coverage.
        spelling: word as written -> word in the vector files.
        oov: "zero" leaves a word that is in no file without a row (it has id 0, the zero vector);
            "random" draws a normal vector of the file's typical length from `seed` and the word.
        seed: of the random vectors.
        limit: reads only the first `limit` vectors of each file, at least 1; None reads all.
        length: mean length that the vectors found in each file are brought to, by one factor a
            file, so that files that are joined weigh alike; None: they stay as they are.
        uncounted: more words to look up, which the coverage leaves out.

    Returns:
        The words, their table and the coverage.

    Raises:
        DataError: a file is no vector file, is damaged, or holds none of the words; or there are no
            words.
        ValueError: `oov` is unknown, `paths` is empty, `limit` is below 1, or `length` is not
            positive.
    """
    if oov not in ("zero", "random"):
        raise ValueError(f"load_vectors: oov must be 'zero' or 'random', got {oov!r}")
    if isinstance(paths, (str, PathLike)) or not paths:
        raise ValueError(f"load_vectors: paths must be a list of files, got {paths!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"load_vectors: limit must be at least 1, got {limit}")
    if length is not None and not (length > 0 and math.isfinite(length)):
        raise ValueError(f"load_vectors: length must be positive and finite, got {length}")
    counts = Counter(words)
    if not counts:
        raise DataError("load_vectors: there is no word to look up: every sentence is empty")
    forms = {word: _forms(word, spelling or {}) for word in sorted({*counts, *uncounted})}
    wanted = {form for by_rule in forms.values() for form in by_rule.values()}

    rules: dict[str, str] = {}
    parts: list[tuple[VectorFile, dict[str, Tensor]]] = []
    for path in paths:
        file = read_vectors(path, wanted, limit)
        found = {}
        for word, by_rule in forms.items():
            rule = next((rule for rule, form in by_rule.items() if form in file.vectors), None)
            if rule is not None:
                found[word] = file.vectors[by_rule[rule]]
                rules.setdefault(word, rule)
        if not found:
            raise DataError(f"{path}: none of the {len(forms)} words looked up has a vector in it")
        parts.append((file, found))

    rows = [word for word in forms if oov == "random" or word in rules]
    sizes = [file.dim for file, _ in parts]
    table = torch.zeros(1 + len(rows), sum(sizes))
    if oov == "random":
        for row, word in enumerate(rows, start=1):
            table[row] = _random_vector(word, seed, table.shape[1])
    for columns, (file, found) in zip(table.split(sizes, dim=1), parts, strict=True):
        columns *= file.norm / math.sqrt(file.dim)
        for row, word in enumerate(rows, start=1):
            if word in found:
                columns[row] = found[word]
        if length is not None:
            counted = [found[word].norm() for word in counts if word in found]
            mean = torch.stack(counted or [torch.tensor(file.norm)]).mean()
            columns *= length / mean.clamp_min(1e-12)
    return WordVectors([UNKNOWN, *rows], table, _coverage(counts, rules))


def _forms(word: str, spelling: Mapping[str, str]) -> dict[str, str]:
    """Return rule -> form to look for, in the order of the rules."""
    spelled = spelling.get(word, word)
    forms = {} if spelled == word else {"spelling": spelled}
    return forms | dict(zip(RULES[1:], (word, *case_forms(word)), strict=True))


def _coverage(counts: Counter[str], rules: Mapping[str, str]) -> Coverage:
    tokens = dict.fromkeys((*RULES, "missing"), 0)
    types = dict(tokens)
    for word, count in counts.items():
        rule = rules.get(word, "missing")
        tokens[rule] += count
        types[rule] += 1
    missing = [(word, count) for word, count in counts.items() if word not in rules]
    return Coverage(tokens, types, sorted(missing, key=lambda item: (-item[1], item[0])))


def _random_vector(word: str, seed: int, size: int) -> Tensor:
    # a digest and not hash(): the same in every process
    digest = hashlib.blake2b(f"{seed} {word}".encode("utf-8", "surrogatepass"), digest_size=8)
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)
    return torch.randn(size, generator=generator)
