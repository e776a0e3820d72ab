"""What a resumed run must share with the one that it goes on with."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from fastsiam.training.config import Config
from fastsiam.training.data import Inputs
from fastsiam.training.pair_file import PairFile

# settings that a resumed run may change: names of places, and what is told of the run.
# What the files hold is compared instead of their names
FREE = {
    *("train", "dev", "test", "pretrain", "vectors", "synonyms", "spelling", "out"),
    *("device", "resume", "checkpoint_every", "log_every", "tensorboard"),
}


def fingerprint(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return the settings that act on a run, and checksums of what its files hold, by name."""
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
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
