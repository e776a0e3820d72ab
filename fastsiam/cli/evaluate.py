"""The commands that print scores: evaluate and similarity."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastsiam.cli.exit import EXIT_CODES, exit_codes
from fastsiam.cli.options import AsJson, Columns, Device, ModelFolder, ScoreRange, split_columns
from fastsiam.cli.screen import print_metrics
from fastsiam.model import TextSiamese
from fastsiam.text.pairs import read_pairs
from fastsiam.training.evaluate import evaluate

app = typer.Typer()


@app.command("evaluate", epilog=EXIT_CODES)
def evaluate_command(
    folder: ModelFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Scored pairs.")],
    columns: Columns = None,
    score_range: ScoreRange = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model with the scores of a file.

    The error is on the scale 1 to 5, whatever the file's.
    """
    with exit_codes():
        pairs = read_pairs(
            file, columns=split_columns(columns, "LEFT,RIGHT,SCORE"), score_range=score_range
        )
        result = evaluate(TextSiamese.from_pretrained(folder, device), pairs)
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
        print_metrics(rows)
        typer.echo(
            f"words without a vector: {result.unknown.total()} "
            f"({len(result.unknown)} different); sentences cut: {result.truncated}"
        )


@app.command("similarity", epilog=EXIT_CODES)
def similarity_command(
    folder: ModelFolder,
    left: Annotated[str, typer.Argument(metavar="SENTENCE")],
    right: Annotated[str, typer.Argument(metavar="SENTENCE")],
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score two sentences.

    Printed are the similarity, from 0 to 1, and the score on the scale of the training pairs.
    """
    with exit_codes():
        model = TextSiamese.from_pretrained(folder, device)
        similarity = model.similarity(left, right)
        score, (low, high) = model.to_score(similarity), model.score_range
        encoded = model.vocabulary.encode([left, right], model.max_len)
        unknown = list(encoded.unknown)
        if as_json:
            values = {
                "similarity": similarity,
                "score": score,
                "score_range": [low, high],
                "unknown": unknown,
                "truncated": encoded.truncated,
            }
            typer.echo(json.dumps(values, ensure_ascii=False))
            return
        typer.echo(f"similarity {similarity:.4f}  (score {score:.2f} on {low:g} to {high:g})")
        if unknown:
            typer.echo(f"words without a vector: {', '.join(unknown)}")
        if encoded.truncated:
            typer.echo(f"sentences cut to {model.max_len} tokens: {encoded.truncated}")
