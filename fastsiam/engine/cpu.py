"""The backend "cpu": whole layers in the compiled C++ library of kernels/cpu, float32.

Each method makes room for its results and calls one function of the library, which takes PyTorch's
weights as they are. kernels/cpu/batch.h says what each field of its struct `Layer` holds.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsiam.engine.layer import (
    GATES,
    SLOTS,
    Activations,
    Backend,
    Call,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Projection,
    Stacked,
    Upstream,
)
from fastsiam.engine.similarity import score, vectors_gradient

# above it a call with few sequences copies and reads more weights than it computes with
MAX_HIDDEN = 512
# the interface, as in kernels/cpu/steps.cpp
VERSION = 4

# bytes from which the GNU C library takes memory from the system whatever was free before
HUGE = 32 * 2**20

_POOLINGS = {"last": 0, "max": 1, "mask": 2}

# fields of the struct Layer in kernels/cpu/batch.h, in its order
_SIZES = ("P", "N", "T", "H", "D", "R", "pooling", "threads")
_TENSORS = (
    *("lengths", "ids", "mask", "x", "weight_ih", "weight_hh", "bias", "table", "panels"),
    *("vectors", "outputs", "peaks", "gates", "before_h", "before_c"),
    *("dvectors", "doutputs", "dx", "dweight_ih", "dweight_hh", "dbias"),
)

FOLDER = Path(__file__).parents[1]


class _Layer(ctypes.Structure):
    """The struct Layer of kernels/cpu/batch.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    ]


