"""The folder of a saved model: its format, and how it is written and read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsiam.calibration import Calibration
from fastsiam.checks import POOLINGS
from fastsiam.engine.similarity import SIMILARITIES
from fastsiam.text.columns import is_range
from fastsiam.text.files import DataError, short
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.text.whole_file import write_file

FORMAT = 3  # of a saved folder; raised when an older fastsiam could no longer read one
CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE = "config.json", "vocabulary.json", "model.safetensors"
TABLE = "embedding.weight"  # name of the word vectors among the weights
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those of SiameseLSTM


@dataclass(frozen=True)
class ModelFolder:
    """The content of a folder: `config.json`, `vocabulary.json` and `model.safetensors`.

    Attributes:
        vocabulary: the V words of the table.
        table: [V, D], one vector a word, of the weights' dtype.
        members: the weights of each LSTM by `nn.LSTM`'s names.
        scales: factor on the L1 distance of each member.
        hidden_size: H, states of a direction.
        bidirectional: as for `SiameseLSTM`.
        pooling: as for `SiameseLSTM`.
        similarity: as for `SiameseLSTM`.
        max_len: tokens of a sentence that are read.
        score_range: lowest and highest score of the scale.
        calibration: map of the similarities; None: none.
    """

    vocabulary: Vocabulary
    table: Tensor
    members: Sequence[Mapping[str, Tensor]]
    scales: list[float]
    hidden_size: int
    bidirectional: bool
    pooling: str
    similarity: str
    max_len: int
    score_range: tuple[float, float]
    calibration: Calibration | None

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, each file whole or not at all.

        Raises:
            OSError: it cannot be written.
            ValueError: a scale is not positive and finite, as a learned one may become.
        """
        from safetensors.torch import save

        if not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(
                f"save_pretrained: every scale must be positive and finite, got {self.scales}; "
                "set the log_scale of such a member nearer to 0"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "input_size": self.table.shape[1],
            "hidden_size": self.hidden_size,
            "bidirectional": self.bidirectional,
            "pooling": self.pooling,
            "similarity": self.similarity,
            "scales": self.scales,
            "max_len": self.max_len,
            "score_range": list(self.score_range),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }
        tensors = {TABLE: self.table.cpu().contiguous()}
        for prefix, weights in zip(_prefixes(len(self.members)), self.members, strict=True):
            for name, tensor in weights.items():
                tensors[prefix + name] = tensor.cpu().contiguous()
        write_file(folder / VOCABULARY_FILE, _to_json(self.vocabulary.to_dict()))
        write_file(folder / WEIGHTS_FILE, save(tensors))
        write_file(folder / CONFIG_FILE, _to_json(config))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ModelFolder:
        """Read and check a folder; nothing in its files is run.

        Raises:
            DataError: a file is missing, damaged, of a newer fastsiam, or does not fit the others.
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
        names = _weight_names(config["bidirectional"])
        return cls(
            vocabulary,
            tensors[TABLE],
            [
                {name: tensors[prefix + name] for name in names}
                for prefix in _prefixes(len(config["scales"]))
            ],
            config["scales"],
            config["hidden_size"],
            config["bidirectional"],
            config["pooling"],
            config["similarity"],
            config["max_len"],
            tuple(config["score_range"]),
            config["calibration"],
        )


def _prefixes(members: int) -> list[str]:
    """Return what stands before the names of each member's weights in a file."""
    return [""] if members == 1 else [f"members.{number}." for number in range(members)]


def _weight_names(bidirectional: bool) -> list[str]:
    suffixes = ("", "_reverse") if bidirectional else ("",)
    kinds = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    return [kind + suffix for suffix in suffixes for kind in kinds]


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
    if config["format"] == 1:  # one direction, one member, not calibrated
        config |= {
            "bidirectional": False,
            "pooling": "last",
            "scales": [config.get("scale")],
            "calibration": None,
        }
    if config["format"] < 3:
        config["similarity"] = "manhattan"
    for name in ("input_size", "hidden_size", "max_len"):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise DataError(f"{path}: {name} must be a positive int, got {short(value)}")
    scales = config.get("scales")
    if (
        not isinstance(scales, list)
        or not scales
        or any(type(scale) is not float or not 0 < scale < math.inf for scale in scales)
    ):
        raise DataError(f"{path}: scales must be positive floats, got {short(scales)}")
    if type(config.get("bidirectional")) is not bool:
        raise DataError(
            f"{path}: bidirectional must be true or false, got {short(config.get('bidirectional'))}"
        )
    for name, choices in (("pooling", POOLINGS), ("similarity", SIMILARITIES)):
        if config.get(name) not in tuple(choices):
            raise DataError(
                f"{path}: {name} must be one of {', '.join(choices)}, got {short(config.get(name))}"
            )
    calibration = config.get("calibration")
    try:
        config["calibration"] = None if calibration is None else Calibration.from_dict(calibration)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: calibration cannot be read: {error}") from error
    limits = config.get("score_range")
    if not (
        isinstance(limits, list)
        and len(limits) == 2
        and all(type(limit) in (int, float) for limit in limits)
        and is_range(*limits)
    ):
        raise DataError(
            f"{path}: score_range must be two numbers, the lower first, got {short(limits)}"
        )
    return config


def _read_weights(path: Path, config: dict[str, Any], V: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    D, H = config["input_size"], config["hidden_size"]
    shapes = {TABLE: [V, D]}
    for prefix in _prefixes(len(config["scales"])):
        for name in _weight_names(config["bidirectional"]):
            columns = [D] if "weight_ih" in name else [H] if "weight_hh" in name else []
            shapes[prefix + name] = [4 * H, *columns]
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
    if len({t.dtype for t in tensors.values()}) != 1 or tensors[TABLE].dtype not in DTYPES:
        raise DataError(
            f"{path}: the tensors must be of one floating-point type, of 16 bits or more"
        )
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise DataError(f"{path}: holds NaN or infinity")
    return tensors
