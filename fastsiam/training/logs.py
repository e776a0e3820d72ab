"""What a run tells while it trains: `steps.csv` and TensorBoard, every n steps and every epoch."""

from __future__ import annotations

import csv
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsiam.training.report import EpochRecord
from fastsiam.training.running import Running

STEPS_FILE, BOARD_FOLDER = "steps.csv", "tensorboard"


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

    def start(self, step: int, running: Running) -> None:
        """Begin, or go on after so many steps: what was logged beyond them is dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._before, self._time = running.totals(), time.perf_counter()
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
        running: Running,
        skipped: int,
        module: nn.Module,
    ) -> None:
        """Log the steps since the last line: their means, and the gradients of the newest.

        Where the epoch began or the run was resumed after the last line, they count from there.

        Args:
            step: number of steps made.
            where: phase, epoch and learning rate.
            running: the sums of the epoch.
            skipped: steps skipped so far.
            module: whose parameters have the clipped gradients of the newest step.
        """
        totals, now = running.totals(), time.perf_counter()
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
