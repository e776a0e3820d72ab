"""Weights of the TensorFlow and Theano programs, against their cells written out in numpy."""

import numpy as np
import pytest
import torch

from fastsiam.convert import from_tensorflow, from_theano
from fastsiam.modules import SiameseLSTM

D, H, T = 4, 3, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tensorflow_cell(x, kernel, bias, forget_bias):
    h = c = np.zeros(H)
    for step in x:
        i, j, f, o = np.split(np.concatenate([step, h]) @ kernel + bias, 4)
        c = c * sigmoid(f + forget_bias) + sigmoid(i) * np.tanh(j)
        h = np.tanh(c) * sigmoid(o)
    return h


def theano_cell(x, W, U, b):
    h = c = np.zeros(H)
    for step in x:
        i, f, o, g = np.split(W @ step + U @ h + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h


def last_state(state, x):
    lstm = SiameseLSTM(D, H, dtype=torch.float64)
    lstm.load_state_dict(state)
    return lstm.encode(torch.tensor(x)[None])[0].detach()


@pytest.mark.parametrize("forget_bias", [1.0, 2.5])
def test_tensorflow(forget_bias):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(T, D)), rng.normal(size=(D + H, 4 * H)), rng.normal(size=12)
    state = from_tensorflow(torch.tensor(kernel), torch.tensor(bias), forget_bias)
    expected = tensorflow_cell(x, kernel, bias, forget_bias)
    np.testing.assert_allclose(last_state(state, x), expected, rtol=1e-12)


def test_theano():
    rng = np.random.default_rng(1)
    x, W, U = rng.normal(size=(T, D)), rng.normal(size=(12, D)), rng.normal(size=(12, H))
    b = rng.normal(size=12)
    state = from_theano(*map(torch.tensor, (W, U, b)))
    np.testing.assert_allclose(last_state(state, x), theano_cell(x, W, U, b), rtol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "bias"), [((7, 12), (11,)), ((7, 13), (13,)), ((3, 12), (12,)), ((12,), (12,))]
)
def test_tensorflow_refuses(kernel, bias):
    with pytest.raises(ValueError, match=r"kernel must be \[D \+ H, 4H\] and bias \[4H\], got"):
        from_tensorflow(torch.zeros(kernel), torch.zeros(bias))


@pytest.mark.parametrize(
    ("W", "U", "b"),
    [((12, 4), (12, 4), (12,)), ((11, 4), (12, 3), (12,)), ((12, 4), (12, 3), (3,))],
)
def test_theano_refuses(W, U, b):
    with pytest.raises(ValueError, match=r"W must be \[4H, D\], U \[4H, H\] and b \[4H\], got"):
        from_theano(torch.zeros(W), torch.zeros(U), torch.zeros(b))
