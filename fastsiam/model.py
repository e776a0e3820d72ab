"""`TextSiamese`: sentences in, numbers out; save and load."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fastsiam.modules import SiameseLSTM
from fastsiam.text.batches import ordered_batches
from fastsiam.text.datasets import DataError, is_range
from fastsiam.text.vocabulary import Encoded, Vocabulary

FORMAT = 1  # of a saved folder; raised when an older fastsiam could no longer read one
CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE = "config.json", "vocabulary.json", "model.safetensors"


class UnavailableError(RuntimeError):
    """The machine lacks what was asked for: a device, or what a backend needs."""


class TextSiamese:
    """A vocabulary with its word vectors, and the Siamese LSTM that reads them.

    The word vectors stay as they are; `lstm` is the module to train.

    Args:
        vocabulary: the V words of the table.
        table: [V, D] float, one vector a word.
        hidden_size: H, size of a sentence vector.
        scale: factor on the L1 distance, > 0.
        max_len: tokens of a sentence that are read, at least 1.
        score_range: lowest and highest score of the scale that `to_score` maps to.
        backend: as for `SiameseLSTM`.
        device: where the weights live; None means CUDA where there is one, else the CPU.
        dtype: of the weights; None means float32.

    Raises:
        ValueError: an argument out of range, or a table that does not fit the vocabulary.
        UnavailableError: the device or the backend cannot be used on this machine.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        table: Tensor,
        hidden_size: int = 50,
        *,
        scale: float = 0.25,
        max_len: int = 73,
        score_range: tuple[float, float] = (1.0, 5.0),
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if table.ndim != 2 or len(table) != len(vocabulary):
            raise ValueError(
                f"TextSiamese: table must be [V, D] with V = {len(vocabulary)}, the words of the "
                f"vocabulary, got {list(table.shape)}"
            )
        if max_len < 1:
            raise ValueError(f"TextSiamese: max_len must be at least 1, got {max_len}")
        low, high = score_range
        if not is_range(low, high):
            raise ValueError(
                f"TextSiamese: score_range must be two numbers, the lower first, got {low} {high}"
            )
        self.vocabulary = vocabulary
        self.max_len = max_len
        self.score_range = (float(low), float(high))
        self._scale = float(scale)
        self.lstm = SiameseLSTM(
            table.shape[1],
            hidden_size,
            embedding=table,
            scale=scale,
            backend=backend,
            device=pick_device(device),
            dtype=dtype or torch.float32,
        )
        try:
            self.lstm.explain()
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.lstm.weight_hh_l0.device

    @overload
    def similarity(self, left: str, right: str, batch_size: int = 256) -> float: ...
    @overload
    def similarity(self, left: list[str], right: list[str], batch_size: int = 256) -> Tensor: ...
    def similarity(
        self, left: str | list[str], right: str | list[str], batch_size: int = 256
    ) -> float | Tensor:
        """Score pairs of sentences.

        Args:
            left: n sentences, or one string. A sentence may be empty.
            right: as many, or one string.
            batch_size: pairs that are computed together.

        Returns:
            [n] float32 in (0, 1], on the CPU, in the order given; a float for two strings.

        Raises:
            TypeError: one side is a string and the other is not.
            ValueError: the two sides differ in number.
        """
        if isinstance(left, str) and isinstance(right, str):
            return float(self.similarity([left], [right], batch_size)[0])
        if isinstance(left, str) or isinstance(right, str):
            raise TypeError(
                "similarity: left and right must be two strings or two lists, got one of each"
            )
        if len(left) != len(right):
            raise ValueError(
                "similarity: left and right must hold as many sentences, "
                f"got {len(left)} and {len(right)}"
            )
        return self.score(self._read(left), self._read(right), batch_size)

    @torch.no_grad()
    def score(self, left: Encoded, right: Encoded, batch_size: int = 256) -> Tensor:
        """Score pairs whose words are ids already; otherwise like `similarity`."""
        scores = torch.empty(len(left.lengths))
        for rows in _by_length(torch.maximum(left.lengths, right.lengths), batch_size):
            (left_ids, left_lengths), (right_ids, right_lengths) = (
                cut(side, rows, self.device) for side in (left, right)
            )
            scores[rows] = self.lstm(left_ids, right_ids, left_lengths, right_lengths).float().cpu()
        return scores

    @torch.no_grad()
    def encode(self, sentences: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the vectors of n sentences, [n, H] on the CPU, in the order given.

        Two sentences score exp(-scale * L1 distance of their vectors).
        """
        encoded = self._read(sentences)
        vectors = torch.empty(len(encoded.lengths), self.lstm.hidden_size).to(
            self.lstm.weight_hh_l0.dtype
        )
        for rows in _by_length(encoded.lengths, batch_size):
            vectors[rows] = self.lstm.encode(*cut(encoded, rows, self.device)).cpu()
        return vectors

    def to_score(self, similarity: float) -> float:
        """Map a similarity, 0..1, to the scale of the scores."""
        low, high = self.score_range
        return low + (high - low) * similarity

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json`, `vocabulary.json` and `model.safetensors`, each whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "input_size": self.lstm.input_size,
            "hidden_size": self.lstm.hidden_size,
            "scale": self._scale,
            "max_len": self.max_len,
            "score_range": list(self.score_range),
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.lstm.state_dict().items()}
        write_file(folder / VOCABULARY_FILE, _to_json(self.vocabulary.to_dict()))
        write_file(folder / WEIGHTS_FILE, save(tensors))
        write_file(folder / CONFIG_FILE, _to_json(config))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> TextSiamese:
        """Read what `save_pretrained` wrote; nothing in the files is run.

        Raises:
            DataError: a file is missing, damaged, of a newer fastsiam, or does not fit the others.
            ValueError: the backend or the device has no such name.
            UnavailableError: the device or the backend cannot be used on this machine.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG_FILE)
        words = _read_json(folder / VOCABULARY_FILE)
        try:
            vocabulary = Vocabulary.from_dict(words)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder / VOCABULARY_FILE}: not a vocabulary that fastsiam wrote: {error}"
            ) from error
        tensors = _read_weights(folder / WEIGHTS_FILE, config, len(vocabulary))
        model = cls(
            vocabulary,
            tensors["embedding.weight"],
            config["hidden_size"],
            scale=config["scale"],
            max_len=config["max_len"],
            score_range=config["score_range"],
            backend=backend,
            device=device,
            dtype=tensors["weight_hh_l0"].dtype,
        )
        model.lstm.load_state_dict(tensors)
        return model

    def _read(self, sentences: Sequence[str]) -> Encoded:
        return self.vocabulary.encode(sentences, self.max_len)


