import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_pairs, write_files, write_pairs, write_vectors
from torch import nn

from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseLSTM
from fastsiam.text.pairs import DataError, read_pairs
from fastsiam.training.batches import grouped_batches
from fastsiam.training.config import Config
from fastsiam.training.data import load_inputs
from fastsiam.training.evaluate import evaluate
from fastsiam.training.metrics import RunningMetrics, measure
from fastsiam.training.objective import MeanSquaredError
from fastsiam.training.run import train
from fastsiam.training.start import initialize, make_optimizer
from fastsiam.training.step import Guard, train_step


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


def make_config(files, **options):
    options = {
        "train": files.train,
        "dev": files.dev,
        "test": files.test,
        "vectors": (files.vectors,),
        "out": files.train.parent.parent / "run",
        "epochs": 4,
        "batch_size": 8,
        "hidden_size": 7,
        "device": "cpu",
        **options,
    }
    return Config(**options)


def read_metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Interrupter:
    """A watcher that presses Ctrl-C after some batches or epochs."""

    def __init__(self, batches=math.inf, epochs=math.inf):
        self.batches, self.epochs = batches, epochs

    def on_start(self, _inputs, _model, pairs):
        self.pairs = pairs

    def on_resume(self, _records, _step, pairs):
        self.pairs -= pairs

    def on_batch(self, pairs):
        self.pairs -= pairs
        self.batches -= 1
        if self.batches == 0:
            raise KeyboardInterrupt

    def on_epoch(self, _record, _best):
        self.epochs -= 1
        if self.epochs == 0:
            raise KeyboardInterrupt


# metrics


def by_hand_pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def mean_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_metrics_by_hand():
    gold = np.array([0.0, 0.25, 0.25, 1.0, 0.6, 0.9])
    predicted = np.array([0.1, 0.2, 0.3, 0.7, 0.7, 0.95])
    metrics = measure(torch.tensor(predicted), torch.tensor(gold))
    assert metrics.n == 6
    assert metrics.pearson == pytest.approx(by_hand_pearson(predicted, gold), abs=1e-12)
    ranks = mean_ranks(predicted), mean_ranks(gold)
    assert metrics.spearman == pytest.approx(by_hand_pearson(*ranks), abs=1e-12)
    on_1_to_5 = (1 + 4 * predicted) - (1 + 4 * gold)
    assert metrics.mse == pytest.approx((on_1_to_5**2).mean(), abs=1e-12)
    assert metrics.undefined == ""


@pytest.mark.parametrize(
    ("predicted", "gold", "why"),
    [
        ([0.5], [0.25], "at least two pairs"),
        ([0.5, 0.25], [0.75, 0.75], "gold scores are all the same"),
        ([0.5, 0.5], [0.25, 0.75], "predictions are all the same"),
    ],
)
def test_undefined_correlations_are_none_and_say_why(predicted, gold, why):
    metrics = measure(torch.tensor(predicted), torch.tensor(gold))
    assert metrics.pearson is None
    assert metrics.spearman is None
    assert why in metrics.undefined
    errors = np.subtract(predicted, gold)
    assert metrics.mse == pytest.approx(16 * (errors**2).mean())


# the start and the steps


def test_start_has_the_stated_spreads_and_one_trained_bias():
    D, H = 30, 40
    lstm = SiameseLSTM(D, H)
    initialize(lstm, 2.5, torch.Generator().manual_seed(0))
    # thousands of draws: the spread is within a few percent
    assert float(lstm.weight_ih_l0.detach().std()) == pytest.approx(0.2 / (D * H) ** 0.25, rel=0.05)
    assert float(lstm.weight_hh_l0.detach().std()) == pytest.approx(0.2 / H**0.5, rel=0.05)
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
    assert bias[H : 2 * H].tolist() == [2.5] * H
    rest = torch.cat([bias[:H], bias[2 * H :]])
    assert rest.abs().max() <= 0.5
    assert float(rest.std()) == pytest.approx(12**-0.5, rel=0.1)
    assert not lstm.bias_hh_l0.any()
    assert not lstm.bias_hh_l0.requires_grad


