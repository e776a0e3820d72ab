"""Render benchmarks/results/*.json: `python -m benchmarks.report [--check]`.

Writes the README's headline and tables between markers and, beside each results file, a page with
every row and its plots. With --check it writes nothing and fails where one of them is out of step.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.baselines import MAIN_RIVAL
from benchmarks.results import RESULTS, Row, load

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADLINE_BEGIN, HEADLINE_END = "<!-- headline: begin -->", "<!-- headline: end -->"
NOTHING = (
    "No machine has been measured yet: `make bench` measures this one, `make report` fills this in."
)
SHOWN = ("scoring", "step")  # in the README; the page has all passes
OURS = "fastsiam"

# the floor of a step on an NVIDIA GPU: clocks that pass from one step's h to the next one's beside
# the special functions, special functions a cell, and those of a multiprocessor a clock
EXCHANGE_CLOCKS = 140
SPECIAL_A_CELL, SPECIAL_A_CLOCK = 5, 16
SEQUENCES = 4  # of a program, at least
FLOOR = (
    "The floor of scoring is an estimate: the longest sentence's steps times "
    f"({EXCHANGE_CLOCKS} + {SPECIAL_A_CELL} x {SEQUENCES} x H / {SPECIAL_A_CLOCK}) clocks (the "
    f"exchange of h with the products behind it, then the special functions of {SEQUENCES} "
    f"sequences), or all tokens' special functions, {SPECIAL_A_CELL} x H / {SPECIAL_A_CLOCK} "
    "clocks each, over all multiprocessors, whichever is longer, at the highest clock."
)


def group(rows: list[Row], *names: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Yield the rows with equal values of the named columns, in the order of their first row."""

    def value(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in names)

    order = {v: i for i, v in enumerate(dict.fromkeys(map(value, rows)))}
    for v, some in groupby(sorted(rows, key=lambda row: order[value(row)]), key=value):
        yield v, list(some)


def by_contender(rows: list[Row]) -> dict[str, float]:
    return {row["contender"]: row["median_s"] for row in rows}


def best_rival(rows: list[Row]) -> Row:
    return min((row for row in rows if not row["ours"]), key=lambda row: row["median_s"])


