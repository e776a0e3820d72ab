"""Files of word vectors, streamed: the vectors of the wanted words, in any format."""

from __future__ import annotations

import codecs
import gzip
import math
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastsiam.text.files import DataError, check_file

_PROBE_BYTES = 1 << 20  # enough for a header and one vector of any size in use
_NORM_RECORDS = 1000  # vectors whose mean length stands for the file's


@dataclass(frozen=True)
class VectorFile:
    """The wanted vectors of a file.

    Attributes:
        vectors: word as in the file -> its vector, [dim] float32.
        dim: size of a vector.
        norm: typical length: the mean of the file's first 1000 vectors.
    """

    vectors: dict[str, Tensor]
    dim: int
    norm: float


@dataclass(frozen=True)
class _Layout:
    binary: bool
    header: bool
    count: float  # infinite where no header says it
    dim: int


def read_vectors(
    path: str | PathLike[str], wanted: Collection[str], limit: int | None = None
) -> VectorFile:
    """Read the vectors of some words.

    Args:
        path: word2vec binary or text, or GloVe text, plain or gzip.
        wanted: words to look for, as written in the file.
        limit: reads only the first `limit` vectors; None reads all.

    Returns:
        The vectors of the words that are there.

    Raises:
        DataError: not such a file, damaged, or a vector that is not finite.
    """
    path = check_file(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            layout = _sniff(path, stream)
            vectors, norm = _scan(path, stream, layout, wanted, limit)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut short: {error}") from error
    if not (math.isfinite(norm) and all(bool(v.isfinite().all()) for v in vectors.values())):
        raise DataError(f"{path}: a vector holds NaN or infinity")
    return VectorFile(vectors, layout.dim, norm)


def _sniff(path: Path, stream: BinaryIO | gzip.GzipFile) -> _Layout:
    """Tell the kind of file by its first lines, and leave the stream where they begin."""
    probe = stream.read(_PROBE_BYTES)
    mark = codecs.BOM_UTF8 if probe.startswith(codecs.BOM_UTF8) else b""
    first, _, rest = probe[len(mark) :].partition(b"\n")
    stream.seek(len(mark))
    fields = first.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        count, dim = map(int, fields)
        if count and dim:
            return _Layout(not _is_text_record(rest.partition(b"\n")[0]), True, count, dim)
    elif _is_text_record(first):
        return _Layout(False, False, math.inf, len(fields) - 1)
    raise DataError(
        f"{path}: must be word vectors in word2vec or GloVe format: a first line with the number "
        "and size of the vectors, or with a word and its numbers"
    )


def _is_text_record(line: bytes) -> bool:
    fields = line.split()
    return len(fields) > 1 and all(map(_is_number, fields[1:]))


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _scan(
    path: Path,
    stream: BinaryIO | gzip.GzipFile,
    layout: _Layout,
    wanted: Collection[str],
    limit: int | None,
) -> tuple[dict[str, Tensor], float]:
    """Return the wanted vectors by word, and the typical length."""
    keys = {word.encode("utf-8", "surrogatepass"): word for word in wanted}
    found: dict[str, Tensor] = {}
    norms: list[float] = []
    count = layout.count if limit is None else min(layout.count, limit)
    read, parse = (
        (_binary_records, _binary_vector) if layout.binary else (_text_records, _text_vector)
    )
    for key, data in read(path, stream, layout, count):
        word = keys.get(key)
        # the first of repeated words counts
        new = word is not None and word not in found
        if new or len(norms) < _NORM_RECORDS:
            try:
                vector = parse(data)
            except ValueError as error:
                raise DataError(f"{path}: not a file of word vectors: {error}") from error
            if len(norms) < _NORM_RECORDS:
                norms.append(float(vector.double().norm()))
            if word is not None and new:
                found[word] = vector
    return found, sum(norms) / len(norms)


def _binary_vector(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def _text_vector(data: bytes) -> Tensor:
    return torch.tensor([float(field) for field in data.split()], dtype=torch.float64).float()


def _binary_records(
    path: Path, stream: BinaryIO | gzip.GzipFile, layout: _Layout, count: float
) -> Iterator[tuple[bytes, bytes]]:
    stream.readline()
    size = 4 * layout.dim
    buffer, start, done = b"", 0, 0
    while done < count:
        blank = buffer.find(b" ", start)
        end = blank + 1 + size
        if blank >= 0 and end <= len(buffer):
            # some writers end a vector with a line feed
            yield buffer[start:blank].lstrip(b"\n"), buffer[blank + 1 : end]
            start, done = end, done + 1
        elif more := stream.read(_PROBE_BYTES):
            buffer, start = buffer[start:] + more, 0
        else:
            raise DataError(
                f"{path}: ends after {done} of {layout.count:.0f} vectors: cut short, or not a "
                "word2vec file"
            )


def _text_records(
    path: Path, stream: BinaryIO | gzip.GzipFile, layout: _Layout, count: float
) -> Iterator[tuple[bytes, bytes]]:
    done = 0
    for number, raw in enumerate(stream, start=1):
        if done >= count:
            return
        if number == 1 and layout.header:
            continue
        # blanks and tabs, however many
        fields = raw.rsplit(None, layout.dim)
        if len(fields) == layout.dim and raw[:1].isspace():
            # a word without letters, which stands for no token
            fields.insert(0, b"")
        # GloVe has words with blanks; a number there means that the vector is longer
        if len(fields) <= layout.dim or (
            len(parts := fields[0].split()) > 1 and _is_number(parts[-1])
        ):
            raise DataError(f"{path}, line {number}: must be a word and {layout.dim} numbers")
        yield fields[0].lstrip(), raw[len(fields[0]) :]
        done += 1
    if layout.header and done < count:
        raise DataError(f"{path}: ends after {done} of {layout.count:.0f} vectors: cut short")
