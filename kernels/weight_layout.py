"""Weights and tables for the kernels, and their gradients: the only file that knows the scaling.

Scaling. The kernels use sigmoid(x) = (1 + tanh(x / 2)) / 2 and keep 2h instead of h: with the rows
of i, f, o halved and the recurrent weight halved once more, a cell needs no multiplication for it.
Backward, the kernel stores the gradient of a gate's pre-activation times 4 (i, f) or 2 (g, o).

A GRU's gates are r, z, n, y: n is what x alone gives to nn.GRU's n, y = W_hn h + b_hn is what the
reset gate multiplies. So y has no input weight but a bias, and n has no recurrent weight. r, z and
y are halved, y because the reset gate is (1 + tanh) / 2, and so are their stored gradients.

All factors are powers of two, so nothing is rounded. The row order is `pack`'s.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.kernels import tiling
from fastsiam.kernels.pack import Operand, pack, packed_shape
from fastsiam.kernels.tiling import NARROW, block_h
from fastsiam.kernels.weight_gradients import products_over_tokens


class Scaling(NamedTuple):
    """Factors of a cell's gates."""

    ahead: tuple[float, ...]  # of a pre-activation
    back: tuple[float, ...]  # of a stored gate gradient, where it gives to a weight


SCALINGS = {
    "lstm": Scaling((0.5, 0.5, 1.0, 0.5), (0.25, 0.25, 0.5, 0.5)),
    "gru": Scaling((0.5, 0.5, 1.0, 0.5), (0.5, 0.5, 1.0, 0.5)),
}


@functools.cache
def _factors(cell: str, device: torch.device) -> Tensor:
    """Return [2, 4] float32, kept on the device: only the first call copies them."""
    with torch.inference_mode(False):
        return torch.tensor(SCALINGS[cell], device=device, dtype=torch.float32)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a table: words of two in half precision."""
    return torch.float32 if dtype == torch.float32 else torch.int32


def record_shapes(
    cell: str, N: int, T: int, H: int, P: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """Return the shapes of the forward's records: gates, cells (of a GRU None) and hidden states.

    A sequence has T + 1 rows, the gaps between its tokens. A step goes from one gap to the next, in
    the second direction to the one before: its gates, cells and state stand where it ends, its gate
    gradients where it begins, beside the state that it began with.
    """
    block = block_h(H)
    rows = N * (T + 1)
    cells = (P, rows, block, 2) if cell == "lstm" else None
    return (P, rows, block, 4), cells, (P, rows, block)


def prepare(
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    keep: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the rows of x, [R, D], to gates; return them and the bits of weight_hh for `a + W h`.

    The gates are [R, P, block, 4], in half precision [R, P, block, 2] words of two. With `keep` the
    bits of weight_hh for the backward come too, in `transposed_shape`.
    """
    P, _, H = weight_hh.shape
    packed_ih, packed_bias, weight, transposed = pack(
        weight_ih,
        weight_hh,
        bias,
        _factors(cell, x.device),
        _forward_operand(x.dtype, H),
        _backward_operand(x.device, x.dtype, H, allow_tf32) if keep else None,
    )
    columns = packed_ih.flatten(0, 1).T
    table = x @ columns if bias is None else torch.addmm(packed_bias.flatten(), x, columns)
    words = 4 if x.dtype == torch.float32 else 2
    return (
        table.view(table_dtype(x.dtype)).view(x.shape[0], P, block_h(H), words),
        weight.view(torch.int16),
        transposed.view(_bits(transposed.dtype)),
    )


