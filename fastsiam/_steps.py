"""The compiled step loops of kernels/steps.cpp, where this installation has them.

They take float32 on a CPU; `batched` runs its own loops of tensor operations for all else, and
where no C++ compiler was found when fastsiam was installed. Environment variable FASTSIAM_STEPS=0
leaves them out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# sequences that one thread takes together, and multiplications that are worth a thread: about
# ten times what starting one costs; both as steps.cpp works on them
TILE = 24
WORTH = 10**7

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class Seen(NamedTuple):
    """What becomes of a block's hidden states besides; None where it is not wanted."""

    outputs: Tensor | None  # [m, H] all of them
    pooled: Tensor | None  # [n, H] their sum by weights, or without these their maximum
    weights: Tensor | None  # [m, 1]
    peaks: Tensor | None  # [n, H] int32, step in own time of the maximum


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    if os.environ.get("FASTSIAM_STEPS") == "0":
        return None, "FASTSIAM_STEPS=0"
    found = importlib.util.find_spec("fastsiam._compiled_steps")
    if found is None or found.origin is None:
        return None, "fastsiam was installed without a C++ compiler"
    if platform.machine().lower() in ("x86_64", "amd64") and not _has_avx2():
        return None, "this processor has no AVX2"
    try:
        library = ctypes.CDLL(found.origin)
        for cell in ("lstm", "gru"):
            # integers H, steps, then sizes, then integers step, part, parts, then tensors
            for name, tensors in ((f"{cell}_forward", 10), (f"{cell}_backward", 8)):
                function = getattr(library, name)
                numbers = [_INTEGER] * 2 + [_POINTER] + [_INTEGER] * 3
                function.argtypes, function.restype = numbers + [_POINTER] * tensors, None
    except (OSError, AttributeError) as error:
        return None, f"they could not be loaded: {error}"
    return library, ""


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


_LIBRARY, WHY_NOT = _load()


def run(tensor: Tensor) -> bool:
    """Return whether the compiled loops take a tensor like this."""
    return _LIBRARY is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def forward(
    cell: str,
    gates: Tensor,
    weight: Tensor,
    states: tuple[Tensor, ...],
    sizes: list[int],
    step: int,
    before: tuple[Tensor, ...] | None,
    seen: Seen,
) -> None:
    """Do as `batched_lstm.forward` or `batched_gru.forward`, whose arguments these are.

    `step` is the number of the first step, in own time, and `seen` what else is made of each h.
    """
    h, c = _two(states)
    before_h, before_c = _two(before or ())
    tensors = (weight, gates, h, c, before_h, before_c, *seen)
    _call(f"{cell}_forward", weight.shape[0], sizes, step, tensors)


def backward(
    cell: str,
    gates: Tensor,
    before: tuple[Tensor, ...],
    weight: Tensor,
    grads: tuple[Tensor, ...],
    sizes: list[int],
    step: int,
    upstream: Tensor | None,
) -> Tensor:
    """Do as `batched_lstm.backward` or `batched_gru.backward`, whose arguments these are."""
    dgates = torch.empty_like(gates)
    tensors = (weight, gates, *_two(before), upstream, dgates, *_two(grads))
    _call(f"{cell}_backward", weight.shape[1], sizes, step, tensors)
    return dgates


def _two(tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return h and c: a GRU has no c."""
    h, c = (*tensors, None, None)[:2]
    return h, c


def _call(
    name: str, H: int, sizes: list[int], step: int, tensors: tuple[Tensor | None, ...]
) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors), name
    function: Callable[..., None] = getattr(_LIBRARY, name)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    counts = (_INTEGER * len(sizes))(*sizes)

    def run(part: int) -> None:
        function(H, len(sizes), counts, step, part, parts, *pointers)

    parts = min(torch.get_num_threads(), -(-sizes[0] // TILE), 1 + sum(sizes) * H * H * 4 // WORTH)
    # new ones each time: a pool's would be missing in a forked process
    others = [threading.Thread(target=run, args=(part,)) for part in range(1, parts)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
