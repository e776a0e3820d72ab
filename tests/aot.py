"""Compile every kernel for GPUs that are not there, and read the machine code of its step loop.

    python tests/aot.py [--quick] [--json FILE]

prints a table and writes the rows as JSON. Exit status 1 where a promise is broken: a tile that
`tiling.py` offers does not fit its target or spills, or a step loop is longer than BOUNDS says.
Triton brings ptxas, cuobjdump and nvdisasm; AMD's assembler prints its own counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # kernels are compiled here, whatever the tests do
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsiam.kernels import tiling, weight_gradients
from fastsiam.kernels.pack import COLUMNS, UNITS, WARPS, _pack_kernel
from fastsiam.kernels.pairwise import _manhattan_pairs_kernel
from fastsiam.kernels.recurrence_bwd import recurrence_bwd_kernel
from fastsiam.kernels.recurrence_fwd import recurrence_fwd_kernel
from fastsiam.kernels.tile import in_triton
from fastsiam.kernels.wide_bwd import wide_bwd_kernel
from fastsiam.kernels.wide_fwd import score_kernel, wide_fwd_kernel

TARGETS = tuple(tiling.SHARED_BYTES)
DTYPES = ("bfloat16", "float16", "tf32", "float32")
HIDDEN = (16, 50, 64, 100, 128, 256, 512, 1024)
# sequences of a multiprocessor, by which tiles differ: one program has it, two of 4 sequences share
# it, two of 8 do, programs queue
LOADS = (4, 8, 16, 32)
# the wide kernels' tiles hang on the batch: here of a GPU with so many multiprocessors
MULTIPROCESSORS = 132
FEW, MANY = 256, 16384

COMMON = {"DIRECTIONS": 1, "POOLING": "last", "PAIRED": True, "HAS_ORDER": False}
PLAIN_FWD = COMMON | {
    "HAS_IDS": True,
    "STORE_RECORDS": False,
    "STORE_OUTPUTS": False,
}
PLAIN_BWD = COMMON | {
    "HAS_DSIM": True,
    "HAS_DPAIR": False,
    "HAS_DVECTORS": False,
    "HAS_DOUTPUTS": False,
}
TRAIN = PLAIN_FWD | {"STORE_RECORDS": True}
ENCODE_BWD = PLAIN_BWD | {"PAIRED": False, "HAS_DSIM": False, "HAS_DVECTORS": True}
PACK = {
    "COLUMNS": COLUMNS,
    "GATES": 4,
    "BY_UNIT": False,
    "HAS_INPUT": True,
    "HAS_BIAS": True,
    "AHEAD": True,
    "BACK": False,
}
SUM_TOKENS = {
    "ROWS": weight_gradients.ROWS,
    "COLUMNS": weight_gradients.COLUMNS,
    "TOKENS": weight_gradients.TOKENS,
    "STEPS": weight_gradients.STEPS,
    "HAS_IDS": True,
}
COLLECT = {
    "UNITS": weight_gradients.UNITS,
    "COLUMNS": weight_gradients.COLUMNS,
    "PARTS": 16,
    "GATES": 4,
}
BOTH_WAYS = {"DIRECTIONS": 2}
MAXIMUM = {"POOLING": "max"}
MASKED = {"POOLING": "mask"}
PLAIN = ("lstm_fwd", "lstm_fwd_train", "lstm_bwd")
GRU = ("gru_fwd", "gru_fwd_train", "gru_bwd")
ALL_STATES = {"STORE_OUTPUTS": True}
FORWARDS = {
    "fwd": PLAIN_FWD,
    "fwd_train": TRAIN,
    "fwd_dense": PLAIN_FWD | {"HAS_IDS": False},
    "fwd_mask": PLAIN_FWD | MASKED,
    "fwd_grouped": PLAIN_FWD | {"HAS_ORDER": True},
    "fwd_encode": PLAIN_FWD | {"PAIRED": False},
    "fwd_both_ways": PLAIN_FWD | BOTH_WAYS,
    "fwd_max": PLAIN_FWD | MAXIMUM,
    "fwd_outputs": PLAIN_FWD | ALL_STATES,
    "fwd_train_dense": TRAIN | {"HAS_IDS": False},
    "fwd_train_mask": TRAIN | MASKED,
    "fwd_train_both_ways": TRAIN | BOTH_WAYS,
    "fwd_train_max": TRAIN | MAXIMUM,
    "fwd_train_outputs": TRAIN | ALL_STATES,
}
BACKWARDS = {
    "bwd": PLAIN_BWD,
    "bwd_mask": PLAIN_BWD | MASKED,
    "bwd_encode": ENCODE_BWD,
    "bwd_both_ways": PLAIN_BWD | BOTH_WAYS,
    "bwd_max": PLAIN_BWD | MAXIMUM,
    "bwd_outputs": PLAIN_BWD | {"HAS_DOUTPUTS": True},
}
WIDE_FORWARDS = {
    "fwd": PLAIN_FWD | {"HAS_ORDER": True},
    "fwd_train": TRAIN | {"HAS_ORDER": True},
    "fwd_train_max": TRAIN | BOTH_WAYS | MAXIMUM,
    "fwd_outputs": PLAIN_FWD | ALL_STATES,
}
WIDE_BACKWARDS = {
    "bwd": PLAIN_BWD | {"HAS_ORDER": True},
    "bwd_outputs": PLAIN_BWD | BOTH_WAYS | MASKED | {"HAS_DOUTPUTS": True},
}
KERNELS = {
    **{
        f"{prefix}{cell}_{name}": (kernel, flags | {"CELL": cell})
        for cell in ("lstm", "gru")
        for prefix, kernel, variants in (
            ("", recurrence_fwd_kernel, FORWARDS),
            ("", recurrence_bwd_kernel, BACKWARDS),
            ("wide_", wide_fwd_kernel, WIDE_FORWARDS),
            ("wide_", wide_bwd_kernel, WIDE_BACKWARDS),
        )
        for name, flags in variants.items()
    },
    # without a loop
    "score": (score_kernel, {"PAIRED": True, "BLOCK_F": 512}),
    "pack": (_pack_kernel, PACK),
    "pack_train": (_pack_kernel, PACK | {"BACK": True}),
    "pack_gru": (_pack_kernel, PACK | {"GATES": 3}),
    "pack_gru_train": (_pack_kernel, PACK | {"GATES": 3, "BACK": True}),
    "pack_input": (_pack_kernel, PACK | {"HAS_BIAS": False, "AHEAD": False}),
    "collect": (weight_gradients._collect_kernel, COLLECT),
    "collect_gru": (weight_gradients._collect_kernel, COLLECT | {"GATES": 3}),
    # its loop is over tokens
    "weight_gradients": (weight_gradients._weight_gradients_kernel, SUM_TOKENS),
    "weight_gradients_dense": (
        weight_gradients._weight_gradients_kernel,
        SUM_TOKENS | {"HAS_IDS": False},
    ),
    # its loop is over features, and H says nothing
    "manhattan_pairs": (_manhattan_pairs_kernel, {"BLOCK_Q": 64, "BLOCK_M": 128}),
}
# of the step loop on sm_90, with 8 sequences a program: kernel, dtype, block of H, warps, and
# instructions of one warp at most
BOUNDS_8 = {
    ("lstm_fwd", "bfloat16", 64, 4): 110,
    ("lstm_fwd", "bfloat16", 128, 8): 135,
    ("lstm_fwd", "tf32", 64, 4): 110,
    ("lstm_fwd", "tf32", 128, 8): 130,
    ("lstm_fwd_train", "bfloat16", 64, 4): 175,
    ("lstm_fwd_train", "bfloat16", 128, 8): 190,
    ("lstm_fwd_train", "tf32", 64, 4): 150,
    ("lstm_fwd_train", "tf32", 128, 8): 170,
    ("lstm_bwd", "bfloat16", 64, 4): 175,
    ("lstm_bwd", "bfloat16", 128, 8): 205,
    ("lstm_bwd", "tf32", 64, 4): 175,
    ("gru_fwd", "bfloat16", 64, 4): 103,
    ("gru_fwd", "bfloat16", 128, 8): 135,
    ("gru_fwd_train", "bfloat16", 64, 4): 155,
    ("gru_fwd_train", "bfloat16", 128, 8): 175,
    ("gru_bwd", "bfloat16", 64, 4): 175,
    ("gru_bwd", "bfloat16", 128, 8): 205,
    ("gru_bwd", "tf32", 64, 4): 195,
    ("manhattan_pairs", "float32", 64, 4): 165,
    ("weight_gradients", "bfloat16", 128, 8): 100,
    ("lstm_fwd", "float32", 64, 8): 230,
    ("lstm_fwd", "float32", 128, 8): 490,
    ("lstm_fwd_train", "float32", 64, 8): 258,
    ("lstm_fwd_train", "float32", 128, 8): 540,
    ("lstm_bwd", "tf32", 128, 8): 202,
    ("lstm_bwd", "float32", 64, 4): 298,
    ("lstm_bwd", "float32", 128, 8): 460,
    ("gru_fwd_train", "tf32", 128, 8): 150,
    ("gru_fwd_train", "float32", 128, 8): 425,
    ("gru_bwd", "tf32", 128, 8): 182,
    ("gru_bwd", "float32", 64, 4): 270,
    ("gru_bwd", "float32", 128, 8): 355,
}
# the same with 4 sequences a program, where few share a multiprocessor
BOUNDS_4 = {
    ("lstm_fwd", "bfloat16", 64, 4): 80,
    ("lstm_fwd", "bfloat16", 64, 8): 55,
    ("lstm_fwd", "bfloat16", 128, 8): 102,
    ("lstm_fwd", "float16", 64, 8): 55,
    ("lstm_fwd", "tf32", 64, 4): 80,
    ("lstm_fwd", "tf32", 64, 8): 54,
    ("lstm_fwd", "tf32", 128, 8): 97,
    ("lstm_fwd", "float32", 64, 8): 155,
    ("lstm_fwd_train", "bfloat16", 64, 4): 124,
    ("lstm_fwd_train", "bfloat16", 64, 8): 78,
    ("lstm_fwd_train", "bfloat16", 128, 8): 142,
    ("lstm_fwd_train", "tf32", 64, 4): 112,
    ("lstm_fwd_train", "tf32", 64, 8): 72,
    ("lstm_fwd_train", "tf32", 128, 8): 130,
    ("lstm_fwd_train", "float32", 64, 8): 182,
    ("lstm_bwd", "bfloat16", 64, 4): 116,
    ("lstm_bwd", "bfloat16", 128, 8): 145,
    ("lstm_bwd", "tf32", 64, 4): 132,
    ("lstm_bwd", "tf32", 128, 8): 150,
    ("lstm_fwd_mask", "bfloat16", 64, 8): 63,
    ("lstm_fwd_both_ways", "bfloat16", 64, 8): 56,
    ("lstm_fwd_max", "bfloat16", 64, 8): 56,
    ("lstm_fwd_outputs", "bfloat16", 64, 8): 74,
    ("lstm_fwd_train_mask", "bfloat16", 64, 8): 84,
    ("lstm_fwd_train_both_ways", "bfloat16", 64, 8): 78,
    ("lstm_fwd_train_max", "bfloat16", 64, 8): 79,
    ("lstm_fwd_train_outputs", "bfloat16", 64, 8): 92,
    ("lstm_bwd_mask", "bfloat16", 64, 4): 124,
    ("lstm_bwd_both_ways", "bfloat16", 64, 4): 116,
    ("lstm_bwd_max", "bfloat16", 64, 4): 116,
    ("lstm_bwd_outputs", "bfloat16", 64, 4): 144,
    ("gru_fwd", "bfloat16", 64, 4): 77,
    ("gru_fwd", "bfloat16", 64, 8): 54,
    ("gru_fwd", "bfloat16", 128, 8): 99,
    ("gru_fwd", "tf32", 64, 8): 52,
    ("gru_fwd_train", "bfloat16", 64, 4): 106,
    ("gru_fwd_train", "bfloat16", 64, 8): 67,
    ("gru_fwd_train", "bfloat16", 128, 8): 126,
    ("gru_fwd_train", "tf32", 64, 8): 65,
    ("gru_bwd", "bfloat16", 64, 4): 113,
    ("gru_bwd", "bfloat16", 128, 8): 133,
    ("gru_bwd", "tf32", 64, 4): 139,
    ("gru_bwd", "tf32", 128, 8): 134,
}
# with 16, where programs queue or H is wide
BOUNDS_16 = {
    ("lstm_bwd", "bfloat16", 64, 4): 312,
    ("lstm_bwd", "bfloat16", 128, 8): 345,
    ("gru_bwd", "bfloat16", 64, 4): 300,
    ("gru_bwd", "bfloat16", 128, 8): 330,
    # one launch, waiting included
    ("wide_lstm_fwd", "bfloat16", 256, 4): 340,
    ("wide_lstm_fwd_train", "bfloat16", 256, 4): 400,
    ("wide_lstm_fwd_train", "tf32", 256, 4): 580,
    ("wide_lstm_bwd", "bfloat16", 256, 4): 620,
    ("wide_gru_fwd", "bfloat16", 256, 4): 332,
    ("wide_gru_fwd_train", "bfloat16", 256, 4): 373,
    ("wide_gru_fwd_train", "tf32", 256, 4): 554,
    ("wide_gru_bwd", "bfloat16", 256, 4): 629,
}
BOUNDS_OF = {4: BOUNDS_4, 8: BOUNDS_8, 16: BOUNDS_16, 32: {}}
# versions of the compiler differ by a few instructions
SLACK = 1.05
# where gate gradients are scaled for float16, their largest passes between warps
SCALED_BARRIERS = 5
# in one launch: three of the wait, one of the arrival, one of the product
WAITING_BARRIERS = 5
# kernels of whole layers, without a step loop, and their warps
LAYERS = {
    "pack": WARPS,
    "pack_train": WARPS,
    "pack_gru": WARPS,
    "pack_gru_train": WARPS,
    "pack_input": WARPS,
    "collect": weight_gradients.WARPS,
    "collect_gru": weight_gradients.WARPS,
    "weight_gradients": weight_gradients.WARPS,
    "weight_gradients_dense": weight_gradients.WARPS,
    "score": 4,
}
WIDE = ("wide_lstm_fwd", "wide_lstm_fwd_train", "wide_lstm_bwd")
WIDE_GRU = tuple(kernel.replace("lstm", "gru") for kernel in WIDE)
WIDE_VARIANTS = tuple(
    kernel for kernel in KERNELS if kernel.startswith("wide_") and kernel not in (*WIDE, *WIDE_GRU)
)
VARIANTS = tuple(
    kernel
    for kernel in KERNELS
    if kernel not in (*PLAIN, *GRU, *LAYERS, *WIDE, *WIDE_GRU, *WIDE_VARIANTS, "manhattan_pairs")
)
# of a test run: every bound that is promised on sm_90, and the hardest shape elsewhere
_QUICK = {
    *itertools.product(PLAIN, ("sm_90",), DTYPES[:3], (64,)),
    *itertools.product(PLAIN, ("sm_90",), ("bfloat16",), (32, 128)),
    *itertools.product(PLAIN, TARGETS, ("bfloat16",), (128,)),
    *itertools.product(PLAIN[1:], TARGETS, ("tf32",), (64,)),
    *itertools.product(PLAIN[1:], ("sm_86", "sm_120"), ("float16",), (128,)),
    ("lstm_fwd_train", "sm_86", "float32", 128),
    *itertools.product(PLAIN, ("sm_90",), ("tf32", "float32"), (64, 128)),
    ("lstm_bwd", "gfx942", "float32", 64),
    *itertools.product(GRU, ("sm_90",), ("bfloat16", "tf32"), (64, 128)),
    *itertools.product(GRU[1:], ("sm_90",), ("float32",), (128,)),
    ("gru_bwd", "sm_90", "float32", 64),
    *itertools.product(GRU[1:], ("sm_86",), ("bfloat16",), (128,)),
}


class Job(NamedTuple):
    """What to compile."""

    kernel: str
    target: str
    dtype: str
    tile: tiling.Tile
    wide: tiling.WideTile | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out; counts of the loop are of one warp and one time step."""

    kernel: str
    target: str
    dtype: str
    H: int
    sequences: int
    num_warps: int
    streamed: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    loop_instructions: int | None = None
    loop_barriers: int | None = None
    loop_spills: int | None = None
    loop_shared_loads: int | None = None  # h alone where registers hold W_hh


