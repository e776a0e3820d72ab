"""A made-up world to try the library on: sentence pairs with a score, and vectors of its words.

An event has an agent, an action, perhaps an object, a place and an adjective, and may be denied. A
pair is two events, each put into words; its score follows from what the events share, not from the
words: "A lad is riding a bike" and "A bicycle is being ridden by a boy" get 5.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

# concept -> (its class, the words for it); concepts of one class are half alike
AGENTS = {
    "boy": ("youth", ("boy", "lad")),
    "girl": ("youth", ("girl",)),
    "child": ("youth", ("child", "kid")),
    "man": ("adult", ("man", "guy")),
    "woman": ("adult", ("woman", "lady")),
    "doctor": ("adult", ("doctor", "physician")),
    "dog": ("animal", ("dog", "puppy")),
    "cat": ("animal", ("cat", "kitten")),
    "monkey": ("animal", ("monkey",)),
}
OBJECTS = {
    "apple": ("fruit", ("apple",)),
    "banana": ("fruit", ("banana",)),
    "potato": ("vegetable", ("potato",)),
    "onion": ("vegetable", ("onion",)),
    "bike": ("vehicle", ("bike", "bicycle")),
    "car": ("vehicle", ("car", "automobile")),
    "horse": ("mount", ("horse", "pony")),
    "ball": ("toy", ("ball",)),
    "stick": ("toy", ("stick",)),
    "guitar": ("strings", ("guitar",)),
    "violin": ("strings", ("violin", "fiddle")),
    "drum": ("drums", ("drum",)),
    "book": ("paper", ("book",)),
    "newspaper": ("paper", ("newspaper",)),
    "picture": ("art", ("picture", "image")),
    "stone": ("stone", ("stone", "rock")),
}
# concept -> (class, words as (-ing, participle), objects; none: an action without an object)
ACTIONS = {
    "eat": (
        "food",
        (("eating", "eaten"), ("devouring", "devoured")),
        ("apple", "banana", "potato"),
    ),
    "cut": ("food", (("cutting", "cut"), ("slicing", "sliced")), ("apple", "potato", "onion")),
    "ride": ("travel", (("riding", "ridden"),), ("bike", "horse")),
    "repair": ("work", (("repairing", "repaired"), ("fixing", "fixed")), ("bike", "car", "guitar")),
    "wash": ("work", (("washing", "washed"), ("cleaning", "cleaned")), ("car", "horse", "potato")),
    "throw": ("game", (("throwing", "thrown"), ("tossing", "tossed")), ("ball", "stick", "stone")),
    "catch": ("game", (("catching", "caught"), ("grabbing", "grabbed")), ("ball", "stick")),
    "play": ("music", (("playing", "played"),), ("guitar", "violin", "drum")),
    "read": ("study", (("reading", "read"), ("studying", "studied")), ("book", "newspaper")),
    "draw": ("study", (("drawing", "drawn"), ("sketching", "sketched")), ("picture", "horse")),
    "run": ("motion", (("running", ""), ("jogging", "")), ()),
    "jump": ("motion", (("jumping", ""), ("leaping", "")), ()),
    "sleep": ("rest", (("sleeping", ""), ("napping", "")), ()),
    "sing": ("music", (("singing", ""),), ()),
}
FOR_ANIMALS = ("eat", "catch", "run", "jump", "sleep")
PLACES = {
    "park": ("green", ("in the park",)),
    "garden": ("green", ("in the garden", "in the yard")),
    "beach": ("water", ("on the beach", "on the shore")),
    "lake": ("water", ("near the lake",)),
    "kitchen": ("house", ("in the kitchen",)),
    "room": ("house", ("in the room",)),
}
ADJECTIVES = {
    "young": ("age", ("young",)),
    "old": ("age", ("old", "elderly")),
    "big": ("size", ("big", "large")),
    "small": ("size", ("small", "little")),
    "happy": ("mood", ("happy", "cheerful")),
}

SIZES = {"train": 1600, "dev": 200, "test": 400}  # pairs
STORIES = 5000  # lines of text for the vectors, two sentences each
SIZE = 50  # of a vector


@dataclass(frozen=True)
class SamplePaths:
    """The files of a sample.

    Attributes:
        train: pairs to train on, with the header of SICK; scores from 1 to 5.
        dev: pairs to select by.
        test: pairs to report on; none of them is in `train` or `dev`.
        corpus: text of the same world, tokens between blanks, a story a line.
        vectors: vectors of the words of `corpus`, word2vec text format.
    """

    train: Path
    dev: Path
    test: Path
    corpus: Path
    vectors: Path


@dataclass(frozen=True)
class _Event:
    agent: str
    action: str
    object: str | None
    place: str | None
    adjective: str | None
    denied: bool = False


def write_sample(folder: str | PathLike[str], seed: int = 0) -> SamplePaths:
    """Write pairs, text and vectors of the little world into a folder.

    The same seed writes the same files. Takes a few seconds on one core.

    Args:
        folder: made if it is not there.
        seed: of the sentences and of the vectors' training.

    Returns:
        The paths of the files written.

    Raises:
        FileExistsError: one of the files is there already.
        ImportError: gensim is not installed.
    """
    folder = Path(folder)
    names = ("train.tsv", "dev.tsv", "test.tsv", "corpus.txt", "vectors.txt")
    paths = SamplePaths(*(folder / name for name in names))
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"write_sample: {folder / name} exists; name another folder")
    rng = random.Random(seed)
    stories = [_story(rng) for _ in range(STORIES)]
    pairs = _pairs(rng, sum(SIZES.values()))
    vectors = _train_vectors(stories, seed)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for path, size in zip((paths.train, paths.dev, paths.test), SIZES.values(), strict=True):
        _write_pairs(path, pairs[start : start + size], start + 1)
        start += size
    corpus = "".join(" ".join(story) + "\n" for story in stories)
    paths.corpus.write_text(corpus, encoding="utf-8", newline="\n")
    paths.vectors.write_text(vectors, encoding="utf-8", newline="\n")
    return paths


def _write_pairs(path: Path, pairs: list[tuple[str, str, float]], number: int) -> None:
    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score"]
    for pair_id, (left, right, score) in enumerate(pairs, start=number):
        lines.append(f"{pair_id}\t{left}\t{right}\t{score:.1f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _train_vectors(stories: list[list[str]], seed: int) -> str:
    """Return vectors trained on the stories as the text of a word2vec file."""
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        message = "write_sample: gensim is missing; install it with: pip install gensim"
        raise ImportError(message) from error
    model = Word2Vec(
        stories,
        vector_size=SIZE,
        window=8,
        min_count=1,
        sg=1,
        epochs=5,
        seed=seed + 1,
        workers=1,  # several threads would make the result depend on their timing
        hashfxn=lambda word: zlib.crc32(word.encode()),  # and hash() on the process
    )
    rows = [
        " ".join([word, *(f"{value:.6f}" for value in model.wv[word])])
        for word in model.wv.index_to_key
    ]
    return "\n".join([f"{len(rows)} {SIZE}", *rows, ""])


def _story(rng: random.Random) -> list[str]:
    """Tell one event twice in other words, so that words for one thing meet in the text."""
    event = _event(rng)
    # no punctuation here, so a blank is between any two tokens
    return [token for _ in range(2) for token in _say(event, rng).lower().split()]


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str, float]]:
    """Draw pairs that differ from one another, in either order."""
    pairs: dict[frozenset[str], tuple[str, str, float]] = {}
    while len(pairs) < count:
        first = _event(rng)
        second = _vary(first, rng)
        left, right = _say(first, rng), _say(second, rng)
        pairs.setdefault(frozenset((left, right)), (left, right, _relatedness(first, second)))
    return list(pairs.values())


def _event(rng: random.Random) -> _Event:
    agent = rng.choice(list(AGENTS))
    action = rng.choice([action for action in ACTIONS if _can(agent, action)])
    objects = ACTIONS[action][2]
    return _Event(
        agent,
        action,
        rng.choice(objects) if objects else None,
        rng.choice([None, *PLACES]),
        rng.choice([None, None, *ADJECTIVES]),
        rng.random() < 0.1,
    )


def _can(agent: str, action: str) -> bool:
    return action in FOR_ANIMALS or AGENTS[agent][0] != "animal"


def _vary(event: _Event, rng: random.Random) -> _Event:
    """Return an event that shares all, most, some or nothing with the given one."""
    other = _event(rng)
    kind = rng.randrange(6)
    if kind == 0:
        return event
    if kind == 1:
        return replace(event, denied=not event.denied)
    if kind == 2:
        return replace(event, place=other.place, adjective=other.adjective)
    if kind == 3 and _can(event.agent, other.action):
        return replace(other, agent=event.agent, place=event.place)
    if kind == 4 and _can(other.agent, event.action):
        objects = ACTIONS[event.action][2]
        new_object = rng.choice(objects) if objects else None
        return replace(event, agent=other.agent, object=new_object, adjective=other.adjective)
    return other


def _relatedness(first: _Event, second: _Event) -> float:
    """Score two events from 1 to 5: by agent, action and object, less for each other difference."""
    action = _alike(ACTIONS, first.action, second.action)
    if first.object is None and second.object is None:
        thing = action
    else:
        thing = _alike(OBJECTS, first.object, second.object)
    core = 0.25 * _alike(AGENTS, first.agent, second.agent) + 0.5 * action + 0.25 * thing
    core *= 1 - 0.2 * (1 - _alike(PLACES, first.place, second.place))
    core *= 1 - 0.1 * (1 - _alike(ADJECTIVES, first.adjective, second.adjective))
    if first.denied != second.denied:
        core *= 0.65
    return round(1 + 4 * core, 1)


def _alike(concepts: Mapping[str, Sequence[object]], a: str | None, b: str | None) -> float:
    if a == b:
        return 1.0
    if a is None or b is None or concepts[a][0] == concepts[b][0]:
        return 0.5
    return 0.0


def _say(event: _Event, rng: random.Random) -> str:
    """Return a sentence for an event, with random synonyms, in the active or the passive."""
    agent = rng.choice(AGENTS[event.agent][1])
    if event.adjective:
        agent = f"{rng.choice(ADJECTIVES[event.adjective][1])} {agent}"
    doing, done = rng.choice(ACTIONS[event.action][1])
    place = f" {rng.choice(PLACES[event.place][1])}" if event.place else ""
    thing = rng.choice(OBJECTS[event.object][1]) if event.object else ""
    article = rng.choice(("a", "the"))
    if event.object and rng.random() < 0.3:
        no = " not" if event.denied else ""
        text = f"{_noun(article, thing)} is{no} being {done} by {_noun(article, agent)}{place}"
    elif event.denied and rng.random() < 0.5:
        text = f"there is no {agent} {doing}{' ' + _noun('a', thing) if thing else ''}{place}"
    else:
        no = " not" if event.denied else ""
        thing = f" {_noun('a', thing)}" if thing else ""
        text = f"{_noun(article, agent)} is{no} {doing}{thing}{place}"
    return text[0].upper() + text[1:]


def _noun(article: str, noun: str) -> str:
    return f"{'an' if article == 'a' and noun[0] in 'aeiou' else article} {noun}"
