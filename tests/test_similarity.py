"""The similarities: cosine against scipy's, on every backend, and its gradients."""

import numpy as np
import pytest
import torch
from cases import DEVICE
from scipy.spatial.distance import cosine

from fastsiam import SiameseGRU, SiameseLSTM, functional

D, H, B, T = 3, 5, 6, 4


def draw(dtype=torch.float32):
    torch.manual_seed(0)
    left, right = torch.randn(2, B, T, D, device=DEVICE, dtype=dtype)
    return left, right, [4, 1, 3, 2, 4, 0], [2, 4, 1, 3, 4, 0]


def defined(vectors):
    """(1 + cos) / 2 of scipy's cosine; that with a zero vector is 0."""
    u, v = vectors.detach().double().cpu().numpy()
    pairs = zip(u, v, strict=True)
    return torch.tensor(
        [1 - cosine(a, b) / 2 if np.any(a) and np.any(b) else 0.5 for a, b in pairs]
    )


@pytest.mark.parametrize("kind", [SiameseLSTM, SiameseGRU])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "pooling": "mean"}], ids=str)
def test_cosine_against_scipy(backend, kind, options):
    m = kind(D, H, similarity="cosine", scale=7.0, backend=backend, device=DEVICE, **options)
    left, right, *lengths = draw()
    vectors = torch.stack([m.encode(x, n) for x, n in zip((left, right), lengths, strict=True)])
    found = m(left, right, *lengths)
    truth = defined(vectors)
    torch.testing.assert_close(found.double().cpu(), truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(m.log_similarity(left, right, *lengths), found.log())
    assert ((found >= 0) & (found <= 1)).all()


def test_gradients_of_cosine(backend):
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        m = SiameseLSTM(D, H, similarity="cosine", backend=name, device=DEVICE)
        left, right, *lengths = draw()
        left.requires_grad_()
        (m(left, right, *lengths) * torch.arange(1.0, B + 1, device=DEVICE)).sum().backward()
        results.append([left.grad, *(p.grad for p in m.parameters())])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


def test_gradcheck_of_cosine():
    torch.manual_seed(0)
    m = SiameseLSTM(D, H, similarity="cosine", backend="batched", dtype=torch.float64)
    left, right = torch.randn(2, 2, 3, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: m(x, right), left.requires_grad_())


def test_equal_and_opposite_vectors():
    m = SiameseLSTM(D, H, similarity="cosine")
    x = torch.randn(B, T, D)
    assert (m(x, x) <= 1).all()
    torch.testing.assert_close(m(x, x), torch.ones(B))


def test_a_similarity_of_no_such_name():
    with pytest.raises(
        ValueError, match="SiameseLSTM: similarity must be one of manhattan, cosine"
    ):
        SiameseLSTM(D, H, similarity="dot")
    m = SiameseLSTM(D, H)
    weights = functional.Weights(*m.parameters())
    x = torch.randn(B, T, D)
    with pytest.raises(ValueError, match="siamese_similarity: similarity must be one of"):
        functional.siamese_similarity(x, x, weights, similarity="dot")
