"""The command train: its options, which are the settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastsiam.cli.exit import EXIT_CODES, exit_codes
from fastsiam.cli.options import Columns, Device, Quiet, ScoreRange, split_columns
from fastsiam.cli.screen import speaks, train_on_screen
from fastsiam.training.config import PRESETS, Config

app = typer.Typer()


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
        typer.Option(
            "--train-on-dev",
            help="Train on the dev pairs too; keeps the last epoch, without patience.",
        ),
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
    ] = None,
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
    device: Device = None,
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
        int,
        typer.Option(
            help="Steps between lines of steps.csv, each about those since the line before, the "
            "epoch's start or a resume; 0: none."
        ),
    ] = Config.log_every,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to DIR/tensorboard too.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train on scored sentence pairs.

    --columns and --score-range hold for every file of pairs.
    """
    with exit_codes():
        settings = {
            "train": train_file,
            "dev": dev,
            "vectors": tuple(vectors),
            "out": out,
            "test": test,
            "pretrain": pretrain,
            "synonyms": synonyms,
            "train_on_dev": train_on_dev,
            "ensemble": ensemble,
            "calibrate": calibrate,
            "epochs": epochs,
            "pretrain_epochs": pretrain_epochs,
            "patience": patience,
            "select": select,
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
            "max_len": max_len,
            "oov": oov,
            "spelling": spelling,
            "seed": seed,
            "backend": backend,
            "device": device,
            "columns": split_columns(columns, "LEFT,RIGHT,SCORE"),
            "score_range": score_range,
            "stream": stream,
            "shuffle_buffer": shuffle_buffer,
            "precision": precision,
            "resume": resume,
            "checkpoint_every": checkpoint_every,
            "log_every": log_every,
            "tensorboard": tensorboard,
        }
        # an option that was not given leaves the recipe's own
        given = {name: value for name, value in settings.items() if value is not None}
        train_on_screen(Config.preset(preset, **given), quiet)
        if speaks():
            typer.echo(f"run folder: {out}")
