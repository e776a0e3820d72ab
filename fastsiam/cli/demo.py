"""The command demo: make data, train a model on it, print the result."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastsiam.cli.exit import EXIT_CODES, exit_codes
from fastsiam.cli.screen import train_on_screen
from fastsiam.text.sample import write_sample
from fastsiam.training.config import Config
from fastsiam.training.run import Result
from fastsiam.training.run_folder import RunFolder

EXAMPLES = 6  # pairs that are printed

app = typer.Typer()


@app.command("demo", epilog=EXIT_CODES)
def demo_command(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the pairs and the run here; new or empty."),
    ] = None,
) -> None:
    """Make sentence pairs, train on them, show the result."""
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
            _print_examples(train_on_screen(config, quiet=False, resumable=False))
        if out is not None:
            typer.echo(
                f'try: fastsiam similarity {out / "run"} "a boy is running" "a lad is jogging"'
            )


def _print_examples(result: Result) -> None:
    pairs, test = result.inputs.test, result.test
    assert pairs is not None
    assert test is not None
    order = sorted(range(len(pairs)), key=pairs.score.__getitem__)
    typer.echo("\nheld-out pairs, with the score they have and the score they got:")
    for i in (order[step * (len(order) - 1) // (EXAMPLES - 1)] for step in range(EXAMPLES)):
        score = result.model.to_score(float(test.similarity[i]))
        typer.echo(f"  {pairs.score[i]:.1f}  {score:.1f}  {pairs.left[i]} | {pairs.right[i]}")