def tile_of(kernel: str, H: int, dtype: str, target: str, load: int) -> tiling.Tile:
    """Return the tile that `tiling.py` gives where a multiprocessor gets `load` sequences."""
    how = arithmetic(dtype, target)
    choose = tiling.backward_tile if "_bwd" in kernel else tiling.forward_tile
    tile = choose(H, torch_dtype(dtype), how, target, load)
    warps = LAYERS.get(kernel, 4 if kernel == "manhattan_pairs" else tile.num_warps)
    return tile._replace(num_warps=warps)


def torch_dtype(dtype: str) -> torch.dtype:
    name = "float32" if dtype == "tf32" else dtype
    made: torch.dtype = getattr(torch, name)
    return made


def wide_job(kernel: str, target: str, dtype: str, H: int, N: int) -> Job | None:
    """Return a job with the tile that `tiling.py` gives to N sequences, if it gives one."""
    choose = tiling.wide_backward_tile if "_bwd" in kernel else tiling.wide_forward_tile
    if precision(dtype, target) == "tf32x3":
        return None
    P, operand = KERNELS[kernel][1]["DIRECTIONS"], torch_dtype(dtype)
    wide = choose(N, P, H, operand, target, MULTIPROCESSORS)
    if wide is None:
        return None
    tile = tiling.Tile(H, wide.sequences, wide.num_warps, False, operand, parts=1)
    return Job(kernel, target, dtype, tile, wide)


