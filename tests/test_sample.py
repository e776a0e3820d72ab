"""The little world: its files, their determinism, and that its scores can be learned."""

import os
import random
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

from fastsiam.modules import SiameseLSTM
from fastsiam.text import sample
from fastsiam.text.pairs import drop_repeats, read_pairs
from fastsiam.text.tokens import tokenize
from fastsiam.text.vectors import load_vectors
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.batches import grouped_batches

pytest.importorskip("gensim")
pytest.importorskip("nltk")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return sample.write_sample(tmp_path_factory.mktemp("sample") / "new" / "folder", seed=3)


@pytest.fixture(scope="module")
def parts(paths):
    return [read_pairs(path) for path in (paths.train, paths.dev, paths.test)]


def pearson(similarity, score):
    return float(torch.corrcoef(torch.stack([similarity, torch.tensor(score)]))[0, 1])


def test_parts(parts):
    train, dev, test = parts
    assert [len(part) for part in parts] == [1600, 200, 400]
    assert train.score_range == (1.0, 5.0)
    assert drop_repeats(train, test)[1] == drop_repeats(train, dev)[1] == 0
    assert drop_repeats(dev, test)[1] == 0
    for low in (1, 2, 3, 4):  # graded: every band is there
        assert sum(low <= score < low + 1 for score in train.score) > 100


def test_test_sentences_are_new(parts):
    train, _, test = parts
    seen = {*train.left, *train.right}
    sentences = {*test.left, *test.right}
    assert len(sentences - seen) > 0.5 * len(sentences)


def test_vectors_know_the_words(paths, parts):
    tokens = [
        token
        for part in parts
        for side in (part.left, part.right)
        for s in side
        for token in tokenize(s)
    ]
    loaded = load_vectors([paths.vectors], tokens)
    assert loaded.coverage.missing == []
    assert loaded.table.shape[1] == sample.SIZE
    row = {word: loaded.table[i] for i, word in enumerate(loaded.words)}

    def alike(a, b):
        return float(torch.cosine_similarity(row[a], row[b], dim=0))

    assert alike("bike", "bicycle") > alike("bike", "banana")
    assert alike("doctor", "physician") > alike("doctor", "puppy")


def test_mean_vectors_correlate_but_leave_room(paths, parts):
    test = parts[2]
    tokens = [token for s in test.left + test.right for token in tokenize(s)]
    loaded = load_vectors([paths.vectors], tokens)
    vocabulary = Vocabulary(loaded.words)

    def mean(sentences):
        encoded = vocabulary.encode(sentences)
        # rows behind the end are zero
        return loaded.table[encoded.ids].sum(1) / encoded.lengths[:, None]

    cosine = torch.cosine_similarity(mean(test.left), mean(test.right))
    assert 0.5 < pearson(cosine, test.score) < 0.9


def test_a_siamese_lstm_learns_the_scores(paths, parts):
    torch.manual_seed(0)
    train, _, test = parts
    loaded = load_vectors(
        [paths.vectors], [t for s in train.left + train.right for t in tokenize(s)]
    )
    vocabulary = Vocabulary(loaded.words)
    module = SiameseLSTM(sample.SIZE, 30, embedding=loaded.table, scale=0.25, backend="torch")
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    target = torch.tensor(train.similarity)
    left, right = vocabulary.encode(train.left), vocabulary.encode(train.right)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in grouped_batches(left.lengths, right.lengths, 32, generator):
            sides = (left.ids[rows], right.ids[rows], left.lengths[rows], right.lengths[rows])
            loss = (module(*sides) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    left, right = vocabulary.encode(test.left), vocabulary.encode(test.right)
    with torch.no_grad():
        similarity = module(left.ids, right.ids, left.lengths, right.lengths)
    assert pearson(similarity, test.score) > 0.85


def test_same_seed_same_files_in_any_process(paths, tmp_path):
    code = "import sys; from fastsiam.text.sample import write_sample; write_sample(sys.argv[1], 3)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    for path in astuple(paths):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_seed_other_sentences(monkeypatch, tmp_path, paths):
    monkeypatch.setattr(sample, "STORIES", 50)
    other = sample.write_sample(tmp_path, seed=4)
    assert other.train.read_bytes() != paths.train.read_bytes()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "corpus.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"corpus\.txt exists; name another folder"):
        sample.write_sample(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "corpus.txt"]
    assert (tmp_path / "corpus.txt").read_text() == "mine"


def event(agent="boy", action="ride", thing="bike", place="park", adjective=None, denied=False):
    return sample._Event(agent, action, thing, place, adjective, denied)


@pytest.mark.parametrize(
    ("other", "score"),
    [
        (event(), 5.0),
        (event(agent="girl"), 4.5),
        (event(agent="woman"), 4.0),
        (event(thing="horse"), 4.0),
        (event(place="kitchen"), 4.2),
        (event(adjective="happy"), 4.8),
        (event(denied=True), 3.6),
        (event("woman", "cut", "onion"), 1.0),
    ],
)
def test_score(other, score):
    assert sample._relatedness(event(), other) == sample._relatedness(other, event()) == score


def test_words_of_an_event():
    said = {sample._say(event(), random.Random(seed)) for seed in range(300)}
    assert "A lad is riding a bike in the park" in said
    assert "The bicycle is being ridden by the boy in the park" in said
    denied = {sample._say(event(denied=True), random.Random(seed)) for seed in range(300)}
    assert "There is no boy riding a bicycle in the park" in denied
    assert "A bike is not being ridden by a lad in the park" in denied
    assert said.isdisjoint(denied)
    eaten = event("monkey", "eat", "apple", None, "old")
    assert "An elderly monkey is devouring an apple" in {
        sample._say(eaten, random.Random(seed)) for seed in range(300)
    }


def test_every_concept_can_be_said():
    rng = random.Random(0)
    events = [sample._event(rng) for _ in range(5000)]
    assert {e.agent for e in events} == set(sample.AGENTS)
    assert {e.action for e in events} == set(sample.ACTIONS)
    assert {e.object for e in events} == {None, *sample.OBJECTS}
    assert {e.place for e in events} == {None, *sample.PLACES}
    assert all(sample._can(e.agent, e.action) for e in events)
    assert all(sample._can(e.agent, e.action) for e in (sample._vary(e, rng) for e in events))
    assert all("  " not in sample._say(e, rng) for e in events)
