"""The recipes: presets, starts, what is minimised, which pairs are seen, ensembles, calibration."""

import dataclasses
import json
import math
import pickle

import pytest
import torch
from test_training import Interrupter, make_config
from tiny import WORDS, D, make_pairs, write_files, write_pairs, write_vectors
from torch.nn import functional as F
from typer.testing import CliRunner

from fastsiam.calibration import Calibration
from fastsiam.cli import app
from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseLSTM
from fastsiam.text.pairs import DataError, join_pairs, read_pairs, rows_outside
from fastsiam.text.synonyms import close_synonyms, load_synonyms, swap_words
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training import recipe
from fastsiam.training.config import PRESETS, Config
from fastsiam.training.data import load_inputs
from fastsiam.training.evaluate import evaluate
from fastsiam.training.objective import (
    AuxiliaryLoss,
    Batch,
    MeanSquaredError,
    make_objective,
    spread,
)
from fastsiam.training.recipe import run_recipe
from fastsiam.training.run import train
from fastsiam.training.start import initialize, make_optimizer

LABELLED = ("sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


def add_puppy(files):
    """Give "puppy" the vector of "dog", so that a swap of the two is a close one."""
    write_vectors(files.vectors, words=[*WORDS, "puppy"])
    lines = files.vectors.read_text().splitlines()
    dog = next(line for line in lines if line.startswith("dog "))
    files.vectors.write_text("\n".join([*lines[:-1], dog.replace("dog", "puppy")]) + "\n")


def label(pairs):
    names = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    return [(*pair, names[i % 3]) for i, pair in enumerate(pairs)]


# presets


def test_presets_are_plain_values_of_settings():
    names = {field.name for field in dataclasses.fields(Config)}
    assert list(PRESETS) == ["article", "paper", "fast", "good", "best"]
    for values in PRESETS.values():
        assert set(values) <= names


def test_the_article_as_written_but_for_its_faults(files):
    config = make_config(files, **{"batch_size": 32, "hidden_size": 50, **PRESETS["article"]})
    assert (config.epochs_of("pretrain"), config.epochs_of("train")) == (70, 360)
    assert (config.batch_size, config.hidden_size, config.clip, config.max_len) == (32, 50, 5, 73)
    assert (config.scale, config.start, config.pooling) == (1.0, "seed", "last")
    # Adadelta's own steps: the article scaled them by 1e-4
    optimizer, schedule = make_optimizer(torch.nn.Linear(1, 1), config, steps=10)
    assert isinstance(optimizer, torch.optim.Adadelta)
    for _ in range(3):
        assert schedule.get_last_lr() == [1.0]
        optimizer.step()
        schedule.step()
    group = optimizer.param_groups[0]
    assert (group["rho"], group["eps"]) == (0.95, 1e-6)


def test_what_is_given_wins_over_a_preset(files):
    need = {name: getattr(files, name) for name in ("train", "dev")}
    need |= {"vectors": (files.vectors,), "out": files.train.parent / "run"}
    assert Config.preset("best", **need).batch_size == 64
    assert Config.preset("best", batch_size=8, **need).batch_size == 8
    assert Config.preset("fast", **need) == Config(select="last", **need)
    # dev can choose nothing where it is trained on, unless that is asked for
    for name in PRESETS:
        config = Config.preset(name, train_on_dev=True, **need)
        assert (config.select, config.patience) == ("last", None)
    for given in ({"patience": 10}, {"select": "dev"}):
        with pytest.raises(ValueError, match="train_on_dev must go with"):
            Config.preset("paper", train_on_dev=True, **given, **need)
    # with a patience the best epoch is kept, whatever the preset keeps
    assert Config.preset("fast", patience=3, **need).select == "dev"
    with pytest.raises(ValueError, match=r"preset must be one of article, paper, .*, got 'slow'"):
        Config.preset("slow", **need)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pretrain_epochs": 0}, "pretrain_epochs"),
        ({"patience": 0}, "patience"),
        ({"ensemble": 0}, "ensemble"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
        ({"kl_weight": -0.1}, "kl_weight must be 0 or more"),
        ({"entailment_weight": math.nan}, "entailment_weight must be 0 or more"),
        ({"vector_length": 0.0}, "vector_length must be positive"),
        ({"start": "he"}, "start must be one of orig, seed, pytorch"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant"),
        ({"pooling": "sum"}, "pooling must be one of last, mean, max"),
        ({"select": "best"}, "select must be one of dev, last"),
        ({"select": "last", "patience": 3}, "patience must go with select 'dev'"),
        ({"train_on_dev": True}, "train_on_dev must go with select 'last'"),
        ({"train_on_dev": True, "select": "last", "patience": 3}, "train_on_dev must go with"),
    ],
    ids=str,
)
def test_settings_are_checked(files, options, match):
    with pytest.raises(ValueError, match=match):
        make_config(files, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_from_the_command_line(files, tmp_path, preset):
    write_pairs(files.train, label(make_pairs(40, seed=1)), LABELLED)
    pretrain = write_pairs(tmp_path / "pre.tsv", make_pairs(20, seed=7))
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text('{"dog": ["cat"]}')
    args = ["train", "--preset", preset, "--out", tmp_path / "run", "--quiet", "--device", "cpu"]
    for name in ("train", "dev", "test", "vectors"):
        args += [f"--{name}", getattr(files, name)]
    args += ["--epochs", 1, "--hidden-size", 4, "--pretrain", pretrain, "--synonyms", synonyms]
    args += ["--pretrain-epochs", 1]
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    assert ("test, calibrated" in result.stdout) == (preset == "paper")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = {**PRESETS[preset], "epochs": 1, "pretrain_epochs": 1, "hidden_size": 4}
    assert {name: run["config"][name] for name in expected} == expected
    assert set(run["pairs"]) == {"pretrain", "train"}
    model = TextSiamese.from_pretrained(tmp_path / "run", device="cpu")
    assert model.lstm.hidden_size == 4
    assert (model.calibration is None) == (preset != "paper")


# starts


@pytest.mark.parametrize("bidirectional", [False, True])
def test_named_starts(bidirectional):
    D, H = 40, 30
    lstm = SiameseLSTM(D, H, bidirectional=bidirectional)

    def draw(start, forget_bias=None):
        initialize(lstm, forget_bias, torch.Generator().manual_seed(0), start)
        for suffix in ("", "_reverse")[: 1 + bidirectional]:
            names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
            tensors = [getattr(lstm, name + suffix).detach() for name in names]
            assert not tensors.pop().any()
            assert not getattr(lstm, f"bias_hh_l0{suffix}").requires_grad
            yield tensors

    for weight_ih, weight_hh, bias in draw("seed"):
        assert float(weight_ih.std()) == pytest.approx(0.2, rel=0.05)
        assert float(weight_hh.std()) == pytest.approx(0.2, rel=0.05)
        # the forget bias of 1 that TensorFlow's cell adds as it runs
        assert bias.view(4, H).sum(dim=1).tolist() == [0, H, 0, 0]
    bound = H**-0.5
    for weight_ih, weight_hh, bias in draw("pytorch"):
        for tensor in (weight_ih, weight_hh):
            assert float(tensor.abs().max()) == pytest.approx(bound, rel=0.01)
        # the sum of two uniform numbers: a variance of 2 * bound^2 / 3
        assert float(bias.std()) == pytest.approx(bound * (2 / 3) ** 0.5, rel=0.1)
    for *_, bias in draw("pytorch", forget_bias=3.0):
        assert bias[H : 2 * H].tolist() == [3.0] * H
    for *_, bias in draw("orig"):
        assert bias[H : 2 * H].tolist() == [2.5] * H
    if bidirectional:
        assert not torch.equal(lstm.weight_ih_l0, lstm.weight_ih_l0_reverse)


# what is minimised


def make_objective_case(**options):
    torch.manual_seed(3)
    lstm = SiameseLSTM(
        D, 5, bidirectional=True, embedding=torch.randn(9, D), scale=0.3, learn_scale=True
    ).double()
    objective = AuxiliaryLoss(lstm, kl_weight=0.3, entailment_weight=0.7, **options)
    lengths = torch.tensor([3, 1, 4, 2, 3, 0])
    inputs = [torch.randint(9, (6, 4)), torch.randint(9, (6, 5)), lengths, lengths.flip(0) + 1]
    target = torch.tensor([0.1, 0.5, 1.0, 0.0, 0.62, 0.9], dtype=torch.float64)
    labels = torch.tensor([0, 2, -1, 1, 1, -1])
    return objective, Batch(inputs, target, labels)


def loss_by_hand(objective, batch):
    """The loss of each pair by itself, from nn.LSTM and the formulas."""
    lstm, heads = objective.module.to_lstm(), objective.heads
    left, right, left_lengths, right_lengths = batch.inputs
    scale = objective.module.log_scale.exp()

    def vector(ids, length):
        if not length:
            return torch.zeros(10, dtype=torch.float64)
        _, (h, _) = lstm(objective.module.embedding.weight[ids[:length]][None])
        return torch.cat([h[0, 0], h[1, 0]])

    losses = []
    for row, gold in enumerate(batch.target):
        u = vector(left[row], int(left_lengths[row]))
        v = vector(right[row], int(right_lengths[row]))
        loss = (torch.exp(-scale * (u - v).abs().sum()) - gold) ** 2
        hidden = torch.tanh(heads["shared"](torch.cat([(u - v).abs(), u * v])))
        guess = heads["score"](hidden).softmax(0)
        score = 1 + 4 * float(gold)
        low = min(4, math.floor(score))
        for klass, p in ((low, low + 1 - score), (low + 1, score - low)):
            if p > 0:
                loss = loss + 0.3 * p * (math.log(p) - guess[klass - 1].log())
        if batch.labels[row] >= 0:
            odds = heads["entailment"](hidden).softmax(0)
            loss = loss - 0.7 * odds[batch.labels[row]].log()
        losses.append(loss)
    return torch.stack(losses)


def test_heads_by_hand():
    objective, batch = make_objective_case()
    by_hand = loss_by_hand(objective, batch)
    output = objective(batch)
    assert float(output.loss.detach()) == pytest.approx(float(by_hand.detach().mean()), rel=1e-9)
    heads = list(objective.heads.parameters())
    ours = torch.autograd.grad(output.loss, heads)
    theirs = torch.autograd.grad(by_hand.mean(), heads, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    # and into the LSTM, against differences
    weight = objective.module.weight_hh_l0
    (dweight,) = torch.autograd.grad(objective(batch).loss, weight)
    for row, column in ((0, 0), (7, 3), (19, 4)):
        with torch.no_grad():
            losses = []
            for step in (1e-5, -2e-5):
                weight[row, column] += step
                losses.append(float(objective(batch).loss))
            weight[row, column] += 1e-5
        difference = (losses[0] - losses[1]) / 2e-5
        assert float(dweight[row, column]) == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_losses_of_parts_add_up_to_that_of_the_batch():
    objective, batch = make_objective_case()
    parts = [
        Batch([t[rows] for t in batch.inputs], batch.target[rows], batch.labels[rows])
        for rows in (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5]))
    ]
    weighted = sum(len(part.target) * objective(part).loss for part in parts) / 6
    torch.testing.assert_close(objective(batch).loss, weighted, rtol=1e-12, atol=0)


def test_without_labels_the_entailment_head_has_no_part():
    objective, batch = make_objective_case()
    none = objective(batch._replace(labels=None)).loss
    unlabelled = objective(batch._replace(labels=torch.full((6,), -1))).loss
    torch.testing.assert_close(none, unlabelled)
    assert none < objective(batch).loss


def test_spread_is_tai_socher_and_manning():
    similarity = torch.tensor([0.0, 0.6, 0.25, 1.0, 0.9], dtype=torch.float64)
    target = spread(similarity, 5)
    classes = torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(target @ classes, 1 + 4 * similarity)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(target[1], torch.tensor([0, 0, 0.6, 0.4, 0], dtype=torch.float64))
    assert target[3].tolist() == [0, 0, 0, 0, 1]


def test_without_weights_the_loss_is_the_mean_squared_error(files):
    objective, batch = make_objective_case()
    plain = make_objective(objective.module, make_config(files))
    assert isinstance(plain, MeanSquaredError)
    bare = AuxiliaryLoss(objective.module)
    for one in (plain, bare):
        output = one(batch)
        expected = F.mse_loss(objective.module(*batch.inputs), batch.target)
        torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in bare.named_parameters()
    }


