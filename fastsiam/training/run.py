"""The state of training, step by step: what a checkpoint holds, and what it is applied to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.epoch import Precision, run_epoch
from fastsiam.training.evaluate import Metrics
from fastsiam.training.guard import LIMIT, Guard, NotFiniteError
from fastsiam.training.logs import Logs
from fastsiam.training.phase import Observer, Phase
from fastsiam.training.randomness import random_state, set_random_state
from fastsiam.training.report import EpochRecord
from fastsiam.training.running import Running
from fastsiam.training.world import World

# steps between two looks at what the device found; on the CPU a look waits for nothing
LOOK_EVERY = {"cpu": 1}
LOOK_EVERY_ELSEWHERE = 50


class Run:
    """The state of `fit`: everything that a checkpoint holds, and what it is applied to."""

    stop: Callable[[], int]
    observer: Observer | None
    logs: Logs | None

    def __init__(
        self,
        objective: nn.Module,
        phases: Sequence[Phase],
        dev: Callable[[], Metrics] | None,
        clip: float,
        generator: torch.Generator | None,
        checkpoint: Checkpoint | None,
        precision: Precision,
        world: World,
    ) -> None:
        self.objective, self.phases, self.dev, self.clip = objective, phases, dev, clip
        self.generator = generator or torch.Generator().manual_seed(0)
        self.checkpoint, self.precision, self.world = checkpoint, precision, world
        self.wrapped = world.wrap(objective)
        self.device = next(objective.parameters()).device
        self.guard, self.running = Guard(self.device), Running(self.device)
        self.phase = self.done = self.step = self.signal = 0  # done: steps of this epoch
        self.epoch = 1
        self.order = self.generator.get_state()  # at the start of this epoch
        self.seconds = 0.0  # of this epoch
        self.records: list[EpochRecord] = []
        self.best: EpochRecord | None = None
        self.kept = self.last = copy_weights(objective)

    def run(self) -> None:
        """Run what is left of the phases."""
        while self.phase < len(self.phases):
            phase = self.phases[self.phase]
            while self.epoch <= phase.epochs and not self._out_of_patience(phase):
                self._epoch(phase)
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
        records = [record for record in self.records if record.phase == phase.name]
        ranks = [_rank(record) for record in records]
        return bool(ranks) and len(ranks) - 1 - ranks.index(max(ranks)) >= phase.patience

    def _epoch(self, phase: Phase) -> None:
        start, before = time.perf_counter(), self.seconds
        look_every = LOOK_EVERY.get(self.device.type, LOOK_EVERY_ELSEWHERE)
        if self.world.size > 1:
            look_every = LOOK_EVERY_ELSEWHERE

        def after_step(pairs: int) -> bool:
            self.done, self.step = self.done + 1, self.step + 1
            self.seconds = before + time.perf_counter() - start
            self._tell(lambda observer: observer.on_batch(pairs))
            if self.step % look_every == 0:
                self._look(phase)
                # together: a process that stopped alone would leave the others waiting
                self.signal = max(self.world.gather(self.signal or self.stop()))
            elif self.world.size == 1:
                self.signal = self.signal or self.stop()
            if self.logs is not None and self.logs.every and self.step % self.logs.every == 0:
                where = {
                    "phase": phase.name,
                    "epoch": self.epoch,
                    "lr": float(phase.schedule.get_last_lr()[0]),
                }
                skipped = self._look(phase)
                self.logs.step(self.step, where, self.running, skipped, self.objective)
            due = self.checkpoint is not None and self.checkpoint.every
            if self.signal or (due and self.step % due == 0):
                self._look(phase)
                self._save()
            return not self.signal

        run_epoch(
            self.wrapped,
            phase.source,
            self._batches(phase),
            phase.optimizer,
            phase.schedule,
            clip=self.clip,
            precision=self.precision,
            guard=self.guard,
            running=self.running,
            world=self.world,
            after_step=after_step,
        )
        if not self.signal:
            self._end_epoch(phase)
            # what came while dev was scored
            self.signal = max(self.world.gather(self.signal or self.stop()))

    def _batches(self, phase: Phase) -> Iterable[Any]:
        """Return the batches that are left of this epoch."""
        now = self.generator.get_state()
        if not self.done:
            self.order = now
            return phase.source.batches(self.generator)
        # drawn once more as when the epoch began; then on from where the checkpoint was
        self.generator.set_state(self.order)
        left = islice(phase.source.batches(self.generator), self.done, None)
        self.generator.set_state(now)
        return left

    def _end_epoch(self, phase: Phase) -> None:
        skipped = self._look(phase)
        figures = self._merged().figures()
        metrics = None if self.dev is None else self.dev()
        pairs = len(phase.source)
        record = EpochRecord(
            epoch=self.epoch,
            phase=phase.name,
            loss=figures.loss,
            dev_pearson=None if metrics is None else metrics.pearson,
            dev_spearman=None if metrics is None else metrics.spearman,
            dev_mse=None if metrics is None else metrics.mse,
            time_s=self.seconds,
            pairs_per_s=pairs / self.seconds,
            gradient_norm=figures.gradient_norm,
            lr=float(phase.schedule.get_last_lr()[0]),
            mse=figures.mse,
            pearson=figures.pearson,
            spearman=figures.spearman,
            clamped=figures.clamped,
            skipped=skipped - sum(record.skipped for record in self.records),
            steps=self.done,
        )
        self.records.append(record)
        better = (
            self.dev is None
            or phase.select == "last"
            or self.best is None
            or _rank(record) > _rank(self.best)
        )
        if better:
            self.best, self.kept = record, copy_weights(self.objective)
        if self.logs is not None:
            self.logs.epoch(self.step, record)
        self.running = Running(self.device)
        self.epoch, self.done, self.seconds = self.epoch + 1, 0, 0.0
        self.order = self.generator.get_state()
        # before the observer writes the model: one without a checkpoint is no run to go on with
        if self.checkpoint is not None:
            self._save()
        self._tell(lambda observer: observer.on_epoch(record, better))

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

    def _save(self) -> None:
        """Write the state; every process calls this."""
        random = self.world.gather(random_state())
        running = self._merged().state_dict()
        if not self.world.main or self.checkpoint is None:
            return
        phase = self.phases[self.phase]
        state = {
            "phase": self.phase,
            "epoch": self.epoch,
            "done": self.done,
            "step": self.step,
            "seconds": self.seconds,
            "order": self.order,
            "generator": self.generator.get_state(),
            "random": random,
            "weights": copy_weights(self.objective),
            "optimizer": phase.optimizer.state_dict(),
            "schedule": phase.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "running": running,
            "records": [asdict(record) for record in self.records],
            "best": None if self.best is None else self.records.index(self.best),
            "kept": self.kept,
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
        self.phase, self.epoch, self.done = state["phase"], state["epoch"], state["done"]
        self.step, self.seconds, self.order = state["step"], state["seconds"], state["order"]
        phase = self.phases[self.phase]
        try:
            load_weights(self.objective, state["weights"])
            phase.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"resume: the checkpoint is of another model: {error}") from error
        phase.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        if self.world.main:  # it holds the sums of all
            self.running.load_state_dict(state["running"])
        self.records = [EpochRecord(**values) for values in state["records"]]
        self.best = None if state["best"] is None else self.records[state["best"]]
        self.kept = {name: tensor.to(self.device) for name, tensor in state["kept"].items()}
        pairs = sum(len(self._phase(record.phase).source) for record in self.records)
        pairs += round(self.done / phase.source.steps() * len(phase.source))
        self._tell(lambda observer: observer.on_resume(self.records, self.step, pairs))
        # last: nothing above may draw from them afterwards
        self.generator.set_state(state["generator"])
        set_random_state(state["random"][self.world.rank])

    def _phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def _merged(self) -> Running:
        """Return the sums of all processes."""
        if self.world.size == 1:
            return self.running
        return Running.merged(self.world.gather(self.running.state_dict()), self.device)

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        """Tell the observer; Ctrl-C in it ends training after the step, as a signal does."""
        if self.observer is None:
            return
        try:
            tell(self.observer)
        except KeyboardInterrupt:
            self.signal = signal.SIGINT


def _rank(record: EpochRecord) -> float:
    return -1.0 if record.dev_pearson is None else record.dev_pearson


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what training changes: trainable parameters and buffers."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    trained |= {name for name, _ in module.named_buffers()}
    return {name: t.clone() for name, t in module.state_dict().items() if name in trained}


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put back what `copy_weights` copied."""
    module.load_state_dict(weights, strict=False)
