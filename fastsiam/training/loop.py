"""From files to a run folder: train, keep the epoch that is asked for, score the test pairs."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from fastsiam.device import pick_device
from fastsiam.model import TextSiamese
from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.evaluate import Evaluation, Metrics, evaluate, measure, score_pairs
from fastsiam.training.fingerprint import fingerprint
from fastsiam.training.fit import Fit, fit
from fastsiam.training.guard import NotFiniteError
from fastsiam.training.logs import Logs
from fastsiam.training.objective import make_objective
from fastsiam.training.phase import Observer, Phase
from fastsiam.training.report import EpochRecord, RunFolder
from fastsiam.training.signals import stop_signals
from fastsiam.training.source import PairBatches, Source
from fastsiam.training.start import initialize, make_optimizer
from fastsiam.training.stream import StreamBatches
from fastsiam.training.world import World, find_world

NEEDED = ("gensim", "matplotlib", "nltk", "safetensors", "scipy")


class Watcher(Observer, Protocol):
    """Is told how a run goes; Ctrl-C in it ends the run after the step."""

    def on_start(self, inputs: Inputs, model: TextSiamese, pairs: int) -> None:
        """The inputs are read; `pairs` training pairs will be seen in all."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        model: with the weights of the epoch that is kept.
        best: that epoch; None where the run was interrupted before the first one ended.
        inputs: what was read.
        test: how the test pairs were scored; None without them, or after an interruption.
        signal: number of the signal that ended the run early, SIGINT or SIGTERM, or 0.
    """

    model: TextSiamese
    best: EpochRecord | None
    inputs: Inputs
    test: Evaluation | None
    signal: int

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run."""
        return self.signal != 0


