"""The compiled step loops against those of tensor operations, in float64."""

import threading

import pytest
import torch

from fastsiam import SiameseLSTM, _steps, batched, batched_lstm, compiled, functional

COMPILED = not _steps.obstacle(torch.device("cpu"), torch.float32, H=1)
needs_library = pytest.mark.skipif(not COMPILED, reason="the step loops are not compiled here")

# around a tile's sequences, a product's rows and columns, and a vector's floats
SIZES = [(1, 1), (2, 3), (5, 8), (7, 17), (24, 50), (25, 16), (49, 33), (130, 5)]
WORK = [("last", False), ("last", True), ("max", False), ("mask", False), ("mask", True)]


def draw(cell, N, H, P, T=6, D=4, V=11):
    """Return ids, lengths (some 0), a mask and stacked weights, in float64."""
    torch.manual_seed(N + H)
    gates = 4 if cell == "lstm" else 3
    lengths = torch.randint(T + 1, (N,))
    lengths[0] = T
    mask = torch.rand(N, T, dtype=torch.float64)
    size = H**-0.5
    weights = [
        size * torch.randn(P, *shape).double()
        for shape in ((gates * H, D), (gates * H, H), (4 * H,))
    ]
    return torch.randn(V, D).double(), torch.randint(V, (N, T)), lengths, mask, weights


def run(cell, case, pooling, keep_outputs, dtype):
    """Return all that a forward, a scoring and a backward give."""
    x, ids, lengths, mask, weights = case
    x, mask = x.to(dtype), mask.to(dtype) if pooling == "mask" else None
    weight_ih, weight_hh, bias = (w.to(dtype) for w in weights)
    T = ids.shape[1]
    inputs = (x, ids, lengths, mask, weight_ih, weight_hh)
    *found, saved = batched.forward(*inputs, bias, T, pooling, keep_outputs, cell)
    table, weight = batched.prepare(x, weight_ih, weight_hh, bias, cell)
    scored = batched.infer(table, weight, ids, lengths, mask, T, pooling, keep_outputs, cell)
    torch.manual_seed(0)
    gradients = [torch.randn(some.shape, dtype=torch.float64).to(dtype) for some in found]
    if not keep_outputs:
        gradients[1] = None
    grads = [batched.backward(*gradients, *inputs, saved, T, pooling, True, cell) for _ in range(2)]
    # a backward leaves what was saved for another one
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    return [*found, *scored, saved.peaks, *grads[0]]


@needs_library
@pytest.mark.parametrize(("pooling", "keep_outputs"), WORK)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("N", "H"), SIZES)
def test_against_tensor_operations(cell, N, H, pooling, keep_outputs):
    case = draw(cell, N, H, P=1 + N % 2)
    truth = run(cell, case, pooling, keep_outputs, torch.float64)
    found = run(cell, case, pooling, keep_outputs, torch.float32)
    for ours, theirs in zip(found, truth, strict=True):
        if theirs.dtype == torch.float64:
            largest = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6 * max(1, largest))
        elif theirs.numel():
            # a maximum's step may be another one where two states differ in rounding alone
            assert (ours != theirs).double().mean() < 0.02