def test_heads_come_from_the_generator_alone():
    lstm = SiameseLSTM(D, 5, embedding=torch.randn(9, D))

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        made = AuxiliaryLoss(lstm, kl_weight=1.0, entailment_weight=1.0, generator=generator)
        return torch.cat([p.detach().flatten() for p in made.heads.parameters()])

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    # what nn.Linear itself would leave drawn is not the matter of anyone else
    assert first.abs().max() <= 1 / math.sqrt(10)
    torch.set_rng_state(state)


def test_one_dropout_mask_serves_both_sides():
    """Two masks would put distance between equal sentences."""
    torch.manual_seed(0)
    lstm = SiameseLSTM(D, 5, embedding=torch.randn(9, D))
    objective = AuxiliaryLoss(lstm, dropout=0.5)
    ids, lengths = torch.randint(9, (7, 4)), torch.tensor([4, 1, 2, 3, 4, 4, 0])
    same = Batch([ids, ids, lengths, lengths], torch.ones(7))
    other = Batch([ids, ids.flip(0), lengths, lengths.flip(0)], torch.ones(7))
    for _ in range(5):
        assert objective(same).similarity.tolist() == pytest.approx([1.0] * 7, abs=1e-6)
    assert not torch.equal(objective(other).similarity, objective(other).similarity)
    table = lstm.embedding.weight.clone()
    objective.eval()
    torch.testing.assert_close(objective(other).similarity, lstm(*other.inputs))
    assert torch.equal(lstm.embedding.weight, table)


