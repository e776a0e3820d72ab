"""A recurrent layer as objects: its inputs, weights, options, outputs and gradients.

Both towers are one batch of N = 2B sequences: sequences j and B + j are a pair. A layer has P
directions, one or two. Direction 1 reads a sequence from its last valid step to its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

# rows of weight_ih and weight_hh are GATES[cell] * H
GATES = {"lstm": 4, "gru": 3}
# gates of a step once biases are split by what reads them: LSTM i, f, g, o; GRU r, z, and n in two
# parts, of the input and of the state. Projected rows, biases and gate gradients have SLOTS * H
SLOTS = 4


class Weights(NamedTuple):
    """The weights of one direction of a layer under nn.LSTM's names, of one dtype and device.

    weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H] or both None; gates i, f, g, o.
    Of a GRU as nn.GRU has them: 3H rows, gates r, z, n.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """The sequences that a layer reads."""

    x: Tensor  # [R, D] an embedding that ids point into, or one row a token (row n * T + t)
    ids: Tensor | None  # [N, T] rows of x
    lengths: Tensor  # [N] int64 valid steps, 0 <= length <= T
    mask: Tensor | None  # [N, T] weights of the steps (pooling "mask")
    steps: int  # T, padded steps

    @property
    def count(self) -> int:
        """N, the number of sequences."""
        return self.lengths.shape[0]


@dataclass(frozen=True, slots=True)
class Stacked:
    """The weights of a layer, stacked by direction, of the inputs' dtype. G is 4H, of a GRU 3H."""

    weight_ih: Tensor  # [P, G, D]
    weight_hh: Tensor  # [P, G, H]
    bias: Tensor | None  # [P, 4H] the sum of nn.LSTM's two; of a GRU r, z, n of input, n of state

    @property
    def directions(self) -> int:
        """P, the number of directions."""
        return self.weight_hh.shape[0]

    @property
    def hidden(self) -> int:
        """H, the hidden size of a direction."""
        return self.weight_hh.shape[2]

    @property
    def bias_shape(self) -> tuple[int, int]:
        """Shape of a bias, and of its gradient."""
        return self.directions, SLOTS * self.hidden


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer computes, and whether it keeps activations. All values are plain."""

    cell: str
    pooling: str = "last"  # "last", "max" or "mask"
    paired: bool = False  # whether sequences j and B + j are scored by the Manhattan similarity
    scale: float = 1.0  # factor on L1
    all_states: bool = False  # whether the hidden states of all steps are wanted
    training: bool = False  # whether a backward follows
    recompute: bool = False  # whether the backward runs the layer again instead of keeping it
    allow_tf32: bool = False  # whether float32 products may be rounded to tf32

    @property
    def keep(self) -> bool:
        """Whether the forward keeps its activations."""
        return self.training and not self.recompute

    def encode(self) -> str:
        """Return the options as text, which `decode` reads."""
        return ",".join(str(getattr(self, field.name)) for field in fields(self))

    @staticmethod
    def decode(text: str) -> Options:
        """Return the options that `encode` wrote."""
        cell, pooling, paired, scale, *flags = text.split(",")
        others = [flag == "True" for flag in flags]
        return Options(cell, pooling, paired == "True", float(scale), *others)


@dataclass(frozen=True, slots=True)
class Outputs:
    """The results of a layer; None where the options do not ask for one."""

    vectors: Tensor  # [N, P * H]
    states: Tensor | None = None  # [N, T, P * H] of all steps, 0 behind a sequence's end
    distance: Tensor | None = None  # [B] L1 of the pairs
    similarity: Tensor | None = None  # [B] exp(-scale * L1)


@dataclass(frozen=True, slots=True)
class Activations:
    """The tensors that a backward needs, in the layout of their backend."""

    gates: Tensor
    cells: Tensor | None  # None for a cell without one
    states: Tensor
    peaks: Tensor | None  # [N, P * H] int32 steps of the maxima (pooling "max")
    weight: Tensor | None = None  # weight_hh as the backend's backward reads it

    def tensors(self) -> Iterator[Tensor | None]:
        """Yield the fields in order."""
        return (getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Upstream:
    """The gradients of the fields of `Outputs`; None where nothing depends on a field."""

    vectors: Tensor | None  # [N, P * H]
    states: Tensor | None  # [N, T, P * H]; not read behind a sequence's end
    distance: Tensor | None  # [B]
    similarity: Tensor | None  # [B]

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of `Inputs.x` (None where not wanted) and of the fields of `Stacked`."""

    x: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Projection:
    """All rows of an embedding, projected for one backend; calls without gradients share it."""

    backend: str
    cell: str
    table: Tensor  # input gates of the rows, in the backend's layout
    weight: Tensor  # weight_hh, in the backend's layout
    shape: tuple[int, ...]  # of weight_hh, [P, G, H]
    dtype: torch.dtype  # of the layer's results

    @property
    def hidden(self) -> int:
        """H, the hidden size of a direction."""
        return self.shape[2]