def precision(dtype: str, target: str) -> str:
    return tiling.product_precision(torch_dtype(dtype), dtype == "tf32", target)


def arithmetic(dtype: str, target: str) -> tiling.Arithmetic:
    return tiling.arithmetic(torch_dtype(dtype), dtype == "tf32", target)


def compile_job(job: Job) -> Any:
    """Compile one kernel as a launch would: pointers divisible by 16, sizes unknown."""
    function, flags = KERNELS[job.kernel]
    element = {"bfloat16": "*bf16", "float16": "*fp16"}.get(job.dtype, "*fp32")
    half = element != "*fp32"
    words = "*i32" if half else "*fp32"
    backward = "_bwd" in job.kernel
    operand = f"*{in_triton(job.tile.operand)}"
    types = {
        "table_ptr": words,
        "weight_ptr": "*i16" if job.tile.operand.itemsize == 2 else "*i32",
        "carried_h_ptr": element,
        "arrived_ptr": "*i32",
        "ids_ptr": "*i64",
        "lengths_ptr": "*i64",
        "order_ptr": "*i64",
        "vectors_ptr": element,
        "dvectors_ptr": element,
        "outputs_ptr": element,
        "doutputs_ptr": element,
        "peaks_ptr": "*i32",
        "gates_ptr": words if backward else element,
        "cells_ptr": words if backward else element,
        "before_ptr": element if flags.get("CELL") == "gru" else words,
        "states_ptr": element,
        "dgates_ptr": element,
        **{f"{way}{name}_ptr": element for way in ("weight_", "packed_") for name in ("ih", "hh")},
        **{f"dweight_{name}_ptr": element for name in ("ih", "hh")},
        "x_ptr": element,
        "bias_ptr": element,
        "dbias_ptr": element,
        "packed_bias_ptr": element,
        "ahead_ptr": operand,
        "back_ptr": operand,
        "scale": "fp32",
    }
    constants = {
        "BLOCK_H": job.tile.block_h,
        "BLOCK_N": job.tile.sequences,
        "WARPS": job.tile.num_warps,
        "STREAM": job.tile.stream,
        "OPERAND": in_triton(job.tile.operand),
        "PARTS": job.tile.parts,
        "AHEAD_PARTS": job.tile.parts,
        "BACK_PARTS": job.tile.parts,
        "PRECISION": precision(job.dtype, job.target),
        "UNITS": math.gcd(job.tile.block_h, UNITS),
        "SLICE": job.tile.block_h,
        **arithmetic(job.dtype, job.target)._asdict(),
        **flags,
    }
    options = {"num_warps": job.tile.num_warps}
    if backward and job.wide is None:
        options |= tiling.all_registers(job.target)
    elif "STORE_RECORDS" in flags and job.wide is None:
        has_ids, store_records = flags["HAS_IDS"], flags["STORE_RECORDS"]
        options |= tiling.forward_options(job.target, has_ids, store_records)
    if job.wide is not None:
        types["weight_ptr"] = element
        constants |= {
            "UNITS": job.wide.units,
            "BLOCK_K": job.wide.block_k,
            "PRECISION": precision(job.dtype, job.target),
        }
        options["num_stages"] = 1
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride")
    }
    constants = {name: constants[name] for name in signature if name in constants}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    if job.target.startswith("gfx"):
        gpu = GPUTarget("hip", job.target, 64)
    else:
        gpu = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    return triton.compile(source, target=gpu, options=options)


