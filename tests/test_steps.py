"""The compiled step loops against those of tensor operations, in float64."""

import threading

import pytest
import torch

from fastsiam import SiameseLSTM, _steps, batched, batched_lstm, compiled, functional
from fastsiam._packed import BLOCK

COMPILED = not _steps.obstacle(torch.device("cpu"), torch.float32, H=1)
needs_library = pytest.mark.skipif(not COMPILED, reason="the step loops are not compiled here")

# around a tile's sequences, a product's rows and columns, and a vector's floats; the last has
# several blocks of tiles
SIZES = [(1, 1), (2, 3), (5, 8), (7, 17), (24, 50), (25, 16), (49, 33), (130, 5), (1500, 2)]
WORK = [("last", False), ("last", True), ("max", False), ("mask", False), ("mask", True)]


def draw(cell, N, H, P, T=6, D=4):
    """Return x, ids, lengths (some 0), a mask and stacked weights, in float64."""
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
    # few tokens of a large table are found in another way
    V = 11 if N > 2 else 1000
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
    """Not of results nor of gradients; and scoring gives the bits of a training."""
    # the backward goes through several blocks of tiles
    x, ids, lengths, _, weights = draw(cell, N=1500, H=50, P=1, T=9)
    assert lengths.sum() > 3 * BLOCK
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
            grads = batched.backward(vectors, None, *inputs, saved, *how[:2], True, cell)
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


def one_step(x, weight_ih, bias=None):
    """Run an LSTM's first step over x, [N, D]; return vectors [N, H] and gates [N, 4H]."""
    G, lengths = weight_ih.shape[0], torch.ones(len(x), dtype=torch.long)
    weights = weight_ih[None], x.new_zeros(1, G, G // 4), None if bias is None else bias[None]
    vectors, _, saved = compiled.forward(
        x, None, lengths, None, *weights, 1, "last", False, "lstm", True
    )
    return vectors, saved.gates[0]


@needs_library
@pytest.mark.parametrize(
    "value", [0.0, 1e-30, 0.7, 20.0, 43.6, 87.5, 90.0, 1e4, torch.inf, torch.nan]
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("H", [3, 9, 17])  # fewer than a vector, and more
def test_gates_of_any_size(value, sign, H):
    """One step from a zero state: h = sigmoid(o) tanh(sigmoid(i) tanh(g))."""
    bias = torch.full((4 * H,), sign * value)
    vectors, _ = one_step(torch.zeros(1, 0), torch.zeros(4 * H, 0), bias)
    gate = torch.tensor(sign * value).double()
    o = i = torch.sigmoid(gate)
    truth = o * torch.tanh(i * torch.tanh(gate))
    torch.testing.assert_close(
        vectors.double(), truth.expand(1, H), rtol=0, atol=1.5e-7, equal_nan=True
    )


@needs_library
@pytest.mark.parametrize("H", [1, 16])  # single numbers, and a vector
def test_gates_are_right_to_rounding(H):
    """Those that a forward leaves, i, f, g and o."""
    x = torch.linspace(-90, 90, 20032).view(-1, 4 * H)
    gates = one_step(x, torch.eye(4 * H))[1].double().view(-1, 4, H)
    x = x.double().view(-1, 4, H)
    error = (gates - torch.sigmoid(x)).abs()
    assert error[:, [0, 1, 3]].max() < 1e-7
    assert (gates - torch.tanh(x))[:, 2].abs().max() < 2e-7


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


@needs_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_that_nobody_checked(cell):
    """They count as the nearest ones that there are."""
    x, ids, _, _, weights = draw(cell, N=7, H=5, P=2)
    found = [
        run(cell, (x, ids, torch.tensor(lengths), None, weights), "max", True, torch.float32)
        for lengths in ([3, 0, 6, 7, 1, -2, 9], [3, 0, 6, 6, 1, 0, 6])
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_library
def test_no_sequences():
    x, ids, lengths, _, weights = draw("lstm", N=3, H=5, P=1)
    for rows, some in ((x, ids[:0]), (x[:0], ids[:0])):
        found = run("lstm", (rows, some, lengths[:0], None, weights), "max", True, torch.float32)
        assert all(not each.any() for each in found)


@needs_library
def test_no_memory():
    lengths, vectors = torch.ones(1, dtype=torch.long), torch.empty(1, 2)
    with pytest.raises(MemoryError, match=r"1 sequences of up to \d+ steps"):
        _steps.run("forward", "lstm", 1, 1, 2**60, 2, 1, 1, lengths=lengths, vectors=vectors)


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
        with pytest.raises(ValueError, match=r"siamese_encode: prepared must be .* with \[1, "):
            functional.siamese_encode(
                ids, weights["lstm"], embedding=table, backend="torch", prepared=prepared
            )


@needs_library
@pytest.mark.parametrize("own_rows", [False, True])
def test_word_vectors_with_gaps(own_rows):
    """Columns of a wider table, with ids (wild ones behind an end), or of wider rows."""
    wide, ids, lengths, _, weights = draw("lstm", N=30, H=8, P=1, D=5)
    weights = [w.float() for w in weights]
    ids[lengths < 6, -1] = 99
    if own_rows:
        wide, ids = wide[torch.randint(11, (ids.numel(),))], None
    wide = torch.cat((wide, wide), dim=1).float()
    inputs = ids, lengths, None, *weights[:2]
    how = 6, "last", False, "lstm"
    found = []
    for x in (wide[:, :5], wide[:, :5].contiguous()):
        vectors, _, saved = batched.forward(x, *inputs, weights[2], *how)
        grads = batched.backward(vectors, None, x, *inputs, saved, *how[:2], True, "lstm")
        found.append([*batched.prepare(x, *weights, "lstm"), vectors, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


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
