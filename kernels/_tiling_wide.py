"""Which tile runs a hidden size that one program cannot hold: a pure function, with reasons."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastsiam.kernels._tiling import (
    LEAST_SHARED_BYTES,
    SHARED_BYTES,
    block_h,
    cdiv,
    multiprocessors,
    product_precision,
    target_of,
)


class WideTile(NamedTuple):
    """What a wide kernel is compiled for, and how it is launched."""

    units: int  # of a program: a slice of them
    sequences: int  # of a tile, two a pair
    block_k: int  # of a product's inner dimension at a time
    resident: bool  # whether the weight stays on chip, and all steps are one launch
    groups: int  # tiles that run at once
    num_warps: int
    num_stages: int  # pieces of a product's operands that are on their way at once

    def launches(self, steps: int) -> Sequence[tuple[int, int]]:
        """Return the first step of each launch, and the one behind its last."""
        return [(0, steps)] if self.resident else [(t, t + 1) for t in range(steps)]


def forward_units() -> int:
    """Return the units of a program of the forward."""
    # their gates are 128 rows of the weight, 32 of each of 4 warps: fewer, and the gates of a unit
    # would not meet in one thread; more fit the registers with fewer sequences only
    return 32


def backward_units() -> int:
    """Return the units of a program of the backward."""
    # a row each: the 64 rows of Hopper's matrix instruction, 16 of each of 4 warps
    return 64


# bytes of a slice of the weight that stays on chip, and of what its product takes of each step, on
# the way to which they pass through registers; with more the compiler spills
_ON_CHIP = {"sm_90": (131072, 32768), "sm_100": (131072, 16384)}
_ON_CHIP_ELSEWHERE = (65536, 8192)
# tiles that a group of programs may run one after another in one launch: by estimate a launch a
# step takes about as long for all tiles
_ROUNDS = 2


@functools.cache
def forward_tile(
    N: int, P: int, H: int, dtype: torch.dtype, precision: str, target: str, at_once: int
) -> WideTile:
    """Return the tile of the forward kernel.

    Args:
        N: sequences.
        P: directions, 1 or 2.
        H: hidden size, above 128.
        dtype: float32, float16 or bfloat16.
        precision: what `_tiling.product_precision` gives.
        target: see `_tiling.forward_tile`.
        at_once: multiprocessors of the device.
    """
    block, units = block_h(H), forward_units()
    programs = P * block // units
    resident = _resident(N, programs, units, 4 * units, block, dtype, precision, target, at_once)
    return resident or _step_by_step(N, programs, units, dtype, precision, at_once)


@functools.cache
def backward_tile(
    N: int, P: int, H: int, dtype: torch.dtype, precision: str, target: str, at_once: int
) -> WideTile:
    """Return the tile of the backward kernel; arguments as for `forward_tile`."""
    block, units = block_h(H), backward_units()
    programs = P * block // units
    resident = _resident(N, programs, units, units, 4 * block, dtype, precision, target, at_once)
    return resident or _step_by_step(N, programs, units, dtype, precision, at_once)


def describe(
    N: int, P: int, H: int, dtype: torch.dtype, allow_tf32: bool, device: torch.device
) -> str:
    """Say how the kernels run N sequences on `device`; arguments as for `forward_tile`."""
    target = target_of(device)
    shape = N, P, H, dtype, product_precision(dtype, allow_tf32, target)
    tiles = {
        name: choose(*shape, target, multiprocessors(device, target))
        for name, choose in (("forward", forward_tile), ("backward", backward_tile))
    }
    return ", ".join(
        f"{name} {'in one launch' if tile.resident else 'a launch a step'}"
        for name, tile in tiles.items()
    )


def _resident(
    N: int,
    programs: int,
    units: int,
    rows: int,
    inner: int,
    dtype: torch.dtype,
    precision: str,
    target: str,
    at_once: int,
) -> WideTile | None:
    """Return the tile with which the weight stays on chip; None where it does not, or should not.

    Args:
        N: sequences.
        programs: that share a tile, both directions.
        units: of a program.
        rows: of its slice of the weight.
        inner: columns of that.
        dtype, precision, target, at_once: as for `forward_tile`.
    """
    # AMD's multiprocessors lack the space; interpreted, a program that waits would wait for ever.
    # Three products of tf32 want each slice twice
    if not target.startswith("sm_") or precision == "tf32x3":
        return None
    block_k = 1 << (inner - 1).bit_length()
    largest_slice, largest_step = _ON_CHIP.get(target, _ON_CHIP_ELSEWHERE)
    slice_bytes = rows * block_k * dtype.itemsize
    limit = SHARED_BYTES.get(target, LEAST_SHARED_BYTES)

    def fits(columns: int) -> bool:
        step_bytes = columns * block_k * dtype.itemsize
        on_chip = slice_bytes <= largest_slice and step_bytes <= largest_step
        return on_chip and slice_bytes + step_bytes + 1024 <= limit

    # all programs of a group have to run at once, a multiprocessor each
    groups = at_once // programs
    rounds = {columns: cdiv(N, columns * max(groups, 1)) for columns in (16, 32) if fits(columns)}
    if groups == 0 or not rounds or min(rounds.values()) > _ROUNDS:
        return None
    # with fewer columns a step is shorter
    columns = min(rounds, key=lambda columns: (rounds[columns], columns))
    return WideTile(units, columns, block_k, True, groups, 4, 1)


def _step_by_step(
    N: int, programs: int, units: int, dtype: torch.dtype, precision: str, at_once: int
) -> WideTile:
    """Return the tile of a launch a step; arguments as for `_resident`."""
    # more columns share what is read of the weight, fewer leave no multiprocessor idle. 64 have two
    # warps for each that the units fill, or would not fit the registers; beside three products of
    # tf32 only 16 do. AMD's matrix instructions have no less
    sizes = (64, 32) if precision != "tf32x3" else ()
    wanted = (size for size in sizes if cdiv(N, size) * programs >= at_once)
    columns = next(wanted, 16)
    num_warps = 8 if columns == 64 else 4
    return WideTile(units, columns, 128 // dtype.itemsize, False, cdiv(N, columns), num_warps, 3)