def measure(job: Job) -> Row:
    """Compile and read off what a row of the table says."""
    compiled = compile_job(job)
    counts: dict[str, int | None] = {}
    if job.target.startswith("gfx"):
        listing = compiled.asm["amdgcn"]
        registers = _field(r"\.vgpr_count:\s+(\d+)", listing)
        spilled = _field(r"\.private_segment_fixed_size:\s+(\d+)", listing)
    else:
        usage, listing = _disassemble(compiled.asm["cubin"])
        registers = _field(r"REG:(\d+)", usage)
        spilled = _field(r"STACK:(\d+)", usage)
        counts = _loop_counts(listing)
    return Row(
        job.kernel,
        job.target,
        job.dtype,
        job.tile.block_h,
        job.tile.sequences,
        job.tile.num_warps,
        job.tile.stream,
        registers,
        spilled,
        compiled.metadata.shared,
        **counts,
    )


def rows_for(job: Job, hidden: tuple[int, ...] = HIDDEN) -> list[Row]:
    """Return a row for each hidden size that this tile serves: H is no compile-time constant."""
    row = measure(job)
    served = [H for H in hidden if tiling.block_h(H) == job.tile.block_h]
    return [dataclasses.replace(row, H=H) for H in served]


def jobs(quick: bool) -> list[Job]:
    """Return everything to compile, or the part that fits a test run."""
    shapes: list[tuple[str, str, str, int]] = []
    for shape in itertools.product(PLAIN, TARGETS, DTYPES, (32, 64, 128)):
        _, target, dtype, H = shape
        # small blocks are easy everywhere: one target shows them in every dtype
        if H > 32 or target == "sm_90" or dtype == "bfloat16":
            shapes.append(shape)
    for shape in itertools.product(GRU, TARGETS, DTYPES, (64, 128)):
        _, target, dtype, _ = shape
        # the GRU's tiles are the LSTM's, and hold less: two dtypes show them elsewhere
        if target == "sm_90" or dtype in ("bfloat16", "tf32"):
            shapes.append(shape)
    for kernel in VARIANTS:
        # a variant differs from its kernel by a few instructions: one target says enough
        if not quick:
            shapes += itertools.product([kernel], ["sm_90"], ("bfloat16", "tf32"), (64, 128))
        elif "gru" not in kernel:
            shapes.append((kernel, "sm_90", "bfloat16", 64))
    found = [
        Job(kernel, target, dtype, tile_of(kernel, H, dtype, target, load))
        for kernel, target, dtype, H in shapes
        if not quick or kernel in VARIANTS or (kernel, target, dtype, H) in _QUICK
        for load in _loads(kernel, target, quick)
    ]
    targets = ("sm_90", "gfx942") if quick else TARGETS
    layers = list(itertools.product(["manhattan_pairs"], targets, ["float32"], [64]))
    for dtype, H in [("bfloat16", 128)] if quick else [("bfloat16", 128), ("tf32", 64)]:
        layers += itertools.product(LAYERS, targets, [dtype], [H])
    sums = ("weight_gradients", "weight_gradients_dense")
    layers += itertools.product(sums, ["sm_80"], ["tf32", "float32"], [64])
    found += [
        Job(kernel, target, dtype, tile_of(kernel, H, dtype, target, LOADS[2]))
        for kernel, target, dtype, H in layers
    ]
    # unlike loads may have one tile
    return list(dict.fromkeys(found)) + wide_jobs(quick)


