"""The compiled library of kernels/steps.cpp, where this installation has it.

It takes float32 on a CPU; `batched` runs tensor operations for all else, and where no C++ compiler
was found when fastsiam was installed. What its functions do and take is told there.
"""

from __future__ import annotations

import ctypes
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# above it a call with few sequences copies and reads more weights than it computes with
MAX_HIDDEN = 512
# the interface, as in steps.cpp
VERSION = 3

# sequences in a tile; of few ones less, so that each thread gets some, unless the weights are too
# many to be read for each tile
TILE, SMALL_TILE = 24, 6
FEW, NEAR_HIDDEN = 256, 128

_POOLINGS = {"last": 0, "max": 1, "mask": 2}

_FOLDER = Path(__file__).parent
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    """What steps.cpp calls Layer, field by field."""

    _fields_ = [
        *((name, _INTEGER) for name in ("H", "N", "T", "columns", "turned", "pooling")),
        *((name, _INTEGER) for name in ("threads", "tile")),
        *((name, _POINTER) for name in ("lengths", "order", "starts", "panels", "work")),
        ("R", _INTEGER),
        *((name, _POINTER) for name in ("table", "ids", "places", "mask")),
        *((name, _POINTER) for name in ("vectors", "outputs", "peaks")),
        *((name, _POINTER) for name in ("gates", "before_h", "before_c")),
        ("count", _INTEGER),
        ("blocks", _POINTER),
        ("largest", _INTEGER),
        *((name, _POINTER) for name in ("rows", "dvectors", "upstream")),
        *((name, _POINTER) for name in ("dgates", "dtable", "h_by_gates")),
    ]


class Batch(NamedTuple):
    """The sequences of a batch in tiles, longest first."""

    lengths: Tensor  # [N] int64, from 0 to the padded steps
    steps: int
    tile: int  # sequences in one
    order: Tensor  # [N] sequences
    starts: Tensor  # [tiles + 1] packed row where each tile begins and the last one ends


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
        layer = ctypes.POINTER(_Layer)
        for cell in ("lstm", "gru"):
            forward, backward = (getattr(library, f"{cell}_{way}") for way in _WAYS)
            forward.argtypes, forward.restype = [layer], ctypes.c_bool
            backward.argtypes, backward.restype = [layer], None
        library.panel.restype = _INTEGER
        library.order.argtypes, library.order.restype = [_INTEGER] * 3 + [_POINTER] * 4, None
        library.distinct.argtypes = [_INTEGER] * 3 + [_POINTER] * 4
        library.distinct.restype = _INTEGER
        for name, integers, tensors in (
            ("lay_out", 4, 2),
            ("project", 5, 5),
            ("sum_products", 4, 4),
        ):
            function = getattr(library, name)
            function.argtypes = [_INTEGER] * integers + [_POINTER] * tensors
            function.restype = None
        library.pack.argtypes, library.pack.restype = [layer, _POINTER, _POINTER], None
    except (OSError, AttributeError) as error:
        return None, f"they could not be loaded: {error}"
    return library, ""


