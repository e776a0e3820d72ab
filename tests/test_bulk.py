"""Files of sentences to files of numbers, and the search."""

import math

import pytest
import torch
from tiny import WORDS, D, make_pairs

from fastsiam.model import TextSiamese
from fastsiam.text.vocabulary import Vocabulary

H = 5


def make_model(**options):
    torch.manual_seed(0)
    table = torch.randn(1 + len(WORDS), D)
    table[0] = 0
    return TextSiamese(Vocabulary(["<unk>", *WORDS]), table, H, device="cpu", **options)


PAIRS = make_pairs(60, seed=2)
LEFT, RIGHT = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]


@pytest.fixture(scope="module", params=["plain", "ensemble"])
def model(request):
    if request.param == "plain":
        return make_model(scale=0.5)
    return make_model(scale=[0.25, 0.5], bidirectional=True, pooling="max")


def test_search_finds_the_most_similar(model):
    corpus = list(dict.fromkeys(LEFT))  # equal sentences would tie
    expected = torch.stack([model.similarity([query] * len(corpus), corpus) for query in RIGHT])
    similarity, index = model.search(RIGHT, corpus, k=7)
    assert index.dtype == torch.int64
    assert similarity.shape == index.shape == (60, 7)
    torch.testing.assert_close(similarity, expected.sort(descending=True)[0][:, :7])
    torch.testing.assert_close(similarity, expected.gather(1, index))
    assert all(len(set(row)) == 7 for row in index.tolist())
    again = model.search(RIGHT, model.encode(corpus), k=7)
    torch.testing.assert_close(again, (similarity, index), rtol=1e-6, atol=0)


def test_search_for_one_string(model):
    corpus = ["dog", "the cat", "", "the cat", "cat"]
    similarity, index = model.search("the cat", corpus, k=5)
    assert similarity.shape == index.shape == (5,)
    assert index.tolist()[:2] == [1, 3]  # of equal ones the first comes first
    assert similarity[0] == similarity[1] == 1
    assert similarity[2] < 1
    assert sorted(index.tolist()) == list(range(5))
    assert math.isclose(similarity[4], model.similarity("the cat", corpus[index[4]]), rel_tol=1e-5)


def test_search_refuses():
    model = make_model()
    with pytest.raises(TypeError, match="search: corpus must be a list of strings"):
        model.search("a", "b")
    with pytest.raises(ValueError, match=r"search: corpus must be \[m, 5\], .* got \[3, 4\]"):
        model.search("a", torch.zeros(3, 4))
    with pytest.raises(ValueError, match="search: k must be 1 to 2, the corpus, got 3"):
        model.search("a", ["a", "b"], k=3)
    with pytest.raises(ValueError, match="search: k must be 1 to 0, the corpus, got 10"):
        model.search("a", [])
