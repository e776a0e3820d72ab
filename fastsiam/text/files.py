"""Checks shared by everything that reads a file of the user's."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A file whose content cannot be used; the message names it and, where known, the line."""


def check_file(path: str | PathLike[str]) -> Path:
    """Return `path` if it is a file that can be read and is not empty, else raise DataError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not first:
        raise DataError(f"{path}: the file is empty")
    return path


def read_object(path: str | PathLike[str], of: str) -> dict[str, Any]:
    """Return the JSON object in a file; `of` names its values, for the message.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    path = check_file(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be a JSON object of {of}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: must be a JSON object of {of}, got {type(found).__name__}")
    return found


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; JSON and pickles may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """Return a value as a message shows it: at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
