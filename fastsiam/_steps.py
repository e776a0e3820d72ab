"""The compiled step loops of kernels/steps.cpp, where this installation has them.

They take float32 on a CPU; `batched` runs loops of tensor operations for all else, and where no C++
compiler was found when fastsiam was installed.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# above it a call with few sequences copies and reads more weights than it computes with
MAX_HIDDEN = 512
# columns of a panel, and the interface, as in steps.cpp
PANEL = 16
VERSION = 1

_FOLDER = Path(__file__).parent
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class Seen(NamedTuple):
    """What becomes of a block's hidden states besides; None where it is not wanted."""

    outputs: Tensor | None  # [m, H] all of them
    pooled: Tensor | None  # [n, H] their sum by weights, or without these their maximum
    weights: Tensor | None  # [m, 1]
    peaks: Tensor | None  # [n, H] int32, step in own time of the maximum


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    names = [f"_compiled_steps{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((_FOLDER / name for name in names if (_FOLDER / name).exists()), None)
    if file is None:
        return None, "this installation of fastsiam was made without a C++ compiler that takes them"
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX" not in capability:
        return None, f"they need AVX2, and PyTorch names this processor {capability}"
    try:
        library = ctypes.CDLL(str(file))
        if library.version() != VERSION:
            return None, "they are of another version; install fastsiam again"
        for cell in ("lstm", "gru"):
            for name, tensors in ((f"{cell}_forward", 10), (f"{cell}_backward", 8)):
                function = getattr(library, name)
                # H, steps, sizes, step, threads, and the tensors
                numbers = [_INTEGER, _INTEGER, _POINTER, _INTEGER, ctypes.c_int]
                function.argtypes, function.restype = numbers + [_POINTER] * tensors, None
        library.schedule.argtypes = [_INTEGER] * 3 + [_POINTER] * 6
        library.schedule.restype = _INTEGER
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


def panels(weight: Tensor) -> Tensor:
    """Lay the right-hand side of a step's product, [K, N], out for the loops: [N / 16, K, 16]."""
    K, N = weight.shape
    return F.pad(weight, (0, -N % PANEL)).view(K, -1, PANEL).transpose(0, 1).contiguous()


def schedule(
    lengths: Tensor, steps: int, P: int, group: int
) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """Return sequences, longest first; each direction's tokens; each group's rows by step.

    `lengths` [N] are int64, from 0 to `steps`.
    """
    N = lengths.shape[0]
    order = torch.empty(N, dtype=torch.long, device=lengths.device)
    tokens = [order.new_empty(N * steps) for _ in range(P)]
    alive = (_INTEGER * (-(-N // group) * steps))()
    found = [lengths, order, *tokens, *[None] * (2 - P), order.new_zeros(steps + 2)]
    assert _LIBRARY is not None
    count = _LIBRARY.schedule(N, steps, group, *_pointers(found), ctypes.addressof(alive))
    by_group = [alive[at : at + steps] for at in range(0, len(alive), steps)] if steps else []
    sizes = [some[: some.index(0)] if 0 in some else some for some in by_group]
    return order, [t[:count] for t in tokens], sizes


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

    But `weight` is in `panels`, `step` is the number of the first step, in own time, and `seen` is
    what else is made of each h.
    """
    tensors = (weight, gates, *_two(states), *_two(before or ()), *seen)
    _call(f"{cell}_forward", gates.shape[1] // 4, sizes, step, tensors)


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
    """Do as `batched_lstm.backward` or `batched_gru.backward`, but `weight` is in `panels`."""
    dgates = torch.empty_like(gates)
    tensors = (weight, gates, *_two(before), upstream, dgates, *_two(grads))
    _call(f"{cell}_backward", gates.shape[1] // 4, sizes, step, tensors)
    return dgates


def _two(tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return h and c: a GRU has no c."""
    h, c = (*tensors, None, None)[:2]
    return h, c


def _call(
    name: str, H: int, sizes: list[int], step: int, tensors: tuple[Tensor | None, ...]
) -> None:
    function: Callable[..., None] = getattr(_LIBRARY, name)
    counts = (_INTEGER * len(sizes))(*sizes)

    function(H, len(sizes), counts, step, torch.get_num_threads(), *_pointers(tensors))


def _pointers(tensors: Iterable[Tensor | None]) -> Iterator[int | None]:
    for tensor in tensors:
        # a pointer says nothing of strides
        assert tensor is None or tensor.is_contiguous()
        yield None if tensor is None else tensor.data_ptr()