@needs_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_threads_change_no_bit(cell):
    """Not of results nor of gradients of weights; and scoring gives the bits of a training."""
    # the backward goes through several blocks of tiles
    x, ids, lengths, _, weights = draw(cell, N=1500, H=50, P=1, T=9)
    assert lengths.sum() > 3 * compiled.BLOCK
    x, weights = x.float(), [w.float() for w in weights]
    inputs = x, ids, lengths, None, *weights[:2]
    how = 9, "last", True, cell
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            prepared = batched.prepare(x, *weights, cell)
            scored, outputs = batched.infer(*prepared, ids, lengths, None, *how)
            vectors, _, saved = batched.forward(*inputs, weights[2], *how)
            grads = batched.backward(vectors, None, *inputs, saved, *how[:2], False, cell)
            assert torch.equal(scored, vectors)
            found.append([*prepared, scored, outputs, *grads])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_thread_that_begins_meanwhile_has_all_of_torchs_threads(monkeypatch, name):
    """A thread takes torch's number when it begins, and keeps it."""
    seen, inner = [], getattr(batched_lstm, name)

    def watched(*args):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return inner(*args)

    monkeypatch.setattr(batched_lstm, name, watched)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SiameseLSTM(5, 6, dtype=torch.float64, backend="torch")(x, x).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def one_step(table):
    """Run an LSTM's first step over a table, [N, 4H]; return vectors [N, H] and what is saved."""
    N, H = table.shape[0], table.shape[1] // 4
    batch = _steps.batch(torch.ones(N, dtype=torch.long), 1, H)
    vectors = torch.empty(N, H)
    saved = torch.empty(N, 4 * H), torch.empty(N, H), torch.empty(N, H)
    panels = _steps.panels(torch.zeros(H, 4 * H))
    inputs = table, None, None, "last", None
    _steps.forward("lstm", batch, 0, panels, *inputs, vectors, None, None, saved)
    return vectors, saved


@needs_library
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, 20.0, 87.5, 90.0, 1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("H", [3, 9])  # fewer than a vector, and more
def test_gates_of_any_size(value, sign, H):
    """One step from a zero state: h = sigmoid(o) tanh(sigmoid(i) tanh(g))."""
    vectors, _ = one_step(torch.full((1, 4 * H), sign * value))
    # inside, the gates of g are doubled
    gate = torch.tensor(sign * value).double()
    o = i = torch.sigmoid(gate)
    truth = o * torch.tanh(i * torch.tanh(gate / 2))
    torch.testing.assert_close(
        vectors.double(), truth.expand(1, H), rtol=0, atol=1.5e-7, equal_nan=True
    )


@needs_library
@pytest.mark.parametrize("H", [1, 8])  # single numbers, and a vector
def test_sigmoid_is_right_to_rounding(H):
    """An input gate, seen in the gates that a forward leaves."""
    N = 20008 // H
    x = torch.linspace(-90, 90, N * 4 * H).view(N, 4 * H)
    _, (gates, _, _) = one_step(x)
    error = gates.double()[:, : 2 * H] - torch.sigmoid(x.double())[:, : 2 * H]
    assert error.abs().max() < 1e-7


@needs_library
def test_a_nan_stays_in_its_sequence():
    case = draw("lstm", N=30, H=8, P=1)
    x, ids, lengths, _, weights = case
    x, lengths = x.float(), torch.full_like(lengths, 6)
    x[3] = torch.nan
    table, weight = batched.prepare(x, *(w.float() for w in weights), "lstm")
    for pooling in ("last", "max"):
        vectors, _ = batched.infer(table, weight, ids, lengths, None, 6, pooling, False, "lstm")
        assert torch.equal(vectors.isnan().any(dim=1), (ids == 3).any(dim=1))
        assert torch.equal(vectors.isnan().any(dim=1), vectors.isnan().all(dim=1))


def test_explain_says_whether(monkeypatch):
    double = SiameseLSTM(3, 2, backend="torch", dtype=torch.float64)
    assert double.explain("cpu").endswith(
        "step loops not compiled: they take float32, and the states are float64)"
    )
    large = SiameseLSTM(3, 513, backend="torch")
    assert large.explain("cpu").endswith("not compiled: they take H up to 512, and it is 513)")
    if COMPILED:
        half = SiameseLSTM(3, 2, backend="torch", dtype=torch.bfloat16)
        assert half.explain("cpu").endswith("bfloat16 on cpu, step loops compiled)")
    monkeypatch.setattr(_steps, "_WHY_NOT", "left out")
    single = SiameseLSTM(3, 2, backend="torch")
    assert single.explain("cpu").endswith("step loops not compiled: left out)")


