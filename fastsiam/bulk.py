"""Files of sentences to files of numbers: read, computed and written a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastsiam.model import TextSiamese
from fastsiam.search import nearest_rows
from fastsiam.text.files import DataError
from fastsiam.text.streams import (
    Block,
    Name,
    check_output,
    pair_blocks,
    reading,
    sentence_blocks,
    writing,
)

BATCH = 2048  # sentences that are computed together


@dataclass
class Tally:
    """What has been done so far.

    Attributes:
        rows: pairs or sentences of the file.
        sentences: different sentences of each block: what was computed.
        tokens: of these.
        unknown: those of the tokens that have no vector.
        truncated: those of the sentences that were longer than the model's `max_len`.
        position: bytes of the file that were read.
    """

    rows: int = 0
    sentences: int = 0
    tokens: int = 0
    unknown: int = 0
    truncated: int = 0
    position: int = 0


class Hit(NamedTuple):
    """A sentence that was found: its similarity to the query, its line in the file, its text."""

    similarity: float
    line: int
    sentence: str


OnBlock = Callable[[Tally], None]


def encode_file(
    model: TextSiamese,
    source: Name,
    out: Name,
    *,
    column: str | None = None,
    on_block: OnBlock | None = None,
) -> Tally:
    """Write the vectors of a file's sentences as an .npy file, [n, vector_size] float32.

    Args:
        model: what computes them; a float64 model gives float64.
        source: a text with a sentence a line, of which an empty one has the vector 0; or a table
            if `column` is given.
        out: the .npy file, written whole or not at all.
        column: name of the table's column, or its number from "1" where the table has no header.
        on_block: called after each block.

    Returns:
        What was done.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is no such table.
        ValueError: `out` is the file that is read, or a pipe: an .npy file begins with the number
            of its rows.
        OSError: `out` cannot be written.
    """
    import numpy as np

    tally = Tally()
    check_output("encode_file", out, source)
    with reading(source) as stream, writing(out) as file, ExitStack() as held:
        if str(out) == "-" or not file.seekable():
            raise ValueError(
                "encode_file: out must be a file and no pipe, as the number of vectors stands "
                f"before them, got {str(out)!r}"
            )
        kind = np.dtype("<f8" if model.lstm.weight_hh_l0.dtype == torch.float64 else "<f4")
        _write_npy_header(file, kind, 0, model.vector_size)
        for block in sentence_blocks(str(source), stream, column):
            (sentences,) = block.columns
            vectors, (rows,) = _distinct_vectors(model, [sentences], tally, held)
            file.write(vectors[rows].numpy().astype(kind, copy=False).tobytes())
            _count(tally, block, stream, on_block)
        file.seek(0)
        # numpy leaves room in the header for any number of rows
        _write_npy_header(file, kind, tally.rows, model.vector_size)
    return tally


def score_file(
    model: TextSiamese,
    source: Name,
    out: Name,
    *,
    columns: tuple[str, str] | None = None,
    on_block: OnBlock | None = None,
) -> Tally:
    """Write the similarities of a table's sentence pairs, and their scores on the model's scale.

    Line n of what is written belongs to the pair that begins on line n of the table, so that
    `paste` joins the two: there is a header where the table has one, and an empty line for each
    line on which no pair begins.

    Args:
        model: what scores them.
        source: a table: tab-separated, quoted CSV or JSON lines.
        out: the file to write: `similarity`, a tab, `score`. A file is written whole or not at all,
            a pipe block by block.
        columns: names of the two sentences, or their numbers from "1" where the table has no
            header; not needed for the headers of SICK and STS.
        on_block: called after each block.

    Returns:
        What was done.

    Raises:
        DataError: the file cannot be read, is not UTF-8, lacks a column, or has a line that does
            not fit.
        ValueError: `out` is the file that is read.
        OSError: `out` cannot be written.
    """
    tally = Tally()
    check_output("score_file", out, source)
    with reading(source) as stream, writing(out) as file, ExitStack() as held:
        titled, blocks = pair_blocks(str(source), stream, columns)
        if titled:
            file.write(b"similarity\tscore\n")
        last = int(titled)
        for block in blocks:
            vectors, (left, right) = _distinct_vectors(model, block.columns, tally, held)
            distance = model.measure.distance(vectors[left], vectors[right])
            similarity = model.measure.value(distance, model.scale)
            gaps = ["\n" * (line - before - 1) for before, line in pairwise((last, *block.lines))]
            numbers = similarity.tolist(), model.to_score(similarity).tolist()
            rows = map("%s%.6g\t%.4f\n".__mod__, zip(gaps, *numbers, strict=True))
            file.write("".join(rows).encode())
            last = block.lines[-1]
            _count(tally, block, stream, on_block)
    return tally


def search_file(
    model: TextSiamese,
    queries: Sequence[str],
    corpus: Name,
    k: int = 10,
    *,
    column: str | None = None,
    vectors: Name | None = None,
    on_block: OnBlock | None = None,
) -> list[list[Hit]]:
    """Find the k sentences of a file that are most similar to each query.

    The file is read once and not held, whatever its size.

    Args:
        model: what compares them.
        queries: n sentences.
        corpus: as `source` of `encode_file`; sentences without a word are passed over.
        k: at least 1.
        column: as for `encode_file`.
        vectors: what `encode_file` wrote for this model and corpus, to spare its computation.
        on_block: called after each block.

    Returns:
        For each query its hits, the smallest distance first and equal ones by line; fewer than k
        where the corpus has fewer sentences.

    Raises:
        DataError: the corpus cannot be read, is not UTF-8, has no sentence, or does not fit the
            vectors; or these are not such a file.
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"search_file: k must be at least 1, got {k}")
    stored = None if vectors is None else _open_vectors(vectors, model.vector_size)
    wanted = _precise(model.encode(queries, BATCH)).to(model.device)
    # not similarities: those of large distances are all 0
    distance = wanted.new_empty(len(queries), 0, dtype=torch.float32)
    index = wanted.new_empty(len(queries), 0, dtype=torch.int64)
    texts: dict[int, tuple[int, str]] = {}  # of the sentences in `index`
    tally, count = Tally(), 0
    with reading(corpus) as stream, ExitStack() as held:
        for block in sentence_blocks(str(corpus), stream, column):
            (sentences,) = block.columns
            kept = [row for row, sentence in enumerate(sentences) if sentence.strip()]
            if stored is None:
                distinct, (rows,) = _distinct_vectors(model, [sentences], tally, held)
                candidates = distinct[rows[kept]]
            else:
                candidates = _rows_of(stored, vectors, tally.rows, len(sentences))[kept]
            if kept:
                found, rows = nearest_rows(
                    "search_file", wanted, candidates.to(wanted), min(k, len(kept)), model.measure
                )
                # the earlier sentences stand first, and a stable sort leaves equal ones so
                distance, order = torch.cat([distance, found], dim=1).sort(dim=1, stable=True)
                index = torch.cat([index, rows + count], dim=1).gather(1, order)
                distance, index = distance[:, :k], index[:, :k]
                texts |= {
                    count + i: (block.lines[row], sentences[row]) for i, row in enumerate(kept)
                }
                texts = {i: texts[i] for i in set(index.flatten().tolist())}
                count += len(kept)
            _count(tally, block, stream, on_block)
    if not count:
        raise DataError(f"{corpus}: no sentence in the file")
    if stored is not None and len(stored) != tally.rows:
        raise DataError(f"{vectors}: holds {len(stored)} vectors, but {corpus} has {tally.rows}")
    similarity = model.measure.value(distance, model.scale)
    return [
        [Hit(value, *texts[i]) for value, i in zip(values, places, strict=True)]
        for values, places in zip(similarity.tolist(), index.tolist(), strict=True)
    ]


