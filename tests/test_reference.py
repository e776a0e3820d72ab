"""The definition, against nn.LSTM and against finite differences, in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastsiam.engine import reference
from fastsiam.engine.similarity import MANHATTAN

LENGTHS = [7, 1, 0, 4, 6]


def draw(B=5, T=7, D=3, H=4, bias=True):
    torch.manual_seed(0)
    lstm = nn.LSTM(D, H, bias=bias, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    return lstm, x, torch.randn(B, T, dtype=torch.float64)


def encode(x, lengths, mask, lstm, pooling="last", reverse=False):
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 if lstm.bias else None
    weights = lstm.weight_ih_l0, lstm.weight_hh_l0, bias
    states = reference.lstm_states(x, lengths, *weights, reverse)
    pooling = pooling if mask is None else "mask"
    return reference.pool(states, lengths, pooling, mask, reverse)


def vectors_of(lstm, x, lengths, mask, pooling, reverse):
    """The same vectors from nn.LSTM, row by row without padding, turned round to run backwards."""
    rows = []
    for row, steps, weights in zip(x, lengths, mask, strict=True):
        if steps == 0:
            rows.append(row.new_zeros(lstm.hidden_size))
            continue
        read = row[:steps].flip(0) if reverse else row[:steps]
        y = lstm(read.unsqueeze(0))[0][0]
        if pooling == "mask":
            rows.append((weights[:steps].flip(0) if reverse else weights[:steps]) @ y)
        else:
            rows.append(y[-1] if pooling == "last" else y.max(dim=0).values)
    return torch.stack(rows)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("pooling", ["last", "mask", "max"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_nn_lstm(bias, pooling, reverse):
    lstm, x, mask = draw(bias=bias)
    dh = torch.randn(5, 4, dtype=torch.float64)
    weights = mask if pooling == "mask" else None
    actual = encode(x, torch.tensor(LENGTHS), weights, lstm, pooling, reverse)
    expected = vectors_of(lstm, x, LENGTHS, mask, pooling, reverse)
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
    for m in (None, mask):
        assert not encode(x, torch.zeros(5, dtype=torch.int64), m, lstm).any()
    assert not encode(x, torch.zeros(5, dtype=torch.int64), None, lstm, "max").any()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_among_equal_maxima_the_first_one_read_has_the_gradient(reverse):
    states = torch.tensor([[[1.0], [2.0], [2.0], [5.0]]]).requires_grad_()
    v = reference.pool(states, torch.tensor([3]), "max", None, reverse)
    assert v.item() == 2
    (gradient,) = torch.autograd.grad(v, states)
    assert gradient.flatten().tolist() == ([0, 0, 1, 0] if reverse else [0, 1, 0, 0])


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("masked", [False, True], ids=["last", "mask"])
def test_gradients(check, masked):
    lstm, x, mask = draw(B=3, T=3, D=2, H=2)
    lengths = torch.tensor([3, 0, 2])
    w = [p.detach().requires_grad_() for p in lstm.parameters()]

    def score(x, weight_ih, weight_hh, bias_ih, bias_hh):
        states = reference.lstm_states(x, lengths, weight_ih, weight_hh, bias_ih + bias_hh)
        h = reference.pool(states, lengths, "mask" if masked else "last", mask)
        # one with itself: 0; the others are apart, so L1 has a derivative
        return torch.exp(-MANHATTAN.distance(h[:2], h[1:])), h

    assert check(score, (x, *w))


def test_distance():
    u = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    v = torch.tensor([[-1.0, 1.0], [0.5, 0.0]])
    assert MANHATTAN.distance(u, v).tolist() == [5.0, 0.0]
