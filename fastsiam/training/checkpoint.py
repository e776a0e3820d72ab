"""The state of a run on disk: written whole or not at all, the newest two kept, checked when read.

A checkpoint is the name of its format, the SHA-256 of the rest, and the bytes of `torch.save`.
`torch.load` reads plain values and tensors alone, and runs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsiam.text.files import DataError
from fastsiam.text.whole_file import write_file

KEPT = 2
FORMAT = b"fastsiam checkpoint 2\n"
NAME = re.compile(r"step-(\d+)\.pt")


class DamagedWarning(UserWarning):
    """A checkpoint is damaged, and the one before it was read."""


class Checkpoint:
    """The checkpoints of a run, in a folder of their own.

    Args:
        folder: made when the first one is saved.
        every: steps between checkpoints within an epoch; 0: only where an epoch ends.
        recipe: JSON-able settings that a continued run must share, by name; None: not compared.

    Raises:
        ValueError: `every` is negative.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 0:
            raise ValueError(f"Checkpoint: every must be at least 0, got {every}")
        self.folder = Path(folder)
        self.every = every
        # as JSON gives it back, so that the two compare
        self.recipe = None if recipe is None else json.loads(json.dumps(dict(recipe)))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after so many steps; only the newest two files stay.

        Args:
            step: names the file; a later state has a higher one or the same.
            state: dicts, lists, tuples, text, numbers, None and tensors.

        Raises:
            OSError: the folder cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"recipe": self.recipe, "state": dict(state)}, buffer)
        data = buffer.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:010d}.pt"
        write_file(path, FORMAT + hashlib.sha256(data).digest() + data)
        _sync_folder(self.folder)
        for old in self.files()[KEPT:]:
            old.unlink(missing_ok=True)
        for part in self.folder.glob(".*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole; None where nothing was saved yet.

        A damaged file is named in a `DamagedWarning` and set aside as `*.damaged`, and the one
        before it is read.

        Raises:
            DataError: there are files, and none of them is whole.
            ValueError: the recipe of the saved run is another one.
        """
        files = self.files()
        for index, path in enumerate(files):
            try:
                tree = _read(path)
            except DataError as error:
                if index == len(files) - 1:
                    raise DataError(f"{error}; no other checkpoint is left, start anew") from None
                message = f"{error}; going on from {files[index + 1].name}"
                warnings.warn(message, DamagedWarning, stacklevel=2)
                # else the next save would count it among the newest
                path.rename(path.with_name(path.name + ".damaged"))
                continue
            self._check_recipe(tree["recipe"])
            state: dict[str, Any] = tree["state"]
            return state
        return None

    def files(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)

    def _check_recipe(self, saved: dict[str, Any] | None) -> None:
        if self.recipe is None or saved is None:
            return
        for name in [*self.recipe, *(saved.keys() - self.recipe.keys())]:
            was, now = saved.get(name), self.recipe.get(name)
            if was != now:
                raise ValueError(
                    f"resume: {name} must be what it was in {self.folder}, {was!r}, got {now!r}; "
                    "give that, or name a new folder"
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data.startswith(FORMAT):
        raise DataError(f"{path}: damaged, or not a checkpoint that this fastsiam wrote")
    digest, tree = data[len(FORMAT) :][:32], data[len(FORMAT) + 32 :]
    if digest != hashlib.sha256(tree).digest():
        raise DataError(f"{path}: damaged (its checksum is another)")
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(tree), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: must hold plain values and tensors alone") from error
    return found


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where the system can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's global generators."""
    import numpy as np

    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    import numpy as np

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
