"""Legacy pickles of sentence pairs, read without running anything in them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastsiam.text.files import DataError, short


class _NoGlobals(pickle.Unpickler):
    """Reads numbers, strings and lists; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"the pickle asks for {module}.{name}; only lists, text and numbers are read"
        )


def pickle_rows(path: Path, data: bytes) -> Iterator[tuple[str, list[Any]]]:
    """Read a pickled list of `[sentence, sentence, score, ...]`.

    Args:
        path: the file's name, for messages.
        data: its bytes.

    Yields:
        Where a row stands, "FILE, row N" counted from 0, and its first three entries or, where
        there are more, four; text that Python 2 wrote is bytes.

    Raises:
        DataError: the pickle is damaged, is no such list, or asks to import something.
    """
    try:
        # Python 2 text comes as bytes here, so that its UTF-8 is decoded once and by us
        rows = _NoGlobals(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: not a readable pickle: {error}") from error
    if not isinstance(rows, (list, tuple)):
        raise DataError(f"{path}: the pickle must hold a list, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, (list, tuple)) or len(row) < 3:
            raise DataError(f"{where}: must be [sentence, sentence, score, ...], got {short(row)}")
        yield where, list(row[:4])
