"""The settings of a training run: the recipe, the files, the machine; and the named recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fastsiam.checks import POOLINGS
from fastsiam.engine.select import NAMES as BACKENDS

LEARNING_RATES = {"adam": 2e-3, "adadelta": 1.0}  # where none is given
FORGET_BIASES = {"orig": 2.5, "seed": 1.0, "pytorch": None}  # None: as drawn

# what each recipe sets apart from the defaults of Config. Where the rate falls to 0 the last epoch
# is kept: a few hundred dev pairs tell the epochs apart no better than chance
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # the TensorFlow 1 program, but for its faults: Adadelta takes its own steps and not 1e-4
        # of them, and the epoch is chosen on pairs that were never trained on
        "article": {
            "epochs": 360,
            "pretrain_epochs": 70,
            "scale": 1.0,
            "start": "seed",
            "optimizer": "adadelta",
            "schedule": "constant",
        },
        # Mueller and Thyagarajan, AAAI 2016: pre-training, early stopping, augmentation with
        # synonyms (both where the files are given), and a regression on the predictions
        "paper": {
            "epochs": 60,
            "pretrain_epochs": 15,
            "patience": 10,
            "scale": 1.0,
            "optimizer": "adadelta",
            "schedule": "constant",
            "calibrate": True,
        },
        "fast": {"select": "last"},
        "good": {
            "bidirectional": True,
            "pooling": "max",
            "scale": 0.21,
            "learn_scale": True,
            "select": "last",
        },
        "best": {
            "hidden_size": 75,
            "bidirectional": True,
            "pooling": "max",
            "batch_size": 64,
            "lr": 4e-3,
            "scale": 0.17,
            "learn_scale": True,
            "vector_length": 4.0,
            "kl_weight": 0.05,
            "entailment_weight": 0.025,
            "select": "last",
        },
    }
)


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the recipe "fast", with the epoch that dev chooses.

    Attributes:
        train: pairs to train on.
        dev: pairs whose Pearson correlation chooses the epoch that is kept.
        vectors: word2vec or GloVe files; several join side by side.
        out: the run folder, new or empty.
        test: pairs to score at the end; nothing is chosen by them.
        pretrain: pairs to train on first, by the same recipe with an optimizer of its own; the
            epoch kept of that phase is where training on `train` starts.
        synonyms: JSON file, word -> list of words to swap it with: each pair of `train` is seen
            up to twice more with words swapped.
        train_on_dev: train on the pairs of `dev` too. They can choose nothing then, so `select`
            must be "last", and `patience` None.
        epochs: passes over the pairs, in each phase.
        pretrain_epochs: passes over the pairs of `pretrain`; None: as many as `epochs`.
        patience: epochs without a better one on dev after which a phase ends; None: it never does.
        select: the epoch that is kept: "dev", the one best on dev, or "last".
        batch_size: pairs a step.
        hidden_size: size of the LSTM, in each direction.
        bidirectional: whether a second direction reads from the end.
        pooling: sentence vector: "last", "mean" or "max" over the states.
        scale: factor on the L1 distance, or its start where it is learned.
        learn_scale: whether the factor is trained.
        start: weights to start from: "orig" (small, of the MaLSTM authors' own program), "seed"
            (normal of deviation .2, of the TensorFlow article) or "pytorch" (nn.LSTM's).
        forget_bias: start of the forget gates' bias; None: 2.5 for "orig", 1 for "seed", as drawn
            for "pytorch".
        optimizer: "adam" or "adadelta".
        lr: first learning rate; None: 2e-3 for adam, 1 for adadelta.
        schedule: "cosine", which falls to 0 over a phase, or "constant".
        clip: largest norm of the gradient.
        dropout: share of the word vectors' numbers that are zero in a step, 0 <= dropout < 1. One
            mask a step serves both sides of every pair.
        kl_weight: weight of an auxiliary head that classes the pair by its score; 0 for none.
        entailment_weight: weight of one that predicts the entailment label of SICK; 0 for none.
        vector_length: mean length that the vectors of each file are brought to; None: as they are.
        max_len: tokens of a sentence that are read.
        oov: vector of a word that no file has, "zero" or "random".
        spelling: JSON file, word as written -> word in the vector files.
        columns: names of the two sentences and the score in every file; None: a known header.
        score_range: lowest and highest score in every file; None: that of the header, or 1 to 5.
        stream: leave the training pairs in their files, and read those once an epoch.
        shuffle_buffer: pairs that the next one of a streamed file is drawn from, at least 1.
        ensemble: models that are trained, from seeds that follow one another, and saved as one.
        calibrate: fit a monotone map from similarities to gold ones on out-of-fold predictions.
        folds: parts of the training pairs for that, at least 2.
        seed: of the start and of the order of the pairs.
        backend: as for `SiameseLSTM`.
        device: None means CUDA where there is one, else the CPU.
        precision: "float32", or "bf16": the recurrence computes in bfloat16, weights stay float32.
        resume: go on with the run in `out`, if there is one.
        checkpoint_every: steps between checkpoints within an epoch; 0: only where one ends.
        log_every: steps between lines of `steps.csv`, each of which is about the steps since the
            line before, the epoch's start or a resume; 0: epochs alone are logged.
        tensorboard: write event files in `out/tensorboard` too.

    Raises:
        ValueError: a value out of range.
    """

    train: Path
    dev: Path
    vectors: tuple[Path, ...]
    out: Path
    test: Path | None = None
    pretrain: Path | None = None
    synonyms: Path | None = None
    train_on_dev: bool = False
    epochs: int = 16
    pretrain_epochs: int | None = None
    patience: int | None = None
    select: Literal["dev", "last"] = "dev"
    batch_size: int = 32
    hidden_size: int = 50
    bidirectional: bool = False
    pooling: Literal["last", "mean", "max"] = "last"
    scale: float = 0.25
    learn_scale: bool = False
    start: Literal["orig", "seed", "pytorch"] = "orig"
    forget_bias: float | None = None
    optimizer: str = "adam"
    lr: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = 5.0
    dropout: float = 0.0
    kl_weight: float = 0.0
    entailment_weight: float = 0.0
    vector_length: float | None = None
    max_len: int = 73
    oov: Literal["zero", "random"] = "zero"
    spelling: Path | None = None
    columns: tuple[str, str, str] | None = None
    score_range: tuple[float, float] | None = None
    stream: bool = False
    shuffle_buffer: int = 8192
    ensemble: int = 1
    calibrate: bool = False
    folds: int = 5
    seed: int = 0
    backend: str = "auto"
    device: str | None = None
    precision: Literal["float32", "bf16"] = "float32"
    resume: bool = False
    checkpoint_every: int = 0
    log_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = ("epochs", "pretrain_epochs", "patience", "batch_size", "hidden_size", "max_len")
        for name in (*counts, "ensemble", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name} must be from 1 to 2**31 - 1, got {value}")
        for name in ("scale", "clip", "lr", "vector_length"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("kl_weight", "entailment_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be 0 or more and finite, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.forget_bias is not None and not math.isfinite(self.forget_bias):
            raise ValueError(f"forget_bias must be finite, got {self.forget_bias}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not self.vectors:
            raise ValueError("vectors must name at least one file, got none")
        for name in ("checkpoint_every", "log_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        choices: dict[str, Any] = {
            "select": ("dev", "last"),
            "pooling": POOLINGS,
            "start": FORGET_BIASES,
            "optimizer": LEARNING_RATES,
            "schedule": ("cosine", "constant"),
            "oov": ("zero", "random"),
            "backend": BACKENDS,
            "precision": ("float32", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.train_on_dev and (self.select == "dev" or self.patience is not None):
            raise ValueError(
                "train_on_dev must go with select 'last' and no patience: pairs that are trained "
                f"on cannot choose the epoch, got select {self.select!r} and patience "
                f"{self.patience}"
            )
        if self.patience is not None and self.select == "last":
            raise ValueError(
                "patience must go with select 'dev': an epoch without a better one would be kept, "
                f"got select 'last' and patience {self.patience}"
            )

        whole = ("synonyms", "train_on_dev", "entailment_weight", "calibrate")
        given = [name for name in whole if getattr(self, name)]
        if self.stream and given:
            raise ValueError(
                f"stream must go without {' and '.join(given)}, for which all pairs must be in "
                "memory, got both"
            )

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Config:
        """Return the settings of a recipe of `PRESETS`; what is given here wins over it.

        With `train_on_dev` the recipe keeps the last epoch and has no patience; with a patience it
        keeps the epoch that was best on dev.

        Raises:
            ValueError: there is no recipe of that name, or a value is out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        implied = {}
        if settings.get("train_on_dev"):
            implied = {"select": "last", "patience": None}
        elif settings.get("patience") is not None:
            implied = {"select": "dev"}
        return cls(**{**PRESETS[name], **implied, **settings})

    @property
    def first_lr(self) -> float:
        """The learning rate of the first step."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def epochs_of(self, phase: str) -> int:
        """Return the passes over the pairs of a phase, "pretrain" or "train"."""
        if phase == "pretrain" and self.pretrain_epochs is not None:
            return self.pretrain_epochs
        return self.epochs

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dict."""

        def plain(value: object) -> object:
            if isinstance(value, tuple):
                return [plain(entry) for entry in value]
            return str(value) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in asdict(self).items()}