class Cpu(Backend):
    """Layers in the compiled library; `library` is None, and `why_not` a clause, without one."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL | None, why_not: str) -> None:
        self.library, self.why_not = library, why_not

    def obstacle(self, call: Call) -> str:
        """Name what the library does not take, or the reason why it is missing."""
        if call.device.type != "cpu":
            return f"the compiled library runs on a CPU, and the inputs are on {call.device.type}"
        if call.dtype != torch.float32:
            name = str(call.dtype).removeprefix("torch.")
            return f"the compiled library takes float32, and the weights are {name}"
        if call.H > MAX_HIDDEN:
            return f"the compiled library takes H up to {MAX_HIDDEN}, got {call.H}"
        return self.why_not

    def project(self, x: Tensor, weights: Stacked, cell: str) -> Projection:
        """Return the table [P, R, 4H], and weight_hh as panels of columns."""
        P, H = weights.directions, weights.hidden
        table = x.new_empty(P, x.shape[0], SLOTS * H)
        panels = table.new_empty(self.panels_shape(P, H, GATES[cell] * H))
        self._call(
            "prepare",
            cell,
            _sizes(P, H, D=x.shape[1], R=x.shape[0]),
            {"x": x.contiguous(), "table": table, "panels": panels, **_weights(weights)},
        )
        shape = tuple(weights.weight_hh.shape)
        return Projection(self.name, cell, table, panels, shape, torch.float32)

    def infer(self, inputs: Inputs, projection: Projection, options: Options) -> Outputs:
        """Run a layer over the table."""
        P, R, H = *projection.table.shape[:2], projection.hidden
        outputs = _new_outputs(inputs, P * H, options)
        tensors = {**_sequences(inputs), **_results(outputs)}
        tensors |= {"table": projection.table, "panels": projection.weight}
        self._call("forward", options.cell, _sizes(P, H, 0, R, inputs, options), tensors)
        return score(outputs, options)

    def forward(
        self, inputs: Inputs, weights: Stacked, options: Options
    ) -> tuple[Outputs, Activations | None]:
        """Run a layer; activations lie in packed rows, of which N * T is more than enough."""
        P, H = weights.directions, weights.hidden
        outputs = _new_outputs(inputs, P * H, options)
        kept = self.activations_like(inputs, weights, options) if options.keep else None
        tensors = {**_sequences(inputs), **_results(outputs), **_weights(weights)}
        tensors["x"] = inputs.x.contiguous()
        if kept is not None:
            tensors |= _records(kept)
        R, D = inputs.x.shape
        self._call("forward", options.cell, _sizes(P, H, D, R, inputs, options), tensors)
        return score(outputs, options), kept

    def backward(
        self,
        inputs: Inputs,
        weights: Stacked,
        options: Options,
        outputs: Outputs,
        activations: Activations,
        upstream: Upstream,
        need_dx: bool,
    ) -> Gradients:
        """Carry the gradients back through time, and sum those of the weights."""
        P, H = weights.directions, weights.hidden
        dvectors = vectors_gradient(outputs, upstream, options)
        like = activations.states
        found = Gradients(
            like.new_zeros(inputs.x.shape) if need_dx else None,
            torch.empty_like(weights.weight_ih, memory_format=torch.contiguous_format),
            torch.empty_like(weights.weight_hh, memory_format=torch.contiguous_format),
            like.new_empty(weights.bias_shape),
        )
        tensors = {**_sequences(inputs), **_weights(weights), **_records(activations)}
        tensors |= {
            "x": inputs.x.contiguous(),
            "dvectors": dvectors,
            "doutputs": upstream.states,
            "dx": found.x,
            "dweight_ih": found.weight_ih,
            "dweight_hh": found.weight_hh,
            "dbias": found.bias,
        }
        R, D = inputs.x.shape
        self._call("backward", options.cell, _sizes(P, H, D, R, inputs, options), tensors)
        return found

    def activations_like(self, inputs: Inputs, weights: Stacked, options: Options) -> Activations:
        """Return packed rows [P, N * T, ...]; rows behind the last token are never touched."""
        P, H, M = weights.directions, weights.hidden, inputs.count * inputs.steps
        x = inputs.x
        return Activations(
            empty((P, M, SLOTS * H), x),
            empty((P, M, H), x) if options.cell == "lstm" else None,
            empty((P, M, H), x),
            x.new_zeros((inputs.count, P * H), dtype=torch.int32)
            if options.pooling == "max"
            else None,
        )

    def panels_shape(self, P: int, K: int, N: int) -> tuple[int, ...]:
        """Return the shape of the panels of P right-hand sides of products, [K, N] each."""
        assert self.library is not None
        panel = self.library.panel()
        return P, -(-N // panel), K, panel

    def _call(
        self, what: str, cell: str, sizes: tuple[int, ...], tensors: dict[str, Tensor | None]
    ) -> None:
        """Call a function of the library with the fields of its struct."""
        layer = _Layer(*sizes, torch.get_num_threads())
        for name, tensor in tensors.items():
            if tensor is not None:
                # a pointer says nothing of strides
                assert tensor.is_contiguous(), name
                setattr(layer, name, tensor.data_ptr())
        outcome = getattr(self.library, f"{cell}_{what}")(layer)
        if outcome == 1:
            raise IndexError(f"an id is not from 0 to {layer.R - 1}")
        if outcome:
            raise MemoryError(
                f"no memory for a batch of {layer.N} sequences of up to {layer.T} steps"
            )


def _sizes(
    P: int,
    H: int,
    D: int,
    R: int,
    inputs: Inputs | None = None,
    options: Options | None = None,
) -> tuple[int, ...]:
    """Return the fields _SIZES but threads."""
    N, T = (0, 0) if inputs is None else (inputs.count, inputs.steps)
    return P, N, T, H, D, R, _POOLINGS["last" if options is None else options.pooling]


def _sequences(inputs: Inputs) -> dict[str, Tensor | None]:
    ids, mask = inputs.ids, inputs.mask
    return {
        "lengths": inputs.lengths,
        "ids": None if ids is None else ids.long().contiguous(),
        "mask": None if mask is None else mask.float().contiguous(),
    }


def _weights(weights: Stacked) -> dict[str, Tensor | None]:
    bias = weights.bias
    return {
        "weight_ih": weights.weight_ih.contiguous(),
        "weight_hh": weights.weight_hh.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
    }


def _records(kept: Activations) -> dict[str, Tensor | None]:
    return {
        "gates": kept.gates,
        "before_h": kept.states,
        "before_c": kept.cells,
        "peaks": kept.peaks,
    }


def _new_outputs(inputs: Inputs, columns: int, options: Options) -> Outputs:
    like = inputs.lengths
    vectors = like.new_empty((inputs.count, columns), dtype=torch.float32)
    states = None
    if options.all_states:
        states = vectors.new_zeros(inputs.count, inputs.steps, columns)
    return Outputs(vectors, states)


def _results(outputs: Outputs) -> dict[str, Tensor | None]:
    return {"vectors": outputs.vectors, "outputs": outputs.states}


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return uninitialized memory on a CPU, in huge pages where it is large.

    Memory of this size comes from the system, which clears each page at its first use: in pages of
    2 MiB that takes a fraction of the time. It goes back to the system with the tensor. It is never
    filled with NaN.
    """
    if type(like) not in (Tensor, nn.Parameter) or not hasattr(mmap, "MADV_HUGEPAGE"):
        # a fake tensor has no memory
        return like.new_empty(shape)
    size = torch.Size(shape).numel() * like.element_size()
    if size < HUGE:
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return like.new_empty(shape)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _load() -> Cpu:
    """Return the backend with the library for this processor, or with the reason of none."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = [f"_compiled_steps{suffix}" for suffix in EXTENSION_SUFFIXES]
    if capability == "AVX512":
        names = [f"_compiled_steps_avx512{suffix}" for suffix in EXTENSION_SUFFIXES] + names
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX" not in capability:
        return Cpu(None, f"the compiled library needs AVX2, and this processor has {capability}")
    why_not = "fastsiam was installed without a C++ compiler for the compiled library"
    for file in (FOLDER / name for name in names):
        if file.exists():
            library, why_not = load_library(file)
            if library is not None:
                return Cpu(library, "")
    return Cpu(None, why_not)


def load_library(file: Path) -> tuple[ctypes.CDLL | None, str]:
    """Return the library in a file, or the reason why it cannot be used."""
    try:
        library = ctypes.CDLL(str(file))
        if library.version() != VERSION:
            return None, "the compiled library is of another version; install fastsiam again"
        library.panel.restype = ctypes.c_int64
        for cell in GATES:
            for what in ("prepare", "forward", "backward"):
                function = getattr(library, f"{cell}_{what}")
                function.argtypes, function.restype = [ctypes.POINTER(_Layer)], ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"the compiled library could not be loaded: {error}"
    return library, ""


CPU = _load()