def _loads(kernel: str, target: str, quick: bool) -> tuple[int, ...]:
    if not quick or (target == "sm_90" and kernel not in VARIANTS):
        return LOADS
    # the tile of few sequences, or elsewhere the one that needs most space
    return LOADS[:1] if kernel in VARIANTS else LOADS[2:3]


def wide_jobs(quick: bool) -> list[Job]:
    """Return the same for the kernels of a wide H."""
    plan: list[tuple[str, str, str, int, int]] = []
    targets = ("sm_80", "sm_120") if quick else ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    for kernel in (*WIDE, *WIDE_GRU):
        plan += [(kernel, "sm_90", "bfloat16", 256, N) for N in (FEW, MANY)]
        plan += [(kernel, target, "bfloat16", 256, FEW) for target in targets]
    if not quick:
        shapes = ((256, FEW), (512, FEW), (512, MANY))
        plan += [
            (kernel, target, dtype, *shape)
            for kernel, target, dtype, shape in itertools.product(
                (*WIDE, *WIDE_GRU), targets, ("bfloat16", "tf32", "float32"), shapes
            )
        ]
    plan += [(kernel, "sm_90", "bfloat16", 512, FEW) for kernel in (WIDE[0], WIDE_GRU[0])]
    plan += [(kernel, "sm_90", "tf32", 256, FEW) for kernel in (WIDE[1], WIDE_GRU[1])]
    plan += [(kernel, "sm_90", "bfloat16", 256, FEW) for kernel in WIDE_VARIANTS]
    jobs = {wide_job(*shape) for shape in plan} - {None}
    # unlike batches may have one tile
    return list(dict.fromkeys(job._replace(wide=job.wide._replace(groups=1)) for job in jobs))


