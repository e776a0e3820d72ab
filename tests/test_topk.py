"""The nearest rows of a corpus: against every distance sorted, whatever the pieces."""

import os

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fastsiam import search
from fastsiam.engine import similarity as similarity_objects
from fastsiam.engine.similarity import MANHATTAN
from fastsiam.functional import manhattan_similarity, manhattan_topk

DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def grid(Q, M, F, dtype=torch.float32):
    """Make rows of few small integers, whose distances are exact and often equal."""
    made = torch.Generator().manual_seed(Q + M + F)
    sizes = ((Q, F), (M, F))
    return [torch.randint(-2, 3, s, generator=made).to(DEVICE, dtype) for s in sizes]


def sort_all(queries, corpus, k):
    """Return L1 and row numbers from SciPy's distances and NumPy's stable sort."""
    both = (t.double().cpu().numpy() for t in (queries, corpus))
    distance = cdist(*both, "cityblock")
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, axis=1), index


def check(queries, corpus, k, backend, scale=1.0):
    similarity, index = manhattan_topk(queries, corpus, k, scale=scale, backend=backend)
    distance, wanted = sort_all(queries, corpus, k)
    assert similarity.dtype == torch.float32
    assert index.dtype == torch.int64
    np.testing.assert_array_equal(index.cpu().numpy(), wanted)
    np.testing.assert_allclose(similarity.cpu().numpy(), np.exp(-scale * distance), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("Q", "M", "F", "k"),
    [(1, 1, 1, 1), (1, 130, 5, 7), (3, 17, 50, 17), (65, 129, 3, 1), (2, 9, 131, 4), (2, 5, 0, 5)],
)
def test_order_with_ties(fused_backend, Q, M, F, k, dtype):
    check(*grid(Q, M, F, dtype), k, fused_backend, scale=0.25)


def test_float64():
    corpus = torch.tensor([[300.0], [301 + 1e-9], [301], [2.0]], dtype=torch.float64, device=DEVICE)
    # the second and third row differ in float64 alone, so the smaller number comes first
    similarity, index = manhattan_topk(torch.zeros_like(corpus[:1]), corpus, 4, scale=1e-3)
    assert index.tolist() == [[3, 0, 1, 2]]
    assert similarity.dtype == torch.float32


@pytest.mark.parametrize(("backend", "F"), [("torch", 50), ("torch", 200), ("triton", 5)])
def test_pieces_change_no_bit(backend, F, monkeypatch, request):
    if backend == "triton":
        request.getfixturevalue("triton")
    made = torch.Generator().manual_seed(F)
    queries, corpus = (torch.randn(n, F, generator=made).to(DEVICE) for n in (5, 101))
    corpus[50:] = corpus[:51].clone()
    whole = manhattan_topk(queries, corpus, 9, scale=0.1, backend=backend)
    monkeypatch.setattr(search, "LIMITS", {})
    # of the wide rows four at once
    monkeypatch.setattr(similarity_objects, "CACHED", 800)
    # pieces of 5 x 37, of 2 x 30, of 2 x 4 where 9 are asked for, and of one query by 17
    for pairs, rows, numbers in (
        (5 * 37, 5, 2**20),
        (60, 2, 2**20),
        (60, 2, 4 * F),
        (17, 1, 2**20),
    ):
        monkeypatch.setattr(search, "LIMITS_ELSEWHERE", (pairs, numbers))
        monkeypatch.setattr(search, "QUERIES", rows)
        pieces = manhattan_topk(queries, corpus, 9, scale=0.1, backend=backend)
        assert torch.equal(pieces[0], whole[0])
        assert torch.equal(pieces[1], whole[1])


def test_real_distances(fused_backend):
    made = torch.Generator().manual_seed(1)
    queries, corpus = (torch.randn(n, 77, generator=made).to(DEVICE) for n in (4, 300))
    similarity, index = manhattan_topk(queries, corpus, 300, scale=0.05, backend=fused_backend)
    distance, wanted = sort_all(queries, corpus, 300)
    found = np.take_along_axis(sort_all(queries, corpus, 300)[0], np.argsort(wanted), axis=1)
    # not one pair of these is as close as the sums of float32 may err
    assert np.diff(distance).min() > 0
    np.testing.assert_allclose(
        np.take_along_axis(found, index.cpu().numpy(), axis=1), distance, rtol=1e-5
    )
    np.testing.assert_allclose(similarity.cpu().numpy(), np.exp(-0.05 * distance), rtol=1e-5)


