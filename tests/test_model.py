import json
import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, D

from fastsiam.bulk import score_file, search_file
from fastsiam.calibration import Calibration
from fastsiam.device import UnavailableError, pick_device
from fastsiam.model import TextSiamese
from fastsiam.text.pairs import DataError
from fastsiam.text.vocabulary import Vocabulary

H = 5
LEFT = ["the cat runs", "", "a dog", "kid sits here there fast slow", "zebra cat", "dog"]
RIGHT = ["a cat sits fast", "dog", "a dog", "", "cat zebra", "the the the the the the the the"]


@pytest.fixture
def model():
    return make_model()


def make_model(**options):
    torch.manual_seed(0)
    table = torch.randn(1 + len(WORDS), D)
    table[0] = 0
    options = {"device": "cpu", **options}
    return TextSiamese(Vocabulary(["<unk>", *WORDS]), table, H, **options)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(model, sentence):
    """The last state of an nn.LSTM that reads the words one sentence at a time."""
    rows = [1 + WORDS.index(w) if w in WORDS else 0 for w in sentence.split()][: model.max_len]
    if not rows:
        return torch.zeros(H)
    with torch.no_grad():
        states, _ = model.lstm.to_lstm()(model.lstm.embedding.weight[rows][None])
    return states[0, -1]


def test_similarity_is_the_formula_in_the_order_given(model):
    expected = torch.stack(
        [
            torch.exp(-0.25 * (by_hand(model, left) - by_hand(model, right)).abs().sum())
            for left, right in zip(LEFT, RIGHT, strict=True)
        ]
    )
    assert expected.unique().numel() == 6
    for batch_size in (1, 2, 256):
        scores = model.similarity(LEFT, RIGHT, batch_size)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_two_strings_give_a_float(model):
    score = model.similarity(LEFT[0], RIGHT[0])
    assert isinstance(score, float)
    assert score == pytest.approx(float(model.similarity(LEFT, RIGHT)[0]), rel=1e-6)


def test_equal_sentences_score_one_and_sides_may_swap(model):
    assert model.similarity("the cat runs", "the cat runs") == 1.0
    torch.testing.assert_close(
        model.similarity(LEFT, RIGHT), model.similarity(RIGHT, LEFT), rtol=1e-6, atol=0
    )


def test_empty_sentences(model):
    assert model.similarity("", "") == 1.0
    assert model.encode(["", " "]).tolist() == [[0.0] * H] * 2
    assert model.similarity([], []).shape == (0,)
    assert model.encode([]).shape == (0, H)


def test_encode_in_the_order_given(model):
    vectors = model.encode(LEFT, batch_size=2)
    expected = torch.stack([by_hand(model, sentence) for sentence in LEFT])
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-7)
    score = torch.exp(-0.25 * (vectors - model.encode(RIGHT)).abs().sum(1))
    torch.testing.assert_close(score, model.similarity(LEFT, RIGHT), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("float64_by_default")
def test_results_do_not_follow_the_default_dtype():
    model = make_model()
    assert model.similarity(LEFT, RIGHT).dtype == torch.float32
    assert model.encode(LEFT).dtype == torch.float32
    assert model.search(LEFT[0], RIGHT, 2)[0].dtype == torch.float32


def test_results_do_not_follow_the_default_device(model):
    expected = model.similarity(LEFT, RIGHT), model.encode(LEFT)
    with torch.device("meta"):
        assert torch.equal(model.similarity(LEFT, RIGHT), expected[0])
        assert torch.equal(model.encode(LEFT), expected[1])


def test_vectors_under_autocast(model):
    expected = model.encode(LEFT)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = model.encode(LEFT)
    assert not torch.equal(vectors, expected)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0.02)


def test_max_len_keeps_the_first_words():
    model = make_model(max_len=3)
    assert model.similarity("a the cat dog kid", "a the cat") == 1.0
    assert model.similarity("a the cat dog kid", "the cat dog kid") < 1.0


def test_to_score():
    assert make_model().to_score(0.5) == 3.0
    assert make_model(score_range=(0, 5)).to_score(0.5) == 2.5