LENGTHS = [[0], [0, 0, 0], [3, 0, 7, 7, 1, -2, 9], [5] * 2050, []]


@needs_library
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_order_of_a_batch(lengths, p):
    """Longest first, equal ones as they came; packed rows are tiles, and steps in each."""
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch = _steps.batch(lengths, 7, H=1)
    capped = lengths.clamp(0, 7).tolist()
    assert batch.lengths.tolist() == capped
    order = sorted(range(len(capped)), key=lambda n: -capped[n])
    assert batch.order.tolist() == order
    tokens, starts = [], [0]
    for first in range(0, len(order), batch.tile):
        for step in range(7):
            running = [n for n in order[first : first + batch.tile] if step < capped[n]]
            tokens += [n * 7 + (capped[n] - 1 - step if p else step) for n in running]
        starts.append(len(tokens))
    assert batch.starts.tolist() == starts
    ids = torch.randint(5, (len(capped), 7))
    words, places = _steps.distinct(batch, ids, 5)
    positions, rows = _steps.pack(batch, p, ids, places)
    assert positions.tolist() == tokens
    read = ids.flatten()[tokens]
    assert torch.equal(words, read.unique())
    assert torch.equal(words[rows], read)
    assert _steps.pack(batch, p, None, None)[0].tolist() == tokens


BUILDS = sorted(_steps._FOLDER.glob("_compiled_steps*"))