def test_duplicates_score_one_and_nan_comes_last(fused_backend):
    corpus = torch.tensor([[torch.nan, 0], [torch.inf, 0], [3, 4], [0, 1], [3, 4]], device=DEVICE)
    similarity, index = manhattan_topk(corpus[2:3], corpus, 5, backend=fused_backend)
    assert index.tolist() == [[2, 4, 3, 1, 0]]
    assert similarity[0, :2].tolist() == [1.0, 1.0]
    assert similarity[0, 3] == 0
    assert torch.isnan(similarity[0, 4])


def test_no_queries(fused_backend):
    similarity, index = manhattan_topk(*grid(0, 4, 3), 2, backend=fused_backend)
    assert similarity.shape == index.shape == (0, 2)


def test_strided_rows_and_a_scale_that_trains(fused_backend):
    queries, corpus = (t.T.contiguous().T for t in grid(3, 20, 6))
    check(queries, corpus, 4, fused_backend)
    scale = torch.full((1,), 0.5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    similarity, _ = manhattan_topk(
        queries.requires_grad_(), corpus, 4, scale=scale, backend=fused_backend
    )
    assert similarity.dtype == torch.float32
    assert not similarity.requires_grad
    check(queries.detach(), corpus, 4, fused_backend, scale=0.5)


def test_gradient_comes_from_the_rows_found():
    queries, corpus = grid(3, 20, 6)
    queries.requires_grad_()
    similarity, index = manhattan_topk(queries, corpus, 1)
    again = manhattan_similarity(queries, corpus[index[:, 0]])
    assert torch.equal(again.detach(), similarity[:, 0])
    again.sum().backward()
    assert queries.grad is not None


@pytest.mark.parametrize(
    ("Q", "M", "F", "k"),
    [(300, 3000, 1, 3), (1, 300_000, 1, 3), (40, 9000, 1, 9000), (1, 9000, 1000, 3)],
)
def test_memory_is_bounded(Q, M, F, k, monkeypatch):
    sizes = []

    def pairs(queries, corpus):
        assert corpus.numel() <= 2**22
        distance = torch.cdist(queries, corpus, p=1)
        sizes.append(distance.numel())
        return distance

    rows = torch.arange(float(M)).unsqueeze(1).expand(M, F)
    monkeypatch.setattr(MANHATTAN, "distances", pairs)
    _, index = search.nearest_rows("f", rows[:Q], rows, k, backend="torch")
    assert index[:, 0].tolist() == list(range(Q))
    assert len(sizes) > 1
    assert sum(sizes) == Q * M
    assert max(sizes) <= 2**18


def test_operator_is_registered_as_pytorch_wants(fused_backend):
    queries, corpus = grid(3, 20, 6)
    operator = torch.ops.fastsiam.nearest_rows
    torch.library.opcheck(operator, (queries, corpus, 4, "manhattan", fused_backend == "triton"))
    compiled = torch.compile(manhattan_topk, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        compiled(queries, corpus, 4, backend=fused_backend),
        manhattan_topk(queries, corpus, 4),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be between 1 and the 20 rows of corpus, got 0"),
        ({"k": 21}, "k must be between 1 and the 20 rows of corpus, got 21"),
        ({"queries": torch.zeros(6)}, r"must be \[Q, F\] and \[M, F\], got \[6\] and \[20, 6\]"),
        ({"queries": torch.zeros(3, 5)}, r"got \[3, 5\] and \[20, 6\]"),
        ({"queries": torch.zeros(3, 6).double()}, "one floating-point dtype, got torch.float64"),
        ({"queries": torch.zeros(3, 6, device="meta")}, "one device, got meta"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": torch.ones(2)}, r"scale must have one element, got \[2\]"),
        ({"backend": "lstm"}, "backend must be auto, triton or torch, got 'lstm'"),
        ({"backend": "faiss"}, "backend must be auto, triton or torch, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    arguments = {"queries": torch.zeros(3, 6), "corpus": torch.zeros(20, 6), "k": 2} | change
    with pytest.raises(ValueError, match=f"^manhattan_topk: .*{message}"):
        manhattan_topk(**arguments)


def test_triton_takes_no_float64(triton):
    with pytest.raises(ValueError, match=r"^manhattan_topk: dtype must be .*got torch\.float64"):
        manhattan_topk(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), 1, backend="triton")