@pytest.mark.parametrize(
    ("left", "right", "error", "match"),
    [
        ("a", ["a"], TypeError, "two strings or two lists"),
        (["a"], "a", TypeError, "two strings or two lists"),
        (["a", "b"], ["a"], ValueError, "got 2 and 1"),
        (["a"], [None], TypeError, "string"),
    ],
)
def test_similarity_refuses(model, left, right, error, match):
    with pytest.raises(error, match=match):
        model.similarity(left, right)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_len": 0}, "max_len"),
        ({"score_range": (5, 1)}, "score_range"),
        ({"scale": 0.0}, "scale"),
        ({"scale": []}, "a number for each member"),
        ({"pooling": "sum"}, "pooling must be one of"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"device": "gpu"}, "device must be like"),
    ],
)
def test_constructor_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        make_model(**options)


def test_table_must_fit_the_vocabulary():
    with pytest.raises(ValueError, match=r"V = 2.*got \[3, 4\]"):
        TextSiamese(Vocabulary(["<unk>", "a"]), torch.zeros(3, 4), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda():
    assert pick_device(None).type == "cpu"
    with pytest.raises(UnavailableError, match="'cuda' cannot be used"):
        pick_device("cuda")


def test_a_backend_that_cannot_run_is_told_at_once():
    pytest.importorskip("triton")
    table = torch.zeros(2, D)
    with pytest.raises(UnavailableError, match="at most 128"):
        TextSiamese(Vocabulary(["<unk>", "a"]), table, 2049, backend="triton", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_save_and_load_are_bit_equal(tmp_path, dtype):
    spelled = Vocabulary(["<unk>", *WORDS], {"kitty": "cat", "Grüße": "dog"})
    model = make_model(dtype=dtype, scale=0.3, max_len=4, score_range=(0.0, 5.0))
    model.vocabulary = spelled
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = TextSiamese.from_pretrained(tmp_path / "new" / "folder", device="cpu")
    state = model.lstm.state_dict()
    assert loaded.lstm.state_dict().keys() == state.keys()
    for name, tensor in loaded.lstm.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name]), name
    sentences = [*LEFT, "kitty Grüße"]
    assert torch.equal(loaded.encode(sentences), model.encode(sentences))
    assert torch.equal(
        loaded.similarity(sentences, sentences[::-1]), model.similarity(sentences, sentences[::-1])
    )
    assert loaded.score_range == (0.0, 5.0)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocabulary.json",
    ]


