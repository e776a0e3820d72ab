"""From a file of sentence pairs to a file of scores, beside sentence-transformers, on one core.

    python -m benchmarks.text_to_scores --data DIR

DIR holds sick/ and vectors/. The rival is sentence-transformers' word embeddings, LSTM and pooling,
with the same word vectors, the same weights and its own tokenizer, which splits at blanks; it must
be importable (`make scores DATA=DIR` puts it into build/). Its scores are compared with fastsiam's
before anything is timed. All contenders are loaded first and then read, compute and write the SICK
test file in turn, round after round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from fastsiam.bulk import score_file
from fastsiam.functional import manhattan_similarity
from fastsiam.model import TextSiamese
from fastsiam.text.pairs import read_pairs
from fastsiam.text.tokens import part_tokens, tokenize
from fastsiam.text.vectors import load_vectors
from fastsiam.text.vocabulary import Vocabulary

BATCHES = (32, 128, 512, 1024, 2048)  # the rival gets the best of them; 32 is its default
NLTK_SENTENCES = 1000  # that nltk alone is timed on
WANTED_PAIRS_PER_S = 22_000

Work = Callable[[Path, Path], object]


def load_model(data: Path) -> TextSiamese:
    """Return a model with the words of SICK; its weights are drawn, not trained."""
    names = ("SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt")
    parts = [read_pairs(data / "sick" / name) for name in names]
    words = [word for p in parts for text in (*p.left, *p.right) for word in tokenize(text)]
    found = load_vectors([data / "vectors" / "glove840b-plus-300.bin.gz"], words)
    torch.manual_seed(0)
    return TextSiamese(Vocabulary(found.words), found.table, device="cpu")


class Rival:
    """sentence-transformers' WordEmbeddings, LSTM and Pooling with fastsiam's vectors and weights.

    Its tokenizer drops what it does not know and, as a rule, English stop words too; here it drops
    none, so that it reads what fastsiam reads.
    """

    def __init__(self, model: TextSiamese) -> None:
        try:
            import sentence_transformers
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import (
                LSTM,
                Pooling,
                WordEmbeddings,
            )
            from sentence_transformers.sentence_transformer.modules.tokenizer import (
                WhitespaceTokenizer,
            )
        except ImportError as error:
            raise SystemExit(
                f"text_to_scores: sentence-transformers cannot be imported ({error}); "
                "make scores DATA=DIR puts it into build/ and runs this"
            ) from error
        self.name = f"sentence-transformers {sentence_transformers.__version__}"
        self.scale = model.scale
        table = model.lstm.embedding
        assert table is not None
        self.tokenizer = WhitespaceTokenizer(model.vocabulary.words, stop_words=[])
        lstm = LSTM(model.lstm.input_size, model.lstm.hidden_size, bidirectional=False)
        lstm.encoder.load_state_dict(model.lstm.to_lstm().state_dict())
        modules: list[Any] = [
            WordEmbeddings(self.tokenizer, table.weight.detach()),
            lstm,
            Pooling(model.lstm.hidden_size, pooling_mode="lasttoken"),
        ]
        self.encoder = SentenceTransformer(modules=modules, device="cpu")
        self.batch_size = BATCHES[0]

    def encode(self, sentences: list[str]) -> Tensor:
        vectors: Tensor = self.encoder.encode(
            sentences,
            batch_size=self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return vectors

    def all_sentences(self, source: Path, out: Path) -> None:
        left, right = read(source)
        u, v = self.encode([*left, *right]).chunk(2)
        write(out, manhattan_similarity(u, v, self.scale))

    def different_sentences(self, source: Path, out: Path) -> None:
        left, right = read(source)
        number = {s: i for i, s in enumerate(dict.fromkeys([*left, *right]))}
        vectors = self.encode(list(number))
        u, v = (vectors[[number[s] for s in side]] for side in (left, right))
        write(out, manhattan_similarity(u, v, self.scale))


def read(source: Path) -> tuple[list[str], list[str]]:
    """Return the sentences of a file that is tab-separated and has SICK's header."""
    with source.open(encoding="utf-8") as file:
        header = next(file).rstrip("\n").split("\t")
        rows = [line.split("\t") for line in file]
    left, right = (header.index(name) for name in ("sentence_A", "sentence_B"))
    return [row[left] for row in rows], [row[right] for row in rows]


def write(out: Path, similarity: Tensor) -> None:
    with out.open("w", encoding="utf-8") as file:
        file.write("similarity\tscore\n")
        for value in similarity.tolist():
            file.write(f"{value:.6g}\t{1 + 4 * value:.4f}\n")


def column(file: Path) -> Tensor:
    rows = file.read_text(encoding="utf-8").splitlines()[1:]
    return torch.tensor([float(row.split("\t")[0]) for row in rows])


