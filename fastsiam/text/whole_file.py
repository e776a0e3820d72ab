"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place at the end: a reader sees the old file or the new one.

    The new file has the permissions of the old one.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # none on a file system that has no modes
        with suppress(FileNotFoundError, PermissionError):
            shutil.copymode(path, beside)
        beside.replace(path)
    except BaseException as error:  # a full disk, or Ctrl-C
        beside.unlink(missing_ok=True)
        # a failed write does not say where, and a failed opening names the file beside
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    with whole_file(path) as file:
        file.write(data)
