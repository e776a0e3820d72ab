"""Which tile runs a hidden size that one program cannot hold: a pure function, with reasons."""

from __future__ import annotations

from typing import NamedTuple

from fastsiam.kernels._tiling import block_h


class WideTile(NamedTuple):
    """What a wide kernel is compiled for."""

    units: int  # of a program: a slice of them
    sequences: int  # of a program, two a pair
    num_warps: int
    num_stages: int  # pieces of the product's operands that are on their way at once


def forward_units() -> int:
    """Return the units of a program of the forward, a power of two."""
    # their gates are the 128 rows of two matrix instructions of Hopper's
    return 32


def forward_tile(sequences: int, P: int, H: int, multiprocessors: int) -> WideTile:
    """Return the tile of the forward kernel.

    Args:
        sequences: of the batch.
        P: directions, 1 or 2.
        H: hidden size, above 128.
        multiprocessors: of the device.
    """
    units = forward_units()
    return WideTile(units, _columns(sequences, P * block_h(H) // units, multiprocessors), 4, 3)


def backward_tile(sequences: int, P: int, H: int, multiprocessors: int) -> WideTile:
    """Return the tile of the backward kernel; arguments as for `forward_tile`."""
    # of their 4 gates each a program needs one row: the 64 rows of a matrix instruction
    units = 64
    return WideTile(units, _columns(sequences, P * block_h(H) // units, multiprocessors), 4, 3)


def _columns(sequences: int, slices: int, multiprocessors: int) -> int:
    # more columns share what is read of the weight (64 do not fit the registers), fewer leave no
    # multiprocessor idle; no matrix instruction of AMD's has less than 16
    return 32 if -(-sequences // 32) * slices >= multiprocessors else 16
