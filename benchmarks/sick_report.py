"""Render benchmarks/results/sick/*.json as docs/results.md.

`python -m benchmarks.sick_report [--check]`; with --check it writes nothing and fails where the
page is out of step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import duration, machine_line, markdown_table
from benchmarks.results import load
from benchmarks.sick import FIGURES, SICK_RESULTS
from benchmarks.sick_times import OURS, whole_recipe
from fastsiam.training.config import PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
PUBLISHED = {"pearson": 0.8822, "spearman": 0.8345, "mse": 0.2286}
ORDER = ("article", "paper", "fast", "good", "best")
PHASES = {"train": "SICK", "pretrain": "STS"}
INTRODUCTION = """\
# Results on SICK

Made by `python -m benchmarks.sick_report` from the files below benchmarks/results/sick/, which
`python -m benchmarks.sick --preset NAME --data DIR` and
`python -m benchmarks.sick_times --data DIR` wrote. Figures are of the 4927 pairs of the SICK test
part; MSE is on the scale 1 to 5.

- Training pairs that repeat a test pair (either order, in lower case, without punctuation) were
  left out, and those that repeat a trial pair too unless the trial part was trained on.
- Settings were chosen by cross-validation inside the training part, epochs by the trial part or by
  a fixed number. The test part was scored when a recipe was done; `fast` and `good` were scored
  twice, as their epoch was first the best on the trial part (Pearson 0.8412 and 0.8503) and is now
  the last.
- "Calibrated" is the same model behind an isotonic regression of gold scores on predictions for
  training pairs, out of fold: five models, each trained on four fifths. All seeds share the map.
