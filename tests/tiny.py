"""A few made-up sentence pairs and word vectors, as files."""

import random
from dataclasses import dataclass
from pathlib import Path

WORDS = ["a", "the", "cat", "dog", "kid", "runs", "sits", "eats", "here", "there", "fast", "slow"]
D = 6
SICK_HEADER = ("sentence_A", "sentence_B", "relatedness_score")


@dataclass(frozen=True)
class Files:
    train: Path
    dev: Path
    test: Path
    vectors: Path


def make_pairs(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Sentences of 1 to 7 words; the share of common words gives a score from 1 to 5."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        share = i % 7 / 6  # of the words that stay: from none to all
        left = [rng.choice(WORDS) for _ in range(rng.randint(1, 7))]
        right = [word if rng.random() < share else rng.choice(WORDS) for word in left]
        right = right[: rng.randint(1, 7)]
        common = len(set(left) & set(right)) / len(set(left) | set(right))
        pairs.append((" ".join(left), " ".join(right), round(1 + 4 * common, 1)))
    return pairs


def write_pairs(path: Path, pairs, header=SICK_HEADER) -> Path:
    lines = ["\t".join(header), *("\t".join(map(str, pair)) for pair in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_vectors(path: Path, words=WORDS, dim: int = D) -> Path:
    rng = random.Random(0)
    lines = [f"{len(words)} {dim}"]
    lines += [" ".join([word, *(f"{rng.gauss(0, 1):.4f}" for _ in range(dim))]) for word in words]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_files(folder: Path) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    return Files(
        write_pairs(folder / "train.tsv", make_pairs(90, seed=1)),
        write_pairs(folder / "dev.tsv", make_pairs(30, seed=2)),
        write_pairs(folder / "test.tsv", make_pairs(25, seed=3)),
        write_vectors(folder / "vectors.txt"),
    )
