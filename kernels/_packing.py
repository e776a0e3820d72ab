"""Weights and tables for the kernels, and their gradients: the only file that knows the scaling.

Scaling. The kernels use sigmoid(x) = (1 + tanh(x / 2)) / 2 and keep 2h instead of h: with the rows
of i, f, o halved and the recurrent weight halved once more, a cell needs no multiplication for it.
Backward, what the kernel stores for a gate is the gradient with respect to its pre-activation times
4 (i, f) or 2 (g, o). All factors are powers of two, so nothing is rounded.

The row order is `_pack`'s.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.kernels import _tiling
from fastsiam.kernels._pack import pack
from fastsiam.kernels._tiling import NARROW, block_h

_INPUT = (0.5, 0.5, 1.0, 0.5)  # of a pre-activation, gates i, f, g, o
_GRADIENT = (0.25, 0.25, 0.5, 0.5)  # of a stored gate gradient


@functools.cache
def _factors(of_gates: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a factor a gate, [4, 1, 1], kept on the device: no call but the first copies them."""
    with torch.inference_mode(False):
        return torch.tensor(of_gates, device=device, dtype=dtype).view(4, 1, 1)


def packed_shapes(
    R: int, H: int, dtype: torch.dtype, P: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what `prepare` makes of R rows, for P directions."""
    block, (operand, parts) = block_h(H), _forward_operand(dtype, H)
    return (R, P, block, _words(dtype, 4)), (P, parts, 4 * block, block * operand.itemsize // 2)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a table: words of two in half precision."""
    return torch.float32 if dtype == torch.float32 else torch.int32


def record_shapes(N: int, T: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the forward keeps: gates, cells and hidden states.

    A sequence has T + 1 rows, the gaps between its tokens. A step goes from one gap to the next, in
    the second direction to the one before: its gates, cells and state stand where it ends, its gate
    gradients where it begins, beside the state that it began with.
    """
    block = block_h(H)
    rows = N * (T + 1)
    return (P, rows, block, 4), (P, rows, block, 2), (P, rows, block)


def prepare(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    of_gates: tuple[float, ...] = _INPUT,
) -> tuple[Tensor, Tensor]:
    """Project the rows of x, [R, D], to gates; return them and the bits of weight_hh for `a + W h`.

    The shapes are `packed_shapes`.
    """
    factors = _factors(of_gates, x.device, torch.float32)
    H = weight_hh.shape[2]
    packed_ih, weight, packed_bias = pack(
        weight_ih, weight_hh, bias, factors, False, *_forward_operand(x.dtype, H)
    )
    columns = packed_ih.flatten(0, 1).T
    table = x @ columns if bias is None else torch.addmm(packed_bias.flatten(), x, columns)
    shape, _ = packed_shapes(x.shape[0], H, x.dtype, len(weight_hh))
    return table.view(table_dtype(x.dtype)).view(shape), weight.view(torch.int16)


def _forward_operand(dtype: torch.dtype, H: int) -> tuple[torch.dtype, int]:
    """Return the dtype of the packed weight's elements and the parts of each.

    Of float32 there are two whatever the precision, where one program has them all: a kernel that
    wants tf32 reads the first.
    """
    return (torch.float16, 2) if dtype == torch.float32 and H <= NARROW else (dtype, 1)


def pack_backward(
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    allow_tf32: bool,
    of_gates: tuple[float, ...] = _GRADIENT,
) -> tuple[Tensor | None, Tensor]:
    """Return weight_ih, if given, for `weight_gradients` and the bits of weight_hh transposed."""
    dtype, H = weight_hh.dtype, weight_hh.shape[2]
    operand, parts = dtype, 1
    if H <= NARROW:
        target = _tiling.target_of(weight_hh.device)
        how = _tiling.arithmetic(dtype, allow_tf32, target)
        tile = _tiling.backward_tile(H, dtype, how, target)
        operand, parts = tile.operand, tile.parts
    factors = _factors(of_gates, weight_hh.device, torch.float32)
    packed_ih, weight, _ = pack(weight_ih, weight_hh, None, factors, True, operand, parts)
    bits = weight.view(torch.int32 if operand == torch.float32 else torch.int16)
    return None if weight_ih is None else packed_ih, bits


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
    if ids is not None and x.shape[0] <= ids.numel():
        return x, ids
    valid = torch.arange(steps, device=x.device) < lengths.unsqueeze(1)
    if ids is None:
        return torch.where(valid.view(-1, 1), x, 0), None
    kept = torch.where(valid, ids, 0).clamp(0, x.shape[0] - 1)
    return F.embedding(kept.view(-1), x), None


def weight_gradients(
    dgates: Tensor,
    states: Tensor,
    x: Tensor,
    ids: Tensor | None,
    lengths: Tensor,
    packed_ih: Tensor | None,
    H: int,
    steps: int,
    of_gates: tuple[float, ...] = _GRADIENT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the kernel's gate gradients into gradients of the weights.

    Args:
        dgates, states: see `record_shapes`; gate gradients are zero where no step was, states are
            2h, and finite.
        x, ids: the rows and ids that the forward projected, as given to the operator.
        lengths: [N].
        packed_ih: of `pack_backward`, or None where the gradient of x is not wanted.
        H: hidden size.
        steps: T.
        of_gates: what a stored gate gradient counts, gate by gate.

    Returns:
        dx (like x, or empty), dweight_ih, dweight_hh, dbias [P, 4H].
    """
    N, P = lengths.shape[0], dgates.shape[0]
    dgates = dgates.flatten(2)
    # halved because the states are 2h
    gates_by_h = torch.bmm(dgates.transpose(1, 2), states)[:, :, :H]
    dweight_hh = _unpack(gates_by_h, H, _halved(of_gates))
    rows, row_ids = token_rows(x, ids, lengths, steps)
    if row_ids is None:
        drows = _at_tokens(dgates.view(P, N, steps + 1, dgates.shape[2]))
    else:
        drows = _sum_by_id(dgates, row_ids, lengths, rows.shape[0])
    dweight_ih = _unpack(torch.bmm(drows.transpose(1, 2), rows.expand(P, -1, -1)), H, of_gates)
    dbias = _unpack(drows.sum(dim=1, dtype=torch.float32).unsqueeze(2), H, of_gates).squeeze(2)
    dx = x.new_empty(0)
    if packed_ih is not None:
        dx = drows[0] @ packed_ih[0]
        if P == 2:
            dx = torch.addmm(dx, drows[1], packed_ih[1])
        if row_ids is None and ids is not None:
            dx = _sum_by_id(dx.unsqueeze(0), ids, lengths, x.shape[0])[0]
    return dx, dweight_ih, dweight_hh, dbias.to(x.dtype)


def _at_tokens(dgates: Tensor) -> Tensor:
    """Return what stands at the gaps before tokens, or after them, [P, N * T, K] by token."""
    ahead = dgates[0, :, :-1].flatten(0, 1).unsqueeze(0)
    if dgates.shape[0] == 1:
        return ahead
    return torch.cat((ahead, dgates[1, :, 1:].flatten(0, 1).unsqueeze(0)))


def _sum_by_id(rows: Tensor, ids: Tensor, lengths: Tensor, R: int) -> Tensor:
    """Add up the rows of the valid tokens of each id, [P, N * T, K] to [P, R, K].

    Rows may stand at gaps too, [P, N * (T + 1), K]. Without atomics: the gradient of torch's
    embedding sorts by id, so sums are repeatable.
    """
    P, none = rows.shape[0], rows.shape[0] * R
    valid = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
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


def _halved(of_gates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(0.5 * factor for factor in of_gates)


def _words(dtype: torch.dtype, values: int) -> int:
    return values if dtype == torch.float32 else values // 2


def _unpack(packed: Tensor, H: int, of_gates: tuple[float, ...]) -> Tensor:
    """Return [P, block * 4, K] gate gradients as [P, 4H, K] in PyTorch's order, true to size."""
    P, _, K = packed.shape
    gates = packed.view(P, -1, 4, K)[:, :H].transpose(1, 2)
    unpacked = gates.new_empty(gates.shape)
    torch.mul(gates, _factors(of_gates, packed.device, packed.dtype), out=unpacked)
    return unpacked.view(P, 4 * H, K)