def transposed_shape(weight_hh: Tensor, allow_tf32: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of what `prepare` keeps of weight_hh for the backward."""
    P, rows, H = weight_hh.shape
    operand = _backward_operand(weight_hh.device, weight_hh.dtype, H, allow_tf32)
    return packed_shape(P, rows // H, H, operand.parts, transposed=True), _bits(operand.dtype)


def _forward_operand(dtype: torch.dtype, H: int) -> Operand:
    """Return how the forward has weight_hh.

    Of float32 there are two parts whatever the precision, where one program has them all: a kernel
    that wants tf32 reads the first.
    """
    if dtype == torch.float32 and H <= NARROW:
        return Operand(torch.float16, 2)
    return Operand(dtype, 1)


def _backward_operand(
    device: torch.device, dtype: torch.dtype, H: int, allow_tf32: bool
) -> Operand:
    """Return how the backward has it."""
    if H > NARROW:
        return Operand(dtype, 1)
    target = tiling.target_of(device)
    how = tiling.arithmetic(dtype, allow_tf32, target)
    tile = tiling.backward_tile(H, dtype, how, target)
    return Operand(tile.operand, tile.parts)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


def token_rows(
    x: Tensor, ids: Tensor | None, lengths: Tensor, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Return the rows to project and the ids that point into them, whichever are fewer.

    Args:
        x: [R, D] vocabulary, or one row a token where ids is None.
        ids: [N, T] or None.
        lengths: [N].
        steps: T.

    Returns:
        The vocabulary and the ids where it has no more rows than the batch has tokens; else a
        row a token and None, those of the padding finite whatever x and ids hold there.
    """
    if ids is not None and _rows_are_fewer(x, ids):
        return x, ids
    valid = torch.arange(steps, device=x.device) < lengths.unsqueeze(1)
    if ids is None:
        return torch.where(valid.view(-1, 1), x, 0), None
    kept = torch.where(valid, ids, 0).clamp(0, x.shape[0] - 1)
    return F.embedding(kept.view(-1), x), None


def _rows_are_fewer(x: Tensor, ids: Tensor) -> bool:
    """Return whether a vocabulary has no more rows than a batch has tokens, valid or not."""
    return x.shape[0] <= ids.numel()


def weight_gradients(
    cell: str,
    dgates: Tensor,
    states: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    steps: int,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    allow_tf32: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Turn the kernel's gate gradients into gradients of the weights and of x.

    Args:
        cell: "lstm" or "gru".
        dgates, states: see `record_shapes`; states are 2h.
        x, ids: the rows and ids that the forward read.
        lengths: [N].
        steps: T.
        weight_ih: [P, gates * H, D], or None where the gradient of x is not wanted.
        weight_hh: [P, gates * H, H].
        allow_tf32: whether float32 products may be rounded to tf32.

    Returns:
        dx (like x, or None), dweight_ih [P, gates * H, D], dweight_hh [P, gates * H, H], dbias
        [P, 4H].
    """
    _, rows, H = weight_hh.shape
    factors = _factors(cell, dgates.device)[1]
    of_weights = products_over_tokens(
        dgates,
        states,
        x,
        ids,
        lengths,
        steps,
        factors,
        (rows // H, H),
        allow_tf32,
    )
    dx = None
    if weight_ih is not None:
        packed_ih = pack(weight_ih, weight_hh, None, factors)[0]
        dx = _input_gradient(dgates.flatten(2), packed_ih, x, ids, lengths, steps)
    return dx, *of_weights


def _input_gradient(
    dgates: Tensor, packed_ih: Tensor, x: Tensor, ids: Tensor | None, lengths: Tensor, steps: int
) -> Tensor:
    """Return the gradient of x from dgates, [P, N * (T + 1), 4 * block]."""
    valid = torch.arange(steps, device=x.device) < lengths.unsqueeze(1)
    if ids is not None and _rows_are_fewer(x, ids):
        summed = torch.bmm(_sum_by_id(dgates, ids, valid, x.shape[0]), packed_ih)
        return summed[0] if len(summed) == 1 else summed.sum(dim=0)
    at_gaps = torch.bmm(dgates, packed_ih).view(len(dgates), -1, steps + 1, x.shape[1])
    # gate gradients stand at the gaps before tokens, in the second direction behind them
    dtokens = at_gaps[0, :, :-1]
    if len(at_gaps) == 2:
        dtokens = dtokens + at_gaps[1, :, 1:]
    if ids is None:
        # a token without a step has what memory held
        return torch.where(valid.unsqueeze(2), dtokens, 0).view(x.shape)
    return _sum_by_id(dtokens.reshape(1, -1, x.shape[1]), ids, valid, x.shape[0])[0]


def _sum_by_id(rows: Tensor, ids: Tensor, valid: Tensor, R: int) -> Tensor:
    """Add up the rows of the valid tokens of each id, [P, N * T, K] to [P, R, K].

    Rows may stand at gaps too, [P, N * (T + 1), K]. Without atomics: the gradient of torch's
    embedding sorts by id, so sums are repeatable. Rows of other tokens are not read.
    """
    P, none = rows.shape[0], rows.shape[0] * R
    ids = ids.clamp(0, R - 1)
    targets = torch.where(valid, ids, none)
    if rows.shape[1] > ids.numel():
        targets = F.pad(targets, (0, 1), value=none)
    if P == 2:
        # the second direction's steps begin at the gaps behind their tokens
        behind = F.pad(torch.where(valid, ids + R, none), (1, 0), value=none)
        targets = torch.stack((targets, behind))
    summed: Tensor = torch.ops.aten.embedding_dense_backward(
        rows.flatten(0, 1), targets.view(-1), P * R + 1, none, False
    )
    return summed[:none].view(P, R, rows.shape[2])