def cut(side: Encoded, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and lengths of some sentences on the device, no wider than the longest of them."""
    lengths = side.lengths[rows]
    width = max(1, int(lengths.max()))
    return side.ids[rows, :width].to(device), lengths.to(device)


def pick_device(device: torch.device | str | None) -> torch.device:
    """Return the device; None means CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no device of that name.
        UnavailableError: there is, but not on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be like cpu, cuda or cuda:0, got {str(device)!r}") from error
    try:
        torch.zeros(1, device=chosen).item()  # "meta" holds no value to give back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error).split("\n", 1)[0].rstrip("."), 120, placeholder=" ...")
        raise UnavailableError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); use cpu"
        ) from error
    return chosen


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there: a reader sees the old or the new one."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:  # a full disk, or Ctrl-C
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say where
        raise


def _by_length(lengths: Tensor, batch_size: int) -> list[Tensor]:
    order = torch.argsort(lengths, stable=True)
    return [order[rows] for rows in ordered_batches(len(order), batch_size)]


def _to_json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); the folder must be one that "
            "'fastsiam train' or save_pretrained wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be JSON: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if not isinstance(config, dict) or type(config.get("format")) is not int:
        raise DataError(f"{path}: not a configuration that fastsiam wrote")
    if config["format"] > FORMAT:
        raise DataError(
            f"{path}: written by a newer fastsiam (format {config['format']}, this one reads up to "
            f"{FORMAT}); upgrade fastsiam"
        )
    kinds: dict[str, type] = {
        "input_size": int,
        "hidden_size": int,
        "max_len": int,
        "scale": float,
    }
    for name, kind in kinds.items():
        value = config.get(name)
        if type(value) is not kind or not 0 < config[name] < math.inf:
            raise DataError(f"{path}: {name} must be a positive {kind.__name__}, got {value!r}")
    limits = config.get("score_range")
    if not (
        isinstance(limits, list)
        and len(limits) == 2
        and all(type(limit) in (int, float) for limit in limits)
        and is_range(*limits)
    ):
        raise DataError(f"{path}: score_range must be two numbers, the lower first, got {limits!r}")
    return config


def _read_weights(path: Path, config: dict[str, Any], V: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    D, H = config["input_size"], config["hidden_size"]
    shapes = {
        "weight_ih_l0": [4 * H, D],
        "weight_hh_l0": [4 * H, H],
        "bias_ih_l0": [4 * H],
        "bias_hh_l0": [4 * H],
        "embedding.weight": [V, D],
    }
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or 'no such file'})") from error
    except SafetensorError as error:
        raise DataError(f"{path}: damaged, or not a safetensors file: {error}") from error
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise DataError(
                f"{path}: {name} must be {shape}, as {CONFIG_FILE} and {VOCABULARY_FILE} say, "
                f"got {found}"
            )
    if tensors.keys() != shapes.keys():
        raise DataError(f"{path}: holds {sorted(tensors.keys() - shapes.keys())}, unknown names")
    if (
        len({t.dtype for t in tensors.values()}) != 1
        or not tensors["bias_ih_l0"].is_floating_point()
    ):
        raise DataError(f"{path}: the tensors must be of one floating-point type")
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise DataError(f"{path}: holds NaN or infinity")
    return tensors