@needs_library
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("N", "H"), [(3, 3), (5, 9), (25, 16), (100, 50)])
def test_builds_for_other_processors(monkeypatch, build, cell, N, H):
    """They give the same bits."""
    if "avx512" in build.name and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor cannot run it")
    case = draw(cell, N, H, P=2)
    expected = run(cell, case, "max", True, torch.float32)
    library, why_not = _steps._open(build)
    assert not why_not
    monkeypatch.setattr(_steps, "_LIBRARY", library)
    found = run(cell, case, "max", True, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_library
def test_ids_out_of_the_table():
    """They would be read from anywhere; only an unchecked call brings them."""
    x, ids, lengths, _, weights = draw("lstm", N=3, H=5, P=1)
    x, weights = x.float(), [w.float() for w in weights]
    table, weight = batched.prepare(x, *weights, "lstm")
    for bad in (-1, len(x)):
        some = ids.clone()
        some[lengths < 6, -1] = bad  # behind an end nobody reads it
        batched.infer(table, weight, some, lengths, None, 6, "last", False, "lstm")
        some[0, 5] = bad
        with pytest.raises(IndexError, match="an id is not from 0 to 10"):
            batched.infer(table, weight, some, lengths, None, 6, "last", False, "lstm")
        with pytest.raises(IndexError, match="an id is not from 0 to 10"):
            batched.forward(x, some, lengths, None, *weights, 6, "last", False, "lstm")


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("K", "M", "N"), [(0, 3, 4), (1, 1, 1), (70, 7, 17), (129, 50, 200)])
def test_products(monkeypatch, K, M, N, threads):
    """Those with the input's weight, against float64."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(K)
    x, rows = torch.randn(K + 5, M), torch.randint(K + 5, (K,))
    weight, bias = torch.randn(N, M), torch.randn(N + 2)
    projected = _steps.project(x, rows, weight, bias)
    truth = x[rows].double() @ weight.T.double() + bias[:N]
    torch.testing.assert_close(projected[:, :N].double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(projected[:, N:], bias[N:].expand(K, 2))
    assert torch.equal(projected, _steps.project(x[rows], None, weight, bias))

    a = torch.randn(K, N)
    summed = _steps.sum_products(a, x, rows)
    truth = a.T.double() @ x[rows].double()
    torch.testing.assert_close(summed.double(), truth, rtol=1e-5, atol=1e-4)
    assert torch.equal(summed, _steps.sum_products(a, x[rows], None))


@needs_library
@pytest.mark.skipif(len(BUILDS) < 2, reason="there is one build")
def test_the_processor_picks_the_build(monkeypatch):
    for capability, name in (("AVX2", "_compiled_steps"), ("AVX512", "_compiled_steps_avx512")):
        monkeypatch.setattr(_steps.torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(_steps, "_open", lambda file: (file.name, ""))
        assert _steps._load()[0].partition(".")[0] == name


@needs_library
def test_why_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_steps, "VERSION", 0)
    assert _steps._load() == (None, "they are of another version; install fastsiam again")
    monkeypatch.setattr(_steps.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(_steps.platform, "machine", lambda: "x86_64")
    assert _steps._load()[1] == "they need AVX2, and PyTorch names this processor DEFAULT"
    monkeypatch.setattr(_steps.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(_steps, "_FOLDER", tmp_path)
    assert _steps._load()[1].startswith("this installation of fastsiam was made without")
    (tmp_path / "_compiled_steps.abi3.so").write_bytes(b"no library")
    library, why = _steps._load()
    assert library is None
    assert why.startswith("they could not be loaded: ")


def test_prepared_of_another_network():
    """It would be read beyond its end."""
    torch.manual_seed(0)
    table, ids = torch.randn(9, 3), torch.randint(9, (2, 4))
    lstm, gru, larger = torch.nn.LSTM(3, 5), torch.nn.GRU(3, 5), torch.nn.LSTM(3, 7)
    weights = {
        name: functional.Weights(*(p.detach() for p in network.parameters()))
        for name, network in {"lstm": lstm, "gru": gru, "larger": larger}.items()
    }
    for other, cell in (("gru", "gru"), ("larger", "lstm")):
        prepared = functional.prepare(weights[other], table, "torch", cell=cell)
        with pytest.raises(ValueError, match=r"siamese_encode: prepared must be .* got \[1, "):
            functional.siamese_encode(
                ids, weights["lstm"], embedding=table, backend="torch", prepared=prepared
            )


@needs_library
def test_word_vectors_with_gaps():
    """Columns of a wider table."""
    wide, ids, lengths, _, weights = draw("lstm", N=30, H=8, P=1, D=5)
    weights = [w.float() for w in weights]
    wide = torch.cat((wide, wide), dim=1).float()
    inputs = ids, lengths, None, *weights[:2]
    how = 6, "last", False, "lstm"
    found = []
    for x in (wide[:, :5], wide[:, :5].contiguous()):
        vectors, _, saved = batched.forward(x, *inputs, weights[2], *how)
        grads = batched.backward(vectors, None, x, *inputs, saved, *how[:2], True, "lstm")
        found.append([*batched.prepare(x, *weights, "lstm"), vectors, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([0], []),
        ([0, 0, 0], []),
        ([0, 5, 5], [5]),
        ([0, 438, 876, 4380, 4672], [4380, 4672]),
        ([0, 9000, 9001, 9002, 9003], [9000, 9003]),
        ([*range(0, 4800, 240)], [2400, 4560]),
    ],
)
def test_blocks_of_a_backward(starts, ends):
    """Whole tiles in equal parts, and each token once."""
    tiles = list(compiled._blocks(starts))
    assert tiles == sorted(set(tiles))
    assert [starts[tile] for tile in tiles] == [0, *ends]


@needs_library
def test_a_build_that_does_not_load_leaves_the_other(monkeypatch, tmp_path):
    name = f"_compiled_steps{_steps.EXTENSION_SUFFIXES[-1]}"
    monkeypatch.setattr(_steps, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "made without a C++ compiler" in _steps._load()[1]
    (tmp_path / name.replace("steps", "steps_avx512")).write_bytes(b"")
    assert "could not be loaded" in _steps._load()[1]
    plain = next(build for build in BUILDS if "avx512" not in build.name)
    (tmp_path / name).write_bytes(plain.read_bytes())
    assert _steps._load()[1] == ""