def speed_up(factor: float) -> str:
    return f"{factor:.2f}x" if factor >= 1 else f"**{factor:.2f}x, slower**"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def markdown_table(header: list[str], lines: list[list[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def machine_line(facts: Row) -> str:
    """Name the machine and the versions in one sentence."""
    name = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    versions = [f"Python {facts['python']}", f"torch {facts['torch']}", f"triton {facts['triton']}"]
    if "gpu" in facts:
        versions += [f"CUDA {facts['cuda']}", f"cuDNN {facts['cudnn']}"]
    commit = f"commit {facts['commit']}" + (" with changes" if facts["dirty"] else "")
    return f"{name}; {', '.join(versions)}; {commit}"


def headline(results: dict[str, Any], plot: str) -> str:
    """Return the README's sentence about one machine: the range of the speed-ups, and the plot."""
    parts = []
    for work in SHOWN:
        found = []
        rows = [row for row in results["rows"] if row["pass"] == work]
        for _, some in group(rows, "case", "lengths", "dtype", "setting"):
            times = by_contender(some)
            if OURS in times and any(not row["ours"] for row in some):
                found.append(best_rival(some)["median_s"] / times[OURS])
        if found:
            name = "scores" if work == "scoring" else "makes a training step"
            parts.append(f"{name} {min(found):.1f} to {max(found):.1f} times as fast")
    where = machine_line(results["machine"]).partition(";")[0]
    return (
        f"On {where}, it {' and '.join(parts)} as the fastest way to call `nn.LSTM`.\n\n"
        f"![speed-up over the best nn.LSTM]({plot})"
    )


def summary(results: dict[str, Any], page: str) -> list[str]:
    """Return the README's part about one machine: fastsiam against the best rival of each shape."""
    header = ["shape", "lengths", "type", "setting"]
    for work in SHOWN:
        header += [f"{work}: fastsiam", "best nn.LSTM", "speed-up", f"over {MAIN_RIVAL}"]
    lines = []
    for key, rows in group(results["rows"], "case", "lengths", "dtype", "setting"):
        line = list(key)
        for work in SHOWN:
            some = [row for row in rows if row["pass"] == work]
            times = by_contender(some)
            if OURS not in times or MAIN_RIVAL not in times:
                line += [""] * 4
                continue
            best = best_rival(some)
            line += [
                duration(times[OURS]),
                f"{duration(best['median_s'])} ({best['contender']})",
                speed_up(best["median_s"] / times[OURS]),
                speed_up(times[MAIN_RIVAL] / times[OURS]),
            ]
        lines.append(line)
    return [
        f"{machine_line(results['machine'])}. [Every contender]({page}).",
        "",
        *markdown_table(header, lines),
    ]


def full_page(results: dict[str, Any], stem: str, plots: dict[str, str]) -> str:
    """Return the page with every contender of every group; plots are texts by file name."""
    text = [
        f"# {machine_line(results['machine'])}",
        "",
        "Medians and quartiles of the time of one call; contenders were timed in turn. Errors are",
        "the largest against float64, relative to the largest entry. Made by `make report`.",
        "",
        *(f"![{name.removeprefix(stem + '-').removesuffix('.svg')}]({name})" for name in plots),
    ]
    if f"{stem}-floor.svg" in plots:
        text += ["", FLOOR]
    for key, rows in group(results["rows"], "case", "lengths", "dtype", "setting", "pass"):
        first = rows[0]
        sizes = ", ".join(f"{size} {first[size]}" for size in ("H", "D", "B", "T", "V"))
        case, lengths, dtype, setting, work = key
        text += ["", f"## {case}, {lengths} lengths, {dtype}, {setting}: {work}", "", sizes, ""]
        fastest = min(row["median_s"] for row in rows)
        header = ["contender", "median", "quartiles", "of the fastest", "rounds x calls"]
        header += ["peak MiB", "value error", "gradient error"]
        lines = [
            [
                row["contender"],
                duration(row["median_s"]),
                f"{duration(row['q1_s'])} to {duration(row['q3_s'])}",
                f"{row['median_s'] / fastest:.2f}",
                f"{row['rounds']} x {row['calls']}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
                f"{row['value_error']:.1e}",
                f"{row['gradient_error']:.1e}",
            ]
            for row in sorted(rows, key=lambda row: row["median_s"])
        ]
        text += markdown_table(header, lines)
        text += ["", *(f"{r['contender']}: {r['explain']}." for r in rows if r.get("explain"))]
    return "\n".join(text) + "\n"


def floor_s(row: Row, facts: Row) -> float | None:
    """Return the floor of scoring, or None where it is not known; FLOOR says what it counts."""
    multiprocessors, clock_mhz = facts.get("multiprocessors"), facts.get("clock_mhz")
    kernels = row["H"] <= 128 and row["cell"] == "lstm" and not row["bidirectional"]
    if not (multiprocessors and clock_mhz and kernels):
        return None
    special = SPECIAL_A_CELL * row["H"] / SPECIAL_A_CLOCK
    in_turn = row["longest"] * (EXCHANGE_CLOCKS + SEQUENCES * special)
    together = row["tokens"] * special / multiprocessors
    return max(in_turn, together) / (clock_mhz * 1e6)


def floor_plot(results: dict[str, Any]) -> str | None:
    """Draw the microseconds of a time step beside the floor's, for scoring in a CUDA graph."""
    names = (OURS, "best nn.LSTM", "floor")
    labels, series = [], {name: [] for name in names}
    rows = [r for r in results["rows"] if r["pass"] == "scoring" and r["setting"] == "graph"]
    for key, some in group(rows, "case", "lengths", "dtype"):
        floor, times = floor_s(some[0], results["machine"]), by_contender(some)
        if floor is None or OURS not in times or all(row["ours"] for row in some):
            continue
        labels.append(", ".join(key))
        for name, time_s in zip(
            names, (times[OURS], best_rival(some)["median_s"], floor), strict=True
        ):
            series[name].append(time_s * 1e6 / some[0]["longest"])
    title = "scoring in a CUDA graph: microseconds a time step of the longest sentence"
    return draw(labels, series, title, True) if labels else None


def draw(labels: list[str], series: dict[str, list[float | None]], title: str, log: bool) -> str:
    """Draw bars from 0 with a line at 1, or dots on a logarithmic axis, as a reproducible SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "fastsiam", "svg.fonttype": "none"}):
        thick = 1 / (len(series) + 1)
        figure = Figure(figsize=(8, 0.8 + 0.18 * len(labels) / thick), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            at = [i + number * thick for i, value in enumerate(values) if value is not None]
            shown = [value for value in values if value is not None]
            if log:
                axes.plot(shown, at, "o", label=name)
            else:
                axes.barh(at, shown, height=thick, label=name)
        if log:
            axes.set_xscale("log")
        else:
            axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks([i + (len(series) - 1) * thick / 2 for i in range(len(labels))], labels)
        axes.set_ylim(len(labels) - thick / 2, -1.5 * thick)
        axes.set_title(title)
        axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def speed_up_plot(results: dict[str, Any]) -> str:
    """Draw fastsiam's speed-up over the best rival: one bar a pass, one group a shape."""
    rows = results["rows"]
    labels, series = [], {work: [] for work in dict.fromkeys(row["pass"] for row in rows)}
    for key, some in group(rows, "case", "lengths", "dtype", "setting"):
        labels.append(", ".join(key))
        for work, values in series.items():
            here = [row for row in some if row["pass"] == work]
            times = by_contender(here)
            rivals = any(not row["ours"] for row in here)
            values.append(
                best_rival(here)["median_s"] / times[OURS] if OURS in times and rivals else None
            )
    return draw(
        labels, series, "speed-up over the best nn.LSTM (right of the line is faster)", False
    )


def error_plot(results: dict[str, Any]) -> str:
    """Draw the gradient errors of fastsiam and of the main rival by shape and precision."""
    names = (OURS, MAIN_RIVAL)
    labels, series = [], {name: [] for name in names}
    for key, some in group(results["rows"], "case", "lengths", "dtype"):
        labels.append(", ".join(key))
        errors = {row["contender"]: row["gradient_error"] for row in some}
        for name in names:
            series[name].append(errors.get(name))
    return draw(labels, series, "gradients: largest error against float64, relative", True)


def render(readme: str, folder: Path) -> dict[Path, str]:
    """Return every file the report consists of, with its text.

    Raises:
        ValueError: the README lacks the markers.
    """
    files: dict[Path, str] = {}
    parts, headlines = [], []
    for source in sorted(folder.glob("*.json")):
        results, stem = load(source), source.stem
        drawn = {"speedup": speed_up_plot, "floor": floor_plot, "error": error_plot}
        plots = {f"{stem}-{name}.svg": plot(results) for name, plot in drawn.items()}
        plots = {name: text for name, text in plots.items() if text is not None}
        files[folder / f"{stem}.md"] = full_page(results, stem, plots)
        files |= {folder / name: text for name, text in plots.items()}
        parts.append("\n".join(summary(results, f"benchmarks/results/{stem}.md")))
        headlines.append(headline(results, f"benchmarks/results/{stem}-speedup.svg"))
    readme = between(readme, HEADLINE_BEGIN, HEADLINE_END, "\n\n".join(headlines) or NOTHING)
    readme = between(readme, BEGIN, END, "\n\n".join(parts) or NOTHING)
    return {README: readme, **files}


def between(text: str, begin: str, end: str, body: str) -> str:
    """Return a text with a new body between two markers.

    Raises:
        ValueError: the text lacks a marker.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{README.name} must hold {begin} and {end} once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def out_of_step(files: dict[Path, str], folder: Path) -> list[str]:
    """Name the files that differ from what they should be, are missing, or have no results."""
    wrong = [
        path.name
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    made = [path for ending in ("*.md", "*.svg") for path in folder.glob(ending)]
    return wrong + [path.name for path in made if path not in files]


def main() -> int:
    parser = argparse.ArgumentParser(description="Render benchmarks/results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of step")
    check = parser.parse_args().check
    files = render(README.read_text(encoding="utf-8"), RESULTS)
    wrong = out_of_step(files, RESULTS)
    if check:
        if wrong:
            print(f"out of step, run `make report`: {', '.join(wrong)}", file=sys.stderr)
        return int(bool(wrong))
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    for path in RESULTS.glob("*"):
        if path.suffix in (".md", ".svg") and path not in files:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
