"""The compiled step loops of kernels/steps.cpp, where this installation has them.

They take float32 on a CPU; `batched` runs its own loops of tensor operations for all else, and
where no C++ compiler was found when fastsiam was installed. Environment variable FASTSIAM_STEPS=0
leaves them out.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# sequences that a thread takes together, as in steps.cpp, and multiplications that are worth one
TILE = 24
WORTH = 10**6

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
    if os.environ.get("FASTSIAM_STEPS") == "0":
        return None, "FASTSIAM_STEPS=0"
    names = [f"_compiled_steps{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((_FOLDER / name for name in names if (_FOLDER / name).exists()), None)
    if file is None:
        return None, "there was no C++ compiler when fastsiam was installed"
    if platform.machine().lower() in ("x86_64", "amd64") and not _has_avx2():
        return None, "this processor has no AVX2"
    try:
        library = ctypes.CDLL(str(file))
        for cell in ("lstm", "gru"):
            for name, tensors in ((f"{cell}_forward", 10), (f"{cell}_backward", 8)):
                function = getattr(library, name)
                # H, steps, sizes, step, threads, and the tensors
                numbers = [_INTEGER, _INTEGER, _POINTER, _INTEGER, ctypes.c_int]
                function.argtypes, function.restype = numbers + [_POINTER] * tensors, None
        library.schedule.argtypes = [_INTEGER] * 3 + [_POINTER] * 5
        library.schedule.restype = _INTEGER
    except (OSError, AttributeError) as error:
        return None, f"they could not be loaded: {error}"
    return library, ""


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


_LIBRARY, _WHY_NOT = _load()


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Return what keeps the compiled loops from states like these, or an empty string."""
    if device.type != "cpu":
        return f"they run on a CPU, and the inputs are on {device.type}"
    if dtype != torch.float32:
        return f"they take float32, and the states are {str(dtype).removeprefix('torch.')}"
    return _WHY_NOT


def schedule(
    lengths: Tensor, steps: int, P: int, group: int
) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """Return sequences, longest first; each direction's tokens; each group's rows by step."""
    N = lengths.shape[0]
    order = torch.empty(N, dtype=torch.long, device=lengths.device)
    tokens = [order.new_empty(N * steps) for _ in range(P)]
    alive = (_INTEGER * (-(-N // group) * steps))()
    lengths = lengths.long().contiguous()
    found = [lengths, order, *tokens, *[None] * (2 - P)]
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
    function: Callable[..., None] = getattr(_LIBRARY, name)
    counts = (_INTEGER * len(sizes))(*sizes)

    worth = 1 + sum(sizes) * H * H * 4 // WORTH
    threads = min(torch.get_num_threads(), worth, -(-sizes[0] // TILE))
    function(H, len(sizes), counts, step, threads, *_pointers(tensors))


def _pointers(tensors: Iterable[Tensor | None]) -> Iterator[int | None]:
    for tensor in tensors:
        # a pointer says nothing of strides
        assert tensor is None or tensor.is_contiguous()
        yield None if tensor is None else tensor.data_ptr()
