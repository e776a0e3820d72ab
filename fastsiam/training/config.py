"""The settings of a training run: the recipe, the files, the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastsiam._backend import BACKENDS

LEARNING_RATES = {"adam": 2e-3, "adadelta": 1.0}  # where none is given


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the recipe that `fastsiam train` follows.

    Attributes:
        train: pairs to train on.
        dev: pairs whose Pearson correlation chooses the epoch that is kept.
        vectors: word2vec files; several join side by side.
        out: the run folder, new or empty.
        test: pairs to score at the end; nothing is chosen by them.
        pretrain: pairs to train on first, by the same recipe with an optimizer of its own; the
            best epoch of that phase is where training on `train` starts.
        epochs: passes over the pairs, in each phase.
        batch_size: pairs a step.
        hidden_size: size of the LSTM.
        scale: factor on the L1 distance, fixed.
        forget_bias: start of the forget gates' bias.
        optimizer: "adam" or "adadelta".
        lr: first learning rate, falling to 0 on a cosine; None: 2e-3 for adam, 1 for adadelta.
        clip: largest norm of the gradient.
        max_len: tokens of a sentence that are read.
        oov: vector of a word that no file has, "zero" or "random".
        spelling: JSON file, word as written -> word in the vector files.
        columns: names of the two sentences and the score in every file; None: a known header.
        score_range: lowest and highest score in every file; None: that of the header, or 1 to 5.
        seed: of the start and of the order of the pairs.
        backend: as for `SiameseLSTM`.
        device: None means CUDA where there is one, else the CPU.

    Raises:
        ValueError: a value out of range.
    """

    train: Path
    dev: Path
    vectors: tuple[Path, ...]
    out: Path
    test: Path | None = None
    pretrain: Path | None = None
    epochs: int = 16
    batch_size: int = 32
    hidden_size: int = 50
    scale: float = 0.25
    forget_bias: float = 2.5
    optimizer: str = "adam"
    lr: float | None = None
    clip: float = 5.0
    max_len: int = 73
    oov: Literal["zero", "random"] = "zero"
    spelling: Path | None = None
    columns: tuple[str, str, str] | None = None
    score_range: tuple[float, float] | None = None
    seed: int = 0
    backend: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "hidden_size", "max_len"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be from 1 to 2**31 - 1, got {getattr(self, name)}")
        for name in ("scale", "clip", "lr"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not math.isfinite(self.forget_bias):
            raise ValueError(f"forget_bias must be finite, got {self.forget_bias}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not self.vectors:
            raise ValueError("vectors must name at least one file, got none")
        choices = {"optimizer": LEARNING_RATES, "oov": ("zero", "random"), "backend": BACKENDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @property
    def first_lr(self) -> float:
        """The learning rate of the first step."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dict."""

        def plain(value: object) -> object:
            if isinstance(value, tuple):
                return [plain(entry) for entry in value]
            return str(value) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in asdict(self).items()}