def check_agreement(model: TextSiamese, rival: Rival, source: Path, folder: Path) -> None:
    """Stop unless both have the same scores wherever both read the same words."""
    left, right = read(source)
    ids = [model.vocabulary.encode([text]).ids[0].tolist() for text in (*left, *right)]
    its = [rival.tokenizer.tokenize(text) for text in (*left, *right)]
    same = torch.tensor([a == b for a, b in zip(ids, its, strict=True)]).view(2, -1).all(dim=0)
    score_file(model, source, folder / "ours")
    rival.all_sentences(source, folder / "its")
    ours, other = column(folder / "ours"), column(folder / "its")
    error = float((ours - other)[same].abs().max())
    share = float(same.float().mean())
    # written with six digits; words that one side lacks make other sentences
    if len(ours) != len(left) or share < 0.9 or error > 1e-5:
        raise SystemExit(f"the scores differ by {error} on the {share:.1%} of equal words")
    print(
        f"both read the same words in {share:.1%} of the pairs; their scores differ by {error:.1e}"
    )


Seconds = tuple[float, float]  # on the clock, and of the processor's time


def time_in_turn(
    works: dict[str, Work], source: Path, folder: Path, rounds: int
) -> dict[str, list[Seconds]]:
    """Time each work once a round; every round starts one further on, the first warms up."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start, cpu = time.perf_counter(), time.process_time()
            works[name](source, folder / "out")
            if number:
                times = (time.perf_counter() - start, time.process_time() - cpu)
                seconds[name].append(times)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds sick/ and vectors/")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = options.data / "sick" / "SICK_test_annotated.txt"
    model = load_model(options.data)
    rival = Rival(model)
    pairs = len(read(source)[0])

    def ours(source: Path, out: Path) -> None:
        score_file(model, source, out)

    def ours_from_scratch(source: Path, out: Path) -> None:
        part_tokens.cache_clear()
        model.vocabulary = Vocabulary(model.vocabulary.words, model.vocabulary.spelling)
        score_file(model, source, out)

    def ours_all_sentences(source: Path, out: Path) -> None:
        left, right = read(source)
        write(out, model.similarity(left, right, batch_size=2048))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_agreement(model, rival, source, folder)
        tries: dict[int, float] = {}
        for size in BATCHES:
            rival.batch_size = size
            work = {"": rival.all_sentences}
            tries[size] = min(cpu_s for _, cpu_s in time_in_turn(work, source, folder, 2)[""])
        rival.batch_size = min(tries, key=tries.__getitem__)
        works: dict[str, Work] = {
            "fastsiam score, no part of a sentence known": ours_from_scratch,
            "fastsiam score, all parts known": ours,
            "fastsiam similarity, every sentence computed": ours_all_sentences,
            f"{rival.name}, every sentence": rival.all_sentences,
            f"{rival.name}, different ones once": rival.different_sentences,
        }
        seconds = time_in_turn(works, source, folder, options.rounds)

    cpu, threads = machine.cpu_name(), torch.get_num_threads()
    print(
        f"{pairs} pairs of {source.name}, file to file, after loading; {cpu}, threads: {threads}, "
        f"load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; the rival's batch: "
        f"{rival.batch_size}, the fastest of {', '.join(map(str, BATCHES))}"
    )
    print(f"  {'pairs/s':<52} {'median':>8} {'best':>8} {'of CPU time':>12}  median ratio")
    ours_s = seconds[next(iter(works))]
    for name, samples in seconds.items():
        clock = [clock_s for clock_s, _ in samples]
        rates = statistics.median(clock), min(clock), min(cpu_s for _, cpu_s in samples)
        median, best, cpu_best = (pairs / time_s for time_s in rates)
        ratio = statistics.median(a / b for a, (b, _) in zip(clock, ours_s, strict=True))
        print(f"  {name:<52} {median:>8,.0f} {best:>8,.0f} {cpu_best:>12,.0f}  {ratio:.2f}x")
    print(f"  wanted: {WANTED_PAIRS_PER_S:,}; of CPU time: the best round's, were the core free")
    print_tokenizers(source)


def print_tokenizers(source: Path) -> None:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    left, right = read(source)
    sentences = [*left, *right]
    tokenizer = NLTKWordTokenizer()
    times = {}
    start = time.perf_counter()
    plain = [tokenizer.tokenize(sentence) for sentence in sentences[:NLTK_SENTENCES]]
    times["nltk"] = (time.perf_counter() - start) / NLTK_SENTENCES
    part_tokens.cache_clear()
    for name in ("fastsiam, no part known", "fastsiam, all parts known"):
        start = time.perf_counter()
        ours = [tokenize(sentence) for sentence in sentences]
        times[name] = (time.perf_counter() - start) / len(sentences)
    if ours[:NLTK_SENTENCES] != plain:
        raise SystemExit("the tokens are not those of nltk")
    print("us a sentence for its tokens, the same ones: ", end="")
    print("; ".join(f"{name} {1e6 * time_s:.1f}" for name, time_s in times.items()))


if __name__ == "__main__":
    main()
