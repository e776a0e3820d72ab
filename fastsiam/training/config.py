"""The settings of a training run, declared once, and the named recipes.

A field of `Config` is a setting: its type, default, range and help stand there. The command
`fastsiam train` has an option for each field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fastsiam.checks import POOLINGS
from fastsiam.engine.select import NAMES as BACKENDS
from fastsiam.engine.similarity import SIMILARITIES

LEARNING_RATES = {"adam": 2e-3, "adadelta": 1.0}  # where none is given
FORGET_BIASES = {"orig": 2.5, "seed": 1.0, "pytorch": None}  # None: as drawn

# where a recipe differs from the defaults of Config. Where the rate falls to 0 the last epoch is
# selected: a few hundred dev pairs tell the epochs apart no better than chance
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


class Range(NamedTuple):
    """The numbers that a setting may have, as a message says it and as a test."""

    text: str
    holds: Callable[[float], bool]


COUNT = Range("from 1 to 2**31 - 1", lambda n: 1 <= n < 2**31)
STEPS = Range("0 or more", lambda n: n >= 0)
FOLDS = Range("at least 2", lambda n: n >= 2)
SEED = Range("from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
POSITIVE = Range("positive and finite", lambda x: 0 < x < math.inf)
WEIGHT = Range("0 or more and finite", lambda x: 0 <= x < math.inf)
SHARE = Range("from 0 to below 1", lambda x: 0 <= x < 1)
FINITE = Range("finite", math.isfinite)


def setting(
    default: Any,
    text: str,
    *,
    group: str = "Training",
    within: Range | None = None,
    choices: Iterable[str] = (),
    metavar: str | None = None,
    unset: str = "",
    free: bool = False,
) -> Any:
    """Declare a setting.

    Args:
        default: its value where none is given; MISSING: it must be given.
        text: its meaning, for the command's help.
        group: heading of the option in the command's help.
        within: range of a number.
        choices: the allowed texts; none: any.
        metavar: name of the value in the command's help; None: the choices, or the type's.
        unset: meaning of the default None.
        free: whether a resumed run may change it.
    """
    choices = tuple(choices)
    about = {
        "help": text,
        "group": group,
        "within": within,
        "choices": choices,
        "metavar": metavar or "|".join(choices) or None,
        "unset": unset,
        "free": free,
    }
    return field(default=default, metadata=about)


def _file(text: str, default: Any = MISSING, metavar: str = "FILE") -> Any:
    """Declare a place; a resumed run compares contents instead."""
    return setting(default, text, group="Files", metavar=metavar, free=True)


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the recipe "fast", with the epoch that dev selects.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    train: Path = _file("Scored pairs to train on.")
    dev: Path = _file("Scored pairs whose Pearson correlation selects the epoch.")
    vectors: tuple[Path, ...] = _file(
        "Word vectors, word2vec or GloVe; several files join side by side."
    )
    out: Path = _file("Run folder, new or empty.", metavar="DIR")
    test: Path | None = _file("Scored pairs to report on; they select nothing.", default=None)
    pretrain: Path | None = _file(
        "Scored pairs to train on first; the selected epoch is where train starts.", default=None
    )
    synonyms: Path | None = _file(
        "JSON: word -> words to swap it with; each training pair comes up to twice more, swapped.",
        default=None,
    )
    spelling: Path | None = _file(
        "JSON: word as written -> word in the vector files.", default=None
    )
    columns: tuple[str, str, str] | None = setting(
        None,
        "Names of the two sentences and the score in every file.",
        group="Files",
        metavar="LEFT,RIGHT,SCORE",
        unset="a known header, SICK's or STS's",
    )
    score_range: tuple[float, float] | None = setting(
        None,
        "Lowest and highest score in every file.",
        group="Files",
        metavar="LO HI",
        unset="that of the known header, else 1 5",
    )
    stream: bool = setting(
        False, "Leave training pairs in their files, for large ones.", group="Files"
    )
    shuffle_buffer: int = setting(
        8192, "Pairs that a streamed pair is drawn from.", group="Files", within=COUNT
    )
    train_on_dev: bool = setting(
        False, "Train on the dev pairs too; selects the last epoch, without patience."
    )
    epochs: int = setting(16, "Passes over the pairs, in each phase.", within=COUNT)
    pretrain_epochs: int | None = setting(
        None, "Passes over the pairs of pretrain.", within=COUNT, unset="those of train"
    )
    patience: int | None = setting(
        None, "Epochs without a better one on dev that end a phase.", within=COUNT, unset="none"
    )
    select: Literal["dev", "last"] = setting(
        "dev",
        "The epoch of a phase whose weights stay: the best on dev, or the last.",
        choices=("dev", "last"),
    )
    batch_size: int = setting(32, "Pairs a step.", within=COUNT)
    optimizer: str = setting("adam", "The optimizer.", choices=LEARNING_RATES)
    lr: float | None = setting(
        None, "First learning rate.", within=POSITIVE, unset="adam 0.002, adadelta 1"
    )
    schedule: Literal["cosine", "constant"] = setting(
        "cosine",
        "The learning rate falls to 0 over a phase, or stays.",
        choices=("cosine", "constant"),
    )
    clip: float = setting(5.0, "Largest gradient norm.", within=POSITIVE)
    dropout: float = setting(
        0.0,
        "Share of the word vectors' numbers that are 0 in a step, by one mask for both sides.",
        within=SHARE,
    )
    kl_weight: float = setting(
        0.0, "Weight of an auxiliary head that classes the score.", within=WEIGHT
    )
    entailment_weight: float = setting(
        0.0, "Weight of a head that predicts SICK's entailment label.", within=WEIGHT
    )
    ensemble: int = setting(
        1, "Models to train, from seeds in a row, and to save as one.", within=COUNT
    )
    calibrate: bool = setting(
        False, "Fit the scores by isotonic regression on out-of-fold predictions."
    )
    folds: int = setting(5, "Parts of the training pairs to calibrate on.", within=FOLDS)
    seed: int = setting(0, "Of the start and of the order of the pairs.", within=SEED)
    hidden_size: int = setting(
        50, "Size of the LSTM, in each direction.", group="Model", within=COUNT
    )
    bidirectional: bool = setting(False, "A second direction reads from the end.", group="Model")
    pooling: str = setting(
        "last", "Sentence vector, from the hidden states.", group="Model", choices=POOLINGS
    )
    similarity: str = setting(
        "manhattan", "Similarity of two vectors.", group="Model", choices=SIMILARITIES
    )
    scale: float = setting(
        0.25, "Factor on the L1 distance, or its start.", group="Model", within=POSITIVE
    )
    learn_scale: bool = setting(False, "Train that factor.", group="Model")
    start: Literal["orig", "seed", "pytorch"] = setting(
        "orig",
        "Weights to start from: small, of the MaLSTM authors' own program; normal of deviation "
        "0.2, of the TensorFlow article; or nn.LSTM's.",
        group="Model",
        choices=FORGET_BIASES,
    )
    forget_bias: float | None = setting(
        None,
        "Start of the forget gates' bias.",
        group="Model",
        within=FINITE,
        unset="orig 2.5, seed 1, pytorch as drawn",
    )
    vector_length: float | None = setting(
        None,
        "Mean length to bring the vectors of each file to.",
        group="Model",
        within=POSITIVE,
        unset="none",
    )
    max_len: int = setting(73, "Tokens of a sentence that are read.", group="Model", within=COUNT)
    oov: Literal["zero", "random"] = setting(
        "zero", "Vector of a word that no file has.", group="Model", choices=("zero", "random")
    )
    backend: str = setting("auto", "What computes the LSTM.", group="Machine", choices=BACKENDS)
    device: str | None = setting(
        None,
        "cpu, cuda or cuda:0.",
        group="Machine",
        metavar="NAME",
        unset="cuda where there is one",
        free=True,
    )
    precision: Literal["float32", "bf16"] = setting(
        "float32",
        "The recurrence computes in this; weights stay float32.",
        group="Machine",
        choices=("float32", "bf16"),
    )
    resume: bool = setting(
        False, "Go on with the run in out, if there is one.", group="Run", free=True
    )
    checkpoint_every: int = setting(
        0, "Steps between checkpoints; 0: one an epoch.", group="Run", within=STEPS, free=True
    )
    log_every: int = setting(
        0,
        "Steps between lines of steps.csv, each about those since the line before, the epoch's "
        "start or a resume; 0: none.",
        group="Run",
        within=STEPS,
        free=True,
    )
    tensorboard: bool = setting(
        False, "Write event files in out/tensorboard too.", group="Run", free=True
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            name, value = declared.name, getattr(self, declared.name)
            within, choices = declared.metadata["within"], declared.metadata["choices"]
            if within and value is not None and not within.holds(value):
                raise ValueError(f"{name} must be {within.text}, got {value}")
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not self.vectors:
            raise ValueError("vectors must name at least one file, got none")
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


Config.__doc__ = f"{Config.__doc__}\nAttributes:\n" + "".join(
    f"    {each.name}: {each.metadata['help']}\n" for each in fields(Config)
)
