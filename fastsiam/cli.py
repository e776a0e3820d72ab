"""The commands: parse, call, print."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastsiam import __version__, cli_bulk
from fastsiam.cli_exit import EXIT_CODES, exit_codes
from fastsiam.model import TextSiamese
from fastsiam.sample import write_sample
from fastsiam.text.datasets import read_pairs
from fastsiam.training.checkpoint import DamagedWarning
from fastsiam.training.config import PRESETS, Config
from fastsiam.training.data import Inputs
from fastsiam.training.evaluate import Metrics, evaluate
from fastsiam.training.loop import Result
from fastsiam.training.recipe import run_recipe
from fastsiam.training.report import EpochRecord, RunFolder

EXAMPLES = 6  # pairs that `demo` prints

app = typer.Typer(
    name="fastsiam",
    help="Score how similar two sentences are, with a Siamese LSTM.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(cli_bulk.app)


def main() -> None:
    """Run the command line."""
    app(prog_name="fastsiam")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastsiam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


Columns = Annotated[
    str | None,
    typer.Option(
        metavar="LEFT,RIGHT,SCORE",
        help="Names of the two sentences and the score; SICK and STS headers need none.",
    ),
]
ScoreRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LO HI", help="Lowest and highest score; by default the known header's, else 1 5."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that 'fastsiam train' wrote.")
]


def _by_recipe(text: str, setting: str) -> str:
    """Return a help text with the setting's default, and its value in recipes that differ."""

    def shown(value: object) -> str:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    usual = getattr(Config, setting)
    others = [
        f"{name} {shown(values[setting])}" for name, values in PRESETS.items() if setting in values
    ]
    return f"{text}  [default: {', '.join([shown(usual), *others])}]"


@app.command("train", epilog=EXIT_CODES)
def train_command(
    train_file: Annotated[
        Path, typer.Option("--train", metavar="FILE", help="Scored pairs to train on.")
    ],
    dev: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Scored pairs to watch, and to choose the epoch by."),
    ],
    vectors: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Word vectors; given more than once, they are joined."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder, new or empty.")],
    test: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Scored pairs to report on.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(metavar="|".join(PRESETS), help="The recipe; an option below wins over it."),
    ] = "fast",
    pretrain: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scored pairs to train on first."),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON: word -> words to swap it with; training pairs come again with such swaps.",
        ),
    ] = None,
    train_on_dev: Annotated[
        bool,
        typer.Option("--train-on-dev", help="Train on the dev pairs too; keeps the last epoch."),
    ] = False,
    ensemble: Annotated[
        int, typer.Option(help="Models to train, from seeds in a row, and to save as one.")
    ] = Config.ensemble,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            help=_by_recipe("Fit scores by isotonic regression, out of fold.", "calibrate")
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=_by_recipe("Passes over the pairs.", "epochs"))
    ] = None,
    pretrain_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over those of --pretrain.  [default: --epochs, article 70, paper 15]"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Epochs without a better one after which a phase ends.  [default: none, paper 10]"
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(metavar="dev|last", help=_by_recipe("The epoch that is kept.", "select")),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=_by_recipe("Pairs a step.", "batch_size"))
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help=_by_recipe("Size of the LSTM.", "hidden_size"))
    ] = None,
    bidirectional: Annotated[
        bool | None,
        typer.Option(help=_by_recipe("Read from the end too.", "bidirectional")),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="last|mean|max", help=_by_recipe("What of the states is kept.", "pooling")
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help=_by_recipe("Factor on the L1 distance.", "scale"))
    ] = None,
    learn_scale: Annotated[
        bool | None, typer.Option(help=_by_recipe("Train that factor.", "learn_scale"))
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="orig|seed|pytorch", help=_by_recipe("Weights to start from.", "start")
        ),
    ] = None,
    forget_bias: Annotated[
        float | None,
        typer.Option(help="Start of the forget gates' bias.  [default: orig 2.5, seed 1]"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(metavar="adam|adadelta", help=_by_recipe("Rule of the steps.", "optimizer")),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="First learning rate.  [default: adam 2e-3, adadelta 1, best 4e-3]"),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="cosine|constant", help=_by_recipe("How the rate goes on.", "schedule")
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help=_by_recipe("Largest gradient norm.", "clip"))
    ] = (None),
    dropout: Annotated[
        float | None,
        typer.Option(
            help=_by_recipe("Share of the word vectors' numbers dropped in a step.", "dropout")
        ),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(help=_by_recipe("Weight of a head of score classes.", "kl_weight")),
    ] = None,
    entailment_weight: Annotated[
        float | None,
        typer.Option(
            help=_by_recipe("Weight of a head of SICK's entailment labels.", "entailment_weight")
        ),
    ] = None,
    vector_length: Annotated[
        float | None,
        typer.Option(help="Mean length to bring each file's vectors to.  [default: none, best 4]"),
    ] = None,
    max_len: Annotated[int, typer.Option(help="Tokens of a sentence that are read.")] = (
        Config.max_len
    ),
    oov: Annotated[
        str, typer.Option(metavar="zero|random", help="Vector of a word that no file has.")
    ] = Config.oov,
    spelling: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON: word as written -> word in the vector files."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the start and the order of the pairs.")] = (
        Config.seed
    ),
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto, triton, torch, lstm or reference."),
    ] = Config.backend,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda or cuda:0.  [default: cuda where there is one]"
        ),
    ] = None,
    columns: Columns = None,
    score_range: ScoreRange = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave training pairs in their files; for large ones.")
    ] = False,
    shuffle_buffer: Annotated[
        int, typer.Option(help="Pairs that a streamed pair is drawn from.")
    ] = Config.shuffle_buffer,
    precision: Annotated[
        str, typer.Option(metavar="float32|bf16", help="What the recurrence computes in.")
    ] = Config.precision,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: one an epoch.")
    ] = Config.checkpoint_every,
    log_every: Annotated[
        int, typer.Option(help="Steps between lines of steps.csv; 0: none.")
    ] = Config.log_every,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to DIR/tensorboard too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result alone.")] = False,
) -> None:
    """Train on scored sentence pairs; --columns and --score-range hold for every file."""
    with exit_codes():
        given = {
            "calibrate": calibrate,
            "epochs": epochs,
            "pretrain_epochs": pretrain_epochs,
            "patience": patience,
            "select": "last" if train_on_dev and select is None else select,
            "batch_size": batch_size,
            "hidden_size": hidden_size,
            "bidirectional": bidirectional,
            "pooling": pooling,
            "scale": scale,
            "learn_scale": learn_scale,
            "start": start,
            "forget_bias": forget_bias,
            "optimizer": optimizer,
            "lr": lr,
            "schedule": schedule,
            "clip": clip,
            "dropout": dropout,
            "kl_weight": kl_weight,
            "entailment_weight": entailment_weight,
            "vector_length": vector_length,
        }
        config = Config.preset(
            preset,
            train=train_file,
            dev=dev,
            vectors=tuple(vectors),
            out=out,
            test=test,
            pretrain=pretrain,
            synonyms=synonyms,
            train_on_dev=train_on_dev,
            ensemble=ensemble,
            max_len=max_len,
            oov=oov,
            spelling=spelling,
            columns=_split_columns(columns),
            score_range=score_range,
            seed=seed,
            backend=backend,
            device=device,
            stream=stream,
            shuffle_buffer=shuffle_buffer,
            precision=precision,
            resume=resume,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            tensorboard=tensorboard,
            **{name: value for name, value in given.items() if value is not None},
        )
        _train(config, quiet)
        if _speaks():
            typer.echo(f"run folder: {out}")


