"""Which tile runs a shape on a target: a pure function, each row with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# bytes of shared memory that one program may use, by target
SHARED_BYTES = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
# for a GPU that is not named above: what every supported one has
LEAST_SHARED_BYTES = 65536


def target_of(device: torch.device) -> str:
    """Return the name of the machine code that runs on `device`: a key of SHARED_BYTES, if known.

    CPU tensors are taken by Triton's interpreter only.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


class Arithmetic(NamedTuple):
    """How a kernel computes; the fields are its compile-time arguments."""

    PRECISION: str  # of float32 products
    APPROXIMATE: bool  # tanh by one instruction, 2^-11
    WIDEN: bool  # round products' operands to the dtype, then multiply them in float32
    ASSEMBLY: bool  # whether inline PTX is understood


def arithmetic(dtype: torch.dtype, allow_tf32: bool, target: str) -> Arithmetic:
    """Return how tensors of `dtype` are computed on `target`."""
    nvidia = target.startswith("sm_")
    if not nvidia:
        # AMD multiplies float32 as it is; the interpreter would multiply a bfloat16's raw bits
        widen = target == "interpreter" and dtype == torch.bfloat16
        return Arithmetic("ieee", False, widen, False)
    if dtype == torch.float32 and not allow_tf32:
        # three tf32 products: float32's accuracy on tensor cores
        return Arithmetic("tf32x3", False, False, True)
    return Arithmetic("tf32", True, False, True)


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    block_h: int  # units of a program: a power of two >= H
    sequences: int  # of a program, two a pair
    num_warps: int
    stream: bool  # whether weight_hh is read every step instead of kept in registers
    rounds: bool = False  # whether weight_hh and h, of float32, are rounded to float16 for products


def forward_tile(H: int, dtype: torch.dtype, precision: str, target: str, each: int = 1) -> Tile:
    """Return the tile of the forward kernels.

    Args:
        H: hidden size, 1 <= H <= 128.
        dtype: float32, float16 or bfloat16.
        precision: of float32 products: "tf32", "tf32x3" or "ieee".
        target: "sm_90" and so on.
        each: programs that a multiprocessor gets; see `programs_each`.
    """
    block = block_h(H)
    # tf32 has float16's 10 bits of mantissa. A weight and a state need no wider range (a gate
    # gradient does), and so the weight, 256 kB in tf32, fits the registers: 123 instructions a
    # step instead of 611, and a tenth of the estimated clocks
    rounds = block == 128 and dtype == torch.float32 and precision == "tf32"
    return Tile(
        block,
        _sequences(target),
        _forward_warps(block, dtype, target, each),
        _streams(block, torch.float16 if rounds else dtype, precision, target),
        rounds,
    )


def _forward_warps(block: int, dtype: torch.dtype, target: str, each: int) -> int:
    # a warp holds 8 units of a block: at block 32 there are only 4 groups of 8
    if block == 32:
        return 4
    # alone on its multiprocessor a program is quicker with 8 warps (estimated clocks of a step on
    # sm_90, half precision: 421 against 481; training 464, 541): half the activations each. Two
    # share it better with 4 (617 against 502; 699, 585), three as well with either (838, 811)
    if block == 64 and dtype != torch.float32 and target.startswith("sm_") and each > 1:
        return 4
    # float32 in 4 warps has no register left over for all records; block 128 does not fit 4
    return 8


def backward_tile(H: int, dtype: torch.dtype, precision: str, target: str) -> Tile:
    """Return the tile of the backward kernel; arguments as for `forward_tile`."""
    block = block_h(H)
    # the accumulator has one row a unit, so a warp holds 16 units: 2, 4 or 8 warps cover the block
    # its two halves pass through shared memory one after the other; float16 as words twice the size
    parts = 1 if dtype == torch.float16 else 2
    streams = _streams(block, dtype, precision, target, parts)
    return Tile(block, _sequences(target), block // 16, streams)


def block_h(H: int) -> int:
    """Return the units of a program for hidden size H."""
    # the dot product's inner dimension is at least 16; below 32 the work is all latency
    return 32 if H <= 32 else 64 if H <= 64 else 128


def _sequences(target: str) -> int:
    # the columns of the smallest matrix instruction: the fewer, the more programs share the work
    return 16 if target.startswith("gfx") else 8


def _streams(block: int, dtype: torch.dtype, precision: str, target: str, parts: int = 1) -> bool:
    # weight_hh passes through shared memory once on its way to registers, whole or in parts; tf32x3
    # splits each operand in two on the way
    copies = 2 if precision == "tf32x3" else 1
    shared = 4 * block * block * dtype.itemsize * copies // parts
    if target == "interpreter":
        return dtype == torch.float32 and block == 128
    if target.startswith("gfx"):
        # wavefronts of 64 leave half the registers a cell, and the weight stays in shared memory
        # beside the exchange of h
        return 2 * shared > SHARED_BYTES.get(target, LEAST_SHARED_BYTES)
    if dtype == torch.float32 and block == 128:
        # 256 kB: fits no register file
        return True
    # besides it, h of a step passes through
    return shared + 4096 > SHARED_BYTES.get(target, LEAST_SHARED_BYTES)


def programs_each(lengths: Tensor, P: int, target: str) -> int:
    """Return how many programs a multiprocessor gets for the sequences of `lengths`, [N].

    Args:
        lengths: [N], on the device that runs them.
        P: directions, 1 or 2.
        target: as for `forward_tile`.
    """
    if target == "interpreter":
        multiprocessors = 1
    else:
        multiprocessors = torch.cuda.get_device_properties(lengths.device).multi_processor_count
    return -(-lengths.shape[0] * P // (_sequences(target) * multiprocessors))


def pair_order(lengths: Tensor, B: int, target: str, P: int = 1) -> Tensor | None:
    """Return the order in which programs take pairs, [B], longest first; None for the caller's.

    A program runs as long as its longest sequence. Where all programs run at once, order changes
    nothing; where they queue, tiles of like length finish early.

    Args:
        lengths: [2B], or [B] where sequences are not paired.
        B: pairs.
        target: as for `forward_tile`.
        P: directions, 1 or 2.
    """
    # three fit a multiprocessor
    if programs_each(lengths, P, target) <= 3:
        return None
    return torch.argsort(lengths.view(-1, B).amax(dim=0), descending=True, stable=True)
