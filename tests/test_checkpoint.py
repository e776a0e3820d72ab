import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import killed
import numpy as np
import pytest
import torch
from tiny import make_pairs, write_files, write_pairs

from fastsiam.text.pairs import DataError
from fastsiam.training.checkpoint import Checkpoint, random_state, set_random_state
from fastsiam.training.config import Config
from fastsiam.training.run import train

KILLS = 5
CLOCKS = {"time_s", "pairs_per_s"}


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


def make_config(files, out, **options):
    options = {"epochs": 3, "batch_size": 8, "hidden_size": 5, "device": "cpu", **options}
    return Config(
        train=files.train,
        dev=files.dev,
        test=files.test,
        vectors=(files.vectors,),
        out=out,
        **options,
    )


class Stopper:
    """A watcher that presses Ctrl-C after a number of steps."""

    def __init__(self, steps):
        self.steps, self.done, self.resumed_at = steps, 0, None

    def on_start(self, _inputs, _model, pairs):
        self.pairs = pairs

    def on_resume(self, _records, step, pairs):
        self.resumed_at = step
        self.pairs -= pairs

    def on_batch(self, pairs):
        self.pairs -= pairs
        self.done += 1
        if self.done == self.steps:
            raise KeyboardInterrupt

    def on_epoch(self, _record, _best):
        pass


def what_a_run_left(out):
    """Return everything but the clocks and the settings that may differ."""
    with (out / "metrics.csv").open() as file:
        metrics = [
            {k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)
        ]
    facts = json.loads((out / "run.json").read_text())
    for name in CLOCKS:
        del facts["best"][name]
    del facts["config"]
    names = ("model.safetensors", "last/model.safetensors", "predictions.tsv", "vocabulary.json")
    return metrics, facts, {name: (out / name).read_bytes() for name in names}


# the files


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tree = {
        "a": [1, 2.5, None, True, "text", (3, (4.0,))],
        "b": {0: shared.T, 7: {"x": torch.tensor(3, dtype=torch.uint8)}, "$t": 1},
        "again": shared,
        "small": 5e-324,
        "third": 1 / 3,
        "empty": [torch.zeros(0), {}, [], ()],
    }
    checkpoint = Checkpoint(tmp_path)
    path = checkpoint.save(1, tree)
    back = checkpoint.load()
    assert list(back) == list(tree)
    assert back["a"] == tree["a"]
    assert list(back["b"]) == [0, 7, "$t"]
    assert torch.equal(back["b"][0], shared.T)
    assert torch.equal(back["again"], shared)
    assert back["b"][7]["x"].dtype == torch.uint8
    assert (back["small"], back["third"]) == (tree["small"], tree["third"])
    assert back["empty"][1:] == [{}, [], ()]
    # a whole file with something else in it runs nothing
    planted = io.BytesIO()
    torch.save({"recipe": None, "state": {"a": [print]}}, planted)
    data, header = planted.getvalue(), path.read_bytes().partition(b"\n")[0]
    path.write_bytes(header + b"\n" + hashlib.sha256(data).digest() + data)
    with pytest.raises(DataError, match="must hold plain values and tensors alone"):
        checkpoint.load()


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.load() is None
    for step in (1, 9, 10, 10, 200):
        checkpoint.save(step, {"step": step, "x": torch.full((3,), float(step))})
    (tmp_path / "c" / ".step-0000000300.pt.part").write_bytes(b"killed here")
    assert [path.name for path in checkpoint.files()] == [
        "step-0000000200.pt",
        "step-0000000010.pt",
    ]
    state = checkpoint.load()
    assert state["step"] == 200
    assert state["x"].tolist() == [200.0] * 3
    checkpoint.save(201, {})
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_random_numbers_go_on(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(1, random_state())
    first = random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()
    set_random_state(checkpoint.load())
    assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()) == first


def cut_off(data):
    return data[: len(data) - 3]


def flip_last(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_in_tree(data):
    at = data.index(b"loss-so-far")
    return data[:at] + b"l" + bytes([data[at + 1] ^ 1]) + data[at + 2 :]


def flip_in_header_size(data):
    return bytes([data[0] ^ 64]) + data[1:]


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        flip_last,
        flip_in_tree,
        flip_in_header_size,
        lambda _: b"",
        lambda _: b"\0" * 99,
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage):
    checkpoint = Checkpoint(tmp_path)
    for step in (1, 2):
        checkpoint.save(step, {"name": "loss-so-far", "x": torch.arange(4), "step": step})
    newest = checkpoint.files()[0]
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{newest.name}: .*; going on from step-0000000001"):
        assert checkpoint.load()["step"] == 1
    # what is saved next does not push the good one out
    checkpoint.save(2, {"step": 2})
    assert [path.name[10:15] for path in checkpoint.files()] == ["00002", "00001"]
    assert checkpoint.load()["step"] == 2
    for path in checkpoint.files():
        path.write_bytes(damage(path.read_bytes() + b"loss-so-far"))
    with (
        pytest.warns(UserWarning, match="going on"),
        pytest.raises(DataError, match="no other checkpoint is left"),
    ):
        checkpoint.load()


def test_another_recipe_is_refused(tmp_path):
    Checkpoint(tmp_path, recipe={"seed": 1, "lr": 0.1, "range": (0, 5)}).save(1, {})
    assert Checkpoint(tmp_path, recipe={"lr": 0.1, "seed": 1, "range": (0, 5)}).load() == {}
    with pytest.raises(ValueError, match=r"resume: lr must be what it was in .*, 0\.1, got 0\.2"):
        Checkpoint(tmp_path, recipe={"seed": 1, "lr": 0.2, "range": (0, 5)}).load()
    with pytest.raises(ValueError, match="every must be at least 0, got -1"):
        Checkpoint(tmp_path, every=-1)


