"""One run, from files to a folder: read, train, keep the selected epoch, score the test pairs."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastsiam.device import pick_device
from fastsiam.model import TextSiamese
from fastsiam.text.pair_file import PairFile
from fastsiam.training.batches import PairBatches, Source, StreamBatches
from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.evaluate import Evaluation, evaluate, score_pairs
from fastsiam.training.fit import Fit, Observer, Phase, fit
from fastsiam.training.metrics import EpochRecord, Metrics, measure
from fastsiam.training.objective import make_objective
from fastsiam.training.run_folder import Logs, RunFolder
from fastsiam.training.start import initialize, make_optimizer
from fastsiam.training.step import NotFiniteError
from fastsiam.training.world import World, find_world

NEEDED = ("matplotlib", "nltk", "safetensors", "scipy")


class Watcher(Observer):
    """Is told how a run goes; Ctrl-C in it ends the run after the step."""

    def on_start(self, inputs: Inputs, model: TextSiamese, pairs: int) -> None:
        """The inputs are read; `pairs` training pairs will be seen in all."""


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        model: with the weights of the selected epoch.
        best: that epoch; None where the run was interrupted before the first one ended.
        inputs: the pairs and vectors that it read.
        test: the test pairs, scored; None without them, or after an interruption.
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
        inputs: the result of `load_inputs` with the same settings; None: it is called now.

    Returns:
        The trained model and its metrics.

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
        similarity=config.similarity,
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
        writer = None if folder is None else _Writer(folder, model)
        observers = [observer for observer in (writer, watcher) if observer is not None]
        try:
            outcome = _fit(config, inputs, model, world, observers, stop)
            if outcome.signal:
                # a signal of this process's own that came meanwhile is answered with this
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
    observers: Sequence[Observer],
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
        observers=observers,
        logs=logs if world.main else None,
        world=world,
    )
    if world.main and not outcome.signal:
        objective.load_state_dict(outcome.last, strict=False)
        model.save_pretrained(config.out / "last")
        objective.load_state_dict(outcome.kept, strict=False)
    return outcome


class _Writer(Observer):
    """Writes the metrics and the selected model while training goes on."""

    def __init__(self, folder: RunFolder, model: TextSiamese) -> None:
        self.folder, self.model = folder, model
        self.records: list[EpochRecord] = []

    def on_resume(self, records: Sequence[EpochRecord], _step: int, _pairs: int) -> None:
        self.records = list(records)
        if records:
            self.folder.write_metrics(self.records)

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        self.records.append(record)
        self.folder.write_metrics(self.records)
        if best:
            self.model.save_pretrained(self.folder.path)


def facts(config: Config, inputs: Inputs, model: TextSiamese) -> dict[str, Any]:
    """Return the entries of `run.json` of any run: settings, inputs, backend and versions."""
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
    """Write the results of a run; `model` has the weights of the selected epoch."""
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


def fingerprint(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what a resumed run must have in common: settings, and checksums of its files."""
    free = {field.name for field in fields(config) if field.metadata["free"]}
    settings = {name: value for name, value in config.to_dict().items() if name not in free}
    contents = {f"content of {name}": _digest(pairs) for name, pairs in inputs.phases.items()}
    words = "\n".join(inputs.vocabulary.words).encode()
    return {
        **settings,
        "content of vectors": _digest(inputs.table, words),
        **contents,
        "content of dev": _digest(inputs.dev),
    }


def _digest(value: Any, more: bytes = b"") -> str:
    """Return a short checksum of a tensor, or of every tensor in a dataclass."""
    digest = hashlib.sha256(more)

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
        elif isinstance(part, PairFile):
            digest.update(part.checksum.encode())
        elif is_dataclass(part):
            for field in fields(part):
                add(getattr(part, field.name))

    add(value)
    return digest.hexdigest()[:12]


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Collect SIGINT and SIGTERM instead of acting on them; the second SIGINT acts.

    A signal that came and was never asked for acts at the end.

    Handlers belong to the main thread: another thread collects nothing.

    Yields:
        A function that returns the number of the first signal that came, or 0.
    """
    came: list[int] = []
    told = False

    def note(number: int, _frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    def first() -> int:
        nonlocal told
        told = told or bool(came)
        return came[0] if came else 0

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, signal.SIGTERM] if in_main else []
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield first
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if came and not told:
        signal.raise_signal(came[0])