@app.command("evaluate", epilog=EXIT_CODES)
def evaluate_command(
    folder: ModelFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Scored pairs.")],
    columns: Columns = None,
    score_range: ScoreRange = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model's scores with those of a file; the error is on the scale 1 to 5."""
    with exit_codes():
        pairs = read_pairs(file, columns=_split_columns(columns), score_range=score_range)
        result = evaluate(TextSiamese.from_pretrained(folder), pairs)
        if as_json:
            values = asdict(result.metrics)
            # the reason is there only where a correlation is null
            if not result.metrics.undefined:
                del values["undefined"]
            if result.calibrated is not None:
                values["calibrated"] = {
                    name: getattr(result.calibrated, name)
                    for name in ("pearson", "spearman", "mse")
                }
            typer.echo(json.dumps(values))
            return
        rows = {file.name: result.metrics}
        if result.calibrated is not None:
            rows[f"{file.name}, calibrated"] = result.calibrated
        _print_metrics(rows)
        typer.echo(
            f"words without a vector: {result.unknown.total()} "
            f"({len(result.unknown)} different); sentences cut: {result.truncated}"
        )


@app.command("similarity", epilog=EXIT_CODES)
def similarity_command(
    folder: ModelFolder,
    left: Annotated[str, typer.Argument(metavar="SENTENCE")],
    right: Annotated[str, typer.Argument(metavar="SENTENCE")],
    as_json: AsJson = False,
) -> None:
    """Score two sentences, from 0 to 1 and on the scale of the model's training scores."""
    with exit_codes():
        model = TextSiamese.from_pretrained(folder)
        similarity = model.similarity(left, right)
        score, (low, high) = model.to_score(similarity), model.score_range
        unknown = list(model.vocabulary.encode([left, right], model.max_len).unknown)
        if as_json:
            values = {
                "similarity": similarity,
                "score": score,
                "score_range": [low, high],
                "unknown": unknown,
            }
            typer.echo(json.dumps(values, ensure_ascii=False))
            return
        typer.echo(f"similarity {similarity:.4f}  (score {score:.2f} on {low:g} to {high:g})")
        if unknown:
            typer.echo(f"words without a vector: {', '.join(unknown)}")


@app.command("demo", epilog=EXIT_CODES)
def demo_command(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the pairs and the run here; new or empty."),
    ] = None,
) -> None:
    """Make sentence pairs and word vectors, train on them, and show what came of it."""
    with exit_codes():
        with nullcontext(str(out)) if out else tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            RunFolder(folder)  # refuses one in use
            typer.echo("making sentence pairs and word vectors of a little world ...")
            paths = write_sample(folder / "sample")
            config = Config(
                train=paths.train,
                dev=paths.dev,
                test=paths.test,
                vectors=(paths.vectors,),
                out=folder / "run",
            )
            _print_examples(_train(config, quiet=False))
        if out is not None:
            typer.echo(
                f'try: fastsiam similarity {out / "run"} "a boy is running" "a lad is jogging"'
            )


