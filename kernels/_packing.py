"""Weights and tables in the kernels' row order and scaling: the only file that knows either.

Scaling. The kernels use sigmoid(x) = (1 + tanh(x / 2)) / 2 and keep 2h instead of h: with the rows
of i, f, o halved and the recurrent weight halved once more, a cell needs no multiplication for it.
Backward, what the kernel stores for a gate is the gradient with respect to its pre-activation times
4 (i, f) or 2 (g, o). All factors are powers of two, so nothing is rounded.

Row order. In a table a unit's four gates stand together, i, f, g, o. The forward weight's rows are
[gate / 2][unit / 8][gate % 2][unit % 8], which makes a tensor-core accumulator hold a unit's four
gates in one thread. docs/kernels.md has the drawing.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.kernels._tiling import block_h

_INPUT = (0.5, 0.5, 1.0, 0.5)  # of a pre-activation, gates i, f, g, o
_GRADIENT = (0.25, 0.25, 0.5, 0.5)  # of a stored gate gradient


@functools.cache
def _factors(of_gates: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a factor a gate, [4, 1, 1], kept on the device: no call but the first copies them."""
    with torch.inference_mode(False):
        return torch.tensor(of_gates, device=device, dtype=dtype).view(4, 1, 1)


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the integer dtype that carries dtype's bits."""
    return torch.int32 if dtype == torch.float32 else torch.int16


def packed_shapes(R: int, H: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `pack_table` of R rows and of `pack_weight_fwd`."""
    block = block_h(H)
    return (R, block, _words(dtype, 4)), (4 * block, block)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `pack_table`: words of two in half precision."""
    return torch.float32 if dtype == torch.float32 else torch.int32


def record_shapes(N: int, T: int, H: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the forward keeps: gates, cells and hidden states."""
    block = block_h(H)
    rows = N * (T + 1)
    return (rows, block, 4), (rows, block, 2), (rows, block)


def pack_table(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Project the rows of x, [R, D], to gates of a cell's order: see `packed_shapes`."""
    weight = _pack_input(weight_ih, _INPUT).flatten(0, 1)
    if bias is None:
        table = x @ weight.T
    else:
        packed_bias = _pack_input(bias.unsqueeze(1), _INPUT).flatten()
        table = torch.addmm(packed_bias, x, weight.T)
    shape, _ = packed_shapes(x.shape[0], weight_ih.shape[0] // 4, x.dtype)
    return table.view(table_dtype(x.dtype)).view(shape)


def pack_weight_fwd(weight_hh: Tensor) -> Tensor:
    """Return the bits of weight_hh, [4H, H], as [4 * block, block] for `a + W h`."""
    weight = _pad_recurrent(weight_hh, _INPUT)
    block = weight.shape[1]
    rows = weight.view(2, 2, block // 8, 8, block).permute(0, 2, 1, 3, 4)
    return rows.reshape(4 * block, block).view(bits_dtype(weight_hh.dtype))


def pack_weight_bwd(weight_hh: Tensor) -> Tensor:
    """Return the bits of weight_hh transposed, [2, block, 2 * block]: columns i, f and g, o."""
    weight = _pad_recurrent(weight_hh, _GRADIENT)
    block = weight.shape[1]
    halves = weight.view(2, 2, block, block).permute(0, 3, 1, 2).contiguous()
    return halves.view(2, block, 2 * block).view(bits_dtype(weight_hh.dtype))


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
    weight_ih: Tensor,
    weight_hh: Tensor,
    steps: int,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the kernel's gate gradients into gradients of the weights.

    Args:
        dgates: [N * (T + 1), block, 4]; zero where no step was.
        states: [N * (T + 1), block]: 2h of the step before; finite.
        x, ids: the rows and ids that the forward projected, as given to the operator.
        lengths: [N].
        weight_ih, weight_hh: [4H, D], [4H, H].
        steps: T.
        need_dx: whether the gradient of x is wanted.

    Returns:
        dx (like x, or empty), dweight_ih, dweight_hh, dbias.
    """
    H, N = weight_hh.shape[1], lengths.shape[0]
    dgates = dgates.flatten(1)
    # halved because the states are 2h
    dweight_hh = _unpack((dgates.T @ states)[:, :H], H, _halved(_GRADIENT))
    rows, row_ids = token_rows(x, ids, lengths, steps)
    if row_ids is None:
        drows = dgates.view(N, steps + 1, dgates.shape[1])[:, :steps].flatten(0, 1)
    else:
        drows = _sum_by_id(dgates, row_ids, lengths, rows.shape[0], spare=1)
    dweight_ih = _unpack(drows.T @ rows, H)
    dbias = _unpack(drows.sum(dim=0, keepdim=True, dtype=torch.float32).T, H).squeeze(1)
    dx = x.new_empty(0)
    if need_dx:
        dx = drows @ _pack_input(weight_ih, _GRADIENT).flatten(0, 1)
        if row_ids is None and ids is not None:
            dx = _sum_by_id(dx, ids, lengths, x.shape[0], spare=0)
    return dx, dweight_ih, dweight_hh, dbias.to(weight_hh.dtype)


def _sum_by_id(rows: Tensor, ids: Tensor, lengths: Tensor, R: int, spare: int) -> Tensor:
    """Add up the rows of the valid tokens of each id, [N * (T + spare), K] to [R, K].

    Without atomics: the gradient of torch's embedding sorts by id, so sums are repeatable.
    """
    steps = ids.shape[1]
    valid = torch.arange(steps, device=ids.device) < lengths.unsqueeze(1)
    # id R stands for "none"
    targets = F.pad(torch.where(valid, ids.clamp(0, R - 1), R), (0, spare), value=R)
    summed: Tensor = torch.ops.aten.embedding_dense_backward(
        rows, targets.view(-1), R + 1, R, False
    )
    return summed[:R]


def _halved(of_gates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(0.5 * factor for factor in of_gates)


def _words(dtype: torch.dtype, values: int) -> int:
    return values if dtype == torch.float32 else values // 2


def _pack_input(weight: Tensor, of_gates: tuple[float, ...]) -> Tensor:
    """Return [4H, D] as [block, 4, D], a unit's gates together, each times its factor."""
    H, D = weight.shape[0] // 4, weight.shape[1]
    packed = weight.new_zeros(block_h(H), 4, D)
    gates_first = packed[:H].transpose(0, 1)
    torch.mul(
        weight.view(4, H, D), _factors(of_gates, weight.device, weight.dtype), out=gates_first
    )
    return packed


def _pad_recurrent(weight: Tensor, of_gates: tuple[float, ...]) -> Tensor:
    """Return [4H, H] as [4, block, block], halved once more because the kernels keep 2h."""
    H = weight.shape[1]
    packed = weight.new_zeros(4, block_h(H), block_h(H))
    factors = _factors(_halved(of_gates), weight.device, weight.dtype)
    torch.mul(weight.view(4, H, H), factors, out=packed[:, :H, :H])
    return packed


def _unpack(packed: Tensor, H: int, of_gates: tuple[float, ...] = _GRADIENT) -> Tensor:
    """Return [block * 4, K] stored gate gradients as [4H, K] in PyTorch's order, true to size."""
    gates = packed.view(-1, 4, packed.shape[1])[:H].transpose(0, 1)
    unpacked = gates.new_empty(gates.shape)
    torch.mul(gates, _factors(of_gates, packed.device, packed.dtype), out=unpacked)
    return unpacked.view(4 * H, -1)