def test_weights_carry_the_names_of_nn_lstm(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embedding.weight"]
    torch.nn.LSTM(D, H).load_state_dict(tensors)


def test_a_failed_save_leaves_the_old_files(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.lstm.weight_hh_l0.add_(1.0)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        model.save_pretrained(tmp_path)
    assert caught.value.filename == str(tmp_path / "vocabulary.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def set_row(name, value):
    return lambda tensors: tensors.update({name: value})


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors: cannot be read"),
    "no words": (lambda f: (f / "vocabulary.json").unlink(), "vocabulary.json: cannot be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "must be JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a configuration"),
    "no format": (lambda f: edit_config(f, format=True), "not a configuration"),
    "similarity": (
        lambda f: edit_config(f, similarity="l2"),
        "similarity must be one of manhattan, cosine, got 'l2'",
    ),
    "newer": (lambda f: edit_config(f, format=4), "newer fastsiam .format 4"),
    "no size": (lambda f: edit_config(f, hidden_size="5"), "hidden_size must be a positive int"),
    "negative scale": (lambda f: edit_config(f, scales=[-1.0]), "scales must be positive floats"),
    "endless scale": (
        lambda f: edit_config(f, scales=[math.inf]),
        "scales must be positive floats",
    ),
    "no scale": (lambda f: edit_config(f, scales=[]), "scales must be positive floats"),
    "directions": (
        lambda f: edit_config(f, bidirectional=1),
        "bidirectional must be true or false",
    ),
    "pooling": (lambda f: edit_config(f, pooling="sum"), "pooling must be one of last, mean, max"),
    "calibration": (
        lambda f: edit_config(f, calibration={"predicted": [0.1, 0.1], "gold": [0, 1]}),
        "calibration cannot be read: Calibration: predicted must rise",
    ),
    "a calibration of lists": (
        lambda f: edit_config(f, calibration={"predicted": [[0.1], [0.3]], "gold": [[0], [1]]}),
        "calibration cannot be read: .* lists of numbers: float.. argument must be",
    ),
    "a calibration beyond floats": (
        lambda f: edit_config(f, calibration={"predicted": [0, 10**400], "gold": [0, 1]}),
        "calibration cannot be read: .* lists of numbers: int too large",
    ),
    "half a calibration": (
        lambda f: edit_config(f, calibration={"predicted": [0, 1]}),
        "calibration cannot be read: 'gold'",
    ),
    "more members": (
        lambda f: edit_config(f, scales=[0.25, 0.25]),
        r"members.0.weight_ih_l0 must be \[20, 6\].*got nothing",
    ),
    "endless range": (lambda f: edit_config(f, score_range=[0, math.inf]), "two numbers"),
    "a range beyond floats": (lambda f: edit_config(f, score_range=[1, 10**400]), "two numbers"),
    "no numbers": (lambda f: edit_config(f, score_range=[False, True]), "two numbers"),
    "one limit": (lambda f: edit_config(f, score_range=[1]), "score_range must be two numbers"),
    "other size": (lambda f: edit_config(f, hidden_size=7), r"weight_ih_l0 must be \[28, 6\]"),
    "odd words": (lambda f: (f / "vocabulary.json").write_text("[1]"), "not a vocabulary"),
    "a word that is none": (
        lambda f: (f / "vocabulary.json").write_text('{"words": ["<unk>", 1], "spelling": {}}'),
        "must hold text alone",
    ),
    "a spelling that is none": (
        lambda f: (f / "vocabulary.json").write_text(
            '{"words": ["<unk>"], "spelling": {"a": ["b"]}}'
        ),
        "must hold text alone",
    ),
    "a word twice": (
        lambda f: (f / "vocabulary.json").write_text(
            '{"words": ["<unk>", "a", "a"], "spelling": {}}'
        ),
        "'a' twice",
    ),
    "fewer words": (
        lambda f: (f / "vocabulary.json").write_text('{"words": ["<unk>"], "spelling": {}}'),
        r"embedding.weight must be \[1, 6\]",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "damaged",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"hello"), "damaged"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("bias_hh_l0")),
        r"bias_hh_l0 must be \[20\].*got nothing",
    ),
    "one too many": (lambda f: edit_weights(f, set_row("x", torch.zeros(1))), "unknown names"),
    "integers": (
        lambda f: edit_weights(f, set_row("bias_ih_l0", torch.zeros(20, dtype=torch.int32))),
        "one floating-point type",
    ),
    "8 bits": (
        lambda f: edit_weights(
            f, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn) for name in t})
        ),
        "one floating-point type, of 16 bits or more",
    ),
    "NaN": (
        lambda f: edit_weights(f, set_row("bias_ih_l0", torch.full((20,), torch.nan))),
        "NaN or infinity",
    ),
}