class _Screen:
    """How a run goes: a live bar on a terminal, a line an epoch elsewhere, nothing if quiet."""

    def __init__(self, config: Config, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        console = Console()
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
            swapped = f", {inputs.swapped} of them with words swapped" * (phase == "train")
            self._say(
                f"{phase}: {len(kept)} pairs{swapped * bool(inputs.swapped)}, "
                f"{inputs.dropped[phase]} repeats dropped"
            )
        coverage = inputs.coverage
        self._say(
            f"words: {coverage.token_share:.1%} of the tokens have a vector; "
            f"{coverage.types['missing']} different words have none"
        )
        if inputs.truncated:
            self._say(f"sentences cut to {model.max_len} tokens: {inputs.truncated}")
        self._say(f"backend: {model.lstm.explain()}")

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
            self._say(f"{name}: {figures}{'  best' if best else ''}")

    def _say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _train(config: Config, quiet: bool) -> Result:
    screen = _Screen(config, quiet or not _speaks())
    with screen.progress, _plain_warnings():
        result = run_recipe(config, screen)
    if result.interrupted:
        best = result.best
        kept = "of the first steps" if best is None else f"of epoch {best.epoch}, the best so far,"
        how = "terminated" if result.signal == signal.SIGTERM else "interrupted"
        if config.ensemble > 1 or config.calibrate:
            kept = "is not whole; what there is of it"
        if _speaks():
            line = f"fastsiam: {how}; the model {kept} is in {config.out}, and --resume goes on"
            typer.echo(line, err=True)
        raise typer.Exit(128 + result.signal)
    assert result.best is not None
    best = result.best
    assert best.dev_mse is not None
    dev = Metrics(len(result.inputs.dev), best.dev_pearson, best.dev_spearman, best.dev_mse)
    of_dev = "trained on" if config.train_on_dev else f"epoch {best.epoch}"
    rows = {f"dev ({of_dev})": dev}
    if result.test is not None:
        rows["test"] = result.test.metrics
        if result.test.calibrated is not None:
            rows["test, calibrated"] = result.test.calibrated
    if _speaks():
        _print_metrics(rows)
    return result


def _speaks() -> bool:
    """Return whether this is the only process, or the first of several, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line of ours, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedWarning)
        warnings.showwarning = lambda message, *_: typer.echo(f"fastsiam: {message}", err=True)
        yield


def _print_metrics(rows: Mapping[str, Metrics]) -> None:
    table = Table("pairs of", "n", "Pearson", "Spearman", "MSE (1..5)")
    for name, metrics in rows.items():
        figures = map(_number, (metrics.pearson, metrics.spearman, metrics.mse))
        table.add_row(name, str(metrics.n), *figures)
    Console().print(table)
    for name, metrics in rows.items():
        if metrics.undefined:
            typer.echo(f"{name}: no correlation: {metrics.undefined}")


def _print_examples(result: Result) -> None:
    pairs, test = result.inputs.test, result.test
    assert pairs is not None
    assert test is not None
    order = sorted(range(len(pairs)), key=pairs.score.__getitem__)
    typer.echo("\nheld-out pairs, with the score they have and the score they got:")
    for i in (order[step * (len(order) - 1) // (EXAMPLES - 1)] for step in range(EXAMPLES)):
        score = result.model.to_score(float(test.similarity[i]))
        typer.echo(f"  {pairs.score[i]:.1f}  {score:.1f}  {pairs.left[i]} | {pairs.right[i]}")


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _split_columns(columns: str | None) -> tuple[str, str, str] | None:
    if columns is None:
        return None
    names = [name.strip() for name in columns.split(",")]
    if len(names) != 3 or not all(names):
        raise ValueError(f"columns must be LEFT,RIGHT,SCORE, got {columns!r}")
    return names[0], names[1], names[2]