_WAYS = ("forward", "backward")
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
    """Lay the right-hand side of a product, [K, N], out for the library: [N / panel, K, panel]."""
    K, N = weight.shape
    panel = _library().panel()
    found = weight.new_empty(-(-N // panel), K, panel)
    _library().lay_out(K, N, *weight.stride(), weight.data_ptr(), _pointer(found))
    return found


def batch(lengths: Tensor, steps: int, H: int) -> Batch:
    """Order sequences of `lengths`, [N], each padded to `steps`, for states of H units.

    A length beyond these, which only an unchecked call can bring, counts as the nearest one.
    """
    lengths = lengths.long().clamp(0, steps)
    N = lengths.shape[0]
    tile = SMALL_TILE if N <= FEW and H <= NEAR_HIDDEN else TILE
    order = torch.empty_like(lengths)
    starts = lengths.new_empty(-(-N // tile) + 1)
    place = lengths.new_zeros(steps + 2)
    _library().order(N, steps, tile, *map(_pointer, (lengths, place, order, starts)))
    return Batch(lengths, steps, tile, order, starts)


def distinct(batch: Batch, ids: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids of a batch's tokens, [W], ascending, and where each stands, [R]."""
    N = batch.lengths.shape[0]
    places = ids.new_empty(R)
    words = ids.new_empty(min(R, N * batch.steps))
    count = _library().distinct(
        N, batch.steps, R, *map(_pointer, (batch.lengths, ids, places, words))
    )
    if count < 0:
        raise IndexError(f"an id is not from 0 to {R - 1}")
    return words[:count], places


def pack(batch: Batch, p: int, ids: Tensor | None, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens as packed: flat positions n * T + t, and of ids the places, each [M]."""
    tokens = batch.order.new_empty(int(batch.starts[-1]))
    rows = torch.empty_like(tokens) if ids is not None else None
    layer = _layer(batch, p, H=0, ids=ids, places=places)
    _library().pack(layer, _pointer(tokens), _pointer(rows))
    return tokens, tokens if rows is None else rows


def forward(
    cell: str,
    batch: Batch,
    p: int,
    weight: Tensor,
    table: Tensor,
    ids: Tensor | None,
    places: Tensor | None,
    pooling: str,
    mask: Tensor | None,
    vectors: Tensor,
    outputs: Tensor | None,
    peaks: Tensor | None,
    saved: tuple[Tensor | None, ...],
) -> None:
    """Run direction p over a batch.

    Args:
        cell: "lstm" or "gru".
        weight: from `panels`.
        table: [R, 4H] input gates.
        ids: [N, T] int64 rows of it, or ids with `places`, [R], their rows; None: rows are packed.
        mask: [N, T] for pooling "mask".
        vectors, outputs, peaks: [N, P * H], [N, T, P * H] and [N, P * H] int32, to be filled.
        saved: gates, and states before each token, h and c: packed rows, to be filled.
    """
    H = weight.shape[1]
    work = _work(batch, weight, H)
    layer = _layer(
        batch,
        p,
        H,
        columns=vectors.shape[1],
        pooling=_POOLINGS[pooling],
        panels=weight,
        work=work,
        R=table.shape[0],
        table=table,
        ids=ids,
        places=places,
        mask=mask,
        vectors=_columns(vectors, p * H),
        outputs=_columns(outputs, p * H),
        peaks=_columns(peaks, p * H),
        **dict(zip(("gates", "before_h", "before_c"), saved, strict=True)),
    )
    if not getattr(_library(), f"{cell}_forward")(layer):
        raise IndexError(f"an id is not from 0 to {table.shape[0] - 1}")


def backward(
    cell: str,
    batch: Batch,
    p: int,
    blocks: list[int],
    weight: Tensor,
    saved: tuple[Tensor | None, ...],
    dvectors: Tensor | None,
    upstream: Tensor | None,
    rows: Tensor | None,
    dtable: Tensor,
    h_by_gates: Tensor,
) -> None:
    """Run direction p back, and add up the gradients of the gates.

    Args:
        blocks: tiles at which parts begin whose gradients are summed up together, and the last end.
        weight: from `panels`.
        saved: as the forward filled them.
        dvectors: [N, P * H] what reaches the last hidden states, or None.
        upstream: [M, H] what else reaches the hidden states, or None.
        rows: [M] row of dtable that each packed token has; None: its own.
        dtable: [R, 4H], to be filled.
        h_by_gates: [H, 4H] zeros, to become the product of the states before the tokens and the
            gradients.
    """
    H = h_by_gates.shape[0]
    work = _work(batch, dtable, H)
    tiles = batch.starts.new_tensor(blocks)
    largest = max(batch.starts[tiles].diff().tolist(), default=0)
    dgates = None if rows is None else dtable.new_empty(2, largest, 4 * H)
    layer = _layer(
        batch,
        p,
        H,
        columns=0 if dvectors is None else dvectors.shape[1],
        panels=weight,
        work=work,
        count=len(blocks) - 1,
        blocks=tiles,
        largest=largest,
        R=dtable.shape[0],
        rows=rows,
        dvectors=_columns(dvectors, p * H),
        upstream=upstream,
        dgates=dgates,
        dtable=dtable,
        h_by_gates=h_by_gates,
        **dict(zip(("gates", "before_h", "before_c"), saved, strict=True)),
    )
    getattr(_library(), f"{cell}_backward")(layer)


def project(x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x[rows] @ weight.T + bias: [W, M].

    Args:
        x: [R, D] float32.
        rows: [W]; None: all in order.
        weight: [N, D], N <= M; behind its columns stands the bias alone.
        bias: [M].
    """
    W = x.shape[0] if rows is None else rows.shape[0]
    right = panels(weight.T)
    found = x.new_empty(W, bias.shape[0])
    sizes = W, x.shape[1], weight.shape[0], bias.shape[0], torch.get_num_threads()
    _library().project(*sizes, *map(_pointer, (x, rows, right, bias, found)))
    return found


def sum_products(a: Tensor, b: Tensor, rows: Tensor | None) -> Tensor:
    """Return a.T @ b[rows], [M, N]: a [K, M], b [., N]; None: all rows in order."""
    found = a.new_empty(a.shape[1], b.shape[1])
    sizes = *a.shape, b.shape[1], torch.get_num_threads()
    _library().sum_products(*sizes, *map(_pointer, (a, b, rows, found)))
    return found


def _library() -> Any:
    return _LIBRARY


def _layer(batch: Batch, p: int, H: int, **fields: Tensor | int | None) -> _Layer:
    """Return the library's view of a batch and of what else is given."""
    fields |= {"lengths": batch.lengths, "order": batch.order, "starts": batch.starts}
    return _Layer(
        H=H,
        N=batch.lengths.shape[0],
        T=batch.steps,
        turned=p,
        threads=torch.get_num_threads(),
        tile=batch.tile,
        **{
            name: _pointer(field) if isinstance(field, Tensor) else field
            for name, field in fields.items()
        },
    )


def _work(batch: Batch, like: Tensor, H: int) -> Tensor:
    """Return memory for what each thread keeps of a tile."""
    return like.new_empty(torch.get_num_threads(), batch.tile * 7 * H)


def _pointer(tensor: Tensor | None) -> int | None:
    # a pointer says nothing of strides
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _columns(tensor: Tensor | None, first: int) -> int | None:
    """Return where some columns of a tensor's rows begin."""
    at = _pointer(tensor)
    return None if tensor is None or at is None else at + first * tensor.element_size()