def test_training_leaves_nothing_of_the_heads(files):
    write_pairs(files.train, label(make_pairs(40, seed=1)), LABELLED)
    config = make_config(files, epochs=2, kl_weight=0.05, entailment_weight=0.025, dropout=0.1)
    train(config)
    plain = make_config(files, epochs=2, out=config.out.with_name("plain"))
    train(plain)
    names = [
        TextSiamese.from_pretrained(folder, device="cpu").lstm.state_dict()
        for folder in (config.out, plain.out)
    ]
    assert names[0].keys() == names[1].keys()
    assert not torch.equal(names[0]["weight_hh_l0"], names[1]["weight_hh_l0"])


def test_adadelta_with_its_own_steps_learns_and_with_the_articles_does_not(files):
    """The article multiplied Adadelta's steps, which are scaled already, by 1e-4."""
    losses = {}
    for lr in (1.0, 1e-4):
        config = make_config(
            files, out=files.train.parent / f"run{lr}", optimizer="adadelta", lr=lr, epochs=8
        )
        config = dataclasses.replace(config, schedule="constant", scale=1.0)
        result = train(config)
        rows = (config.out / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        losses[lr] = [float(row.split(",")[column]) for row in rows[1:]]
        assert result.best is not None
    assert losses[1.0][-1] < 0.9 * losses[1.0][0]
    assert losses[1e-4][-1] > 0.99 * losses[1e-4][0]


# which pairs are seen


def test_entailment_labels_are_read(tmp_path):
    pairs = [("a", "b", 1.0), ("c", "d", 2.0), ("e", "f", 3.0), ("g", "h", 4.0)]
    labels = ["NEUTRAL", "CONTRADICTION", "ENTAILMENT", "?"]
    rows = [(*pair, name) for pair, name in zip(pairs, labels, strict=True)]
    tsv = write_pairs(tmp_path / "a.tsv", rows, LABELLED)
    assert read_pairs(tsv).entailment == [1, 0, 2, -1]
    jsonl = tmp_path / "a.jsonl"
    lines = [dict(zip([*LABELLED[:3], "Entailment_Judgment"], row, strict=True)) for row in rows]
    del lines[3]["Entailment_Judgment"]
    jsonl.write_text("\n".join(map(json.dumps, lines)))
    assert read_pairs(jsonl).entailment == [1, 0, 2, -1]
    first = dict.fromkeys(LABELLED[:3], "1")  # it need not have the key
    jsonl.write_text("\n".join(map(json.dumps, [first, first | {LABELLED[3]: "NEUTRAL"}])))
    assert read_pairs(jsonl).entailment == [-1, 1]
    legacy = tmp_path / "a.p"
    legacy.write_bytes(pickle.dumps([[*row, 7] for row in rows], protocol=0))
    assert read_pairs(legacy).entailment == [1, 0, 2, -1]
    plain = write_pairs(tmp_path / "b.tsv", pairs)
    assert read_pairs(plain).entailment == []
    both = join_pairs(read_pairs(plain), read_pairs(tsv))
    assert both.entailment == [-1] * 4 + [1, 0, 2, -1]
    assert both.take([5, 0]).entailment == [0, -1]


def test_a_label_to_learn_must_be_there(files):
    config = make_config(files, entailment_weight=0.1)
    with pytest.raises(DataError, match=r"train.tsv: no pair has an entailment label"):
        load_inputs(config)


def test_joined_pairs_have_the_scale_of_the_first(tmp_path):
    sick = read_pairs(write_pairs(tmp_path / "a.tsv", [("a", "b", 2.0)]))
    sts = read_pairs(
        write_pairs(tmp_path / "b.tsv", [("c", "d", 5.0)], ("sentence1", "sentence2", "score"))
    )
    both = join_pairs(sick, sts)
    assert (both.left, both.right, both.score) == (["a", "c"], ["b", "d"], [2.0, 5.0])
    assert both.similarity == [0.25, 1.0]


def test_no_pair_of_the_test_part_is_trained_on(files, tmp_path):
    """Like the file of pre-training pairs whose last 500 rows were the test's, with its scores."""
    test = read_pairs(files.test)
    held = list(zip(test.left, test.right, test.score, strict=True))
    disguised = [(f"{right.upper()} .", left.title(), score) for left, right, score in held]
    sts = ("sentence1", "sentence2", "score")
    pretrain = write_pairs(tmp_path / "pre.tsv", [*make_pairs(30, seed=11), *disguised], sts)
    write_pairs(files.train, [*make_pairs(40, seed=12), *held[:7], ("zebra", "a dog", 4.0)])
    inputs = load_inputs(make_config(files, pretrain=pretrain))
    assert inputs.dropped["pretrain"] >= len(held)
    assert inputs.dropped["train"] >= 7
    keys = {frozenset((a.lower(), b.lower())) for a, b, _ in held}
    for phase, path in (("pretrain", pretrain), ("train", files.train)):
        pairs = read_pairs(path)
        kept = rows_outside(pairs, read_pairs(files.dev), test)
        assert len(kept) == len(inputs.phases[phase])
        for row in kept:
            plain = [text.lower().replace(" .", "") for text in (pairs.left[row], pairs.right[row])]
            assert frozenset(plain) not in keys


def test_a_swap_may_not_make_a_pair_of_the_test_part(files, tmp_path):
    add_puppy(files)
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text('{"dog": ["puppy", "nowhere"]}')
    write_pairs(files.train, [("fast dog", "cat", 2.0), ("kid", "slow dog", 3.0)])
    write_pairs(files.test, [("Cat.", "Fast puppy", 2.0), ("a kid", "the kid", 4.0)])
    seen = set()
    for seed in range(10):
        inputs = load_inputs(make_config(files, synonyms=synonyms, seed=seed))
        pairs, words = inputs.phases["train"], inputs.vocabulary.words
        assert len(pairs) == 2 + inputs.swapped
        for row in range(len(pairs)):
            sides = [
                " ".join(words[i] for i in side.ids[row, : side.lengths[row]].tolist())
                for side in (pairs.left, pairs.right)
            ]
            seen.add(tuple(sides))
            if row >= 2:
                # the swapped pair keeps the score of the one it came from
                assert pairs.similarity[row] == pairs.similarity[pairs.origin[row]]
    assert seen == {("fast dog", "cat"), ("kid", "slow dog"), ("kid", "slow puppy")}


def test_dev_is_trained_on_when_told_and_without_its_repeats_of_test(files):
    dev, test = read_pairs(files.dev), read_pairs(files.test)
    rows = list(zip(dev.left, dev.right, dev.score, strict=True))
    leak = (test.right[0], test.left[0], 1.5)
    write_pairs(files.dev, [*rows, leak])
    without = load_inputs(make_config(files))
    told = load_inputs(make_config(files, train_on_dev=True, select="last"))
    assert told.dropped["dev"] >= 1
    kept = len(dev) + 1 - told.dropped["dev"]
    # training pairs that repeat a dev pair may stay then
    assert len(told.phases["train"]) == 90 - told.dropped["train"] + kept
    assert told.dropped["train"] <= without.dropped["train"]
    assert len(told.dev) == len(without.dev)


def test_synonyms_are_close_and_no_stop_words():
    table = torch.zeros(7, 2)
    words = ["<unk>", "dog", "hound", "chicken", "The", "these", "Cat"]
    table[1], table[2], table[3] = torch.tensor([[1, 0.1], [1, 0], [0.1, 1]])
    table[4] = table[5] = torch.tensor([1.0, 1.0])
    table[6] = torch.tensor([0.8, 0.5])
    given = {
        "dog": ["hound", "chicken", "dog", "nowhere", "cat"],
        "the": ["these"],
        "nowhere": ["dog"],
        "chicken": ["dog"],
    }
    found = close_synonyms(given, Vocabulary(words), table)
    # a stop word stays; the cosine of chicken and dog is .2
    assert found == {"dog": ["hound", "cat"]}


def test_swaps_come_in_both_sentences_and_keep_the_rest(tmp_path):
    pairs = read_pairs(
        write_pairs(
            tmp_path / "a.tsv",
            [("A Dog runs.", "the dog sits", 4.5, "NEUTRAL"), ("a kid", "a cat", 2.0, "?")],
            LABELLED,
        )
    )
    seen = set()
    for seed in range(60):
        new, rows = swap_words(
            pairs, {"dog": ["hound", "pup"]}, torch.Generator().manual_seed(seed)
        )
        assert len(new) <= 2
        assert set(rows) <= {0}  # nothing to swap in the other pair
        assert new.score == [4.5] * len(new)
        assert new.entailment == [1] * len(new)
        seen |= set(zip(new.left, new.right, strict=True))
        again = swap_words(pairs, {"dog": ["hound", "pup"]}, torch.Generator().manual_seed(seed))
        assert again == (new, rows)
    names = ("Dog", "hound", "pup"), ("dog", "hound", "pup")
    every = {(f"A {a} runs .", f"the {b} sits") for a in names[0] for b in names[1]}
    assert seen == every - {("A Dog runs .", "the dog sits")}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[1]", "must be a JSON object of lists of words, got list"),
        ('{"dog": "hound"}', "must map 'dog' to a list of words, got 'hound'"),
        ('{"dog": [1]}', "must map 'dog' to a list of words"),
        ("{", "must be a JSON object of lists"),
    ],
)
def test_a_file_that_is_no_table_of_synonyms(tmp_path, content, match):
    path = tmp_path / "synonyms.json"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        load_synonyms(path)


