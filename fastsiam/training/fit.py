"""The training loop for a module, an optimizer and pairs of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.epoch import Precision
from fastsiam.training.evaluate import Metrics
from fastsiam.training.logs import Logs
from fastsiam.training.phase import Observer, Phase
from fastsiam.training.report import EpochRecord
from fastsiam.training.run import Run, copy_weights
from fastsiam.training.world import World


@dataclass(frozen=True)
class Fit:
    """What training came to.

    Attributes:
        records: a line an epoch, of all phases.
        best: the epoch whose weights the objective has now; None where none was finished.
        step: number of steps made.
        signal: number of the signal that ended it, or 0.
        kept: the weights that the objective has, by name: what trains, and buffers.
        last: those of the last step.
    """

    records: list[EpochRecord]
    best: EpochRecord | None
    step: int
    signal: int
    kept: dict[str, Tensor]
    last: dict[str, Tensor]


def fit(
    objective: nn.Module,
    phases: Sequence[Phase],
    *,
    dev: Callable[[], Metrics] | None = None,
    clip: float = math.inf,
    generator: torch.Generator | None = None,
    checkpoint: Checkpoint | None = None,
    precision: Precision = "float32",
    stop: Callable[[], int] = lambda: 0,
    observer: Observer | None = None,
    logs: Logs | None = None,
    world: World | None = None,
) -> Fit:
    """Train an objective through its phases, each from the weights kept so far.

    A step whose loss or gradient norm is not finite changes nothing and is counted. No step waits
    for the device: sums and counts live on it, and are read at the end of an epoch and, for the
    counts, every 50 steps.

    With a checkpoint, the state is saved at each epoch, each `checkpoint.every` steps and when
    `stop` says so; where its folder holds one already, training goes on from there. On the CPU, and
    with the same inputs, it goes on bit for bit as if nothing had happened.

    Args:
        objective: called with a batch, returns an `Output`; its trainable parameters are saved.
        phases: in the order they run.
        dev: measures the module after each epoch; None: every phase keeps its last epoch.
        clip: largest norm of the gradient.
        generator: CPU generator of the order of the pairs; None: one of seed 0.
        checkpoint: where states are kept; None: nowhere.
        precision: "bf16" computes the objective under bfloat16 autocast; weights stay float32.
        stop: asked after each step, among several processes after each 50th, and after each epoch;
            a number other than 0 ends training there.
        observer: told of the progress.
        logs: where figures go every few steps; None: nowhere.
        world: the processes that share the work; None: this one alone.

    Returns:
        The records; the objective has the weights that were kept.

    Raises:
        DataError: no checkpoint in the folder is whole.
        NotFiniteError: ten steps in a row had to be skipped.
        ValueError: the checkpoint belongs to another recipe, or there is no phase.
        OSError: a checkpoint cannot be written.
    """
    if not phases:
        raise ValueError("fit: phases must hold at least one phase, got none")
    run = Run(objective, phases, dev, clip, generator, checkpoint, precision, world or World())
    run.stop, run.observer, run.logs = stop, observer, logs
    run.resume()
    if logs is not None:
        logs.start(run.step, run.running)
    run.run()
    if logs is not None:
        logs.close()
    return Fit(run.records, run.best, run.step, run.signal, copy_weights(objective), run.last)
