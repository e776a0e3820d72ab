"""Gradients of weights from records: sums over tokens, however they are split over programs."""

import pytest
import torch
from cases import DEVICE
from tolerance import assert_accurate

FACTORS = (0.25, 0.5, 1.0, 2.0)


def make(N, T, D, H, P, dtype, ids):
    """Return records, NaN wherever no step wrote, and what goes with them."""
    from fastsiam.kernels.tiling import block_h

    block = block_h(H)
    torch.manual_seed(N)
    lengths = torch.randint(0, T + 1, (N,), device=DEVICE)
    lengths[0] = T
    time = torch.arange(T + 1, device=DEVICE)
    ends = lengths.unsqueeze(1)
    # a step goes from its token's gap to the next one, or the other way round
    ways = torch.stack((time < ends, (time > 0) & (time <= ends)))
    began, ended = (gaps[:P].view(P, -1) for gaps in (ways, ways.flip(0)))
    dgates = torch.randn(P, N * (T + 1), block, 4, device=DEVICE).to(dtype)
    states = torch.randn(P, N * (T + 1), block, device=DEVICE).to(dtype)
    dgates[~began] = torch.nan
    states[~ended] = torch.nan
    R = 7 if ids else N * T
    x = torch.randn(R, D, device=DEVICE).to(dtype)
    if ids:
        ids = torch.randint(R, (N, T), device=DEVICE)
        ids[time[:T] >= ends] = -(10**9)
    else:
        ids = None
        x[(time[:T] >= ends).view(-1)] = torch.nan
    return dgates, states, x, ids, lengths


def define(dgates, states, x, ids, lengths, H, gates, dtype):
    """Add up token by token."""
    P, N = len(dgates), len(lengths)
    T = dgates.shape[1] // N - 1
    D = x.shape[1]
    by_x, by_h, by_1 = (
        torch.zeros(P, 4, H, width, dtype=dtype, device=DEVICE) for width in (D, H, 1)
    )
    factors = torch.tensor(FACTORS, dtype=dtype, device=DEVICE).view(4, 1, 1)
    for p in range(P):
        for n, length in enumerate(lengths.tolist()):
            for t in range(length):
                gap = n * (T + 1) + t + p
                row = n * T + t if ids is None else int(ids[n, t])
                d = factors * dgates[p, gap, :H].to(dtype).T.unsqueeze(2)
                begun = t < length - 1 if p else t > 0
                by_x[p] += d * x[row].to(dtype)
                by_1[p] += d
                if begun:
                    by_h[p] += d * states[p, gap, :H].to(dtype) / 2
    of_input, of_state = ([0, 1, 2], [0, 1, 3]) if gates == 3 else ([0, 1, 2, 3],) * 2
    return (
        by_x[:, of_input].flatten(1, 2),
        by_h[:, of_state].flatten(1, 2),
        by_1.flatten(1, 3),
    )


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize(
    ("N", "T", "D", "H", "P", "dtype", "ids", "gates"),
    [
        (5, 19, 3, 3, 1, torch.float32, True, 4),
        (1, 9, 64, 33, 2, torch.float32, False, 4),
        (9, 3, 65, 50, 1, torch.bfloat16, True, 4),
        (6, 8, 5, 65, 2, torch.float16, True, 3),
        (4, 1, 1, 16, 1, torch.float32, False, 3),
    ],
    ids=str,
)
def test_sums_over_tokens(triton, monkeypatch, N, T, D, H, P, dtype, ids, gates, parts):
    from fastsiam.kernels import tiling
    from fastsiam.kernels.weight_gradients import products_over_tokens

    monkeypatch.setattr(tiling, "parts_of_tokens", lambda *_: parts)
    given = make(N, T, D, H, P, dtype, ids)
    factors = torch.tensor(FACTORS, device=DEVICE)
    found = products_over_tokens(*given, T, factors, (gates, H), False)
    again = products_over_tokens(*given, T, factors, (gates, H), False)
    gold = define(*given, H, gates, torch.float64)
    rounded = [t.to(dtype) for t in gold]
    names = ("dweight_ih", "dweight_hh", "dbias")
    for name, a, b, same_dtype, truth in zip(names, found, again, rounded, gold, strict=True):
        assert a.dtype == dtype
        assert_accurate(name, a, same_dtype, truth, torch.finfo(dtype).eps)
        assert torch.equal(a, b), name
