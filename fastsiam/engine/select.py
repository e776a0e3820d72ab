"""The choice of a backend, and its reason: the only place that knows their names."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

from fastsiam.engine.batched import BATCHED
from fastsiam.engine.cpu import CPU
from fastsiam.engine.layer import Backend, Call
from fastsiam.engine.native import NATIVE
from fastsiam.engine.reference import REFERENCE
from fastsiam.engine.triton import AUTO_HIDDEN, TRITON

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TRITON, CPU, BATCHED, NATIVE, REFERENCE)
}
# "torch" is the compiled library where it takes a call, and tensor operations elsewhere
NAMES = ("auto", "torch", *BACKENDS)

# asked once, here: torch.compile does not look into find_spec
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Choice(NamedTuple):
    """A backend and the reason it was picked."""

    backend: Backend
    reason: str


def choose(who: str, name: str, call: Call) -> Choice:
    """Return the backend that runs a call, or raise if the named one cannot.

    Args:
        who: the caller's name, for the message.
        name: one of NAMES.
        call: what is to be computed.

    Raises:
        ValueError: the name is unknown, or the named backend cannot take this call.
        ImportError: "triton" was named and is not installed.
    """
    check_name(who, name)
    if name == "auto":
        return _automatic(call)
    if name == "torch":
        return Choice(_ours(call), "named by the caller")
    if name == "triton" and not HAS_TRITON:
        raise ImportError(
            f"{who}: backend 'triton' needs the package triton, which is not installed; "
            "pip install triton (Linux), or pass backend='torch'"
        )
    if obstacle := BACKENDS[name].obstacle(call):
        raise ValueError(f"{who}: {obstacle}; pass backend='torch'")
    return Choice(BACKENDS[name], "named by the caller")


def check_name(who: str, name: str) -> None:
    """Raise ValueError where a name is not one of NAMES."""
    if name not in NAMES:
        raise ValueError(f"{who}: backend must be one of {', '.join(NAMES)}, got {name!r}")


def takes_triton(who: str, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether work on pairs of vectors, which is no layer's, runs in a Triton kernel.

    Raises:
        ValueError: the name is not "auto", "triton" or "torch", or triton cannot take the call.
        ImportError: "triton" was named and is not installed.
    """
    if name not in ("auto", "triton", "torch"):
        raise ValueError(
            f"{who}: backend must be auto, triton or torch, got {name!r}; pass backend='torch'"
        )
    call = Call("lstm", 1, dtype, device, training=False)
    if name == "auto":
        return device.type == "cuda" and HAS_TRITON and not TRITON.obstacle(call)
    return choose(who, name, call).backend is TRITON


@functools.lru_cache(maxsize=1024)
def _automatic(call: Call) -> Choice:
    """Return the choice of "auto": a rule from measurements, of which docs/cpu.md has the table."""
    if call.device.type == "cuda":
        if obstacle := TRITON.obstacle(call):
            return Choice(NATIVE, obstacle)
        if not HAS_TRITON:
            return Choice(NATIVE, "triton is not installed")
        if call.H > AUTO_HIDDEN:
            return Choice(
                NATIVE, f"H is above {AUTO_HIDDEN}, and no GPU has measured triton there yet"
            )
        return Choice(TRITON, "inputs are on cuda and the kernels cover this shape")
    backend, few = _ours(call), _few(call)
    where = f"inputs are on {call.device.type}"
    if call.device.type == "cpu" and (obstacle := CPU.obstacle(call)):
        where += f", and {obstacle}"
    if call.sequences is not None and call.sequences <= few:
        return Choice(
            NATIVE, f"{where}, and torch's own LSTM is faster up to {few // 2} pairs here"
        )
    if call.sequences is None and few:
        where += f"; up to {few // 2} pairs lstm, which is faster there"
    return Choice(backend, where)


def _ours(call: Call) -> Backend:
    return BATCHED if CPU.obstacle(call) else CPU


def _few(call: Call) -> int:
    """Return the number of sequences up to which torch's own recurrence is faster on a CPU."""
    measured = call.cell == "lstm" and call.dtype == torch.float32 and call.device.type == "cpu"
    if not measured:
        return 0
    if CPU.obstacle(call):
        if call.H > 512:
            return 32
        return 16 if call.training else 2
    return 16 if call.training and call.H > 200 else 0
