"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda or cuda:0.  [default: cuda where there is one]"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone.")]


def split_columns(columns: str | None, form: str) -> tuple[Any, ...] | None:
    """Return the names in --columns, as many as `form` has, such as "LEFT,RIGHT".

    Raises:
        ValueError: there are more or fewer, or one is empty.
    """
    if columns is None:
        return None
    names = [name.strip() for name in columns.split(",")]
    if len(names) != len(form.split(",")) or not all(names):
        raise ValueError(f"columns must be {form}, got {columns!r}")
    return tuple(names)
