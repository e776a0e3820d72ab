"""The run folder: what a training run leaves behind besides the model."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsiam.text.datasets import Pairs
from fastsiam.text.whole_file import write_file

# what a run leaves in its folder: any run, that of one model, and that of several
OWN = {"config.json", "model.safetensors", "predictions.tsv", "run.json", "vocabulary.json"}
OF_ONE = {"checkpoints", "last", "metrics.csv", "plot.png", "steps.csv", "tensorboard"}
OF_MANY = {"folds", "members"}
# what may be there before the first checkpoint
BEGUN = {"checkpoints", "members", "metrics.csv", "steps.csv", "tensorboard"}


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.csv`.

    Attributes:
        epoch: 1, 2, ... within the phase.
        phase: "pretrain" or "train".
        loss: what is minimised, mean over the epoch's pairs while training; None where every step
            was skipped.
        dev_pearson: on the dev pairs after the epoch; None where it is undefined or not measured.
        dev_spearman: likewise.
        dev_mse: on the 1..5 scale.
        time_s: seconds of training, without the dev pairs.
        pairs_per_s: training pairs a second.
        gradient_norm: mean over the steps, before clipping.
        lr: learning rate at the end of the epoch.
        mse: on the 1..5 scale, over the epoch's pairs while training.
        pearson: over the epoch's pairs while training; None where it is undefined.
        spearman: likewise.
        clamped: training pairs whose similarity was within 1e-7 of 0 or of 1.
        skipped: steps that changed nothing, since their loss or gradient was not finite.
        steps: in the epoch.
    """

    epoch: int
    phase: str
    loss: float | None
    dev_pearson: float | None
    dev_spearman: float | None
    dev_mse: float | None
    time_s: float
    pairs_per_s: float
    gradient_norm: float | None
    lr: float
    mse: float | None
    pearson: float | None
    spearman: float | None
    clamped: int
    skipped: int
    steps: int


class RunFolder:
    """The folder of one run.

    Args:
        path: a folder that is empty or does not exist.
        resume: it may also be one that a run has begun to fill.
        many: the run is one of several models, each in a folder of its own below this one.

    Raises:
        ValueError: the path is a file, a folder with something else in it, or one with a model and
            without the checkpoints that it came of.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path: Path, resume: bool = False, many: bool = False) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"out must be a new or empty folder, got the file {path}")
        inside = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if inside and not resume:
            raise ValueError(
                f"out must be a new or empty folder, got {path} with files in it; name another, or "
                "resume the run that it holds"
            )
        # the parts of files that were being written when the run was killed
        inside = {name for name in inside if not name.endswith(".part")}
        if strange := inside - OWN - OF_ONE - OF_MANY:
            raise ValueError(
                f"out must be a new or empty folder or that of a run to resume, got {path} with "
                f"{min(strange)} in it"
            )
        if other := inside & (OF_ONE if many else OF_MANY):
            raise ValueError(
                f"resume: ensemble and calibrate must be what they were in {path}, which has "
                f"{min(other)} in it; give those, or name a new folder"
            )
        state = "members/0/checkpoints" if many else "checkpoints"
        if inside - BEGUN and not any(path.glob(f"{state}/step-*.safetensors")):
            raise ValueError(
                f"resume: {path} must hold the checkpoints of its run, got {min(inside - BEGUN)} "
                f"and nothing in {state}; name a new folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        # a disk that cannot be written is noticed now, before any work
        tempfile.TemporaryFile(dir=path).close()
        self.path = path

    def write_metrics(self, records: Sequence[EpochRecord]) -> None:
        """Write `metrics.csv`, a line an epoch."""
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(field.name for field in fields(EpochRecord))
        table.writerows(asdict(record).values() for record in records)
        write_file(self.path / "metrics.csv", text.getvalue().encode())

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write `run.json`: the settings and what came of them."""
        write_file(self.path / "run.json", (json.dumps(facts, indent=1) + "\n").encode())

    def write_predictions(self, pairs: Pairs, similarity: Tensor) -> None:
        """Write `predictions.tsv`; predictions are on the scale of the file's scores."""
        low, high = pairs.score_range
        lines = [["left", "right", "gold", "predicted"]]
        for left, right, gold, value in zip(
            pairs.left, pairs.right, pairs.score, similarity.tolist(), strict=True
        ):
            # one blank for any white space: a tab or line feed would break the table
            sentences = [" ".join(text.split()) for text in (left, right)]
            lines.append([*sentences, f"{gold:g}", f"{low + (high - low) * value:.4f}"])
        text = "".join("\t".join(line) + "\n" for line in lines)
        write_file(self.path / "predictions.tsv", text.encode())

    def write_plot(self, records: Sequence[EpochRecord]) -> None:
        """Draw `plot.png`: loss and dev correlations by epoch."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        loss_axes = figure.subplots()
        epochs = range(1, len(records) + 1)
        nan = float("nan")
        losses = [nan if r.loss is None else r.loss for r in records]
        loss_axes.plot(epochs, losses, color="tab:gray", label="training loss")
        loss_axes.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
        axes = loss_axes.twinx()
        colours = {"pearson": "tab:blue", "spearman": "tab:orange"}
        for (name, colour), part in product(colours.items(), ("dev", "training")):
            values = [getattr(r, name if part == "training" else f"dev_{name}") for r in records]
            axes.plot(
                epochs,
                [nan if v is None else v for v in values],
                color=colour,
                linestyle="-" if part == "dev" else "--",
                label=f"{part} {name}",
            )
        axes.set_ylabel("correlation")
        for before, after in pairwise(records):
            if before.phase != after.phase:
                axes.axvline(epochs[records.index(after)] - 0.5, color="black", linestyle=":")
        figure.legend(loc="outside upper center", ncols=3)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png")
        write_file(self.path / "plot.png", buffer.getvalue())