def test_joined_vectors_weigh_alike(files):
    other = files.vectors.with_name("long.txt")
    lines = write_vectors(other, dim=3).read_text().splitlines()
    scaled = [
        " ".join([word, *(str(100 * float(v)) for v in values)])
        for word, *values in map(str.split, lines[1:])
    ]
    other.write_text("\n".join([lines[0], *scaled]) + "\n")
    inputs = load_inputs(make_config(files, vectors=(files.vectors, other), vector_length=4.0))
    table = inputs.table[1:]
    assert float(table[:, :D].norm(dim=1).mean()) == pytest.approx(4.0, rel=1e-5)
    assert float(table[:, D:].norm(dim=1).mean()) == pytest.approx(4.0, rel=1e-5)
    # one factor a file: directions and ratios stay
    plain = load_inputs(make_config(files)).table
    torch.testing.assert_close(
        inputs.table[:, :D] / plain,
        (inputs.table[1, 0] / plain[1, 0]).expand_as(plain).where(plain != 0, plain / plain),
        equal_nan=True,
    )


def test_folds_are_disjoint_and_swapped_pairs_follow_theirs(files, tmp_path):
    write_vectors(files.vectors, words=[*WORDS])
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text(json.dumps(dict.fromkeys(WORDS, WORDS)))
    pairs = load_inputs(make_config(files, synonyms=synonyms)).phases["train"]
    own = pairs.origin == torch.arange(len(pairs))
    assert 0 < int((~own).sum())
    marks = torch.arange(len(pairs)).float()
    pairs = dataclasses.replace(pairs, similarity=marks)
    held = []
    for fold in range(5):
        outside, inside = pairs.split(5, fold)
        rows, out = inside.similarity.long(), outside.similarity.long()
        assert own[rows].all()
        held += rows.tolist()
        assert not set(pairs.origin[out].tolist()) & set(rows.tolist())
        # all that has nothing to do with the part is trained on
        assert len(out) + int(torch.isin(pairs.origin, rows).sum()) == len(pairs)
    assert sorted(held) == torch.nonzero(own)[:, 0].tolist()