- The ensemble is the seeds of the table as one saved model.
- Seconds are of training alone, the validation pairs left out, on a machine that had other work."""


# settings that a run may cut short
EPOCHS = ("epochs", "pretrain_epochs")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of a row, raw and calibrated."""
    return [
        number(None if row[kind] is None else row[kind][name])
        for kind in ("raw", "calibrated")
        for name in FIGURES
    ]


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of all recipes: the mean of the seeds, and their ensemble."""
    header = ["recipe", "Pearson", "Spearman", "MSE", "calibrated: Pearson", "Spearman", "MSE"]
    lines = [
        ["published (Mueller and Thyagarajan 2016)", *[""] * 3, *map(number, PUBLISHED.values())]
    ]
    for preset, found in results.items():
        seeds = len(found["seeds"])
        planned = PRESETS[preset]
        fewer = any(found["settings"][name] < planned[name] for name in EPOCHS if name in planned)
        name = f"`{preset}`" + " with fewer epochs" * fewer
        lines.append(
            [
                f"{name}, mean of {seeds} seeds" if seeds > 1 else f"{name}, one seed",
                *cells(found["mean"]),
            ]
        )
        if found["ensemble"] is not None:
            lines.append([f"{name}, ensemble of {seeds}", *cells(found["ensemble"])])
    return markdown_table(header, lines)


def regression_section(found: dict[str, Any]) -> list[str]:
    """Return the part about the regression on more than the similarity."""
    header = ["", "Pearson", "Spearman", "MSE"]
    seeds = len(found["seeds"])
    names = {
        "out of fold": "training pairs, out of fold",
        "mean": f"test, mean of {seeds} seeds",
        "ensemble": f"test, ensemble of {seeds}",
    }
    lines = [
        [name, *(number(found[key][figure]) for figure in FIGURES)] for key, name in names.items()
    ]
    return [
        "## A regression on more than the similarity",
        "",
        "`python -m benchmarks.sick_regression` puts another regression behind the models of",
        f"`{found['preset']}`: ridge regression, of degree two, on the similarity, on how well the",
        "words of the two sentences match by their vectors, and on whether one sentence alone is",
        "negated. It is fitted out of fold like the calibration; its features were chosen by",
        "cross-validation on those training pairs, and the test part was scored once. It shows",
        "what the vectors of two sentences miss. It is no part of the library or of the recipes:",
        "it is more than the paper's regression, which saw the similarity alone.",
        "",
        *markdown_table(header, lines),
        "",
    ]


def section(preset: str, found: dict[str, Any]) -> list[str]:
    """Return the part about one recipe: what was done, and every seed."""
    settings = found["settings"]
    pairs = [
        f"{count} {PHASES[phase]} pairs"
        + (
            f" ({found['swapped']} with words swapped)"
            * bool(phase == "train" and found["swapped"])
        )
        for phase, count in found["pairs"].items()
    ]
    dropped = ", ".join(f"{count} of {name}" for name, count in found["dropped"].items())
    text = [
        f"## {preset}",
        "",
        f"{found['note']} ".lstrip()
        + f"Trained on {' and '.join(pairs)}; repeats left out: {dropped}. Vectors: "
        f"{', '.join(settings['vectors'])}"
        + ("; the trial part was trained on too" if settings["train_on_dev"] else "")
        + ".",
        "",
    ]
    changed = {
        name: value
        for name, value in settings.items()
        if name in PRESETS[preset] and value != PRESETS[preset][name]
    }
    if changed:
        shown = ", ".join(f"{k} {v} for {PRESETS[preset][k]}" for k, v in changed.items())
        text += [f"Other than the preset: {shown}.", ""]
    header = ["seed", "Pearson", "Spearman", "MSE", "calibrated: Pearson", "Spearman", "MSE"]
    lines = []
    for row in found["seeds"]:
        epochs = " + ".join(f"{count} {PHASES[phase]}" for phase, count in row["epochs"].items())
        phase, epoch = row["kept"].split()
        kept = f"{PHASES[phase]} {epoch}"
        lines.append([str(row["seed"]), *cells(row), epochs, kept, duration(row["train_s"])])
    lines.append(["mean", *cells(found["mean"]), "", "", ""])
    if found["ensemble"] is not None:
        lines.append(["ensemble", *cells(found["ensemble"]), "", "", ""])
    text += markdown_table([*header, "epochs", "kept", "training"], lines)
    facts, threads = found["machine"], found["threads"]
    where = f"{machine_line(facts)}; {threads} thread{'s' * (threads > 1)}"
    folds = ", the folds included" * (found["mean"]["calibrated"] is not None)
    return [*text, "", f"{where}; {found['time_s']:.0f} s in all{folds}. {found['backend']}.", ""]


def times_section(found: dict[str, Any]) -> list[str]:
    """Return the part about the seconds of an epoch."""
    text = [
        "## Seconds of an epoch",
        "",
        "The article's recipe (H 50, batch 32, Adadelta), every contender from one start, on the",
        "same batches, in turn; the loss of the first batch agrees to 1e-5. The ratio is a median",
        "over the rounds. The whole recipe is 70 epochs on STS and 360 on SICK, **extrapolated**",
        "from these epochs.",
        "",
    ]
    names = list(found["rows"][0]["contenders"])
    header = ["contender"]
    for row in found["rows"]:
        of = f"{PHASES[row['phase']]}, {row['pairs']} pairs, {row['rounds']} rounds"
        header += [of, f"of {OURS}'s"]
    lines = []
    for name in names:
        line = [name]
        for row in found["rows"]:
            of = row["contenders"][name]
            line += [f"{of['median_s']:.2f} s", f"{of['ratio']:.2f}"]
        lines.append([*line, f"{whole_recipe(found['rows'], name):.0f} s"])
    text += markdown_table([*header, "the whole recipe, extrapolated"], lines)
    first = found["rows"][0]
    where = f"{machine_line(found['machine'])}; {first['threads']} thread"
    where += "s" * (first["threads"] > 1)
    if "load" in found:
        where += f"; load average {found['load']:.1f} at the end"
    return [*text, "", f"{where}. {first['explain']}.", ""]


def render(folder: Path) -> str:
    """Return the page made of the files of a folder."""
    files = {name: folder / f"{name}.json" for name in (*ORDER, "regression", "times")}
    found = {name: load(file) for name, file in files.items() if file.exists()}
    times, regression = found.pop("times", None), found.pop("regression", None)
    text = [INTRODUCTION, ""]
    if not found and times is None:
        return "\n".join([*text, "Nothing has been measured yet."]) + "\n"
    if found:
        text += [*summary(found), ""]
    for preset, results in found.items():
        text += section(preset, results)
    if regression is not None:
        text += regression_section(regression)
    if times is not None:
        text += times_section(times)
    return "\n".join(text).rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Render docs/results.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of step")
    check = parser.parse_args().check
    page = render(SICK_RESULTS)
    if check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            print(
                "docs/results.md is out of step: python -m benchmarks.sick_report", file=sys.stderr
            )
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
