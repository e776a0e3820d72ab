"""The training loop: an objective through its phases, epochs and steps, with checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastsiam.training.batches import Source
from fastsiam.training.checkpoint import Checkpoint, random_state, set_random_state
from fastsiam.training.metrics import EpochRecord, Metrics, RunningMetrics
from fastsiam.training.run_folder import Logs
from fastsiam.training.step import LIMIT, Guard, NotFiniteError, Precision, train_step
from fastsiam.training.world import World

# steps between two looks at the counts of the device; on the CPU a look waits for nothing
LOOK_EVERY = 50
# plain attributes of the loop in a checkpoint
PLAIN = ("phase", "epoch", "done", "step", "seconds", "order", "kept")


@dataclass(frozen=True)
class Phase:
    """Passes over one set of pairs.

    Attributes:
        name: of the phase, in records and messages; another one for each phase.
        source: where its batches come from.
        epochs: passes, at least 1.
        optimizer: holds the parameters that train.
        schedule: moved on after each step.
        select: the epoch of this phase whose weights are kept: "dev", the one of the highest
            Pearson correlation on dev, or "last".
        patience: epochs without a better one on dev after which the phase ends; None: it never
            does.
    """

    name: str
    source: Source
    epochs: int
    optimizer: Optimizer
    schedule: LRScheduler
    select: Literal["dev", "last"] = "dev"
    patience: int | None = None


class Observer:
    """Is told how `fit` goes; Ctrl-C in a method ends training after the step."""

    def on_resume(self, records: Sequence[EpochRecord], step: int, pairs: int) -> None:
        """A checkpoint was taken up: the epochs so far, the steps, and the pairs seen in them."""

    def on_batch(self, pairs: int) -> None:
        """A step is done."""

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        """An epoch is done; `best`: it is the selected one so far."""


@dataclass(frozen=True)
class Fit:
    """The result of training.

    Attributes:
        records: a line an epoch, of all phases.
        best: the selected epoch, whose weights the objective has; None: no epoch was finished.
        step: number of steps made.
        signal: number of the signal that ended it, or 0.
        kept: weights of the selected epoch by name: trainable parameters and buffers.
        last: weights of the last step by name.
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
    observers: Sequence[Observer] = (),
    logs: Logs | None = None,
    world: World | None = None,
) -> Fit:
    """Train an objective through its phases, each from the weights that the phase before selected.

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
        observers: told of the progress, in this order.
        logs: where the metrics of every few steps go; None: nowhere.
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
    loop = _Loop(objective, phases, checkpoint, world or World())
    loop.dev, loop.clip, loop.precision = dev, clip, precision
    loop.stop, loop.observers, loop.logs = stop, observers, logs
    loop.generator = generator or torch.Generator().manual_seed(0)
    loop.resume()
    if logs is not None:
        logs.start(loop.step, loop.metrics)
    loop.run()
    if logs is not None:
        logs.close()
    return Fit(loop.records, loop.best, loop.step, loop.signal, copy_weights(objective), loop.last)


class _Loop:
    """The state of `fit`: the content of a checkpoint, and the objects it belongs to."""

    dev: Callable[[], Metrics] | None
    clip: float
    precision: Precision
    stop: Callable[[], int]
    observers: Sequence[Observer]
    logs: Logs | None
    generator: torch.Generator

    def __init__(
        self,
        objective: nn.Module,
        phases: Sequence[Phase],
        checkpoint: Checkpoint | None,
        world: World,
    ) -> None:
        self.objective, self.phases = objective, phases
        self.checkpoint, self.world = checkpoint, world
        self.wrapped = world.wrap(objective)
        self.device = next(objective.parameters()).device
        self.guard, self.metrics = Guard(self.device), RunningMetrics(self.device)
        self.phase = self.done = self.step = self.signal = 0  # done: steps of this epoch
        self.epoch = 1
        self.order: Tensor | None = None  # the generator's state at the start of this epoch
        self.seconds = 0.0  # of this epoch
        self.records: list[EpochRecord] = []
        self.best: EpochRecord | None = None
        self.kept = self.last = copy_weights(objective)

    def run(self) -> None:
        """Run the phases from where the state stands."""
        while self.phase < len(self.phases):
            phase = self.phases[self.phase]
            while self.epoch <= phase.epochs and not self._out_of_patience(phase):
                self._run_epoch(phase)
                if self.signal:
                    break
            self.last = copy_weights(self.objective)
            if self.best is not None:
                load_weights(self.objective, self.kept)
            if self.signal:
                return
            self.phase, self.epoch = self.phase + 1, 1

    def _out_of_patience(self, phase: Phase) -> bool:
        if phase.patience is None or self.dev is None:
            return False
        ranks = [_rank(record) for record in self.records if record.phase == phase.name]
        return bool(ranks) and len(ranks) - 1 - ranks.index(max(ranks)) >= phase.patience

    def _run_epoch(self, phase: Phase) -> None:
        start, before = time.perf_counter(), self.seconds
        for rows in self._batches(phase):
            self._step(phase, rows)
            self.done, self.step = self.done + 1, self.step + 1
            self.seconds = before + time.perf_counter() - start
            self._tell("on_batch", len(rows))
            self._after_step(phase)
            if self.signal:
                return
        self._end_epoch(phase)
        # a signal may have come while dev was scored
        self.signal = max(self.world.gather(self.signal or self.stop()))

    def _step(self, phase: Phase, rows: Any) -> None:
        mine, weight = self.world.share(rows)
        made = train_step(
            self.wrapped,
            phase.source.batch(mine, self.device),
            phase.optimizer,
            phase.schedule,
            self.guard,
            clip=self.clip,
            precision=self.precision,
            world=self.world,
            weight=weight,
        )
        if weight:
            self.metrics.update(*made)

    def _after_step(self, phase: Phase) -> None:
        """Look for signals and bad steps, log and save where that is due."""
        alone = self.world.size == 1
        look_every = 1 if alone and self.device.type == "cpu" else LOOK_EVERY
        if self.step % look_every == 0:
            self._look(phase)
        if alone or self.step % look_every == 0:
            # together: a process that stopped alone would leave the others waiting
            self.signal = max(self.world.gather(self.signal or self.stop()))
        if self.logs is not None and self.logs.every and self.step % self.logs.every == 0:
            where = {"phase": phase.name, "epoch": self.epoch, "lr": _lr(phase)}
            skipped = self._look(phase)
            self.logs.step(self.step, where, self.metrics, skipped, self.objective)
        due = self.checkpoint is not None and self.checkpoint.every
        if self.signal or (due and self.step % due == 0):
            self._look(phase)
            self._save()

    def _batches(self, phase: Phase) -> Iterable[Any]:
        """Return the batches that are left of this epoch."""
        now = self.generator.get_state()
        if not self.done:
            self.order = now
            return phase.source.batches(self.generator)
        # drawn once more as when the epoch began; then on from where the checkpoint was
        assert self.order is not None
        self.generator.set_state(self.order)
        left = islice(phase.source.batches(self.generator), self.done, None)
        self.generator.set_state(now)
        return left

    def _end_epoch(self, phase: Phase) -> None:
        skipped = self._look(phase)
        metrics = self._merged().compute()
        dev = None if self.dev is None else self.dev()
        record = EpochRecord(
            epoch=self.epoch,
            phase=phase.name,
            dev_pearson=None if dev is None else dev.pearson,
            dev_spearman=None if dev is None else dev.spearman,
            dev_mse=None if dev is None else dev.mse,
            time_s=self.seconds,
            pairs_per_s=len(phase.source) / self.seconds,
            lr=_lr(phase),
            skipped=skipped - sum(record.skipped for record in self.records),
            steps=self.done,
            **asdict(metrics),
        )
        self.records.append(record)
        better = (
            self.dev is None
            or phase.select == "last"
            or self.best is None
            or self.best.phase != phase.name
            or _rank(record) > _rank(self.best)
        )
        if better:
            self.best, self.kept = record, copy_weights(self.objective)
        if self.logs is not None:
            self.logs.epoch(self.step, record)
        self.metrics = RunningMetrics(self.device)
        self.epoch, self.done, self.seconds = self.epoch + 1, 0, 0.0
        if self.checkpoint is not None:
            self._save()
        self._tell("on_epoch", record, better)

    def _look(self, phase: Phase) -> int:
        """Return the number of skipped steps so far, unless there were ten in a row."""
        skipped, over = self.guard.look()
        if over:
            saved = self.checkpoint.files() if self.checkpoint is not None else []
            kept = f"; the last good state is {saved[0]}" if saved else ""
            raise NotFiniteError(
                f"fit: the loss or its gradient was not finite in {LIMIT} steps in a row, in epoch "
                f"{self.epoch} of {phase.name}{kept}; lower the learning rate"
            )
        return skipped

    def _parts(self) -> dict[str, Any]:
        """Return the objects that have a state of their own, by name."""
        phase = self.phases[self.phase]
        return {"optimizer": phase.optimizer, "schedule": phase.schedule, "guard": self.guard}

    def _save(self) -> None:
        """Write the state; every process calls this."""
        random = self.world.gather(random_state())
        metrics = self._merged().state_dict()
        if not self.world.main or self.checkpoint is None:
            return
        state = {
            **{name: getattr(self, name) for name in PLAIN},
            **{name: part.state_dict() for name, part in self._parts().items()},
            "generator": self.generator.get_state(),
            "random": random,
            "weights": copy_weights(self.objective),
            "metrics": metrics,
            "records": [asdict(record) for record in self.records],
            "best": None if self.best is None else self.records.index(self.best),
        }
        self.checkpoint.save(self.step, state)

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            return
        if len(state["random"]) != self.world.size:
            raise ValueError(
                f"resume: the number of processes must be {len(state['random'])}, as before, "
                f"got {self.world.size}"
            )
        vars(self).update({name: state[name] for name in PLAIN})
        try:
            load_weights(self.objective, state["weights"])
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"resume: the checkpoint is of another model: {error}") from error
        if self.world.main:  # it holds the sums of all
            self.metrics.load_state_dict(state["metrics"])
        self.records = [EpochRecord(**values) for values in state["records"]]
        self.best = None if state["best"] is None else self.records[state["best"]]
        self.kept = {name: tensor.to(self.device) for name, tensor in self.kept.items()}
        sources = {phase.name: phase.source for phase in self.phases}
        now = self.phases[self.phase].source
        pairs = sum(len(sources[record.phase]) for record in self.records)
        pairs += round(self.done / now.steps() * len(now))
        self._tell("on_resume", self.records, self.step, pairs)
        # last: nothing above may draw from them afterwards
        self.generator.set_state(state["generator"])
        set_random_state(state["random"][self.world.rank])

    def _merged(self) -> RunningMetrics:
        """Return the sums of all processes."""
        if self.world.size == 1:
            return self.metrics
        return RunningMetrics.merged(self.world.gather(self.metrics.state_dict()), self.device)

    def _tell(self, event: str, *about: Any) -> None:
        """Tell the observers; Ctrl-C in one ends training after the step, as a signal does."""
        try:
            for observer in self.observers:
                getattr(observer, event)(*about)
        except KeyboardInterrupt:
            self.signal = signal.SIGINT


def _rank(record: EpochRecord) -> float:
    return -1.0 if record.dev_pearson is None else record.dev_pearson


def _lr(phase: Phase) -> float:
    return float(phase.schedule.get_last_lr()[0])


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters and the buffers."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    trained |= {name for name, _ in module.named_buffers()}
    return {name: t.clone() for name, t in module.state_dict().items() if name in trained}


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights of `copy_weights`."""
    module.load_state_dict(weights, strict=False)
