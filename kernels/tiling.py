"""Which tile runs a shape on a target: a pure function, each row with its reason.

What a launch asks for at every call is remembered: it takes microseconds of the host to find out.
"""

from __future__ import annotations

import functools
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
# the hidden size up to which one program holds all units of a sequence; of a wider one several
# programs share them
NARROW = 128


@functools.cache
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

    APPROXIMATE: bool  # tanh by one instruction, 2^-11; float32 in products by its first 11 bits
    WIDEN: bool  # multiply the operands of a product in float32, once they are rounded
    ASSEMBLY: bool  # whether inline PTX is understood


def arithmetic(dtype: torch.dtype, allow_tf32: bool, target: str) -> Arithmetic:
    """Return how tensors of `dtype` are computed on `target`."""
    nvidia = target.startswith("sm_")
    # the interpreter would multiply a bfloat16's raw bits; AMD has no tf32
    approximate = nvidia and (dtype != torch.float32 or allow_tf32)
    return Arithmetic(approximate, target == "interpreter", nvidia)


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    block_h: int  # units of a program: a power of two >= H
    sequences: int  # of a program, two a pair
    num_warps: int
    stream: bool  # whether weight_hh is read every step instead of kept on chip
    operand: torch.dtype  # of a product's operands
    parts: int  # of an operand: with 2, what rounding to the first leaves is the second


@functools.cache
def forward_tile(H: int, dtype: torch.dtype, how: Arithmetic, target: str, load: int = 1) -> Tile:
    """Return the tile of the forward kernels.

    Args:
        H: hidden size, 1 <= H <= 128.
        dtype: float32, float16 or bfloat16.
        how: what `arithmetic` gives.
        target: "sm_90" and so on.
        load: sequences that a multiprocessor gets, see `load_of`; on it hang those of a program,
            and the warps.
    """
    block, (operand, parts) = block_h(H), _operand(dtype, how)
    passing = 4 * block * block * operand.itemsize
    stream = _streams(block, operand, parts, target, passing, exchange=block)
    # two programs of 4 sequences are quicker than one of 8 where both fit (348 estimated clocks of
    # a step on sm_90 in half precision at block 64, 421; training 419, 464). Three products a step
    # at block 128 leave no register for 4
    few = 8 if block <= 64 and parts == 1 else 4 if block <= 64 or parts == 1 else 0
    sequences = _sequences(target, load, few)
    warps = _forward_warps(block, parts, target, load > sequences)
    return Tile(block, sequences, warps, stream, operand, parts)


def _operand(dtype: torch.dtype, how: Arithmetic) -> tuple[torch.dtype, int]:
    # float16 has tf32's 11 bits, and a weight and a state need no wider range (gate gradients do,
    # and are scaled): half the registers, and half the matrix instructions. Two parts are 22 bits,
    # what three products of tf32 give, without its two parts of a weight in registers
    if dtype == torch.float32:
        return torch.float16, 1 if how.APPROXIMATE else 2
    return dtype, 1


def _forward_warps(block: int, parts: int, target: str, shared: bool) -> int:
    # a warp holds 8 units of a block: at block 32 there are only 4 groups of 8
    if block == 32:
        return 4
    # alone on its multiprocessor a program is quicker with 8 warps (estimated clocks of a step on
    # sm_90, half precision, 8 sequences: 421 against 481; training 464, 541): half the activations
    # each. Two share it better with 4 (617 against 502; 699, 585; of 4 sequences 433, 348; 493,
    # 419), three as well with either (838, 811)
    if block == 64 and parts == 1 and target.startswith("sm_") and shared:
        return 4
    return 8