def test_no_fold_is_scored_by_a_model_that_has_seen_its_pairs(files, tmp_path, monkeypatch):
    """Not as a repeat, not in the pairs to train on first, not by words that were swapped."""
    add_puppy(files)
    pairs = make_pairs(30, seed=1)
    pairs += [(f"{word} {pet}", "kid", 3.0) for word in WORDS[5:] for pet in ("dog", "puppy")]
    repeats = [(f"{right.upper()} .", left, score) for left, right, score in pairs[:12]]
    write_pairs(files.train, [*pairs, *repeats, *pairs[:4]])
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text('{"dog": ["puppy"], "puppy": ["dog"]}')
    pretrain = write_pairs(tmp_path / "pre.tsv", [*pairs[5:], *make_pairs(9, seed=7)])
    config = make_config(
        files, pretrain=pretrain, synonyms=synonyms, calibrate=True, folds=3, epochs=1
    )
    seen = {}

    def spy(config, progress, inputs):
        seen[config.out.parent.name, config.out.name] = inputs
        return train(config, progress, inputs)

    monkeypatch.setattr(recipe, "train", spy)
    run_recipe(config)

    def keys(part):
        sides = [
            [tuple(i for i in ids[:length] if i) for ids, length in zip(*side, strict=True)]
            for side in (
                (part.left.ids.tolist(), part.left.lengths.tolist()),
                (part.right.ids.tolist(), part.right.lengths.tolist()),
            )
        ]
        return [tuple(sorted(pair)) for pair in zip(*sides, strict=True)]

    whole = seen["members", "0"].phases
    inside = [whole["train"].split(3, fold)[1] for fold in range(3)]
    for fold, held in enumerate(inside):
        phases = seen["folds", str(fold)].phases
        for name in ("pretrain", "train"):
            left = keys(phases[name])
            assert not set(left) & set(keys(held))
            assert 0 < len(left) < len(whole[name])
    sizes = [len(held) for held in inside]
    assert sum(sizes) == len(whole["train"]) - seen["members", "0"].swapped
    assert max(sizes) - min(sizes) <= 1


