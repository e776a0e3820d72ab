"""The commands for files of sentences: encode, score, search."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastsiam.bulk import (
    Hit,
    OnBlock,
    Tally,
    encode_file,
    read_queries,
    score_file,
    search_file,
)
from fastsiam.cli.exit import EXIT_CODES, exit_codes
from fastsiam.cli.options import Device, ModelFolder, Quiet, split_columns
from fastsiam.model import TextSiamese
from fastsiam.text.streams import check_output, writing

app = typer.Typer()

Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The sentences are this column of a table: a name, or a number where there is no "
        "header.",
    ),
]


@app.command("encode", epilog=EXIT_CODES)
def encode_command(
    folder: ModelFolder,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A sentence a line; - is the standard input.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The .npy file to write.")],
    column: Column = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Write the vectors of a file's sentences.

    Row n is that of line n: [n, size] as an .npy file.
    """
    with exit_codes():
        model = TextSiamese.from_pretrained(folder, device)
        with _progress("encoding", file, quiet, model) as on_block:
            encode_file(model, file, out, column=column, on_block=on_block)


@app.command("score", epilog=EXIT_CODES)
def score_command(
    folder: ModelFolder,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Sentence pairs: TSV, CSV or JSON lines; - is the standard input."
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The table to write; - is the standard output.")
    ],
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="LEFT,RIGHT",
            help="Names of the two sentences, numbers (1,2) where there is no header; SICK and STS "
            "headers need none.",
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Score a file of sentence pairs.

    Line n of the output has similarity and score of the pair on line n of FILE.
    """
    with exit_codes():
        names = split_columns(columns, "LEFT,RIGHT")
        model = TextSiamese.from_pretrained(folder, device)
        with _progress("scoring", file, quiet, model) as on_block:
            score_file(model, file, out, columns=names, on_block=on_block)


@app.command("search", epilog=EXIT_CODES)
def search_command(
    folder: ModelFolder,
    corpus: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="The sentences to search, one a line; - is the standard input."
        ),
    ],
    query: Annotated[
        list[str] | None,
        typer.Option(metavar="SENTENCE", help="What to look for; may be given more than once."),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What to look for, a sentence a line; no table."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many to find for each query.")] = 10,
    vectors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What 'fastsiam encode' wrote for the corpus."),
    ] = None,
    column: Column = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The file to write; - is the standard output.")
    ] = "-",
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object for each query.")
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Find the sentences most similar to each query.

    Written are the query's number (its line in --queries), similarity, line and sentence.
    """
    with exit_codes():
        if (query is None) == (queries is None):
            raise ValueError("search: give --query or --queries, one of them")
        if queries == corpus == "-":
            raise ValueError("search: --queries and --corpus cannot both be the standard input")
        check_output("search", out, *(name for name in (corpus, queries, vectors) if name))
        wanted = list(enumerate(query or [], start=1)) or read_queries(str(queries))
        model = TextSiamese.from_pretrained(folder, device)
        with _progress("searching", corpus, quiet, model) as on_block:
            found = search_file(
                model,
                [text for _, text in wanted],
                corpus,
                k,
                column=column,
                vectors=vectors,
                on_block=on_block,
            )
        write = _json_lines if as_json else _table_lines
        with writing(out) as file:
            for (number, text), hits in zip(wanted, found, strict=True):
                file.write(write(number, text, hits).encode("utf-8", "replace"))


def _table_lines(number: int, _: str, hits: list[Hit]) -> str:
    return "".join(
        f"{number}\t{hit.similarity:.6g}\t{hit.line}\t{' '.join(hit.sentence.split())}\n"
        for hit in hits
    )


def _json_lines(number: int, text: str, hits: list[Hit]) -> str:
    values = {"number": number, "query": text, "hits": [hit._asdict() for hit in hits]}
    return json.dumps(values, ensure_ascii=False) + "\n"


@contextmanager
def _progress(what: str, file: str, quiet: bool, model: TextSiamese) -> Iterator[OnBlock]:
    """Show a bar on a terminal, and at the end what was done, both on the standard error."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    path = Path(file)
    size = path.stat().st_size if path.is_file() else None  # of the standard input nobody knows
    task = bar.add_task(what, total=size, rate="")
    start, done = time.perf_counter(), Tally()

    def on_block(tally: Tally) -> None:
        nonlocal done
        done = tally
        rate = tally.rows / (time.perf_counter() - start)
        bar.update(task, completed=tally.position, rate=f"{rate:,.0f} rows/s")

    with bar:
        yield on_block
    if not quiet:
        share = done.unknown / max(done.tokens, 1)
        typer.echo(
            f"{what}: {done.rows} rows in {time.perf_counter() - start:.2f} s; {done.sentences} "
            f"different sentences, {share:.1%} of their words without a vector, {done.truncated} "
            f"cut to {model.max_len} tokens",
            err=True,
        )