def test_rate_falls_on_a_cosine_to_zero(files):
    config = make_config(files, lr=0.5)
    optimizer, schedule = make_optimizer(nn.Linear(1, 1), config, steps=10)
    for step in range(11):
        expected = 0.5 * 0.5 * (1 + math.cos(math.pi * step / 10))
        assert schedule.get_last_lr()[0] == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 2e-3), ("adadelta", 1.0)])
def test_twenty_steps_equal_those_of_nn_lstm(files, optimizer, lr):
    """The rival reads one sentence at a time, with torch's optimizers and a cosine of its own."""
    config = make_config(files, optimizer=optimizer, clip=0.3)
    inputs = load_inputs(config)
    pairs = inputs.phases["train"]
    model = TextSiamese(inputs.vocabulary, inputs.table, 7, device="cpu", dtype=torch.float64)
    initialize(model.lstm, 2.5, torch.Generator().manual_seed(0))
    rival = model.lstm.to_lstm()
    rival.bias_hh_l0.requires_grad_(False)
    batches = []
    for epoch in range(3):
        lengths = pairs.left.lengths, pairs.right.lengths
        batches += grouped_batches(*lengths, 8, torch.Generator().manual_seed(epoch))
    batches = batches[:20]
    start = model.lstm.weight_hh_l0.detach().clone()
    objective = MeanSquaredError(model.lstm)
    tools = make_optimizer(model.lstm, config, 20)
    cpu = torch.device("cpu")
    guard, metrics = Guard(cpu), RunningMetrics(cpu)
    for rows in batches:
        batch = pairs.batch(rows, cpu)
        metrics.update(*train_step(objective, batch, *tools, guard, clip=config.clip))
    figures = metrics.compute()
    loss, norm = figures.loss, figures.gradient_norm

    trained = [p for p in rival.parameters() if p.requires_grad]
    if optimizer == "adam":
        rule = torch.optim.Adam(trained, lr=lr)
    else:
        rule = torch.optim.Adadelta(trained, lr=lr, rho=0.95, eps=1e-6)
    table = inputs.table.double()

    def vector(side, row):
        length = int(side.lengths[row])
        return rival(table[side.ids[row, :length]][None])[0][0, -1]

    losses, norms = [], []
    for step, rows in enumerate(batches):
        rule.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 20))
        errors = []
        for row in rows.tolist():
            distance = (vector(pairs.left, row) - vector(pairs.right, row)).abs().sum()
            errors.append((torch.exp(-0.25 * distance) - pairs.similarity[row].double()) ** 2)
        rule.zero_grad()
        torch.stack(errors).mean().backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in trained)))
        for p in trained:
            p.grad.mul_(min(1.0, 0.3 / (norms[-1] + 1e-6)))
        rule.step()
        losses += torch.stack(errors).tolist()
    assert max(norms) > 0.3 > min(norms)  # some steps are clipped and some are not
    assert loss == pytest.approx(np.mean(losses), abs=1e-9)
    assert norm == pytest.approx(np.mean(norms), abs=1e-9)
    state = model.lstm.state_dict()
    assert (state["weight_hh_l0"] - start).abs().max() > 1e-3
    for name, tensor in rival.state_dict().items():
        assert (state[name] - tensor).abs().max() < 1e-9, name


# a whole run


