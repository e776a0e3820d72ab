"""The command line: the commands of the other files, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from fastsiam import __version__
from fastsiam.cli import bulk, demo, evaluate, train
from fastsiam.cli.exit import EXIT_CODES

app = typer.Typer(
    name="fastsiam",
    help="Score how similar two sentences are, with a Siamese LSTM.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# in the order in which the help names them
for part in (demo, train, evaluate, bulk):
    app.add_typer(part.app)


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
