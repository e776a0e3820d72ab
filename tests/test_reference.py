"""The definition, against nn.LSTM and against finite differences, in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastsiam import reference

LENGTHS = [7, 1, 0, 4, 6]


def draw(B=5, T=7, D=3, H=4, bias=True):
    torch.manual_seed(0)
    lstm = nn.LSTM(D, H, bias=bias, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    return lstm, x, torch.randn(B, T, dtype=torch.float64)


def encode(x, lengths, mask, lstm):
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 if lstm.bias else None
    return reference.encode(x, lengths, mask, lstm.weight_ih_l0, lstm.weight_hh_l0, bias)


def vectors_of(lstm, x, lengths, mask):
    """The same vectors from nn.LSTM, whose step t sees nothing behind it: row by row."""
    y = lstm(x)[0]
    rows = []
    for row, steps, weights in zip(y, lengths, mask, strict=True):
        if mask[0] is None:
            rows.append(row[steps - 1] if steps else row[0] * 0)
        else:
            rows.append(weights[:steps] @ row[:steps])
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True], ids=["last", "mask"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_nn_lstm(bias, masked):
    lstm, x, mask = draw(bias=bias)
    dh = torch.randn(5, 4, dtype=torch.float64)
    actual = encode(x, torch.tensor(LENGTHS), mask if masked else None, lstm)
    expected = vectors_of(lstm, x, LENGTHS, mask if masked else [None] * 5)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    leaves = (x, *lstm.parameters())
    gradients = [torch.autograd.grad(h, leaves, dh) for h in (actual, expected)]
    for name, one, other in zip(("x", *lstm.state_dict()), *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=f"gradient of {name}")


@pytest.mark.parametrize("masked", [False, True], ids=["last", "mask"])
def test_padding_is_never_read(masked):
    lstm, x, mask = draw()
    lengths = torch.tensor(LENGTHS)
    behind = torch.arange(7) >= lengths.unsqueeze(1)
    dh = torch.randn(5, 4, dtype=torch.float64)
    results = []
    for fill in (0.0, torch.nan):
        leaf = x.detach().masked_fill(behind.unsqueeze(2), fill).requires_grad_()
        h = encode(leaf, lengths, mask.masked_fill(behind, fill) if masked else None, lstm)
        results.append((h, *torch.autograd.grad(h, (leaf, *lstm.parameters()), dh)))
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)
    assert not results[0][1][behind].any()


def test_no_steps_is_the_zero_vector():
    lstm, x, mask = draw()
    for steps, weights in ((x, mask), (x[:, :0], mask[:, :0])):
        for m in (None, weights):
            assert not encode(steps, torch.zeros(5, dtype=torch.int64), m, lstm).any()


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("masked", [False, True], ids=["last", "mask"])
def test_gradients(check, masked):
    lstm, x, mask = draw(B=3, T=3, D=2, H=2)
    lengths = torch.tensor([3, 0, 2])
    w = [p.detach().requires_grad_() for p in lstm.parameters()]

    def score(x, weight_ih, weight_hh, bias_ih, bias_hh):
        m = mask if masked else None
        h = reference.encode(x, lengths, m, weight_ih, weight_hh, bias_ih + bias_hh)
        # one with itself: 0; the others are apart, so L1 has a derivative
        return torch.exp(-reference.manhattan_distance(h[:2], h[1:])), h

    assert check(score, (x, *w))


def test_distance():
    u = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    v = torch.tensor([[-1.0, 1.0], [0.5, 0.0]])
    assert reference.manhattan_distance(u, v).tolist() == [5.0, 0.0]