# runs


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "stops": (7, 1, 4, 12)},
        {"optimizer": "adadelta", "schedule": "constant", "stops": (11, 11, 10)},
        {"dropout": 0.3, "kl_weight": 0.1, "select": "last", "stops": (5, 20)},
        {"pretrain_epochs": 2, "patience": 1, "lr": 0.05, "stops": (3, 24)},
    ],
    ids=["adam", "adadelta", "heads", "phases"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_any(files, tmp_path, options):
    """Stopped within epochs, at their ends and at a first step, then resumed."""
    options = dict(options)
    stops = options.pop("stops")
    if "pretrain_epochs" in options:
        options["pretrain"] = write_pairs(tmp_path / "pre.tsv", make_pairs(50, seed=6))
    whole = make_config(files, tmp_path / "whole", **options)
    train(whole)
    parts = make_config(files, tmp_path / "parts", resume=True, **options)
    done = 0
    for steps in stops:
        watcher = Stopper(steps)
        assert train(parts, watcher).signal == signal.SIGINT
        assert watcher.resumed_at == (done or None)
        done += steps
    torch.rand(7)  # what happens between the two does not matter
    watcher = Stopper(10**9)
    train(parts, watcher)
    assert watcher.resumed_at == done
    assert watcher.pairs == 0 or "patience" in options
    assert what_a_run_left(parts.out) == what_a_run_left(whole.out)
    # a finished run has nothing left to do
    again = Stopper(1)
    train(parts, again)
    assert again.done == 0
    assert what_a_run_left(parts.out) == what_a_run_left(whole.out)


def test_a_damaged_checkpoint_costs_some_steps_and_no_more(files, tmp_path):
    whole = make_config(files, tmp_path / "whole")
    train(whole)
    parts = make_config(files, tmp_path / "parts", resume=True, checkpoint_every=5)
    train(parts, Stopper(17))
    newest = sorted((parts.out / "checkpoints").iterdir())[-1]
    newest.write_bytes(cut_off(newest.read_bytes()))
    watcher = Stopper(10**9)
    with pytest.warns(UserWarning, match=newest.name):
        train(parts, watcher)
    assert watcher.resumed_at == 15
    assert what_a_run_left(parts.out) == what_a_run_left(whole.out)


def test_what_differs_is_named(files, tmp_path):
    config = make_config(files, tmp_path / "run", resume=True)
    train(config, Stopper(3))

    def refused(name, **changes):
        with pytest.raises(ValueError, match=f"resume: {name} must be what it was"):
            train(replace(config, **changes))

    refused("seed", seed=1)
    refused("lr", lr=1e-3)
    refused("epochs", epochs=4)
    refused("hidden_size", hidden_size=6)
    other = write_pairs(tmp_path / "other.tsv", make_pairs(90, seed=8))
    refused("content of train", train=other)
    # a file may move, and the run folder too
    moved = files.train.rename(tmp_path / "moved.tsv")
    config.out.rename(tmp_path / "there")
    train(replace(config, train=moved, out=tmp_path / "there"), Stopper(2))
    # without --resume, a folder in use is left alone
    with pytest.raises(ValueError, match="new or empty folder"):
        train(replace(config, train=moved, out=tmp_path / "there", resume=False))
    (tmp_path / "there" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"with thesis\.txt in it"):
        train(replace(config, train=moved, out=tmp_path / "there"))


def test_no_model_is_written_before_its_checkpoint(files, tmp_path):
    class Killed(Stopper):
        def on_epoch(self, _record, _best):
            assert len(Checkpoint(config.out / "checkpoints").files()) >= 1
            raise RuntimeError

    config = make_config(files, tmp_path / "run")
    with pytest.raises(RuntimeError):
        train(config, Killed(10**9))
    train(replace(config, resume=True))


def test_resume_starts_where_there_is_nothing(files, tmp_path):
    train(make_config(files, tmp_path / "a"))
    train(make_config(files, tmp_path / "b", resume=True))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".metrics.csv.part").write_bytes(b"epo")  # killed very early
    (tmp_path / "c" / "metrics.csv").write_bytes(b"epoch\n1\n")
    train(make_config(files, tmp_path / "c", resume=True))
    a, b, c = (what_a_run_left(tmp_path / name) for name in "abc")
    assert a == b == c


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(files, tmp_path, monkeypatch):
    """SIGKILL again and again while checkpoints are written after every step."""
    options = {"checkpoint_every": 1, "epochs": 4}
    whole = make_config(files, tmp_path / "whole", **options)
    train(whole)
    config = make_config(files, tmp_path / "run", resume=True, **options)
    # a server that has imported everything forks the children: they start at once
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["killed"])
    checkpoint = Checkpoint(config.out / "checkpoints")
    rng = random.Random(0)
    kills = 0

    def newest():
        return next((path.name for path in checkpoint.files()), "")

    for _ in range(KILLS):
        before = newest()
        child = children.Process(target=killed.run, args=(config,))
        child.start()
        while child.is_alive() and newest() == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the newest one is whole, not the one before it
            state = checkpoint.load()
        assert state["step"] >= 1
    assert kills >= KILLS // 2
    train(config)
    assert what_a_run_left(config.out) == what_a_run_left(whole.out)
