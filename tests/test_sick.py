"""The benchmark on SICK: its files and figures on made-up pairs, and the page made of them."""

import json
import math
import sys

import pytest
import torch
from tiny import WORDS, make_pairs, write_pairs, write_vectors

from benchmarks import sick, sick_regression, sick_report, sick_times
from fastsiam.model import TextSiamese
from fastsiam.text.pairs import read_pairs
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.config import PRESETS
from fastsiam.training.data import EncodedPairs
from fastsiam.training.evaluate import evaluate

STS = ("sentence1", "sentence2", "score")
LABELLED = ("sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder as the benchmark wants it, and its results in another one."""
    folder = tmp_path / "data"
    for name in ("sick", "sts", "seed", "vectors"):
        (folder / name).mkdir(parents=True)
    parts = {"train": 40, "trial": 15, "test_annotated": 20}
    for seed, (part, count) in enumerate(parts.items()):
        pairs = [(*pair, "NEUTRAL") for pair in make_pairs(count, seed)]
        write_pairs(folder / "sick" / f"SICK_{part}.txt", pairs, LABELLED)
    leak = make_pairs(20, 2)[:3]
    write_pairs(folder / "sts" / "sts_2012_2015.tsv", [*make_pairs(30, 9), *leak], STS)
    (folder / "seed" / "synonyms_sick.json").write_text(json.dumps({"dog": ["cat"]}))
    (folder / "seed" / "dwords.json").write_text(json.dumps({"kids": "kid"}))
    for name in (sick.GLOVE, sick.WORD2VEC):
        write_vectors(folder / "vectors" / name, WORDS)
    results = tmp_path / "results"
    monkeypatch.setattr(sick, "SICK_RESULTS", results)
    monkeypatch.setattr(sick_times, "SICK_RESULTS", results)
    return folder


def call(module, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, args)])
    module.main()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_recipe_has_its_files(data, tmp_path, preset):
    config = sick.recipe(preset, data, tmp_path / "out")
    for path in (config.train, config.dev, config.test, *config.vectors):
        assert path.exists()
    assert (config.pretrain is not None) == (preset in ("article", "paper"))
    assert (config.synonyms is not None) == (preset == "paper")
    assert config.train_on_dev == (preset == "best")


