import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import make_pairs, write_files, write_pairs
from typer.testing import CliRunner

import fastsiam
from fastsiam.cli import app
from fastsiam.model import TextSiamese

ROOT = Path(__file__).parents[1]


def run(*args):
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    # the runner keeps what a command raised; anything but an exit would be a traceback
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def command(*args):
    """Run a command in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "fastsiam", *map(str, args)]
    return subprocess.Popen(
        arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def one_line(result, code):
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("fastsiam: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def train_args(files, out, **changes):
    options = {
        "train": files.train,
        "dev": files.dev,
        "test": files.test,
        "vectors": files.vectors,
        "out": out,
        "epochs": 3,
        "batch-size": 8,
        "hidden-size": 6,
        "device": "cpu",
        **changes,
    }
    args = ["train"]
    for name, value in options.items():
        if value is not None:
            args += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return args


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """A run folder, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run(*train_args(files, out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_train_prints_a_line_an_epoch_and_a_table(trained):
    out, printed = trained
    assert re.search(r"train: \d+ pairs, \d+ repeats dropped", printed)
    assert "100.0% of the tokens have a vector" in printed
    epoch = r"train epoch \d/3: loss \d\.\d{4}  dev Pearson -?\d\.\d{4}  \d+ pairs/s"
    assert len(re.findall(epoch, printed)) == 3
    assert re.search(r"dev \(train epoch \d\).*30", printed)
    assert re.search(r"test .*25", printed)
    assert "\x1b" not in printed
    for name in ("config.json", "model.safetensors", "vocabulary.json", "metrics.csv", "plot.png"):
        assert (out / name).stat().st_size > 0


def test_evaluate_json_agrees_with_the_predictions(trained, files):
    out, _ = trained
    result = run("evaluate", out, files.test, "--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout.splitlines()[-1])
    assert list(values) == ["n", "pearson", "spearman", "mse"]
    rows = [line.split("\t") for line in (out / "predictions.tsv").read_text().splitlines()[1:]]
    errors = [(float(gold) - float(predicted)) ** 2 for _, _, gold, predicted in rows]
    assert values["n"] == len(rows) == 25
    assert values["mse"] == pytest.approx(sum(errors) / 25, abs=1e-3)
    assert -1 <= values["spearman"] <= 1
    assert values == json.loads(run("evaluate", out, files.test, "--json").stdout)


def test_evaluate_maps_any_range_to_1_to_5(trained, files, tmp_path):
    out, _ = trained
    pairs = [(left, right, (score - 1) * 25) for left, right, score in make_pairs(25, seed=3)]
    other = write_pairs(tmp_path / "own.tsv", pairs, ("a", "b", "percent"))
    options = ("--columns", "a,b,percent", "--score-range", "0", "100", "--json")
    ours = json.loads(run("evaluate", out, other, *options).stdout)
    assert ours == pytest.approx(json.loads(run("evaluate", out, files.test, "--json").stdout))


def test_a_file_is_named_as_it_is(trained, files, tmp_path):
    out, _ = trained
    file = tmp_path / "pairs[dev]  :cat:.tsv"
    assert str(file) in one_line(run("evaluate", out, file), 3)
    file.write_bytes(files.dev.read_bytes())
    assert file.name in run("evaluate", out, file).stdout


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([("a cat", "a dog", 3)], "at least two pairs"),
        ([("a cat", "a dog", 3), ("a kid", "kid", 3)], "gold scores are all the same"),
        ([("a cat", "a cat", 3), ("a kid", "a kid", 5)], "predictions are all the same"),
    ],
)
def test_evaluate_says_why_there_is_no_correlation(trained, tmp_path, pairs, why):
    out, _ = trained
    file = write_pairs(tmp_path / "few.tsv", pairs)
    values = json.loads(run("evaluate", out, file, "--json").stdout)
    assert values["n"] == len(pairs)
    assert values["pearson"] is None
    assert values["spearman"] is None
    assert values["mse"] >= 0
    assert why in values["undefined"]
    plain = run("evaluate", out, file)
    assert plain.exit_code == 0
    assert f"few.tsv: no correlation: {'a ' * why.startswith('at')}" in plain.stdout


@pytest.mark.parametrize("command", ["evaluate", "similarity"])
def test_a_device_is_used_or_refused(trained, files, command):
    out, _ = trained
    what = (files.test,) if command == "evaluate" else ("the cat runs", "a zebra sits")
    assert run(command, out, *what, "--device", "cpu").exit_code == 0
    assert "device must be like" in one_line(run(command, out, *what, "--device", "gpu"), 2)
    assert "'meta' cannot be used" in one_line(run(command, out, *what, "--device", "meta"), 4)


def test_similarity(trained):
    out, _ = trained
    left, right = "the cat runs fast", "a zebra sits"
    values = json.loads(run("similarity", out, left, right, "--json").stdout)
    expected = TextSiamese.from_pretrained(out).similarity(left, right)
    assert values["similarity"] == expected
    assert values["score"] == pytest.approx(1 + 4 * expected)
    assert values["score_range"] == [1.0, 5.0]
    assert values["unknown"] == ["zebra"]
    printed = run("similarity", out, left, right).stdout
    assert f"similarity {expected:.4f}  (score {1 + 4 * expected:.2f} on 1 to 5)" in printed
    assert "words without a vector: zebra" in printed
    assert "without" not in run("similarity", out, "a cat", "").stdout
    # a sentence of which the end was not read
    assert values["truncated"] == 0
    assert "cut" not in printed
    long = "the " * 74
    assert json.loads(run("similarity", out, long, right, "--json").stdout)["truncated"] == 1
    assert "sentences cut to 73 tokens: 2" in run("similarity", out, long, long).stdout


def test_every_option_of_train(files, tmp_path):
    header = ("l", "r", "s")
    folder = tmp_path / "own"
    folder.mkdir()
    sizes = {"train": (40, 5), "dev": (20, 6), "pretrain": (20, 7), "test": (9, 8)}
    own = {
        name: write_pairs(
            folder / f"{name}.tsv",
            [(left, right, score - 1) for left, right, score in make_pairs(count, seed)],
            header,
        )
        for name, (count, seed) in sizes.items()
    }
    spelling = folder / "spelling.json"
    spelling.write_text('{"kitty": "cat"}')
    args = train_args(
        files,
        tmp_path / "run",
        **own,
        **{
            "scale": 0.5,
            "forget-bias": 1.5,
            "optimizer": "adadelta",
            "lr": 0.5,
            "clip": 1,
            "max-len": 5,
            "oov": "random",
            "spelling": spelling,
            "seed": 3,
            "backend": "lstm",
            "columns": "l,r,s",
            "score-range": (0, 4),
        },
    )
    result = run(*args, "--vectors", files.vectors, "--quiet")
    assert result.exit_code == 0, result.output
    assert "epoch 1/" not in result.stdout
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    given = {
        "scale": 0.5,
        "forget_bias": 1.5,
        "optimizer": "adadelta",
        "lr": 0.5,
        "clip": 1.0,
        "max_len": 5,
        "oov": "random",
        "spelling": str(spelling),
        "seed": 3,
        "backend": "lstm",
        "columns": ["l", "r", "s"],
        "score_range": [0.0, 4.0],
        "pretrain": str(own["pretrain"]),
        "vectors": [str(files.vectors)] * 2,
    }
    assert {name: config[name] for name in given} == given
    model = TextSiamese.from_pretrained(tmp_path / "run")
    assert (model.lstm.input_size, model.max_len, model.score_range) == (12, 5, (0.0, 4.0))
    assert float(model.lstm.scale) == 0.5


def test_in_a_process_of_its_own(files, tmp_path):
    process = command(*train_args(files, tmp_path / "run"))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr == ""
    assert "train epoch 3/3:" in stdout
    assert f"run folder: {tmp_path / 'run'}" in stdout


def test_output_that_nobody_reads_ends_with_141(trained, files, tmp_path):
    out, _ = trained
    for args in (("evaluate", out, files.test), train_args(files, tmp_path / "run")):
        with command(*args) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 141


@pytest.mark.parametrize(("select", "which"), [("dev", "best so far"), ("last", "last whole one")])
def test_ctrl_c_saves_and_exits_130(files, tmp_path, select, which):
    out = tmp_path / "run"
    process = command(*train_args(files, out, epochs=100_000, select=select))
    deadline = time.monotonic() + 60
    while not (out / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert re.fullmatch(
        rf"fastsiam: interrupted; the model of epoch \d+, the {which}, is in .*\n", stderr
    )
    # no epoch is called the best where the last is kept
    assert ("  best\n" in stdout) == (select == "dev")
    assert TextSiamese.from_pretrained(out).similarity("a cat", "a cat") == 1.0
    assert json.loads((out / "run.json").read_text())["interrupted"]


def test_demo_learns_and_shows_it(tmp_path):
    result = run("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if "test" in line and "│" in line)
    assert float(row.split("│")[3]) > 0.8
    examples = re.findall(r"^  (\d\.\d)  (\d\.\d)  (.+) \| (.+)$", result.stdout, re.MULTILINE)
    golds = [float(gold) for gold, *_ in examples]
    assert golds == sorted(golds)
    assert golds[0] < 2
    assert golds[-1] > 4.5
    assert (tmp_path / "demo" / "run" / "model.safetensors").exists()
    for used in (tmp_path / "demo", tmp_path / "demo" / "run" / "plot.png"):
        assert "new or empty" in one_line(run("demo", "--out", used), 2)


# what is refused: one line, an exit code, no traceback


def test_wrong_files(files, tmp_path):
    lines = files.train.read_text().splitlines()

    def broken(number, line):
        path = tmp_path / "broken.tsv"
        path.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n")
        return path

    def fails(code, *words, **changes):
        line = one_line(run(*train_args(files, tmp_path / "out", **changes)), code)
        assert all(word in line for word in words), line

    fails(3, "broken.tsv", "the columns are", train=broken(1, "a\tb\tc"))
    fails(3, "broken.tsv", "line 5", "'high'", train=broken(5, "a\tb\thigh"))
    fails(3, "broken.tsv", "line 7", "from 1 to 5", "5.5", dev=broken(7, "a\tb\t5.5"))
    fails(3, "broken.tsv", "line 4", "3 fields", test=broken(4, "a\tb"))
    empty = tmp_path / "empty.tsv"
    empty.touch()
    fails(3, "empty.tsv", "empty", pretrain=empty)
    fails(3, "nowhere.tsv", "cannot be read", train=tmp_path / "nowhere.tsv")
    fails(3, "dev.tsv", "format", vectors=files.dev)
    fails(3, "dev.tsv", "no column 'x'", columns="x,sentence_B,relatedness_score")
    fails(3, "broken.tsv", "JSON", spelling=broken(1, "no JSON"))
    fails(2, "LEFT,RIGHT,SCORE", columns="one,two")
    fails(2, "three different names", columns="sentence_A,sentence_A,relatedness_score")
    fails(2, "score_range", **{"score-range": (5, 1)})
    fails(2, "score_range", **{"score-range": (-1e308, 1e308)})
    # nothing was trained
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_options(files, tmp_path):
    def fails(code, *words, **changes):
        line = one_line(run(*train_args(files, tmp_path / "out", **changes)), code)
        assert all(word in line for word in words), line

    fails(2, "backend must be one of", "'fast'", backend="fast")
    fails(2, "optimizer", "'sgd'", optimizer="sgd")
    fails(2, "oov", oov="mean")
    fails(2, "epochs must be from 1 to", "got 0", epochs=0)
    fails(2, "device must be like", device="gpu")
    fails(2, "scale", scale="nan")
    fails(2, "lower lr", "scale (1e+300)", scale="1e300")
    fails(2, "hidden_size must be", **{"hidden-size": 10**20})
    fails(4, "out of memory", **{"hidden-size": 10**9})
    fails(4, "'meta' cannot be used", device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_is_the_environment(files, tmp_path):
    line = one_line(run(*train_args(files, tmp_path / "out", device="cuda")), 4)
    assert "'cuda' cannot be used" in line


def test_a_backend_that_cannot_run_is_the_environment(files, tmp_path):
    changes = {"backend": "triton", "hidden-size": 2049}
    line = one_line(run(*train_args(files, tmp_path / "out", **changes)), 4)
    assert "triton" in line


def test_a_missing_package_is_the_environment(files, tmp_path, monkeypatch):
    real = fastsiam.training.run.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "scipy" else real(name)
    )
    line = one_line(run(*train_args(files, tmp_path / "out")), 4)
    assert "pip install scipy" in line


def test_a_folder_in_use_or_not_writable(files, tmp_path):
    (tmp_path / "notes").write_text("precious")
    assert "new or empty" in one_line(run(*train_args(files, tmp_path)), 2)
    assert "got the file" in one_line(run(*train_args(files, tmp_path / "notes")), 2)
    line = one_line(run(*train_args(files, "/proc/nobody/run")), 4)
    assert "/proc/nobody" in line
    assert (tmp_path / "notes").read_text() == "precious"


def test_wrong_model_folder(trained, files, tmp_path):
    assert "fastsiam train" in one_line(run("evaluate", tmp_path, files.test), 3)
    assert "fastsiam train" in one_line(run("similarity", tmp_path, "a", "b"), 3)
    out, _ = trained
    assert "nowhere" in one_line(run("evaluate", out, tmp_path / "nowhere"), 3)


def test_usage():
    assert run("--version").stdout == f"fastsiam {fastsiam.__version__}\n"
    for args in ((), ("train",), ("evaluate",), ("similarity",), ("demo",)):
        words = run(*args, "--help").stdout
        assert "130 interrupted" in " ".join(words.split())
    missing = run("train", "--dev", "x")
    assert missing.exit_code == 2
    assert "Missing option '--train'" in missing.stderr
    assert run("paint").exit_code == 2