def test_run_learns_and_leaves_a_folder(files):
    config = make_config(files, epochs=12)
    result = train(config)
    rows = read_metrics(config.out)
    assert list(rows[0]) == [
        "epoch",
        "phase",
        "loss",
        "dev_pearson",
        "dev_spearman",
        "dev_mse",
        "time_s",
        "pairs_per_s",
        "gradient_norm",
        "lr",
        "mse",
        "pearson",
        "spearman",
        "clamped",
        "skipped",
        "steps",
    ]
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 13)]
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    assert float(rows[-1]["lr"]) == 0.0
    assert {path.name for path in config.out.iterdir()} == {
        "checkpoints",
        "config.json",
        "last",
        "metrics.csv",
        "model.safetensors",
        "plot.png",
        "predictions.tsv",
        "run.json",
        "vocabulary.json",
    }
    assert (config.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert result.test is not None
    assert json.loads((config.out / "run.json").read_text())["config"]["epochs"] == 12


def test_the_epoch_best_on_dev_is_kept(files):
    # a large rate makes the last epoch differ from the best
    config = make_config(files, lr=0.05, epochs=6)
    result = train(config)
    pearsons = [float(row["dev_pearson"]) for row in read_metrics(config.out)]
    assert result.best.dev_pearson == max(pearsons)
    assert result.best.epoch == 1 + pearsons.index(max(pearsons))
    saved = TextSiamese.from_pretrained(config.out, device="cpu")
    for model in (saved, result.model):
        again = evaluate(model, read_pairs(files.dev)).metrics
        assert again.pearson == pytest.approx(max(pearsons), abs=1e-6)
    last = TextSiamese.from_pretrained(config.out / "last", device="cpu")
    again = evaluate(last, read_pairs(files.dev)).metrics
    assert again.pearson == pytest.approx(pearsons[-1], abs=1e-6)
    assert pearsons[-1] < max(pearsons)


def test_same_seed_same_result(files, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (5, 5, 6), strict=True):
        train(make_config(files, out=out, seed=seed))
    a, b, c = ((out / "model.safetensors").read_bytes() for out in outs)
    assert a == b
    assert a != c
    clocks = {"time_s", "pairs_per_s"}
    kept = [
        [{name: row[name] for name in row.keys() - clocks} for row in read_metrics(out)]
        for out in outs
    ]
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]


def test_predictions_are_on_the_scale_of_the_file(files, tmp_path):
    header = ("sentence1", "sentence2", "score")  # STS: 0 to 5
    pairs = [("the cat", "a\u00a0dog  runs", 0.0), ("a kid", "a kid", 5), ("slow dog", "cat", 2.5)]
    test = write_pairs(tmp_path / "sts.tsv", pairs, header)
    config = make_config(files, test=test)
    result = train(config)
    lines = (config.out / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "left\tright\tgold\tpredicted"
    for line, pair, similarity in zip(lines[1:], pairs, result.test.similarity, strict=True):
        left, right, gold, predicted = line.split("\t")
        assert (left, right, float(gold)) == (pair[0], " ".join(pair[1].split()), pair[2])
        assert float(predicted) == pytest.approx(5 * float(similarity), abs=1e-4)
    assert lines[2].endswith("5\t5.0000")


def test_repeats_of_dev_and_test_are_dropped_and_counted(files):
    def first(path):
        return read_pairs(path).left[0], read_pairs(path).right[0]

    (a, b), (c, d) = first(files.dev), first(files.test)
    leaks = [(b.upper() + ".", a, 2.0), (c, d, 3.0)]
    write_pairs(files.train, [*make_pairs(40, seed=9), *leaks])
    pretrain = write_pairs(files.train.with_name("pre.tsv"), [*make_pairs(20, seed=8), leaks[1]])
    clean = load_inputs(make_config(files, pretrain=None, test=None))
    inputs = load_inputs(make_config(files, pretrain=pretrain))
    # random short sentences may repeat by themselves, hence "more than without"
    assert inputs.dropped["train"] + len(inputs.phases["train"]) == 42
    assert inputs.dropped["pretrain"] >= 1
    assert inputs.dropped["pretrain"] + len(inputs.phases["pretrain"]) == 21
    assert 1 <= clean.dropped["train"] < inputs.dropped["train"]


def test_pretraining_is_a_phase_before(files):
    pretrain = write_pairs(
        files.train.with_name("pre.tsv"),
        [(left, right, score - 1) for left, right, score in make_pairs(40, seed=7)],
        ("sentence1", "sentence2", "score"),
    )
    config = make_config(files, pretrain=pretrain, epochs=2)
    watcher = Interrupter()
    result = train(config, watcher)
    rows = read_metrics(config.out)
    phases = [row["phase"] for row in rows]
    assert phases == ["pretrain"] * 2 + ["train"] * 2
    # each phase has its own optimizer and cosine
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 0, 1e-3, 0])
    # of the last phase: an epoch of pretraining is not selected, however good it is on dev
    assert result.best.phase == "train"
    assert result.best.dev_pearson == max(float(row["dev_pearson"]) for row in rows[2:])
    assert watcher.pairs == 0


