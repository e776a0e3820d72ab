"""A run as its user sees it: progress, warnings, and the result as a table."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastsiam.model import TextSiamese
from fastsiam.training.checkpoint import DamagedWarning
from fastsiam.training.config import Config
from fastsiam.training.data import Inputs
from fastsiam.training.metrics import EpochRecord, Metrics
from fastsiam.training.recipe import run_recipe
from fastsiam.training.run import Result, Watcher


class _Console(Console):
    """A console that raises where nobody reads its output; `exit_codes` handles it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Screen(Watcher):
    """Shows a run: a live bar on a terminal, a line an epoch elsewhere, nothing if quiet."""

    def __init__(self, config: Config, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        console = _Console()
        self.lines = not console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or self.lines,
        )
        self.task = self.progress.add_task("reading", total=None, figures="")

    def on_start(self, inputs: Inputs, model: TextSiamese, pairs: int) -> None:
        self.progress.update(self.task, description="training", total=pairs)
        if self.quiet:
            return
        for phase, kept in inputs.phases.items():
            swapped = ""
            if phase == "train" and inputs.swapped:
                swapped = f", {inputs.swapped} of them with words swapped"
            self._say(
                f"{phase}: {len(kept)} pairs{swapped}, {inputs.dropped[phase]} repeats dropped"
            )
        coverage = inputs.coverage
        self._say(
            f"words: {coverage.token_share:.1%} of the tokens have a vector; "
            f"{coverage.types['missing']} different words have none"
        )
        if inputs.truncated:
            self._say(f"sentences cut to {model.max_len} tokens: {inputs.truncated}")
        self._say(f"backend: {model.lstm.explain(pairs=self.config.batch_size)}")

    def on_resume(self, records: Sequence[EpochRecord], step: int, pairs: int) -> None:
        self.progress.advance(self.task, pairs)
        if not self.quiet:
            self._say(f"resumed: {len(records)} epochs and {step} steps are done")

    def on_batch(self, pairs: int) -> None:
        self.progress.advance(self.task, pairs)

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        figures = (
            f"loss {_number(record.loss)}  dev Pearson {_number(record.dev_pearson)}  "
            f"{record.pairs_per_s:.0f} pairs/s"
        )
        # of several models, each names the phase as its own
        epochs = self.config.epochs_of(record.phase.rpartition(", ")[2])
        name = f"{record.phase} epoch {record.epoch}/{epochs}"
        self.progress.update(self.task, description=name, figures=figures)
        if self.lines and not self.quiet:
            mark = "  best" if best and self.config.select == "dev" else ""
            self._say(f"{name}: {figures}{mark}")

    def _say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def train_on_screen(config: Config, quiet: bool, resumable: bool = True) -> Result:
    """Carry out a recipe and show how it goes.

    Args:
        config: the settings.
        quiet: whether to show the result alone.
        resumable: whether the command has --resume and keeps the run folder, which an interrupted
            one says.

    Raises:
        typer.Exit: a signal ended the run, which one line says.
        As `run_recipe`.
    """
    screen = _Screen(config, quiet or not speaks())
    with screen.progress, _plain_warnings():
        result = run_recipe(config, screen)
    if result.interrupted:
        best = result.best
        which = "best so far" if config.select == "dev" else "last whole one"
        kept = "of the first steps" if best is None else f"of epoch {best.epoch}, the {which},"
        how = "terminated" if result.signal == signal.SIGTERM else "interrupted"
        if config.ensemble > 1 or config.calibrate:
            kept = "is not whole; what there is of it"
        if speaks():
            rest = f"; the model {kept} is in {config.out}, and --resume goes on" * resumable
            typer.echo(f"fastsiam: {how}{rest}", err=True)
        raise typer.Exit(128 + result.signal)
    assert result.best is not None
    best = result.best
    assert best.dev_mse is not None
    dev = Metrics(len(result.inputs.dev), best.dev_pearson, best.dev_spearman, best.dev_mse)
    of_dev = "trained on" if config.train_on_dev else f"{best.phase} epoch {best.epoch}"
    rows = {f"dev ({of_dev})": dev}
    if result.test is not None:
        rows["test"] = result.test.metrics
        if result.test.calibrated is not None:
            rows["test, calibrated"] = result.test.calibrated
    if speaks():
        print_metrics(rows)
    return result


def speaks() -> bool:
    """Return whether this is the only process, or the first of several, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line of ours, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedWarning)
        warnings.showwarning = lambda message, *_: typer.echo(f"fastsiam: {message}", err=True)
        yield


def print_metrics(rows: Mapping[str, Metrics]) -> None:
    """Print a table with a row for each name, and why correlations are missing where they are."""
    table = Table("pairs of", "n", "Pearson", "Spearman", "MSE (1..5)")
    for name, metrics in rows.items():
        figures = map(_number, (metrics.pearson, metrics.spearman, metrics.mse))
        table.add_row(Text(name), str(metrics.n), *figures)
    _Console().print(table)
    for name, metrics in rows.items():
        if metrics.undefined:
            typer.echo(f"{name}: no correlation: {metrics.undefined}")


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
