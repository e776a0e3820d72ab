import csv
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tiny import write_files
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastsiam.training import Checkpoint, MeanSquaredError, Phase, fit
from fastsiam.training.config import Config
from fastsiam.training.metrics import Metrics, RunningMetrics
from fastsiam.training.objective import Batch, Output
from fastsiam.training.run import train
from fastsiam.training.run_folder import Logs
from fastsiam.training.step import LIMIT, Guard, NotFiniteError, train_step

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "examples"


class Rows:
    """A source of made-up rows; those named are poisoned."""

    def __init__(self, count=50, poisoned=(), value=math.nan):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 3, generator=generator)
        self.y = torch.rand(count, generator=generator)
        for row in poisoned:
            self.x[row] = value

    def __len__(self):
        return len(self.y)

    def steps(self):
        return -(-len(self.y) // 7)

    def batches(self, generator):
        return torch.randperm(len(self.y), generator=generator).split(7)

    def batch(self, rows, _device):
        return Batch([self.x[rows]], self.y[rows])


class Line(nn.Module):
    """A model that is no LSTM: the loop asks for a loss and no more."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25, 0.125]))

    def forward(self, x):
        return torch.sigmoid(x @ self.weight)


def phase(objective, source, epochs=3, **options):
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    return Phase("train", source, epochs, optimizer, schedule, **options)


# the loop


def test_fit_is_the_loop_that_one_would_write():
    objective = MeanSquaredError(Line())
    source = Rows()
    outcome = fit(
        objective, [phase(objective, source)], generator=torch.Generator().manual_seed(3), clip=0.01
    )
    rival = Line()
    optimizer = torch.optim.AdamW(rival.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(3)
    steps = 0
    for record in outcome.records:
        predicted, gold, norms, losses = [], [], [], []
        for rows in source.batches(generator):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.99**steps
            similarity = rival(source.x[rows])
            loss = (similarity - source.y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(rival.parameters(), 0.01)))
            optimizer.step()
            steps += 1
            losses += [loss.item()] * len(rows)
            predicted += similarity.tolist()
            gold += source.y[rows].tolist()
        # of the whole epoch, not of a batch
        assert record.pearson == pytest.approx(pearsonr(predicted, gold)[0], abs=1e-6)
        assert record.spearman == pytest.approx(spearmanr(predicted, gold)[0], abs=1e-12)
        assert record.mse == pytest.approx(16 * np.mean(np.subtract(predicted, gold) ** 2))
        assert record.loss == pytest.approx(np.mean(losses))
        assert record.gradient_norm == pytest.approx(np.mean(norms))
        assert record.steps == 8
    assert torch.allclose(objective.module.weight, rival.weight, rtol=1e-5)
    assert outcome.step == steps == 24
    assert outcome.records[-1].lr == pytest.approx(0.05 * 0.99**24)


def test_the_epoch_that_is_asked_for_is_kept():
    pearsons = iter([0.1, 0.5, 0.3, 0.4, 0.2] * 2)

    def dev():
        return Metrics(9, next(pearsons), None, 1.0)

    for select, patience, kept, made in (("dev", None, 2, 5), ("last", None, 5, 5)):
        objective = MeanSquaredError(Line())
        options = {"epochs": 5, "select": select, "patience": patience}
        outcome = fit(objective, [phase(objective, Rows(), **options)], dev=dev)
        assert (outcome.best.epoch, len(outcome.records)) == (kept, made)
        assert torch.equal(outcome.kept["module.weight"], objective.module.weight)
        same = torch.equal(outcome.kept["module.weight"], outcome.last["module.weight"])
        assert same == (kept == made)
    pearsons = iter([0.1, 0.5, 0.3, 0.4, 0.2])
    objective = MeanSquaredError(Line())
    outcome = fit(objective, [phase(objective, Rows(), epochs=9, patience=2)], dev=dev)
    assert [record.epoch for record in outcome.records] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least one phase"):
        fit(objective, [])


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights():
    seen = []

    class Noted(MeanSquaredError):  # noqa: N818, an error but no exception
        def forward(self, batch):
            seen.append((batch.inputs[0] @ self.module.weight).dtype)
            return super().forward(batch)

    for precision in ("bf16", "float32"):
        objective = Noted(Line())
        outcome = fit(objective, [phase(objective, Rows(), epochs=1)], precision=precision)
        assert objective.module.weight.dtype == torch.float32
        assert math.isfinite(outcome.records[0].loss)
    assert seen[0] == torch.bfloat16
    assert seen[-1] == torch.float32


# steps that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["Adam", "AdamFused", "Adadelta", "SGD", "RMSprop"])
def test_a_bad_step_changes_nothing(name, value):
    """Weights and optimizer end as if the bad batches had never been there, the first one too."""
    make = {
        "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "AdamFused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        "Adadelta": lambda p: torch.optim.Adadelta(p),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    }[name]

    def steps(bad):
        line = Line()
        optimizer, guard = make(line.parameters()), Guard(CPU)
        for i, is_bad in enumerate(bad):
            optimizer.zero_grad()
            loss = (line(torch.full((2, 3), 1.0 + i)) - 0.1).square().mean()
            if is_bad:
                loss = loss * value
            elif any(bad[i + 1 :]) and i == 0:
                loss = loss * 1.0
            loss.backward()
            norm = nn.utils.clip_grad_norm_(line.parameters(), 5.0)
            guard.step(optimizer, guard.judge(loss.detach(), norm))
        return line.weight.detach(), optimizer.state_dict()["state"], guard.look()

    bad = [True, False, True, True, False, False]
    weight, state, (skipped, over) = steps(bad)
    assert (skipped, over) == (3, False)
    # the same good steps alone: their inputs are those of steps 1, 4 and 5
    line = Line()
    optimizer = make(line.parameters())
    for i in (1, 4, 5):
        optimizer.zero_grad()
        (line(torch.full((2, 3), 1.0 + i)) - 0.1).square().mean().backward()
        nn.utils.clip_grad_norm_(line.parameters(), 5.0)
        optimizer.step()
    assert torch.equal(weight, line.weight)
    for key, tensor in optimizer.state_dict()["state"][0].items():
        if tensor is not None:
            assert torch.equal(state[0][key], tensor), key


@pytest.mark.parametrize("name", ["Adam", "Adadelta"])
def test_no_step_asks_for_a_value(name):
    """Fake tensors have no values: reading one, which on a GPU would wait for it, raises."""
    with FakeTensorMode():
        source = Rows()
        objective = MeanSquaredError(Line())
        if name == "Adam":
            optimizer = torch.optim.Adam(objective.parameters(), fused=True)
        else:
            optimizer = torch.optim.Adadelta(objective.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        guard, metrics = Guard(CPU), RunningMetrics(CPU)
        for _ in range(3):
            batch = source.batch(torch.arange(7), CPU)
            metrics.update(*train_step(objective, batch, optimizer, schedule, guard, clip=0.5))
        with pytest.raises(DataDependentOutputException):
            metrics.norms[0].item()


def test_after_ten_in_a_row_nothing_moves_any_more():
    guard = Guard(CPU)
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for _ in range(LIMIT - 1):
        assert not guard.judge(nan, one)
    assert guard.judge(one, one)  # nine and a good one
    for _ in range(LIMIT):
        assert not guard.judge(one, nan)
    assert guard.look() == (2 * LIMIT - 1, True)
    # however late the host looks, the weights are those of the last good step
    assert not guard.judge(one, one)


def test_an_epoch_is_selected_within_its_phase():
    objective = MeanSquaredError(Line())
    phases = [
        replace(phase(objective, Rows(), epochs=2), name="pretrain"),
        phase(objective, Rows(), epochs=3),
    ]
    pearsons = iter([0.9, 0.8, 0.1, 0.3, 0.2])
    outcome = fit(objective, phases, dev=lambda: Metrics(9, next(pearsons), None, 0.1))
    assert (outcome.best.phase, outcome.best.epoch) == ("train", 2)
    # a run that ends before the second phase has an epoch keeps that of the first
    steps, pearsons = iter(range(100)), iter([0.9, 0.8])
    outcome = fit(
        objective,
        phases,
        dev=lambda: Metrics(9, next(pearsons), None, 0.1),
        stop=lambda: next(steps) == 20 and 2,
    )
    assert (outcome.best.phase, outcome.best.epoch, outcome.signal) == ("pretrain", 1, 2)


def test_a_run_counts_bad_steps_and_stops_after_ten_in_a_row(tmp_path):
    objective = MeanSquaredError(Line())
    outcome = fit(objective, [phase(objective, Rows(poisoned=[4]))])
    assert [record.skipped for record in outcome.records] == [1, 1, 1]
    assert all(math.isfinite(record.loss) for record in outcome.records)
    assert objective.module.weight.isfinite().all()
    # every pair of every batch is bad
    objective = MeanSquaredError(Line())
    checkpoint = Checkpoint(tmp_path, every=3)
    good, bad = Rows(), Rows(poisoned=range(50))
    phases = [phase(objective, good, epochs=1), phase(objective, bad, epochs=9)]
    with pytest.raises(NotFiniteError, match=r"10 steps in a row, in epoch 2 of train; the last"):
        fit(objective, phases, checkpoint=checkpoint)
    state = checkpoint.load()
    assert state["weights"]["module.weight"].isfinite().all()
    assert state["step"] == 16  # the last epoch that ended


def test_a_correlation_that_is_undefined_is_none():
    """The article's last batch of two rows correlates at +1 or -1, and one row raises."""
    running = RunningMetrics(CPU)
    assert running.compute().pearson is None
    good, one = torch.tensor(True), torch.tensor(1.0)
    gold = torch.tensor([0.25, 0.75])
    running.update(Output(one, torch.tensor([0.3]), gold[:1]), one, good)
    assert running.compute().pearson is None
    running.update(Output(one, torch.tensor([0.3]), gold[1:]), one, good)
    assert (running.compute().pearson, running.compute().spearman) == (None, None)
    running.update(Output(one, torch.tensor([math.nan] * 2), gold), one, torch.tensor(False))
    running.update(Output(one, torch.tensor([0.0, 1.0]), gold), one, good)
    figures = running.compute()
    assert figures.pearson == pytest.approx(pearsonr([0.3, 0.3, 0, 1], [0.25, 0.75] * 2)[0])
    assert (running.totals()["pairs"], figures.clamped) == (4, 2)


# logs


def test_logs_agree_with_the_epochs(tmp_path):
    """steps.csv and TensorBoard hold what metrics.csv holds, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = write_files(tmp_path / "data")
    config = Config(
        train=files.train,
        dev=files.dev,
        vectors=(files.vectors,),
        out=tmp_path / "run",
        epochs=2,
        batch_size=8,
        hidden_size=5,
        device="cpu",
        log_every=1,
        tensorboard=True,
        scale=4.0,
    )
    train(config)
    with (config.out / "metrics.csv").open() as file:
        epochs = list(csv.DictReader(file))
    with (config.out / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [row["step"] for row in steps] == [str(i + 1) for i in range(len(steps))]
    assert len(steps) == sum(int(row["steps"]) for row in epochs)
    for epoch in epochs:
        rows = [row for row in steps if row["epoch"] == epoch["epoch"]]
        norms = [float(row["gradient_norm"]) for row in rows]
        assert np.mean(norms) == pytest.approx(float(epoch["gradient_norm"]))
        assert sum(int(row["clamped"]) for row in rows) == int(epoch["clamped"]) > 0
        assert float(rows[-1]["lr"]) == float(epoch["lr"])
    assert {name for name in steps[0] if name.startswith("zeros")} == {
        f"zeros module.{name}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
    }
    board = EventAccumulator(str(config.out / "tensorboard"))
    board.Reload()
    for tag in ("train/loss", "train/mse", "train/pearson", "train/spearman", "dev/pearson"):
        name = tag.replace("train/", "").replace("dev/", "dev_")
        values = [event.value for event in board.Scalars(tag)]
        assert values == pytest.approx([float(epoch[name]) for epoch in epochs]), tag
    for tag in ("dev/spearman", "dev/mse", "train/gradient_norm", "train/lr", "train/pairs_per_s"):
        assert len(board.Scalars(tag)) == 2
    losses = {event.step: event.value for event in board.Scalars("step/loss")}
    assert losses == pytest.approx({int(row["step"]): float(row["loss"]) for row in steps})
    assert len(board.Scalars("step/zeros/module.weight_hh_l0")) == len(steps)
    histogram = board.Histograms("gradient/module.weight_hh_l0")[0].histogram_value
    assert histogram.num == 20 * 5


def test_logs_come_every_few_steps_and_go_on_after_a_resume(tmp_path):
    def run(name, stop_at=0):
        folder = tmp_path / name
        objective = MeanSquaredError(Line())
        steps = iter(range(1, 1000))
        fit(
            objective,
            [phase(objective, Rows())],
            checkpoint=Checkpoint(folder / "checkpoints"),
            logs=Logs(folder, every=3),
            stop=lambda: next(steps) == stop_at and 15,
        )
        with (folder / "steps.csv").open() as file:
            return list(csv.DictReader(file))

    whole = run("whole")
    assert [int(row["step"]) for row in whole] == [3, 6, 9, 12, 15, 18, 21, 24]
    run("parts", stop_at=14)  # asked after an epoch too: at step 13
    with (tmp_path / "parts" / "steps.csv").open("a") as file:
        file.write("15,train,2,0.5\n18,tr")  # of a run that was killed later on
    parts = run("parts")
    for a, b in zip(whole, parts, strict=True):
        same = {"step", "epoch", "phase", "lr", "skipped", "zeros module.weight"}
        # the mean over steps 13 to 15 is that of 14 and 15 here
        same |= {"loss", "gradient_norm", "mse"} if a["step"] != "15" else set()
        assert {name: a[name] for name in same} == {name: b[name] for name in same}


def test_a_line_of_a_skipped_step_has_no_figures(tmp_path):
    """Those of the steps before it would be taken for its own."""
    objective = MeanSquaredError(Line())
    logs = Logs(tmp_path, every=1)
    fit(objective, [phase(objective, Rows(poisoned=[4]), epochs=1)], logs=logs)
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    before = ["0", *(row["skipped"] for row in rows)]
    for row, skipped in zip(rows, before, strict=False):
        assert (row["loss"] == "") == (row["mse"] == "") == (row["skipped"] != skipped)
    assert [row["loss"] for row in rows].count("") == 1


# examples


@pytest.mark.parametrize("name", ["fit", "own_loop"])
def test_examples_learn(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["pearson"] > 0.7