def test_a_folder_of_the_first_format_is_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    first = {name: config[name] for name in ("input_size", "hidden_size", "max_len", "score_range")}
    path.write_text(json.dumps({"format": 1, "scale": 0.25, **first}))
    loaded = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.similarity(LEFT, RIGHT), model.similarity(LEFT, RIGHT))


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_two_directions_and_a_learned_scale_are_saved(tmp_path, pooling):
    model = make_model(bidirectional=True, pooling=pooling, scale=0.5, learn_scale=True)
    with torch.no_grad():
        model.lstm.log_scale += 0.1
    model.save_pretrained(tmp_path)
    loaded = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert loaded.scale == model.scale == pytest.approx(0.5 * math.exp(0.1))
    vectors, other = model.encode(LEFT), model.encode(RIGHT)
    assert vectors.shape == (len(LEFT), 2 * H) == (len(LEFT), model.vector_size)
    assert torch.equal(loaded.encode(LEFT), vectors)
    expected = torch.exp(-loaded.scale * (vectors - other).abs().sum(1))
    for made in (model, loaded):
        torch.testing.assert_close(made.similarity(LEFT, RIGHT), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("log_scale", [-200.0, 200.0, math.nan])
def test_a_scale_that_could_not_be_loaded_is_not_saved(tmp_path, log_scale):
    model = make_model(learn_scale=True)
    model.lstm.log_scale.data.fill_(log_scale)
    with pytest.raises(ValueError, match=r"^save_pretrained: every scale must be pos"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_scale_may_be_any_number():
    expected = make_model(scale=0.25).similarity(LEFT, RIGHT)
    for scale in (np.float32(0.25), np.float64(0.25), Fraction(1, 4), np.array([0.25])):
        assert torch.equal(make_model(scale=scale).similarity(LEFT, RIGHT), expected)


def make_members(count=3):
    members = [make_model(bidirectional=True, scale=0.2 * (1 + seed)) for seed in range(count)]
    for seed, member in enumerate(members):
        torch.manual_seed(seed)
        member.lstm.reset_parameters()
    return members


def test_an_ensemble_is_the_mean_of_its_members(tmp_path):
    members = make_members()
    model = TextSiamese.ensemble(members)
    alone = torch.stack([member.similarity(LEFT, RIGHT) for member in members]).double()
    assert alone.std(dim=0).max() > 1e-3
    geometric = alone.log().mean(dim=0).exp().float()
    torch.testing.assert_close(model.similarity(LEFT, RIGHT), geometric, rtol=2e-6, atol=0)
    # as one vector: exp(-L1), with no factor left
    vectors, other = model.encode(LEFT, batch_size=2), model.encode(RIGHT)
    assert vectors.shape == (len(LEFT), 3 * 2 * H) == (len(LEFT), model.vector_size)
    assert model.scale == 1.0
    torch.testing.assert_close(
        torch.exp(-(vectors - other).abs().sum(1)), geometric, rtol=2e-6, atol=0
    )
    model.save_pretrained(tmp_path)
    loaded = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.encode(LEFT, batch_size=2), vectors)
    assert torch.equal(loaded.similarity(LEFT, RIGHT), model.similarity(LEFT, RIGHT))
    # the word vectors are there once, in memory and in the file
    assert len({id(member.embedding.weight) for member in loaded.members}) == 1
    names = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("embedding.weight") for name in names) == 1


def as_cosine(vectors, others):
    """(1 + cos) / 2 by numpy; the cosine with a zero vector is 0."""
    u, v = (t.double().numpy() for t in (vectors, others))
    norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    return (1 + (u * v).sum(axis=1) / np.where(norms == 0, 1, norms)) / 2


