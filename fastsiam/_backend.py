"""The only place that picks an implementation, and says why."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from fastsiam._measured import Call, Row, nearest
from fastsiam.kernels._tiling import NARROW

BACKENDS = ("auto", "triton", "torch", "lstm", "reference")
MAX_TRITON_HIDDEN = 2048
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# asked once, here: torch.compile does not look into find_spec
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Choice(NamedTuple):
    """A backend and the reason it was picked."""

    backend: str
    reason: str


def resolve_backend(
    who: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    call: Call | None = None,
    machine: str = "",
    otherwise: str = "lstm",
) -> Choice:
    """Return the backend that runs, or raise if a named one cannot.

    "auto" takes "triton" on CUDA where its kernels cover the call and `otherwise` for the rest on
    CUDA, "torch" elsewhere; but "lstm" where the measurement nearest to the call found it faster.
    Of an H above 128 "triton" has to be measured to be taken.

    Args:
        who: the caller's name, for the message.
        backend: one of BACKENDS.
        device: where the inputs are.
        dtype: what the weights are computed in.
        H: hidden size.
        call: what is to be done; None where that is not known, and no measurement is asked then.
        machine: the name of `device` in the table of measurements.
        otherwise: "lstm", which is cuDNN there, or "torch" for work that is not an LSTM's.

    Raises:
        ValueError: the name is unknown, or the named backend cannot take this call.
        ImportError: "triton" was named and is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "triton"):
        return Choice(backend, "named by the caller")
    if backend == "triton":
        if not HAS_TRITON:
            raise ImportError(
                f"{who}: backend 'triton' needs the package triton, which is not installed; "
                "pip install triton (Linux), or pass backend='torch'"
            )
        if obstacle := _triton_obstacle(device, dtype, H):
            raise ValueError(f"{who}: {obstacle}; pass backend='torch'")
        return Choice("triton", "named by the caller")
    choice = _by_rule(device, dtype, H, otherwise)
    row = None if call is None or choice.backend == "lstm" else nearest(machine, call)
    if row is not None and row.other == choice.backend:
        return _by_measurement(choice, row)
    if choice.backend == "triton" and H > NARROW:
        return Choice(
            otherwise, f"H is above {NARROW}, where triton is taken if measured to be faster"
        )
    return choice


@functools.lru_cache(maxsize=1024)
def _by_measurement(choice: Choice, row: Row) -> Choice:
    """Return "lstm" where it won, else the choice by the rule, with the measurement."""
    if row.ratio < 1:
        return Choice("lstm", str(row))
    return Choice(choice.backend, f"{choice.reason}; {row}")


def _by_rule(device: torch.device, dtype: torch.dtype, H: int, otherwise: str) -> Choice:
    """Return what "auto" takes without a measurement."""
    if device.type != "cuda":
        return Choice("torch", f"inputs are on {device.type}, and triton's kernels run on cuda")
    if obstacle := _triton_obstacle(device, dtype, H):
        return Choice(otherwise, obstacle)
    if not HAS_TRITON:
        return Choice(otherwise, "triton is not installed")
    return Choice("triton", "inputs are on cuda and the kernels cover this shape")


def interpreted() -> bool:
    """Return whether Triton's interpreter is on: kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(device: torch.device, dtype: torch.dtype, H: int) -> str:
    """Return what keeps the kernels from this call, or an empty string."""
    if H > MAX_TRITON_HIDDEN:
        return f"H must be at most {MAX_TRITON_HIDDEN} for backend 'triton', got {H}"
    if dtype not in TRITON_DTYPES:
        return f"dtype must be float32, float16 or bfloat16 for backend 'triton', got {dtype}"
    if device.type != "cuda" and not interpreted():
        return (
            f"backend 'triton' needs CUDA tensors, got {device.type} "
            "(TRITON_INTERPRET=1, set before fastsiam is imported, runs the kernels interpreted)"
        )
    return ""
