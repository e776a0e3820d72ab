"""Train, keep the epoch that is best on dev, score the test pairs."""

from __future__ import annotations

import importlib.util
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastsiam.model import TextSiamese
from fastsiam.text.batches import grouped_batches
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.evaluate import Evaluation, evaluate, measure
from fastsiam.training.report import EpochRecord, RunFolder
from fastsiam.training.start import initialize, make_optimizer

NEEDED = ("gensim", "matplotlib", "nltk", "safetensors", "scipy")


class Watcher(Protocol):
    """Is told how a run goes."""

    def on_start(self, inputs: Inputs, model: TextSiamese, pairs: int) -> None:
        """The inputs are read; `pairs` training pairs will be seen in all."""

    def on_batch(self, pairs: int) -> None:
        """A step is done."""

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        """An epoch is done; `best` says whether its weights are the ones kept so far."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        model: with the weights of the best epoch.
        best: that epoch; None where the run was interrupted before the first one ended.
        inputs: what was read.
        test: how the test pairs were scored; None without them, or after an interruption.
        interrupted: whether Ctrl-C ended the run.
    """

    model: TextSiamese
    best: EpochRecord | None
    inputs: Inputs
    test: Evaluation | None
    interrupted: bool


def train(config: Config, watcher: Watcher | None = None) -> Result:
    """Run a training from files to a run folder.

    All inputs are checked first. The folder gets `metrics.csv` and, at each epoch that is better
    on dev than those before, the model; at the end `predictions.tsv`, `plot.png` and `run.json`.
    Ctrl-C ends the run with what there is by then.

    Args:
        config: the settings.
        watcher: told of the progress, if given.

    Returns:
        The trained model and its figures.

    Raises:
        DataError: a file that cannot be used.
        ValueError: `config.out` is not empty, or the loss is not finite.
        ImportError: a package is missing.
        UnavailableError: the device or the backend cannot be used on this machine.
        OSError: the run folder cannot be written.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"train: {', '.join(missing)} missing; install with: pip install {' '.join(missing)}"
        )
    folder = RunFolder(config.out)
    inputs = load_inputs(config)
    model = TextSiamese(
        inputs.vocabulary,
        inputs.table,
        config.hidden_size,
        scale=config.scale,
        max_len=config.max_len,
        score_range=inputs.score_range,
        backend=config.backend,
        device=config.device,
    )
    run = _Run(config, inputs, model, folder, watcher)
    interrupted = False
    try:
        run.phases()
    except KeyboardInterrupt:
        interrupted = True
    if run.best is not None:
        model.lstm.load_state_dict(run.best_weights)
    if interrupted:  # in the first epoch, or while the files were being written
        model.save_pretrained(folder.path)
    test = None
    if inputs.test is not None and not interrupted:
        test = evaluate(model, inputs.test)
        folder.write_predictions(inputs.test, test.similarity)
    if run.records:
        folder.write_plot(run.records)
    folder.write_run(
        {
            "config": config.to_dict(),
            "backend": model.lstm.explain(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pairs": {phase: len(pairs) for phase, pairs in inputs.phases.items()},
            "dropped": inputs.dropped,
            "truncated": inputs.truncated,
            "token_coverage": inputs.coverage.token_share,
            "interrupted": interrupted,
            "best": None if run.best is None else asdict(run.best),
            "test": None if test is None else asdict(test.metrics),
        }
    )
    return Result(model, run.best, inputs, test, interrupted)


class _Run:
    """The state of a run: its random numbers, its records and the best weights so far."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        model: TextSiamese,
        folder: RunFolder,
        watcher: Watcher | None,
    ) -> None:
        self.config, self.inputs, self.model = config, inputs, model
        self.folder, self.watcher = folder, watcher
        self.generator = torch.Generator().manual_seed(config.seed)
        initialize(model.lstm, config.forget_bias, self.generator, config.start)
        self.records: list[EpochRecord] = []
        self.best: EpochRecord | None = None
        self.best_weights = _copy(model.lstm)

    def phases(self) -> None:
        """Run every phase, each from the best weights so far."""
        if self.watcher is not None:
            total = sum(map(len, self.inputs.phases.values())) * self.config.epochs
            self.watcher.on_start(self.inputs, self.model, total)
        for phase, pairs in self.inputs.phases.items():
            self.model.lstm.load_state_dict(self.best_weights)
            steps = self.config.epochs * -(-len(pairs) // self.config.batch_size)
            optimizer, schedule = make_optimizer(self.model.lstm, self.config, steps)
            for epoch in range(1, self.config.epochs + 1):
                self._epoch(phase, pairs, epoch, optimizer, schedule)

    def _epoch(
        self,
        phase: str,
        pairs: EncodedPairs,
        epoch: int,
        optimizer: Optimizer,
        schedule: LRScheduler,
    ) -> None:
        start = time.perf_counter()
        loss, gradient_norm = run_epoch(
            self.model.lstm,
            pairs,
            grouped_batches(
                pairs.left.lengths, pairs.right.lengths, self.config.batch_size, self.generator
            ),
            optimizer,
            schedule,
            self.config.clip,
            None if self.watcher is None else self.watcher.on_batch,
        )
        time_s = time.perf_counter() - start
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise ValueError(
                f"train: the loss or its gradient is not finite in epoch {epoch} of {phase}; "
                f"lower lr ({self.config.first_lr:g}) or scale ({self.config.scale:g})"
            )
        dev = self.inputs.dev
        metrics = measure(self.model.score(dev.left, dev.right), dev.similarity)
        record = EpochRecord(
            epoch,
            phase,
            loss,
            metrics.pearson,
            metrics.spearman,
            metrics.mse,
            time_s,
            len(pairs) / time_s,
            gradient_norm,
            float(schedule.get_last_lr()[0]),
        )
        self.records.append(record)
        self.folder.add_epoch(record)
        better = self.best is None or _rank(record) > _rank(self.best)
        if better:
            self.model.save_pretrained(self.folder.path)
            self.best, self.best_weights = record, _copy(self.model.lstm)
        if self.watcher is not None:
            self.watcher.on_epoch(record, better)


def run_epoch(
    module: nn.Module,
    pairs: EncodedPairs,
    batches: Iterable[Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    clip: float,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """Train on each batch once, by the mean squared error of the similarities.

    Args:
        module: called as `SiameseLSTM` is, with ids and lengths of both sides.
        pairs: the training pairs.
        batches: index tensors into them.
        optimizer: holds the parameters to train.
        schedule: moved on after each step.
        clip: largest norm of the gradient.
        on_batch: told the number of pairs after each step, if given.

    Returns:
        Mean loss over the pairs, and mean gradient norm over the steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    # summed where they are computed: no step waits for the device
    loss_sum, norm_sum = torch.zeros(2, dtype=torch.float64, device=device)
    seen = steps = 0
    for rows in batches:
        inputs, target, _ = pairs.batch(rows, device)
        similarity = module(*inputs)
        loss = F.mse_loss(similarity, target.to(similarity.dtype))
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(rows)
        norm_sum += norm
        seen, steps = seen + len(rows), steps + 1
        if on_batch is not None:
            on_batch(len(rows))
    return float(loss_sum / seen), float(norm_sum / steps)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _rank(record: EpochRecord) -> float:
    return -1.0 if record.dev_pearson is None else record.dev_pearson