def test_a_fold_goes_without_pretraining_where_nothing_is_left_of_it(files, tmp_path):
    pretrain = write_pairs(tmp_path / "pre.tsv", [("the slow dog", "fast kid", 2.0)])
    write_pairs(files.train, [*make_pairs(20, seed=1), ("Fast kid", "the slow dog.", 2.0)])
    config = make_config(files, pretrain=pretrain, calibrate=True, folds=2, epochs=1)
    run_recipe(config)
    phases = [
        set(json.loads((config.out / "folds" / str(fold) / "run.json").read_text())["pairs"])
        for fold in range(2)
    ]
    assert sorted(phases, key=len) == [{"train"}, {"pretrain", "train"}]


def test_a_calibration_needs_a_pair_for_each_fold(files):
    write_pairs(files.train, [("slow dog", f"{word}", 2.0) for word in [*WORDS[:4], "Cat."]])
    config = make_config(files, calibrate=True)
    with pytest.raises(DataError, match=r"train.tsv: must hold at least 5 different pairs .* got"):
        run_recipe(config)
    load_inputs(dataclasses.replace(config, calibrate=False))


def test_every_run_counts_its_swapped_pairs(files, tmp_path):
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text(json.dumps(dict.fromkeys(WORDS, WORDS)))
    config = make_config(files, synonyms=synonyms, calibrate=True, folds=2, epochs=1)
    run_recipe(config)

    def counted(folder):
        return json.loads((folder / "run.json").read_text())["swapped"]

    pairs = load_inputs(config).phases["train"]
    swapped = pairs.origin != torch.arange(len(pairs))
    assert counted(config.out) == counted(config.out / "members" / "0") == int(swapped.sum()) > 0
    marked = dataclasses.replace(pairs, similarity=swapped.float())
    for fold in range(2):
        outside, _ = marked.split(2, fold)
        assert counted(config.out / "folds" / str(fold)) == int(outside.similarity.sum()) > 0


