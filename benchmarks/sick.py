"""Train on the SICK files: `python -m benchmarks.sick --preset best --seeds 3 --data DIR`.

Prints what each seed of a recipe gets on the test part, the mean, and the ensemble of the seeds,
raw and calibrated, and stores it below benchmarks/results/sick/. Nothing is chosen by the test
part. `python -m benchmarks.sick_report` writes docs/results.md from what is stored.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import RESULTS
from fastsiam.model import TextSiamese
from fastsiam.text.pairs import DataError, Pairs, read_pairs
from fastsiam.training.config import PRESETS, Config
from fastsiam.training.evaluate import evaluate
from fastsiam.training.recipe import run_recipe

SICK_RESULTS = RESULTS / "sick"
GLOVE, WORD2VEC = "glove840b-plus-300.bin.gz", "googlenews-plus-300.bin.gz"
# the files that a recipe asks for, and whether it trains on the trial part too
VECTORS = {
    "article": (WORD2VEC,),
    "paper": (WORD2VEC,),
    "fast": (GLOVE,),
    "good": (GLOVE,),
    "best": (GLOVE, WORD2VEC),
}
PRETRAINED = ("article", "paper")
FIGURES = ("pearson", "spearman", "mse")


def recipe(preset: str, data: Path, out: Path, **settings: Any) -> Config:
    """Return a preset's settings with the files that it asks for."""
    sick, vectors = data / "sick", data / "vectors"
    files: dict[str, Any] = {
        "train": sick / "SICK_train.txt",
        "dev": sick / "SICK_trial.txt",
        "test": sick / "SICK_test_annotated.txt",
        "vectors": tuple(vectors / name for name in VECTORS[preset]),
        "out": out,
    }
    if preset in PRETRAINED:
        files["pretrain"] = data / "sts" / "sts_2012_2015.tsv"
    if preset == "article":
        files["spelling"] = data / "seed" / "dwords.json"
    if preset == "paper":
        files["synonyms"] = data / "seed" / "synonyms_sick.json"
    if preset == "best":
        files["train_on_dev"] = True
    return Config.preset(preset, **{**files, **settings})


def figures(model: TextSiamese, test: Pairs) -> dict[str, dict[str, float | None] | None]:
    """Return the test figures of a model, raw and, if it is calibrated, calibrated."""
    found = evaluate(model, test)
    return {
        "raw": {name: getattr(found.metrics, name) for name in FIGURES},
        "calibrated": None
        if found.calibrated is None
        else {name: getattr(found.calibrated, name) for name in FIGURES},
    }


def history(folder: Path) -> dict[str, Any]:
    """Return the epochs and the seconds of training that a run took."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = json.loads((folder / "run.json").read_text(encoding="utf-8"))["best"]
    return {
        "epochs": Counter(row["phase"] for row in rows),
        "kept": f"{best['phase']} {best['epoch']}",
        "train_s": sum(float(row["time_s"]) for row in rows),
    }


def mean(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float] | None:
    """Return the mean figures of the seeds."""
    if any(row[kind] is None for row in rows):
        return None
    return {name: statistics.fmean(row[kind][name] for row in rows) for name in FIGURES}


def line(name: str, row: dict[str, Any]) -> str:
    """Return a line of the printed table."""
    shown = [
        "  ".join(f"{row[kind][figure]:7.4f}" for figure in FIGURES) if row[kind] else " " * 25
        for kind in ("raw", "calibrated")
    ]
    return f"{name:>12}  {'   '.join(shown)}"


def run(config: Config) -> dict[str, Any]:
    """Train the seeds of a recipe as an ensemble and score the test part with each and with all."""
    start = time.perf_counter()
    result = run_recipe(config)
    time_s = time.perf_counter() - start
    if result.signal:
        raise SystemExit(128 + result.signal)
    assert config.test is not None
    test = read_pairs(config.test)
    several = config.ensemble > 1 or config.calibrate
    rows = []
    for number in range(config.ensemble):
        folder = config.out / "members" / str(number) if several else config.out
        model = TextSiamese.from_pretrained(folder)
        # one map for all: that of the recipe, fitted out of fold
        model.calibration = result.model.calibration
        rows.append(
            {"seed": config.seed + number, **figures(model, test), **history(folder)},
        )
    inputs = result.inputs
    settings = config.to_dict()
    named = ("train", "dev", "test", "pretrain", "synonyms", "spelling")
    settings |= {name: settings[name] and Path(settings[name]).name for name in named}
    settings["vectors"] = [Path(path).name for path in settings["vectors"]]
    return {
        "settings": {name: value for name, value in settings.items() if name != "out"},
        "pairs": {phase: len(pairs) for phase, pairs in inputs.phases.items()},
        "dropped": inputs.dropped,
        "swapped": inputs.swapped,
        "token_coverage": inputs.coverage.token_share,
        "backend": result.model.lstm.explain(),
        "threads": torch.get_num_threads(),
        "seeds": rows,
        "mean": {kind: mean(rows, kind) for kind in ("raw", "calibrated")},
        "ensemble": figures(result.model, test) if config.ensemble > 1 else None,
        "time_s": time_s,
        "machine": machine.facts(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="holds sick/, vectors/, sts/, seed/"
    )
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="passes, in place of the preset's")
    parser.add_argument("--pretrain-epochs", type=int, help="likewise, over the STS pairs")
    parser.add_argument("--no-calibrate", action="store_true", help="leave the five folds out")
    parser.add_argument("--note", default="", help="a sentence that goes into docs/results.md")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    settings: dict[str, Any] = {
        "epochs": options.epochs,
        "pretrain_epochs": options.pretrain_epochs,
    }
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config = recipe(
                options.preset,
                options.data,
                options.out or Path(scratch) / "run",
                ensemble=options.seeds,
                calibrate=not options.no_calibrate,
                **{name: value for name, value in settings.items() if value is not None},
            )
            found = run(config)
        except DataError as error:
            raise SystemExit(f"sick: {error}") from error
    found = {"preset": options.preset, "note": options.note, **found}
    print(f"{options.preset}: {found['pairs']} pairs, {found['dropped']} repeats dropped")
    print(f"{'':>12}  raw: Pearson, Spearman, MSE     calibrated")
    for row in found["seeds"]:
        print(line(f"seed {row['seed']}", row) + f"   {row['train_s']:.0f} s, kept {row['kept']}")
    print(line("mean", found["mean"]))
    if found["ensemble"]:
        print(line("ensemble", found["ensemble"]))
    SICK_RESULTS.mkdir(parents=True, exist_ok=True)
    file = SICK_RESULTS / f"{options.preset}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"stored: {file}, {found['time_s']:.0f} s in all")


if __name__ == "__main__":
    main()
