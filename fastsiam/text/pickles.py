"""Legacy pickles of sentence pairs, read without running anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from fastsiam.text.columns import SICK_HEADER
from fastsiam.text.files import DataError, short
from fastsiam.text.tables import Table, positions


class _NoGlobals(pickle.Unpickler):
    """Reads numbers, strings and lists, and refuses to import or call anything."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"the pickle asks for {module}.{name}; only lists, text and numbers are read"
        )


def pickle_table(name: str, stream: BinaryIO, _header: bool) -> Table:
    """Read a pickled list of `[sentence, sentence, score, ...]`.

    A pickle names no columns: the first four get the names of SICK. Text that Python 2 wrote comes
    as bytes.

    Raises:
        DataError: the pickle is damaged, asks to import something, is no list or, while the rows
            are read, holds something else than such lists.
    """
    try:
        # Python 2 text comes as bytes here, so that its UTF-8 is decoded once and by us
        found = _NoGlobals(stream, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{name}: not a readable pickle: {error}") from error
    if not isinstance(found, (list, tuple)):
        raise DataError(f"{name}: the pickle must hold a list, got {type(found).__name__}")

    def rows() -> Iterator[tuple[int, list[Any]]]:
        for number, row in enumerate(found, start=1):
            if not isinstance(row, (list, tuple)) or len(row) < 3:
                raise DataError(
                    f"{table.where(number)}: must be [sentence, sentence, score, ...], "
                    f"got {short(row)}"
                )
            yield number, [*row[:4], None][:4]

    table = Table(name, list(SICK_HEADER), positions(SICK_HEADER), rows(), unit="row")
    return table