# ensembles and calibration


def test_an_ensemble_is_its_members_and_one_folder(files):
    config = make_config(files, ensemble=2, epochs=2, seed=4)
    result = run_recipe(config)
    saved = TextSiamese.from_pretrained(config.out, device="cpu")
    assert len(saved.members) == 2
    test = read_pairs(files.test)
    logs = []
    for number in range(2):
        alone = make_config(files, epochs=2, seed=4 + number, out=config.out.with_name(f"{number}"))
        logs.append(train(alone).model.similarity(test.left, test.right).log())
    expected = torch.stack(logs).mean(dim=0).exp()
    assert (logs[0] - logs[1]).abs().max() > 1e-3
    torch.testing.assert_close(result.test.similarity, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(saved.similarity(test.left, test.right), expected, rtol=1e-5, atol=0)
    dev = evaluate(saved, read_pairs(files.dev)).metrics
    assert result.best.dev_pearson == pytest.approx(dev.pearson, abs=1e-6)


def test_calibration_is_fitted_out_of_fold(files):
    config = make_config(files, calibrate=True, folds=3, epochs=2)
    result = run_recipe(config)
    inputs = load_inputs(config)
    pairs = inputs.phases["train"]
    predicted, gold = [], []
    for fold in range(3):
        outside, inside = pairs.split(3, fold)
        part = dataclasses.replace(inputs, phases={"train": outside})
        one = make_config(files, epochs=2, out=config.out.with_name(f"fold{fold}"))
        model = train(one, inputs=part).model
        predicted.append(model.score(inside.left, inside.right))
        gold.append(inside.similarity)
    assert sum(map(len, gold)) == len(pairs)
    expected = Calibration.fit(torch.cat(predicted), torch.cat(gold))
    saved = TextSiamese.from_pretrained(config.out, device="cpu")
    for made in (result.model.calibration, saved.calibration):
        torch.testing.assert_close(made.predicted, expected.predicted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(made.gold, expected.gold, rtol=1e-5, atol=1e-7)
    # the model itself is the one that there would be without
    plain = train(make_config(files, epochs=2, out=config.out.with_name("plain")))
    assert torch.equal(plain.test.similarity, result.test.similarity)
    assert plain.test.calibrated is None
    scores = saved.to_score(result.test.similarity.double())
    gold = torch.tensor(read_pairs(files.test).score, dtype=torch.float64)
    assert result.test.calibrated.mse == pytest.approx(float((scores - gold).square().mean()))
    # the predictions in the folder are the calibrated ones
    lines = (config.out / "predictions.tsv").read_text().splitlines()[1:]
    written = [float(text.split("\t")[3]) for text in lines]
    assert written == pytest.approx(scores.tolist(), abs=1e-3)


def test_an_interrupted_ensemble_is_resumed(files):
    options = {"ensemble": 2, "calibrate": True, "folds": 2, "epochs": 2}
    whole = make_config(files, **options)
    run_recipe(whole)
    cut = make_config(files, out=whole.out.with_name("cut"), **options)
    assert run_recipe(cut, Interrupter(epochs=6)).interrupted  # in a fold, the members done
    assert not (cut.out / "run.json").exists()
    resumed = run_recipe(dataclasses.replace(cut, resume=True))
    assert not resumed.interrupted
    for name in ("model.safetensors", "config.json", "predictions.tsv"):
        assert (cut.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_resume_refuses_other_settings_and_loses_nothing(files):
    def written(folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    many = make_config(files, ensemble=2, calibrate=True, folds=2, epochs=1)
    one = make_config(files, epochs=1, out=many.out.with_name("one"))
    alone = dataclasses.replace(one, out=many.out.with_name("alone"))
    for config in (one, many):
        run_recipe(config)
    alone.out.mkdir()
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        (alone.out / name).write_bytes((one.out / name).read_bytes())

    def refused(config, match, **changes):
        before = written(config.out)
        with pytest.raises(ValueError, match=match):
            run_recipe(dataclasses.replace(config, resume=True, **changes))
        assert written(config.out) == before

    refused(many, "resume: ensemble and calibrate must be", ensemble=1, calibrate=False)
    refused(many, "resume: ensemble must be what it was in .*, 2, got 1", ensemble=1)
    refused(many, "resume: ensemble must be what it was in .*, 2, got 3", ensemble=3)
    refused(many, "resume: calibrate must be what it was in .*, True, got False", calibrate=False)
    refused(one, "resume: ensemble and calibrate must be", ensemble=2)
    refused(one, "resume: ensemble and calibrate must be", calibrate=True)
    for changes in ({}, {"hidden_size": 20}, {"ensemble": 2}):
        refused(alone, "alone must hold the checkpoints of its run, got config.json", **changes)
    for path in (many.out / "members" / "0" / "checkpoints").iterdir():
        path.unlink()
    refused(many, "got config.json and nothing in members/0/checkpoints")


def test_the_seeds_of_members_start_again_behind_the_last(files):
    config = make_config(files, ensemble=2, epochs=1, seed=2**63 - 1)
    run_recipe(config)
    seeds = [
        json.loads((config.out / "members" / str(number) / "run.json").read_text())["config"][
            "seed"
        ]
        for number in range(2)
    ]
    assert seeds == [2**63 - 1, 0]


def test_evaluate_shows_both_figures_of_a_calibrated_model(files):
    config = make_config(files, calibrate=True, folds=2, epochs=1)
    run_recipe(config)
    result = CliRunner().invoke(app, ["evaluate", str(config.out), str(files.test)])
    assert "test.tsv, calibrated" in result.stdout
    result = CliRunner().invoke(app, ["evaluate", str(config.out), str(files.test), "--json"])
    values = json.loads(result.stdout)
    assert values["calibrated"]["mse"] != values["mse"]
    assert set(values["calibrated"]) == {"pearson", "spearman", "mse"}
