"""The files that a training run writes besides the model and its checkpoints."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsiam.text.pairs import Pairs
from fastsiam.text.whole_file import write_file
from fastsiam.training.metrics import EpochRecord, RunningMetrics

# names in a run folder: of any run, of a run of one model, of a run of several models
OWN = {"config.json", "model.safetensors", "predictions.tsv", "run.json", "vocabulary.json"}
OF_ONE = {"checkpoints", "last", "metrics.csv", "plot.png", "steps.csv", "tensorboard"}
OF_MANY = {"folds", "members"}
STEPS_FILE, BOARD_FOLDER = "steps.csv", "tensorboard"
# names that may be there before the first checkpoint
BEGUN = {"checkpoints", "members", "metrics.csv", "steps.csv", "tensorboard"}


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
        if inside - BEGUN and not any(path.glob(f"{state}/step-*.pt")):
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
        """Write `run.json`: the settings and the results."""
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


class Logs:
    """The logs in a run folder.

    Nothing is read from the device but every `every` steps and where an epoch ends. Of several
    processes, the lines of the first are about its share of the pairs; epochs are about all.

    Args:
        folder: gets `steps.csv`, and `tensorboard/` where that is asked for.
        every: steps between two lines of `steps.csv`; 0: epochs alone are logged.
        tensorboard: whether to write event files too, with histograms of the gradients.

    Raises:
        ImportError: tensorboard is asked for and not installed.
    """

    def __init__(self, folder: Path, every: int = 0, tensorboard: bool = False) -> None:
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "train: tensorboard missing; install with: pip install 'fastsiam[tensorboard]'"
            )
        self.folder, self.every, self.tensorboard = folder, every, tensorboard
        self._board: Any = None
        self._before: dict[str, float] = {}
        self._time = time.perf_counter()

    def start(self, step: int, metrics: RunningMetrics) -> None:
        """Begin, or go on after `step` steps; later lines of an earlier run are dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._before, self._time = metrics.totals(), time.perf_counter()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purged events are hidden by TensorBoard: those of steps that are made again
            self._board = SummaryWriter(
                self.folder / BOARD_FOLDER, purge_step=step + 1 if step else None
            )
        path = self.folder / STEPS_FILE
        if self.every and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines[1:] if _is_up_to(line, step)] if step else []
            path.write_text("".join(lines[:1] + kept if kept else []), encoding="utf-8")

    def step(
        self,
        step: int,
        where: Mapping[str, Any],
        metrics: RunningMetrics,
        skipped: int,
        module: nn.Module,
    ) -> None:
        """Log the steps since the last line: their means, and the gradients of the newest.

        The count begins anew at the start of an epoch and at a resume.

        Args:
            step: number of steps made.
            where: phase, epoch and learning rate.
            metrics: the sums of the epoch.
            skipped: steps skipped so far.
            module: whose parameters have the clipped gradients of the newest step.
        """
        totals, now = metrics.totals(), time.perf_counter()
        since = {name: value - self._before.get(name, 0.0) for name, value in totals.items()}
        if since["steps"] < 0:  # an epoch ended in between
            since = totals
        pairs, steps = since["pairs"], since["steps"]
        row: dict[str, Any] = {
            "step": step,
            **where,
            "loss": since["loss"] / pairs if pairs else None,
            "mse": 16 * since["squared_error"] / pairs if pairs else None,
            "gradient_norm": since["norms"] / steps if steps else None,
            "pairs_per_s": pairs / (now - self._time),
            "clamped": round(since["clamped"]),
            "skipped": skipped,
        }
        gradients = {
            name: p.grad.detach().cpu()
            for name, p in module.named_parameters()
            if p.grad is not None
        }
        row |= {f"zeros {name}": _zeros(gradient) for name, gradient in gradients.items()}
        self._append(row)
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "phase", "epoch") and value is not None:
                    # TensorBoard takes a blank for an underscore, and warns
                    self._board.add_scalar(f"step/{name.replace(' ', '/')}", value, step)
            for name, gradient in gradients.items():
                if bool(gradient.isfinite().all()):
                    self._board.add_histogram(f"gradient/{name}", gradient.float(), step)
        self._before, self._time = totals, time.perf_counter()

    def epoch(self, step: int, record: EpochRecord) -> None:
        """Log an epoch that ends with a step."""
        self._before = {}
        if self._board is None:
            return
        for name, value in asdict(record).items():
            if name in ("epoch", "phase", "time_s", "steps") or value is None:
                continue
            part = "dev" if name.startswith("dev_") else "train"
            self._board.add_scalar(f"{part}/{name.removeprefix('dev_')}", value, step)
        self._board.flush()

    def close(self) -> None:
        """Write out what is still held."""
        if self._board is not None:
            self._board.close()

    def _append(self, row: dict[str, Any]) -> None:
        with (self.folder / STEPS_FILE).open("a", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if not file.tell():
                table.writerow(row)
            table.writerow(row.values())


def _zeros(gradient: Tensor) -> float:
    return float((gradient == 0).float().mean())


def _is_up_to(line: str, step: int) -> bool:
    """Return whether a whole line is of a step that was saved; a kill may cut the last one."""
    first = line.partition(",")[0]
    return line.endswith("\n") and first.isdecimal() and int(first) <= step