def read_queries(source: Name, *, column: str | None = None) -> list[tuple[int, str]]:
    """Return line number and text of a file's sentences, but for those without a word.

    Args:
        source: as for `encode_file`.
        column: as for `encode_file`.

    Raises:
        DataError: the file cannot be read, is not UTF-8, has no sentence or is no such table.
    """
    with reading(source) as stream:
        found = [
            (line, sentence)
            for block in sentence_blocks(str(source), stream, column)
            for line, sentence in zip(block.lines, block.columns[0], strict=True)
            if sentence.strip()
        ]
    if not found:
        raise DataError(f"{source}: no sentence in the file")
    return found


def _distinct_vectors(
    model: TextSiamese, columns: Sequence[list[str]], tally: Tally, held: ExitStack
) -> tuple[Tensor, list[Tensor]]:
    """Compute each different sentence once.

    From the block on by which the file has more words than the vocabulary, `held` holds the
    projection of the whole vocabulary.

    Returns:
        The vectors, [m, vector_size], and for each column the rows of its sentences in them, [n].
    """
    import numpy as np

    number = {s: i for i, s in enumerate(dict.fromkeys(chain.from_iterable(columns)))}
    encoded = model.vocabulary.encode(list(number), model.max_len)
    tally.sentences += len(number)
    words = int(encoded.lengths.sum())
    if tally.tokens <= len(model.vocabulary) < tally.tokens + words:
        held.enter_context(model.prepared())
    tally.tokens += words
    tally.unknown += encoded.unknown.total()
    tally.truncated += encoded.truncated
    rows = [
        torch.from_numpy(np.fromiter(map(number.__getitem__, column), np.int64, len(column)))
        for column in columns
    ]
    return _precise(model.vectors(encoded, BATCH)), rows


def _precise(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def _count(tally: Tally, block: Block, stream: BinaryIO, on_block: OnBlock | None) -> None:
    tally.rows += len(block.lines)
    tally.position = stream.tell() if stream.seekable() else 0
    if on_block is not None:
        on_block(tally)


def _write_npy_header(file: BinaryIO, kind: Any, rows: int, columns: int) -> None:
    import numpy as np

    shape = {"descr": kind.str, "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, shape)


def _open_vectors(vectors: Name, columns: int) -> Any:
    import numpy as np

    try:
        stored = np.lib.format.open_memmap(vectors, mode="r")
    except OSError as error:
        raise DataError(f"{vectors}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{vectors}: must be an .npy file that 'fastsiam encode' wrote: {error}"
        ) from error
    if stored.ndim != 2 or stored.shape[1] != columns or stored.dtype.kind != "f":
        raise DataError(
            f"{vectors}: must hold [n, {columns}] floating-point numbers, as 'fastsiam encode' "
            f"writes with this model, got {list(stored.shape)} of {stored.dtype}"
        )
    return stored


def _rows_of(stored: Any, vectors: Name | None, start: int, count: int) -> Tensor:
    import numpy as np

    if start + count > len(stored):
        raise DataError(f"{vectors}: holds {len(stored)} vectors, the corpus has more sentences")
    return torch.from_numpy(np.array(stored[start : start + count]))
