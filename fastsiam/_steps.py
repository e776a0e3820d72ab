"""The compiled library of kernels/cpu, where this installation has it.

It takes float32 on a CPU; `batched` runs tensor operations for all else, and where no C++ compiler
was found when fastsiam was installed. What its functions do and take is told there.
"""

from __future__ import annotations

import ctypes
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# above it a call with few sequences copies and reads more weights than it computes with
MAX_HIDDEN = 512
# the interface, as in kernels/cpu/steps.cpp
VERSION = 4

_POOLINGS = {"last": 0, "max": 1, "mask": 2}

# fields of Layer in kernels/cpu/batch.h
_SIZES = ("P", "N", "T", "H", "D", "R", "pooling", "threads")
_TENSORS = (
    *("lengths", "ids", "mask", "x", "weight_ih", "weight_hh", "bias", "table", "panels"),
    *("vectors", "outputs", "peaks", "gates", "before_h", "before_c"),
    *("dvectors", "doutputs", "dx", "dweight_ih", "dweight_hh", "dbias"),
)

_FOLDER = Path(__file__).parent


class _Layer(ctypes.Structure):
    """What kernels/cpu/batch.h calls Layer."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library for this processor, or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = [f"_compiled_steps{suffix}" for suffix in EXTENSION_SUFFIXES]
    if capability == "AVX512":
        names = [f"_compiled_steps_avx512{suffix}" for suffix in EXTENSION_SUFFIXES] + names
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX" not in capability:
        return None, f"they need AVX2, and PyTorch names this processor {capability}"
    why_not = "this installation of fastsiam was made without a C++ compiler that takes them"
    for file in (_FOLDER / name for name in names):
        if file.exists():
            library, why_not = _open(file)
            if library is not None:
                return library, ""
    return None, why_not


def _open(file: Path) -> tuple[ctypes.CDLL | None, str]:
    """Return the library in a file, or why it is of no use."""
    try:
        library = ctypes.CDLL(str(file))
        if library.version() != VERSION:
            return None, "they are of another version; install fastsiam again"
        library.panel.restype = ctypes.c_int64
        for cell in ("lstm", "gru"):
            for what in ("prepare", "forward", "backward"):
                function = getattr(library, f"{cell}_{what}")
                function.argtypes, function.restype = [ctypes.POINTER(_Layer)], ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"they could not be loaded: {error}"
    return library, ""


_LIBRARY, _WHY_NOT = _load()


def obstacle(device: torch.device, dtype: torch.dtype, H: int) -> str:
    """Return what keeps the compiled loops from states like these, or an empty string."""
    if device.type != "cpu":
        return f"they run on a CPU, and the inputs are on {device.type}"
    if dtype != torch.float32:
        return f"they take float32, and the states are {str(dtype).removeprefix('torch.')}"
    if H > MAX_HIDDEN:
        return f"they take H up to {MAX_HIDDEN}, and it is {H}"
    return _WHY_NOT


def panels_shape(P: int, K: int, N: int) -> tuple[int, ...]:
    """Return the shape of `panels` for the right-hand sides of products, [P, K, N]."""
    panel = _library().panel()
    return P, -(-N // panel), K, panel


def run(
    what: str,
    cell: str,
    P: int,
    N: int,
    T: int,
    H: int,
    D: int,
    R: int,
    pooling: str = "last",
    **tensors: Tensor | None,
) -> None:
    """Call the library.

    Args:
        what: "prepare", "forward" or "backward".
        cell: "lstm" or "gru".
        P, N, T, H, D, R, pooling, tensors: the fields of Layer; tensors without gaps,
            float32 but for lengths and ids, int64, and peaks, int32.

    Raises:
        IndexError: an id is no row.
        MemoryError: there is none left.
    """
    layer = _Layer(P, N, T, H, D, R, _POOLINGS[pooling], torch.get_num_threads())
    for name, tensor in tensors.items():
        if tensor is not None:
            # a pointer says nothing of strides
            assert tensor.is_contiguous(), name
            setattr(layer, name, tensor.data_ptr())
    outcome = getattr(_library(), f"{cell}_{what}")(layer)
    if outcome == 1:
        raise IndexError(f"an id is not from 0 to {R - 1}")
    if outcome:
        raise MemoryError(f"no memory for a batch of {N} sequences of up to {T} steps")


def _library() -> Any:
    return _LIBRARY