def barriers_of(kernel: str, dtype: str, H: int) -> int:
    """Return how many barriers a step may have."""
    if kernel.startswith("wide_"):
        return WAITING_BARRIERS
    scaled = "_bwd" in kernel and (dtype == "float32" or (dtype == "tf32" and H > 64))
    return SCALED_BARRIERS if scaled else 2


def faults(row: Row) -> list[str]:
    """Return what is promised of a row and does not hold."""
    found = []
    limit = tiling.SHARED_BYTES[row.target]
    if row.shared_bytes > limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, {limit} there")
    # streamed on AMD, three products a step leave too few registers; elsewhere a few bytes of what
    # the loop has no use for may wait in memory until its end
    promised = not (row.streamed and row.target.startswith("gfx"))
    # what a wide kernel carries from step to step waits for the product's end, in its inner loop
    outside = 192 if row.kernel.startswith("wide_") else 16
    if promised and (row.spill_bytes > outside or row.loop_spills):
        found.append(f"{row.spill_bytes} bytes of spilled registers")
    bound = BOUNDS_OF[row.sequences].get((row.kernel, row.dtype, row.H, row.num_warps))
    if bound is not None and row.target == "sm_90":
        length, barriers = row.loop_instructions, row.loop_barriers
        most = barriers_of(row.kernel, row.dtype, row.H)
        if length is None or barriers is None or length > SLACK * bound or barriers > most:
            found.append(
                f"{length} instructions, {barriers} barriers a step; {bound}, {most} promised"
            )
    return found


