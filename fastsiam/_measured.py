"""Where nn.LSTM was measured to be faster than the other backends: `measured.json`, and a look-up.

`python -m benchmarks.auto` measures a machine and writes the file.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import NamedTuple

from fastsiam.kernels._tiling import NARROW


class Call(NamedTuple):
    """What a call has to do, as far as the host knows it."""

    cell: str  # "lstm" or "gru"
    dtype: str  # "float32" and so on
    training: bool  # whether a backward follows
    threads: int
    H: int
    sequences: int
    steps: int  # of the longest sequence; padded ones where the lengths are on a device
    filled: float | None  # share of sequences * steps that is valid; None as above


class Row(NamedTuple):
    """One measurement; the first eight fields are a Call's."""

    cell: str
    dtype: str
    training: bool
    threads: int
    H: int
    sequences: int
    steps: int
    filled: float
    other: str  # the backend beside "lstm"
    ratio: float  # time of "lstm" over that of `other`

    def __str__(self) -> str:
        work = "a training step" if self.training else "scoring"
        factor = f"{self.ratio:.2f}" if self.ratio < 1 else f"{self.ratio:.1f}"
        return (
            f"nn.LSTM took {factor} times as long as {self.other} in the nearest measurement "
            f"({work}, H = {self.H}, {self.sequences} sequences of up to {self.steps} steps, "
            f"{self.filled:.0%} filled)"
        )


def nearest(device: str, call: Call) -> Row | None:
    """Return the measurement on `device` that is nearest to a call; None without one.

    Args:
        device: a GPU's name; or "cpu" or "cpu without compiled steps", which stand for any CPU.
        call: where `filled` is None, nn.LSTM has to win with full batches and with others: of both
            measurements the one where it did worse is returned.
    """
    # what is not the same is a power of two and some eighths away: one look-up serves many calls
    sizes = (call.H.bit_length(), call.sequences.bit_length(), call.steps.bit_length())
    known = (call.cell, call.dtype, call.training)
    wide = call.H > NARROW
    shares = (1.0, 0.25) if call.filled is None else (max(1, round(8 * call.filled)) / 8,)
    rows = [_nearest(device, known, wide, call.threads, sizes, filled) for filled in shares]
    return max(filter(None, rows), key=lambda row: row.ratio, default=None)


@functools.lru_cache(maxsize=4096)
def _nearest(
    device: str,
    known: tuple[str, str, bool],
    wide: bool,
    threads: int,
    sizes: tuple[int, int, int],
    filled: float,
) -> Row | None:
    rows = [row for row in table().get(device, ()) if row[:3] == known]
    # triton has other kernels for a wide H: the others' times say nothing of them
    rows = [row for row in rows if row.other != "triton" or (row.H > NARROW) == wide]
    if not rows:
        return None

    def distance(row: Row) -> float:
        of_row = (row.H.bit_length(), row.sequences.bit_length(), row.steps.bit_length())
        return (
            sum(abs(a - b) for a, b in zip(sizes, of_row, strict=True))
            + abs(math.log2(filled) - math.log2(row.filled))
            + abs(threads.bit_length() - row.threads.bit_length())
        )

    return min(rows, key=distance)


@functools.cache
def table() -> dict[str, list[Row]]:
    """Return the measurements by device."""
    text = resources.files("fastsiam").joinpath("measured.json").read_text(encoding="utf-8")
    return {
        device: [Row(**row) for row in found["rows"]] for device, found in json.loads(text).items()
    }
