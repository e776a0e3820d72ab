import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_pairs, write_files, write_pairs

from fastsiam.model import TextSiamese
from fastsiam.training.config import Config
from fastsiam.training.data import load_inputs
from fastsiam.training.metrics import RunningMetrics
from fastsiam.training.objective import Output
from fastsiam.training.run import train
from fastsiam.training.world import World, find_world

ROOT = Path(__file__).parents[1]


class Ranked(World):
    """One of several processes, without the others."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_weighted_shares_average_to_the_mean_of_the_batch(size, count):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randperm(count, generator=generator)
    losses = torch.rand(count, generator=generator, dtype=torch.float64)
    seen, average = [], 0.0
    for rank in range(size):
        mine, weight = Ranked(rank, size).share(rows)
        average += weight * float(losses[mine].mean()) / size
        seen += mine.tolist() if weight else []
    assert sorted(seen) == list(range(count))
    assert average == pytest.approx(float(losses.mean()), abs=1e-15)


def test_merged_sums_are_those_of_one_process():
    generator = torch.Generator().manual_seed(0)
    similarity, gold = torch.rand(2, 31, generator=generator)
    one = torch.tensor(1.0)

    def sums(rows):
        running = RunningMetrics(torch.device("cpu"))
        running.update(Output(one / 2, similarity[rows], gold[rows]), one, torch.tensor(True))
        return running

    whole = sums(slice(None)).compute()
    parts = [sums(slice(rank, None, 3)).state_dict() for rank in range(3)]
    merged = RunningMetrics.merged(parts, torch.device("cpu")).compute()
    assert vars(merged) == pytest.approx(vars(whole))


def test_alone_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = find_world(torch.device("cpu"))
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert world.gather("x") == ["x"]


def test_two_processes_train_as_one(tmp_path):
    """torchrun on gloo: the last batch has a row for one of them alone, dev is odd."""
    files = write_files(tmp_path / "data")
    write_pairs(files.dev, make_pairs(31, seed=12))
    config = Config(
        train=files.train,
        dev=files.dev,
        test=files.test,
        vectors=(files.vectors,),
        out=tmp_path / "one",
        epochs=3,
        hidden_size=6,
        device="cpu",
    )
    pairs = len(load_inputs(config).phases["train"])
    config = replace(config, batch_size=next(n for n in range(10, 50) if pairs % n == 1))
    one = train(config)
    arguments = ["--nproc-per-node", "2", "-m", "fastsiam", "train"]
    for name in ("train", "dev", "test", "epochs", "batch_size", "hidden_size", "device"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    arguments += ["--vectors", str(files.vectors), "--out", str(tmp_path / "two")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1  # the first process speaks for both
    assert done.stdout.count("train epoch 3/3") == 1

    def metrics(out):
        with (out / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        clocks = ("phase", "time_s", "pairs_per_s")
        return [{k: float(v) for k, v in row.items() if k not in clocks} for row in rows]

    ours, theirs = metrics(config.out), metrics(tmp_path / "two")
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        # the same sums in another order: float32 rounding, and no more
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    facts = [json.loads((out / "run.json").read_text()) for out in (config.out, tmp_path / "two")]
    assert facts[1]["steps"] == facts[0]["steps"]
    saved = TextSiamese.from_pretrained(tmp_path / "two", device="cpu").lstm.state_dict()
    for name, tensor in one.model.lstm.state_dict().items():
        assert torch.allclose(saved[name], tensor, atol=1e-5), name