def _field(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return int(found[1])


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return cuobjdump's resource usage and nvdisasm's listing."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ([tools / "cuobjdump", "-res-usage", path], [tools / "nvdisasm", "-c", path])
        usage, listing = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, listing


def _loop_counts(listing: str) -> dict[str, int | None]:
    """Count the instructions of the innermost loop that multiplies matrices, or adds a lot."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    bodies = []
    for end, text in enumerate(code):
        jump = re.search(r"BRA.*`\(\.(L_x_\d+)\)", text)
        if jump and labels.get(jump[1], end) < end:
            body = Counter(_opcode(each) for each in code[labels[jump[1]] : end + 1])
            if body["HMMA"] or body["HGMMA"] or body["UTCHMMA"] or body["FADD"] >= 128:
                bodies.append(body)
    if not bodies:
        return {}
    body = min(bodies, key=lambda each: each.total())
    return {
        "loop_instructions": body.total(),
        "loop_barriers": body["BAR"],
        "loop_spills": body["LDL"] + body["STL"],
        "loop_shared_loads": body["LDS"] + body["LDSM"],
    }


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the rows of a test run")
    parser.add_argument("--json", type=Path, default=Path("build/aot.json"))
    arguments = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        rows = [row for each in pool.map(rows_for, jobs(arguments.quick)) for row in each]
    names = [field.name for field in dataclasses.fields(Row)]
    cells = [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for line in [names, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    bad = [(row, fault) for row in rows for fault in faults(row)]
    for row, fault in bad:
        print(f"{row.kernel} {row.target} {row.dtype} H {row.H}: {fault}", file=sys.stderr)
    print(f"{len(rows)} rows, triton {triton.__version__}, written to {arguments.json}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