def train(config: Config, watcher: Watcher | None = None, inputs: Inputs | None = None) -> Result:
    """Run a training from files to a run folder.

    All inputs are checked first. The folder gets `metrics.csv`, `checkpoints/` and, at each epoch
    that is kept, the model; at the end the model of the last epoch in `last/`, `predictions.tsv`,
    `plot.png` and `run.json`. Ctrl-C and SIGTERM end the run after the step, with a checkpoint and
    what there is by then; a second Ctrl-C ends it at once. `config.resume` goes on from the newest
    checkpoint.

    Started several times by torchrun or `accelerate launch`, the processes share each batch; the
    first writes the folder.

    Args:
        config: the settings; one model is trained, whatever its `ensemble` and `calibrate`.
        watcher: told of the progress, if given.
        inputs: what `load_inputs` read with the same settings; None: read now.

    Returns:
        The trained model and its figures.

    Raises:
        DataError: a file that cannot be used, or a run folder without a whole checkpoint.
        ValueError: `config.out` is in use, its run had another recipe, or the loss is not finite.
        ImportError: a package is missing.
        UnavailableError: the device or the backend cannot be used on this machine.
        OSError: the run folder cannot be written.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"train: {', '.join(missing)} missing; install with: pip install {' '.join(missing)}"
        )
    world = find_world(pick_device(config.device))
    folder = RunFolder(config.out, config.resume) if world.main else None
    if inputs is None:
        inputs = load_inputs(config)
    model = TextSiamese(
        inputs.vocabulary,
        inputs.table,
        config.hidden_size,
        bidirectional=config.bidirectional,
        pooling=config.pooling,
        scale=config.scale,
        learn_scale=config.learn_scale,
        max_len=config.max_len,
        score_range=inputs.score_range,
        backend=config.backend,
        device=config.device,
    )
    if watcher is not None:
        total = sum(len(p) * config.epochs_of(phase) for phase, p in inputs.phases.items())
        watcher.on_start(inputs, model, total)
    # the caller's own random numbers go on as if nothing had been drawn
    with torch.random.fork_rng(), stop_signals() as stop:
        torch.manual_seed(config.seed)
        observer = _Reporter(folder, model, watcher)
        try:
            outcome = _fit(config, inputs, model, world, observer, stop)
            if outcome.signal:
                # one of this process's own that came meanwhile asks for no more
                stop()
        except NotFiniteError as error:
            raise NotFiniteError(
                f"{error}: lower lr ({config.first_lr:g}) or scale ({config.scale:g})"
            ) from error
    test = None
    if inputs.test is not None and not outcome.signal:
        test = evaluate(model, inputs.test)
    if folder is not None:
        _write(folder, config, inputs, model, outcome, test)
    return Result(model, outcome.best, inputs, test, outcome.signal)


def _fit(
    config: Config,
    inputs: Inputs,
    model: TextSiamese,
    world: World,
    observer: _Reporter,
    stop: Callable[[], int],
) -> Fit:
    generator = torch.Generator().manual_seed(config.seed)
    initialize(model.lstm, config.forget_bias, generator, config.start)
    objective = make_objective(model.lstm, config, generator)
    phases = []
    for name, pairs in inputs.phases.items():
        source: Source = (
            PairBatches(pairs, config.batch_size)
            if isinstance(pairs, EncodedPairs)
            else StreamBatches(
                pairs, model.vocabulary, config.max_len, config.batch_size, config.shuffle_buffer
            )
        )
        epochs = config.epochs_of(name)
        optimizer, schedule = make_optimizer(objective, config, epochs * source.steps())
        phases.append(
            Phase(name, source, epochs, optimizer, schedule, config.select, config.patience)
        )

    def dev() -> Metrics:
        return measure(score_pairs(model, inputs.dev, world), inputs.dev.similarity)

    logs = Logs(config.out, config.log_every, config.tensorboard)
    outcome = fit(
        objective,
        phases,
        dev=dev,
        clip=config.clip,
        generator=generator,
        checkpoint=Checkpoint(
            config.out / "checkpoints",
            every=config.checkpoint_every,
            recipe=fingerprint(config, inputs),
        ),
        precision=config.precision,
        stop=stop,
        observer=observer,
        logs=logs if world.main else None,
        world=world,
    )
    if world.main and not outcome.signal:
        objective.load_state_dict(outcome.last, strict=False)
        model.save_pretrained(config.out / "last")
        objective.load_state_dict(outcome.kept, strict=False)
    return outcome


class _Reporter:
    """Writes the run folder while training goes on, and tells the watcher."""

    def __init__(
        self, folder: RunFolder | None, model: TextSiamese, watcher: Watcher | None
    ) -> None:
        self.folder, self.model, self.watcher = folder, model, watcher
        self.records: list[EpochRecord] = []

    def on_resume(self, records: Sequence[EpochRecord], step: int, pairs: int) -> None:
        self.records = list(records)
        if self.folder is not None and records:
            self.folder.write_metrics(self.records)
        if self.watcher is not None:
            self.watcher.on_resume(records, step, pairs)

    def on_batch(self, pairs: int) -> None:
        if self.watcher is not None:
            self.watcher.on_batch(pairs)

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        self.records.append(record)
        if self.folder is not None:
            self.folder.write_metrics(self.records)
            if best:
                self.model.save_pretrained(self.folder.path)
        if self.watcher is not None:
            self.watcher.on_epoch(record, best)


def facts(config: Config, inputs: Inputs, model: TextSiamese) -> dict[str, Any]:
    """Return what `run.json` says of any run: its settings, what it read, and what ran it."""
    return {
        "config": config.to_dict(),
        "backend": model.lstm.explain(pairs=config.batch_size),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pairs": {phase: len(pairs) for phase, pairs in inputs.phases.items()},
        "dropped": inputs.dropped,
        "swapped": inputs.swapped,
        "truncated": inputs.truncated,
        "token_coverage": inputs.coverage.token_share,
    }


def _write(
    folder: RunFolder,
    config: Config,
    inputs: Inputs,
    model: TextSiamese,
    outcome: Fit,
    test: Evaluation | None,
) -> None:
    """Write what a run leaves at its end; `model` has the weights that are kept."""
    model.save_pretrained(folder.path)
    if inputs.test is not None and test is not None:
        folder.write_predictions(inputs.test, test.similarity)
    if outcome.records:
        folder.write_plot(outcome.records)
    folder.write_run(
        {
            **facts(config, inputs, model),
            "steps": outcome.step,
            "skipped": sum(record.skipped for record in outcome.records),
            "interrupted": outcome.signal != 0,
            "best": None if outcome.best is None else asdict(outcome.best),
            "test": None if test is None else asdict(test.metrics),
        }
    )