def test_seeds_mean_and_ensemble(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs"
    options = ("--data", data, "--seeds", 2, "--epochs", 2, "--out", out, "--note", "A short one.")
    call(sick, monkeypatch, "--preset", "good", *options)
    found = json.loads((tmp_path / "results" / "good.json").read_text())
    test = read_pairs(data / "sick" / "SICK_test_annotated.txt")
    for number, row in enumerate(found["seeds"]):
        model = TextSiamese.from_pretrained(out / "members" / str(number))
        assert row["raw"]["pearson"] == pytest.approx(evaluate(model, test).metrics.pearson)
        assert row["epochs"] == {"train": 2}
    whole = evaluate(TextSiamese.from_pretrained(out), test)
    assert found["ensemble"]["raw"]["mse"] == pytest.approx(whole.metrics.mse)
    assert found["ensemble"]["calibrated"]["mse"] == pytest.approx(whole.calibrated.mse)
    for kind in ("raw", "calibrated"):
        values = [row[kind]["mse"] for row in found["seeds"]]
        assert found["mean"][kind]["mse"] == pytest.approx(sum(values) / 2)
    # nothing of where the files were
    assert str(tmp_path) not in json.dumps(found)
    assert "seed 1" in capsys.readouterr().out
    page = sick_report.render(tmp_path / "results")
    assert "A short one. Trained on " in page
    assert f"| mean | {found['mean']['raw']['pearson']:.4f} |" in page
    assert "Other than the preset: epochs" not in page  # "good" says nothing of its epochs


def test_what_differs_from_a_preset_is_on_the_page(data, tmp_path, monkeypatch):
    options = ("--data", data, "--seeds", 1, "--epochs", 1, "--pretrain-epochs", 1)
    call(sick, monkeypatch, "--preset", "article", "--no-calibrate", *options)
    page = sick_report.render(tmp_path / "results")
    assert "Other than the preset: epochs 1 for 360, pretrain_epochs 1 for 70." in page
    assert "1 STS + 1 SICK" in page
    assert "0.8822" in page


def test_times_of_an_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    call(sick_times, monkeypatch, "--data", data, "--rounds", 1)
    found = json.loads((tmp_path / "results" / "times.json").read_text())
    assert [row["phase"] for row in found["rows"]] == ["train", "pretrain"]
    names = list(found["rows"][0]["contenders"])
    assert names[0] == "fastsiam"
    assert "nn.LSTM, padded to 73, two calls" in names
    seconds = [row["contenders"][names[1]]["median_s"] for row in found["rows"]]
    whole = sick_times.whole_recipe(found["rows"], names[1])
    assert whole == pytest.approx(360 * seconds[0] + 70 * seconds[1])
    page = sick_report.render(tmp_path / "results")
    assert f"{whole:.0f} s |" in page


def test_the_check_of_the_page_can_fail(tmp_path, monkeypatch, capsys):
    page = tmp_path / "results.md"
    monkeypatch.setattr(sick_report, "PAGE", page)
    monkeypatch.setattr(sick_report, "SICK_RESULTS", tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", ["sick_report", "--check"])
    assert sick_report.main() == 1
    assert "out of step" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sick_report"])
    assert sick_report.main() == 0
    assert "Nothing has been measured yet." in page.read_text()
    monkeypatch.setattr(sys, "argv", ["sick_report", "--check"])
    assert sick_report.main() == 0


def test_the_page_is_in_step():
    assert sick_report.PAGE.read_text(encoding="utf-8") == sick_report.render(sick.SICK_RESULTS)


def test_a_regression_on_the_folders_of_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sick_regression, "SICK_RESULTS", tmp_path / "results")
    out = tmp_path / "runs"
    run = ("--data", data, "--seeds", 2, "--epochs", 1, "--out", out)
    call(sick, monkeypatch, "--preset", "fast", *run)
    options = ("--data", data, "--runs", out, "--preset", "fast")
    call(sick_regression, monkeypatch, *options)
    found = json.loads((tmp_path / "results" / "regression.json").read_text())
    assert len(found["seeds"]) == 2
    assert "test, mean of 2 seeds" in sick_report.render(tmp_path / "results")


def test_features_of_two_sentences_by_hand():
    vocabulary = Vocabulary(["<unk>", "dog", "hound", "runs", "not"])
    table = torch.tensor([[0, 0], [2, 0], [3, 4], [0, 1], [-1, 0.0]])
    model = TextSiamese(vocabulary, table, 3, device="cpu")
    left = vocabulary.encode(["dog runs zebra", "dog", ""])
    right = vocabulary.encode(["hound not", "dog", "dog"])
    train = EncodedPairs(left, right, torch.zeros(3))
    found = sick_regression.Words(model, train).features(left, right)
    # cosines of (dog, runs) and (hound, not): (.6, -1) and (.8, 0); "dog" stands four times in the
    # six sentences, the other words once
    of_dog = math.log(7 / 5) / math.log(7 / 2)
    of_left = (0.6 * of_dog + 0.8) / (of_dog + 1)
    of_right = (0.8 + 0.0) / 2
    assert found[0, :4].tolist() == pytest.approx(
        [1.0, min(of_left, of_right), max(of_left, of_right), 0.0], abs=1e-6
    )
    assert found[1].tolist() == pytest.approx([0, 1, 1, 1, 1], abs=1e-6)
    assert found[2].isfinite().all()


def test_the_regression_is_ridge_on_products():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    similarity = torch.rand(400, generator=generator, dtype=torch.float64)
    # a product of the two, which neither shows alone
    gold = 0.2 + 0.6 * similarity * x[:, 0]
    made = sick_regression.Regression(similarity[:300], x[:300], gold[:300])
    error = (made(similarity[300:], x[300:]) - gold[300:]).square().mean()
    assert error < 0.001 * gold.var()
    alone = sick_regression.Regression(similarity[:300], torch.ones_like(x[:300]), gold[:300])
    assert (
        alone(similarity[300:], torch.ones_like(x[300:])) - gold[300:]
    ).square().mean() > 0.1 * gold.var()