@functools.cache
def backward_tile(H: int, dtype: torch.dtype, how: Arithmetic, target: str, load: int = 1) -> Tile:
    """Return the tile of the backward kernels; arguments as for `forward_tile`."""
    block, (operand, parts) = block_h(H), _operand(dtype, how)
    if dtype == torch.float32 and parts == 1 and block <= 64:
        # to scale gate gradients costs three barriers a step: here tf32, which needs no scale, is
        # quicker (714 estimated clocks against 989 on sm_90), and its weight fits the registers
        operand = torch.float32
    # its two halves pass through shared memory one after the other
    passing = 2 * block * block * operand.itemsize
    stream = _streams(block, operand, parts, target, passing, exchange=4 * block)
    # with 4 a step of float32 is no shorter (1659 estimated clocks against 1564 at block 64), nor
    # is that of tf32 at 32 (542, 470)
    few = 0 if parts == 2 or (block == 32 and operand == torch.float32) else 4
    sequences = _sequences(target, load, few)
    # where programs queue for a multiprocessor, 16 sequences in half precision share the matrix
    # instructions and barriers of a step: 81 estimated clocks a sequence instead of 120 at block
    # 128, of which one program fits, and 27 instead of 36 at 64, of which two fit and three.
    # Elsewhere they spill, or the compiler fails (sm_100)
    queue = load > (8 if block == 128 else 24)
    if queue and target == "sm_90" and dtype != torch.float32 and block > 32:
        sequences = 16
    # the accumulator has one row a unit, so a warp holds 16 units: 2, 4 or 8 warps cover the block
    return Tile(block, sequences, block // 16, stream, operand, parts)


class WideTile(NamedTuple):
    """What a wide kernel is compiled for, and how it is launched."""

    units: int  # of a program: a slice of them
    sequences: int  # of a tile, two a pair
    block_k: int  # columns of a slice of the weight, a power of two
    groups: int  # tiles that run at once
    num_warps: int


# units of a program of the wide forward: their gates are 128 rows of the weight, 32 of each of 4
# warps. With fewer the gates of a unit would not meet in one thread; more would not fit registers
FORWARD_UNITS = 32
# of the wide backward: a row each, the 64 rows of Hopper's matrix instruction
BACKWARD_UNITS = 64
# bytes of a slice of the weight that stays on chip, and of the operand of each step: both pass
# through registers, and with more the compiler spills
_ON_CHIP = {"sm_90": (131072, 32768), "sm_100": (131072, 16384)}
_ON_CHIP_ELSEWHERE = (65536, 8192)


@functools.cache
def wide_forward_tile(
    N: int, P: int, H: int, dtype: torch.dtype, target: str, at_once: int
) -> WideTile | None:
    """Return the tile of the wide forward, or None where H is too wide.

    Args:
        N: sequences.
        P: directions, 1 or 2.
        H: hidden size, above 128.
        dtype: float32, float16 or bfloat16.
        target: as for `forward_tile`.
        at_once: multiprocessors of the device.
    """
    rows = 4 * FORWARD_UNITS, block_h(H)
    return _wide_tile(
        N, P * block_h(H) // FORWARD_UNITS, FORWARD_UNITS, rows, dtype, target, at_once
    )


@functools.cache
def wide_backward_tile(
    N: int, P: int, H: int, dtype: torch.dtype, target: str, at_once: int
) -> WideTile | None:
    """Return the tile of the wide backward; arguments as for `wide_forward_tile`."""
    rows = BACKWARD_UNITS, 4 * block_h(H)
    return _wide_tile(
        N, P * block_h(H) // BACKWARD_UNITS, BACKWARD_UNITS, rows, dtype, target, at_once
    )


def _wide_tile(
    N: int,
    programs: int,  # that share a tile, both directions
    units: int,
    piece: tuple[int, int],  # rows and columns of a slice of the weight
    dtype: torch.dtype,
    target: str,
    at_once: int,
) -> WideTile | None:
    rows, inner = piece
    block_k = power_of_two_above(inner)
    # AMD's multiprocessors lack the space; the interpreter runs one program after another
    largest = _ON_CHIP.get(target, _ON_CHIP_ELSEWHERE) if target.startswith("sm_") else (0, 0)
    slice_bytes = rows * block_k * dtype.itemsize
    limit = SHARED_BYTES.get(target, LEAST_SHARED_BYTES) - 1024

    def fits(columns: int) -> bool:
        step_bytes = columns * block_k * dtype.itemsize
        on_chip = slice_bytes <= largest[0] and step_bytes <= largest[1]
        return on_chip and slice_bytes + step_bytes <= limit

    # all programs of a group have to run at once, a multiprocessor each
    groups = at_once // programs
    rounds = {columns: cdiv(N, columns * max(groups, 1)) for columns in (16, 32) if fits(columns)}
    if groups == 0 or not rounds:
        return None
    # with fewer columns a step is shorter
    columns = min(rounds, key=lambda columns: (rounds[columns], columns))
    return WideTile(units, columns, block_k, groups, 4)


@functools.cache
def largest_hidden(dtype: torch.dtype, training: bool, target: str, at_once: int) -> int:
    """Return the largest H whose layers run in one launch, whatever their directions."""
    wide = [
        H
        for H in range(NARROW + 64, 2048, 64)
        if wide_forward_tile(2, 2, H, dtype, target, at_once)
        and (not training or wide_backward_tile(2, 2, H, dtype, target, at_once))
    ]
    return max(wide, default=NARROW)


def wide_obstacle(
    H: int, dtype: torch.dtype, training: bool, allow_tf32: bool, device: torch.device
) -> str:
    """Return what keeps a hidden size above 128 from the wide kernels, in one clause, or ""."""
    target = target_of(device)
    limit, precision = NARROW, product_precision(dtype, allow_tf32, target)
    # three products of tf32 want each slice of the weight twice
    if precision != "tf32x3":
        limit = largest_hidden(dtype, training, target, multiprocessors(device, target))
    if H <= limit:
        return ""
    how = "with gradients" if training else "without gradients"
    full = " unless torch.backends.cudnn.rnn.fp32_precision is 'tf32'"
    return (
        f"H must be at most {limit} for backend 'triton' in {dtype} {how} on {target}"
        f"{full if precision == 'tf32x3' else ''}, got {H}"
    )


def all_registers(target: str) -> dict[str, int]:
    """Return what tells the compiler that a program may have all registers that there are.

    Told to the backward kernels, and to the forward ones that `forward_options` names.
    """
    # left alone it orders a step for the 64 or 128 with which one more program would fit, and waits
    # for more: 555 estimated clocks against 515 of the LSTM's backward with 8 sequences at block
    # 64, 882, 716 with 16; 519, 391 of the GRU's with 4; 342, 325 of inference without ids
    return {"maxnreg": 255} if target.startswith("sm_") else {}


def forward_options(target: str, has_ids: bool, store_records: bool) -> dict[str, int]:
    """Return what the compiler is told for the forward kernels on `target`, beside their tile."""
    # with ids, or beside the records' stores, nothing is gained by more registers
    return {} if has_ids or store_records else all_registers(target)


def block_h(H: int) -> int:
    """Return hidden size H with its padding: of a narrow H the units of a program."""
    if H > NARROW:
        # whole slices of units, and whole pieces of an inner dimension
        return cdiv(H, 64) * 64
    # the dot product's inner dimension is at least 16; below 32 the work is all latency
    return 32 if H <= 32 else 64 if H <= 64 else 128


def _sequences(target: str, load: int, few: int) -> int:
    # 4 have one of a thread's two columns each: half the activations of a step, and twice the
    # programs. Alone on a multiprocessor such a program's step is shorter (estimated clocks on
    # sm_90, half precision, block 64: 321 against 421; training 346, 464; backward 459, 515)
    if not target.startswith("gfx") and load <= few:
        return 4
    return _columns(target)


def _columns(target: str) -> int:
    # of the smallest matrix instruction: the fewer, the more programs share the work
    return 16 if target.startswith("gfx") else 8


def _streams(
    block: int, operand: torch.dtype, parts: int, target: str, passing: int, exchange: int
) -> bool:
    """Return whether weight_hh does not fit on chip.

    Args:
        block: units.
        operand: dtype of its elements.
        parts: of an element.
        target: as for `forward_tile`.
        passing: bytes of it that pass through shared memory at a time, on their way to registers.
        exchange: elements that a sequence sends through it every step.
    """
    if target == "interpreter":
        return parts == 2 and block == 128
    limit = SHARED_BYTES.get(target, LEAST_SHARED_BYTES)
    if target.startswith("gfx"):
        # wavefronts of 64 leave half the registers a cell, and the weight stays in shared memory
        # beside the exchange
        return 2 * parts * passing > limit
    # the second part stays there
    kept = (parts - 1) * 4 * block * block * operand.itemsize
    exchanged = _columns(target) * exchange * parts * operand.itemsize
    return max(passing, kept) + exchanged > limit


def load_of(lengths: Tensor, P: int, target: str) -> int:
    """Return how many of the sequences of `lengths` a multiprocessor gets.

    Args:
        lengths: [N], on the device that runs them.
        P: directions, 1 or 2, each of which counts.
        target: as for `forward_tile`.
    """
    return cdiv(lengths.shape[0] * P, multiprocessors(lengths.device, target))


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
    # three programs fit a multiprocessor
    if load_of(lengths, P, target) <= 3 * _columns(target):
        return None
    return longest_first(lengths, B)


def longest_first(lengths: Tensor, B: int) -> Tensor:
    """Return the pairs (sequences, where `lengths` is [B]) by length, [B], longest first."""
    return torch.argsort(lengths.view(-1, B).amax(dim=0), descending=True, stable=True)


def parts_of_tokens(device: torch.device, target: str, tiles: int, blocks: int) -> int:
    """Return into how many parts a sum over tokens is split, a power of two up to 32.

    Args:
        device: that adds.
        target: as for `forward_tile`.
        tiles: of the result, each a program.
        blocks: of tokens, valid or not.
    """
    # two programs of eight warps a multiprocessor hide each other's loads; each part is written and
    # read again, so none is made for less than eight blocks
    wanted = min(2 * multiprocessors(device, target) // tiles, blocks // 8, 32)
    return power_of_two_below(wanted)


def cdiv(n: int, size: int) -> int:
    """Return how many pieces of `size` hold n: triton.cdiv, some microseconds sooner."""
    return -(-n // size)


def power_of_two_below(n: int) -> int:
    """Return the largest power of two up to n, and at least 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def power_of_two_above(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def product_precision(dtype: torch.dtype, allow_tf32: bool, target: str) -> str:
    """Return what tl.dot is told of the precision of operands of `dtype`."""
    if dtype != torch.float32 or not target.startswith("sm_"):
        return "ieee"
    # three products on matrix instructions, which have float32's accuracy to a few bits
    return "tf32" if allow_tf32 else "tf32x3"


@functools.cache
def multiprocessors(device: torch.device, target: str) -> int:
    """Return how many a device has; 1 where the interpreter runs."""
    if target == "interpreter":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