@pytest.mark.parametrize("members", [1, 3])
def test_cosine_is_scored_encoded_searched_and_saved(tmp_path, members):
    models = []
    for seed in range(members):
        made = make_model(similarity="cosine", bidirectional=True)
        torch.manual_seed(seed)
        for p in made.lstm.parameters():
            torch.nn.init.normal_(p, std=0.5) if p.requires_grad else None
        models.append(made)
    model = models[0] if members == 1 else TextSiamese.ensemble(models)
    expected = np.mean([as_cosine(m.encode(LEFT), m.encode(RIGHT)) for m in models], axis=0)
    assert np.allclose(model.similarity(LEFT, RIGHT).numpy(), expected, atol=1e-6)
    # the vectors side by side have the ensemble's similarity
    assert np.allclose(as_cosine(model.encode(LEFT), model.encode(RIGHT)), expected, atol=1e-6)
    corpus = [*RIGHT, *RIGHT]  # each twice: the first comes first
    whole = np.stack([model.similarity([query] * len(corpus), corpus) for query in LEFT])
    similarity, index = model.search(LEFT, corpus, k=len(corpus))
    assert np.allclose(np.take_along_axis(whole, index.numpy(), 1), similarity.numpy(), atol=1e-6)
    assert (similarity.diff() <= 0).all()
    places = index.argsort(dim=1)
    assert (places[:, : len(RIGHT)] < places[:, len(RIGHT) :]).all()
    model.save_pretrained(tmp_path)
    again = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert again.lstm.similarity == "cosine"
    assert torch.equal(again.similarity(LEFT, RIGHT), model.similarity(LEFT, RIGHT))
    pairs = tmp_path / "pairs.tsv"
    rows = (f"{left}\t{right}\n" for left, right in zip(LEFT, RIGHT, strict=True))
    pairs.write_text("".join(["sentence1\tsentence2\n", *rows]))
    score_file(model, pairs, tmp_path / "scores", columns=("sentence1", "sentence2"))
    found = np.loadtxt(tmp_path / "scores", skiprows=1)[:, 0]
    assert np.allclose(found, expected, atol=1e-5)
    corpus_file = tmp_path / "corpus.txt"
    corpus_file.write_text("".join(f"{text}\n" for text in RIGHT))
    (hits,) = search_file(model, ["the cat runs"], corpus_file, 3)
    best = sorted((-value, i) for i, value in enumerate(whole[0, : len(RIGHT)]) if RIGHT[i])[:3]
    assert [hit.line - 1 for hit in hits] == [i for _, i in best]
    assert [hit.similarity for hit in hits] == pytest.approx([-v for v, _ in best], abs=1e-6)


def test_an_ensemble_of_two_similarities_is_refused():
    with pytest.raises(ValueError, match="the same words, word vectors, shape, similarity and"):
        TextSiamese.ensemble([make_model(), make_model(similarity="cosine")])


def test_a_folder_of_the_second_format_is_manhattan(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("similarity") == "manhattan"
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 2}))
    again = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(again.similarity(LEFT, RIGHT), model.similarity(LEFT, RIGHT))


def test_an_ensemble_has_weights_of_its_own():
    members = make_members(2)
    model = TextSiamese.ensemble(members)
    before = model.similarity(LEFT, RIGHT)
    with torch.no_grad():
        members[0].lstm.weight_hh_l0.zero_()
    assert torch.equal(model.similarity(LEFT, RIGHT), before)
    again = TextSiamese.ensemble([model, *make_members(1)])
    assert len(again.members) == 3


def test_ensembles_of_different_models_are_refused():
    with pytest.raises(ValueError, match="at least one model"):
        TextSiamese.ensemble([])
    for other in (make_model(max_len=5), make_model(pooling="max"), make_model(bidirectional=True)):
        with pytest.raises(ValueError, match="must have the same words"):
            TextSiamese.ensemble([make_model(), other])
    other = make_model()
    with torch.no_grad():
        other.lstm.embedding.weight[1] += 1
    with pytest.raises(ValueError, match="must have the same words"):
        TextSiamese.ensemble([make_model(), other])


def test_a_calibrated_model_scores_on_the_bent_scale(tmp_path):
    calibration = Calibration([0.0, 0.5, 1.0], [0.0, 0.2, 1.0])
    model = make_model(calibration=calibration, score_range=(1.0, 5.0))
    model.save_pretrained(tmp_path)
    loaded = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert loaded.similarity("a cat", "a dog") == make_model().similarity("a cat", "a dog")
    assert loaded.to_score(0.25) == pytest.approx(1.4)
    scores = loaded.to_score(torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.8, 3.4, 5.0]))
    assert make_model().to_score(torch.tensor([0.5])).tolist() == [3.0]


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_sentence(model, tmp_path, damage, match):
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=match) as caught:
        TextSiamese.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_number_of_tokens_may_be_the_limit(model, tmp_path):
    expected = model.similarity(LEFT, RIGHT)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, max_len=2**63)
    loaded = TextSiamese.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.similarity(LEFT, RIGHT), expected)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="fastsiam train"):
        TextSiamese.from_pretrained(tmp_path / "nowhere")