@pytest.mark.parametrize("when", [{"batches": 3}, {"epochs": 1}, {"batches": 25}], ids=str)
def test_ctrl_c_keeps_the_best_so_far(files, when):
    config = make_config(files, epochs=50)
    result = train(config, Interrupter(**when))
    assert result.interrupted
    assert result.test is None
    if when == {"batches": 3}:  # in the first epoch
        assert result.best is None
    else:
        pearsons = [float(row["dev_pearson"]) for row in read_metrics(config.out)]
        assert result.best.dev_pearson == max(pearsons)
    saved = TextSiamese.from_pretrained(config.out, device="cpu")
    for name, tensor in saved.lstm.state_dict().items():
        assert torch.equal(tensor, result.model.lstm.state_dict()[name])
    assert json.loads((config.out / "run.json").read_text())["interrupted"]


def test_long_sentences_are_cut_and_counted(files):
    write_pairs(files.dev, [("the " * 80, "a dog", 1.0), *make_pairs(20, seed=3)])
    write_pairs(files.test, [("a dog", "the " * 80, 1.0)])
    assert load_inputs(make_config(files)).truncated == 2
    assert load_inputs(make_config(files, max_len=2)).truncated > 30
    assert load_inputs(make_config(files)).dev.left.ids.shape[1] == 73


def test_joined_vectors(files):
    other = write_vectors(files.vectors.with_name("more.txt"), words=["the", "zebra"], dim=3)
    write_pairs(files.train, [*make_pairs(20, seed=4), ("the zebra", "a cat", 1.5)])
    inputs = load_inputs(make_config(files, vectors=(files.vectors, other)))
    assert inputs.table.shape[1] == 9
    assert "zebra" in inputs.vocabulary.words


# what is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs must be from 1 to .*, got 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"max_len": 0}, "max_len"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"clip": math.inf}, "clip must be positive"),
        ({"forget_bias": math.inf}, "forget_bias"),
        ({"seed": -1}, "seed"),
        ({"vectors": ()}, "vectors"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adadelta, got 'sgd'"),
        ({"oov": "mean"}, "oov"),
        ({"backend": "fast"}, "backend must be one of auto"),
    ],
)
def test_config_refuses(files, options, match):
    with pytest.raises(ValueError, match=match):
        make_config(files, **options)


def test_every_setting_is_used():
    """Each field of Config is read somewhere in the package outside its own file."""
    package = Path(__file__).parents[1] / "fastsiam"
    sources = sorted((package / "training").glob("*.py"))
    text = "".join(source.read_text() for source in sources if source.name != "config.py")
    asked = {"lr": "first_lr", "pretrain_epochs": "epochs_of", "epochs": "epochs_of"}
    for field in dataclasses.fields(Config):
        name = asked.get(field.name, field.name)
        assert f"config.{name}" in text, name


def test_a_folder_with_files_is_refused_before_any_work(files, tmp_path):
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    config = make_config(files, out=out, train=tmp_path / "nowhere.tsv")
    with pytest.raises(ValueError, match="new or empty folder"):
        train(config)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="got the file"):
        train(make_config(files, out=out / "thesis.txt"))


def test_dev_must_rank(files):
    write_pairs(files.dev, [("a cat", "a dog", 3.0), ("a kid", "the cat", 3.0)])
    with pytest.raises(DataError, match=r"dev.tsv: must hold different scores.*all 2 are 3"):
        train(make_config(files))


def test_training_pairs_must_remain(files):
    files.train.write_bytes(files.dev.read_bytes())
    with pytest.raises(DataError, match=r"train.tsv: each of its 30 pairs"):
        train(make_config(files))


def test_a_loss_that_is_not_finite_stops_the_run(files):
    config = make_config(files, scale=1e300)
    with pytest.raises(ValueError, match=r"10 steps in a row, in epoch 1 of train.* lower lr"):
        train(config)