@dataclass(frozen=True, slots=True)
class Call:
    """What decides on a backend."""

    cell: str
    H: int
    dtype: torch.dtype
    device: torch.device
    training: bool
    sequences: int | None = None  # two a pair; None where it is not known yet


class Backend:
    """A way to compute a layer; each backend is one file or folder beside this one.

    A composite backend has `run`, which torch's autograd differentiates. The others have `infer`,
    `forward` and `backward`, which `autograd` puts together. They may have `project` too.
    """

    name: str
    composite = False

    def obstacle(self, call: Call) -> str:
        """Return what keeps this backend from a call, in one clause; "" where nothing does."""
        raise NotImplementedError

    def run(self, inputs: Inputs, directions: Sequence[Weights], options: Options) -> Outputs:
        """Run a layer with operations that autograd differentiates (composite backends)."""
        raise NotImplementedError

    def project(self, x: Tensor, weights: Stacked, cell: str) -> Projection | None:
        """Project the rows of x, [R, D], for `infer`; None where the backend has no use for it."""
        del x, weights, cell
        return None

    def infer(self, inputs: Inputs, projection: Projection, options: Options) -> Outputs:
        """Run a layer without gradients over a projection, whose rows the ids point into."""
        raise NotImplementedError

    def forward(
        self, inputs: Inputs, weights: Stacked, options: Options
    ) -> tuple[Outputs, Activations | None]:
        """Run a layer; the activations come where `options.keep` asks for them."""
        raise NotImplementedError

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
        """Return the gradients. Of `outputs`, vectors and similarity are read."""
        raise NotImplementedError

    def activations_like(self, inputs: Inputs, weights: Stacked, options: Options) -> Activations:
        """Return uninitialized tensors of the shapes and dtypes that `forward` keeps."""
        raise NotImplementedError


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stack(tensors: list[Tensor]) -> Tensor:
    """Return one tensor a direction as one; a single tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def stack_weights(directions: Sequence[Weights], cell: str, dtype: torch.dtype) -> Stacked:
    """Return the directions of a layer as one object, in a dtype."""
    bias = None
    if directions[0].bias_ih is not None:
        bias = stack([sum_biases(weights, cell).to(dtype) for weights in directions])
    return Stacked(
        stack([weights.weight_ih.to(dtype) for weights in directions]),
        stack([weights.weight_hh.to(dtype) for weights in directions]),
        bias,
    )


def sum_biases(weights: Weights, cell: str) -> Tensor:
    """Return the sum of both biases, [4H]; those of a GRU's gate n stay apart, input then state."""
    assert weights.bias_ih is not None
    assert weights.bias_hh is not None
    if cell == "lstm":
        return weights.bias_ih + weights.bias_hh
    H = weights.weight_hh.shape[1]
    of_input, of_state = (bias.split((2 * H, H)) for bias in (weights.bias_ih, weights.bias_hh))
    return torch.cat((of_input[0] + of_state[0], of_input[1], of_state[1]))


def part_of(inputs: Inputs, sequences: slice) -> tuple[Inputs, slice]:
    """Return the inputs of some sequences, and the rows of x that they have."""
    first, stop = sequences.start, min(sequences.stop, inputs.count)
    rows = (
        slice(None) if inputs.ids is not None else slice(first * inputs.steps, stop * inputs.steps)
    )
    part = replace(
        inputs,
        x=inputs.x[rows],
        ids=None if inputs.ids is None else inputs.ids[sequences],
        lengths=inputs.lengths[sequences],
        mask=None if inputs.mask is None else inputs.mask[sequences],
    )
    return part, rows


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off where it is on: to enter and to leave it takes longer than to ask."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def allows_tf32(device: torch.device) -> bool:
    """Return whether float32 products of a recurrence may be rounded to tf32."""
    if device.type != "cuda":
        return False
    precision: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"
